"""Stage 2: reinforcement of the reasoning and the embedding together, by GRPO (arXiv 2510.07048, after 2402.03300).

A batch: rollouts of each query, their rewards in a corpus that is re-encoded where training touches it, and one forward
pass of the trained model that gives both the log-probabilities of what was sampled and the differentiable embedding at
the embed token. The reference is the stage 1 policy: merged into the base, so it is the model with its adapter off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search_r3.data.dev_pools import dev_pool
from search_r3.environment.live_corpus import DTYPES, LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.replicated_corpus import ReplicatedCorpus
from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.environment.sharded_corpus import ShardedCorpus
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.resolve import resolve
from search_r3.model.searchr3 import SearchR3
from search_r3.prompts import render
from search_r3.training.config import load_config, to_dict
from search_r3.training.distributed import collectives
from search_r3.training.distributed.sharding import start_processes
from search_r3.training.grpo.collector import (
    IGNORE_INDEX,
    RolloutBatch,
    RolloutCollector,
    encode_rows,
    is_due,
    rank_of_positive,
)
from search_r3.training.grpo.dataset import Query, QueryOrder, RLDataset, load_rl_dataset
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.live_validation import live_figures, staleness_figures
from search_r3.training.grpo.policy_gradient import grpo_loss, padded, token_log_probs
from search_r3.training.grpo.rollout import Rollouts, TorchRollouts, VLLMRollouts
from search_r3.training.loop import run_training
from search_r3.training.lora.concatenation import ConcatenatedAdapter
from search_r3.training.lora.live_encoder import LiveEncoder
from search_r3.training.lora.policy import Policy, Rows, add_lora
from search_r3.training.losses import info_nce
from search_r3.training.sft.validation import dev_figures
from search_r3.training.training_log import truncate_log

PART = "rollouts"
ROLLOUTS_FILE = "rollouts.jsonl"
FORMAT = 1
ENCODE_BLOCK = 2048
"""Documents that are encoded between two lines of progress, the first time."""


class GRPOTask:
    """Stage 2 as the loop sees it.

    Args:
        config: the recipe.
        checkpoint: the stage 1 adapter merged into its base, in float32, without a new adapter yet.
        first: the stage 1 adapter's folder; what is saved has its weights in it.
        dataset: see `load_rl_dataset`.
        engine: who samples; by the recipe if None.
    """

    def __init__(
        self,
        config: GRPOConfig,
        checkpoint: Checkpoint,
        first: Path,
        dataset: RLDataset,
        engine: Rollouts | None = None,
    ) -> None:
        if config.staleness_eval_every and not dataset.held_out:
            raise InputError(
                "staleness_eval_every needs held-out queries: set hold_out_modulus in a query set, or it "
                "to 0"
            )
        self.config, self.checkpoint, self.dataset = config, checkpoint, dataset
        self.rank, self.processes = collectives.rank(), collectives.world_size()
        if config.queries_per_step < self.processes:
            raise InputError(
                f"queries_per_step is {config.queries_per_step}, too few for {self.processes} processes: the batch is "
                "shared out between them"
            )
        model = add_lora(checkpoint, config.lora)
        self.policy = Policy(
            model,
            checkpoint.contract.embed_token_id,
            vocabulary=len(checkpoint.tokenizer),
            mini_batch_size=config.mini_batch_size,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.module: nn.Module = self.policy
        self.saved = ConcatenatedAdapter(first, model)
        self.prefix = render(checkpoint.contract.prompts.reasoning, checkpoint.tokenizer, give_answer=False).prefix
        if engine is None:
            torch_engine = TorchRollouts(config.generation_batch_size)
            merged = Path(config.output) / f"merged-{self.rank}"
            engine = torch_engine if config.engine == "torch" else VLLMRollouts(merged)
        self.kept: list[int] | None = None  # of the training queries, those at the ranks that the recipe wants
        self.collector = RolloutCollector(config, dataset.train, dataset.documents, self._order(dataset.train), engine)
        self.environment: RetrievalEnvironment | None = None
        self.round: RolloutBatch | None = None
        self.staleness = {"staleness_recall": 1.0, "staleness_error": 0.0}
        self.step = 0
        self._live = LiveEncoder(self.policy, checkpoint, config.loop.mixed_precision)
        self._everyones_round: list[dict[str, Any]] = []
        self.pools = [
            dev_pool(name, config.data_root, config.dev_queries, config.dev_documents, 0) for name in config.dev
        ]

    def batch(self, step: int) -> RolloutBatch:
        """The round that `step` is part of: sampled and judged at its first step, with the weights of then."""
        config = self.config
        number, position = divmod(step, config.steps_per_generation)
        if position == 0:
            encoder = self._encoder()
            environment = self._environment(encoder)
            if is_due(step, config.staleness_eval_every, config.steps_per_generation):
                self.staleness = staleness_figures(
                    encoder, environment, self._dev_queries(), self.dataset.documents, step, config
                )
            self.round = self.collector.collect(number, step, encoder, environment)
            self._write([{"step": step + 1} | sample for sample in self.round.samples])
        if self.round is None or self.round.number != number:
            raise RuntimeError(f"step {step} is inside of round {number}, which was never sampled")
        self.step = step + 1
        return self.round

    def loss(self, module: nn.Module, batch: RolloutBatch) -> tuple[Tensor, dict[str, float]]:
        """The clipped policy loss with its KL, and the contrastive term, of this step's rollouts.

        One forward pass, through DDP if there is any: a process without anything to learn from passes one rollout
        through it all the same, with a weight of 0, or the others would wait for its gradients for ever.
        """
        config, several = self.config, self.config.steps_per_generation > 1
        position = (self.step - 1) % config.steps_per_generation
        if several and position == 0:
            self._remember(batch)
        chosen, useful = self._minibatch(batch, position)
        rows = Rows(self.prefix, [batch.rows[i] for i in chosen], [batch.answers[i] for i in chosen])
        encoded = module({PART: rows}, with_base=(PART,) if config.beta and not several else ())[PART]
        device = encoded.embedding_BD.device
        sampled_N, known_N = self._sampled(batch, chosen, device)
        new_N, entropy_N = token_log_probs(encoded.logits_TV, sampled_N, config.temperature)
        reference_N = None
        if encoded.base_logits_TV is not None:
            with torch.no_grad():
                reference_N = token_log_probs(encoded.base_logits_TV, sampled_N, config.temperature)[0]
        old_N = new_N.detach()
        if several:
            assert batch.old_N is not None  # `_remember` has seen to it, or the checkpoint
            old_N = old_N if position == 0 else self._of(batch, batch.old_N, chosen).to(device)
            if batch.reference_N is not None:
                reference_N = self._of(batch, batch.reference_N, chosen).to(device)
        lengths = rows.answers
        policy_R = (batch.policy_R[chosen] & useful).to(device)
        mask_RT = padded(known_N.float(), lengths).bool() & policy_R[:, None]
        # Rollouts of dropped groups are no rollouts to the mean; if all are dropped, their mean is 0.
        keep = policy_R.nonzero()[:, 0] if bool(policy_R.any()) else torch.arange(len(chosen), device=device)
        matrices = [None if n is None else padded(n, lengths)[keep] for n in (new_N, old_N, reference_N)]
        assert matrices[0] is not None
        assert matrices[1] is not None
        policy, figures = grpo_loss(
            matrices[0],
            matrices[1],
            matrices[2],
            batch.advantage_R[chosen].to(device)[keep],
            mask_RT[keep],
            loss_type=config.loss_type,
            epsilon_low=config.epsilon_low,
            epsilon_high=config.epsilon_high,
            beta=config.beta,
            max_tokens=config.max_reasoning_tokens + 1,
            unbiased_kl=config.unbiased_kl,
        )
        tokens = int(mask_RT.sum())
        count = tokens if config.loss_type == "dapo" else int(policy_R.sum())
        contrastive, pairs = self._contrastive(encoded.embedding_BD, batch, chosen if useful else [])
        # What each process computes over its own rollouts counts as much as it has of them (of tokens, in the figures).
        policy_share, pair_share, token_share = collectives.rank_weights(count, pairs, tokens, device=device)
        policy, contrastive = policy_share * policy, pair_share * contrastive
        loss = policy + config.contrastive_weight * contrastive
        # Every weight is part of every step: of an untied model, the embed token's own row is not, if nothing is
        # contrasted and so nobody looks at what was fed last.
        loss = loss + 0.0 * (encoded.embedding_BD.sum() + new_N.sum())
        flat_N = torch.cat([mask_RT[line, :length] for line, length in enumerate(lengths)])
        entropy = float(entropy_N[flat_N].mean()) if tokens else 0.0
        return loss, {
            "tokens": float(rows.tokens),
            "policy": policy.item(),
            "contrastive": contrastive.item(),
            "entropy": token_share * entropy,
            "kl_reference": token_share * figures["kl"],
            "clip_low": token_share * figures["clip_low"],
            "clip_high": token_share * figures["clip_high"],
            "ratio": token_share * figures["ratio"],
            "trained_rollouts": float(policy_R.sum()) * self.processes,
            **batch.figures,
            **self.staleness,
        }

    def nothing_to_learn(self, figures: dict[str, float]) -> str | None:
        """See `learning_signal`: whether no query's rollouts earned different rewards."""
        if figures["trained_rollouts"] > 0 and (self.config.zero_variance != "keep" or figures["zero_variance"] < 1):
            return None
        return (
            f"each query's rollouts all earned the same reward (mean {figures['reward']:.3f}); try harder queries "
            "(min_positive_rank), a larger num_generations, a higher temperature or another environment.reward"
        )

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """`devset.dev_figures` of each pool and their mean, and the held-out queries' reward in the live corpus."""
        with torch.autocast(next(module.parameters()).device.type, enabled=False):  # cosines and the graph are float32
            return self._evaluate(step)

    def _evaluate(self, step: int) -> dict[str, float]:
        config, encoder = self.config, self._encoder()
        environment = self._environment(encoder)
        figures: dict[str, float] = {}
        for pool in self.pools:
            found = dev_figures(encoder, pool, config.max_document_tokens, config.max_reasoning_tokens)
            figures |= {f"{pool.name}.{key}": value for key, value in found.items()}
        for mode in ("off", "on"):
            if self.pools:
                figures[f"ndcg@10.{mode}"] = float(np.mean([figures[f"{pool.name}.{mode}"] for pool in self.pools]))
        if queries := self._dev_queries():
            live, records = live_figures(encoder, environment, queries, config)
            figures |= live
            self._write([{"step": step, "dev": True} | record for record in records])
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The environment (vectors, versions, graph) and, inside of a round, every process's part of it."""
        inside = self.step % self.config.steps_per_generation != 0
        return {
            "format": FORMAT,
            "step": self.step,
            "environment": None if self.environment is None else self.environment.state_dict(),
            "staleness": self.staleness,
            "kept": self.kept,
            "batches": self._everyones_round if inside else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave.

        Raises:
            InputError: the state is of another corpus, or of a newer format.
        """
        if state["format"] != FORMAT:
            raise InputError(f"the run's state has format {state['format']}, this version reads {FORMAT}")
        self.step, self.staleness = int(state["step"]), dict(state["staleness"])
        self._train_on(state.get("kept"))
        self._everyones_round = state["batches"]
        self.round = RolloutBatch.from_state(state["batches"][self.rank]) if state["batches"] else None
        if state["environment"] is not None:
            settings, graph = self.config.environment, None
            if state["environment"]["graph"] is not None:  # an empty one, or the unwritten corpus would be linked
                size = len(self.dataset.documents)
                graph = NeighborGraph(size, width=settings.graph_width, links=settings.graph_links)
            self.environment = RetrievalEnvironment(
                self._empty_corpus(), settings, graph=graph, seed=self.config.loop.seed
            )
            self.environment.load_state_dict(state["environment"])
        if self.rank == 0:
            truncate_log(Path(self.config.output) / ROLLOUTS_FILE, self.step)

    def save(self, folder: Path) -> None:
        """Write stage 1's adapter and this one as one adapter of the original base, and its contract."""
        self.saved.model = self.policy.saved_model
        checkpoints.save_adapter(self.saved, self.checkpoint.contract, folder)

    def _minibatch(self, batch: RolloutBatch, position: int) -> tuple[list[int], bool]:
        """This process's rollouts of an optimizer step that have something to teach; one of them and False if none has.

        Which rollouts of all processes make a step does not depend on how they are dealt.
        """
        epoch, part = divmod(position, self.config.num_mini_batches)
        mine = np.arange(len(batch.rows))
        if self.config.num_mini_batches > 1:
            rng = np.random.default_rng([self.config.loop.seed, batch.number, 0, epoch])
            every = np.arange(batch.total or len(batch.rows))
            chosen = np.array_split(rng.permutation(every), self.config.num_mini_batches)[part]
            mine = mine[np.isin(mine if batch.places is None else batch.places, chosen)]
        useful = [int(i) for i in mine if batch.policy_R[i] or batch.target_R[i] != IGNORE_INDEX]
        return useful or [0 if not len(mine) else int(mine[0])], bool(useful)

    def _sampled(self, batch: RolloutBatch, chosen: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens that were sampled at each position, and whether the policy chose them: (N,) both."""
        sampled, known = [], []
        for i in chosen:
            said = batch.rows[i][len(batch.rows[i]) - batch.answers[i] :]
            end = batch.last[i]
            sampled += [*said[:-1], said[-1] if end == IGNORE_INDEX else end]
            known += [True] * (len(said) - 1) + [end != IGNORE_INDEX]
        return torch.tensor(sampled, device=device), torch.tensor(known, device=device)

    def _contrastive(self, embedding_RD: Tensor, batch: RolloutBatch, chosen: Sequence[int]) -> tuple[Tensor, int]:
        """InfoNCE of the rollouts that have a target against the refreshed documents, and how many there are."""
        target_R = batch.target_R[chosen]
        lines = (target_R != IGNORE_INDEX).nonzero()[:, 0]
        if not len(lines):
            return embedding_RD.new_zeros(()), 0
        device = embedding_RD.device
        loss = info_nce(
            embedding_RD[lines.to(device)],
            batch.candidate_CD.to(device),
            target_R[lines].to(device),
            self.config.contrastive_temperature,
            batch.masked_RC[chosen][lines].to(device),
        )
        return loss, len(lines)

    @torch.no_grad()
    def _remember(self, batch: RolloutBatch) -> None:
        """Log-probabilities by the policy that sampled and by the reference, before the first step changes it."""
        old: list[Tensor] = []
        reference: list[Tensor] = []
        size, last = self.config.mini_batch_size, len(batch.rows) - 1
        calls = collectives.all_reduce_max(-(-len(batch.rows) // size), next(self.policy.parameters()).device)
        for start in range(0, calls * size, size):  # every process makes as many calls
            some = list(range(start, min(start + size, last + 1))) or [last]
            rows = Rows(self.prefix, [batch.rows[i] for i in some], [batch.answers[i] for i in some])
            encoded = self.policy({PART: rows}, with_base=(PART,) if self.config.beta else ())[PART]
            if start > last:
                continue
            sampled_N, _ = self._sampled(batch, some, encoded.embedding_BD.device)
            old.append(token_log_probs(encoded.logits_TV, sampled_N, self.config.temperature)[0].cpu())
            if encoded.base_logits_TV is not None:
                reference.append(token_log_probs(encoded.base_logits_TV, sampled_N, self.config.temperature)[0].cpu())
        batch.old_N, batch.reference_N = torch.cat(old), torch.cat(reference) if reference else None
        self._everyones_round = collectives.all_gather_object(batch.state_dict())  # who writes the checkpoint must know them all

    def _of(self, batch: RolloutBatch, values_N: Tensor, chosen: Sequence[int]) -> Tensor:
        """The chosen rollouts' part of a value for each token."""
        parts = values_N.split(batch.answers)
        return torch.cat([parts[i] for i in chosen])

    def _encoder(self) -> SearchR3:
        return self._live.sync()

    def _empty_corpus(self) -> Any:
        device = next(self.policy.parameters()).device
        kind = self.config.corpus_dtype
        if kind == "auto":
            kind = "float32" if device.type == "cpu" else "bfloat16"
        cls: type[Any] = LiveCorpus
        if self.processes > 1:
            cls = ShardedCorpus if self.config.shard_corpus else ReplicatedCorpus
        return cls(len(self.dataset.documents), self.checkpoint.contract.dimension, dtype=DTYPES[kind], device=device)

    def _environment(self, encoder: SearchR3) -> RetrievalEnvironment:
        """The environment; the first time in a run, every document is encoded by the stage 1 model."""
        if self.environment is None:
            if self.rank == 0:
                (Path(self.config.output) / ROLLOUTS_FILE).unlink(missing_ok=True)
            corpus = self._empty_corpus()
            encode = encode_rows(encoder, self.dataset.documents, self.config.max_document_tokens)
            for start in range(0, len(corpus), ENCODE_BLOCK):
                rows = corpus.local_rows(np.arange(start, min(start + ENCODE_BLOCK, len(corpus))))
                vectors = encode(rows) if len(rows) else np.zeros((0, corpus.dimension), dtype=np.float32)
                corpus.update(rows, vectors, 0)
                if self.rank == 0 and len(corpus) > ENCODE_BLOCK:
                    done = min(start + ENCODE_BLOCK, len(corpus))
                    print(f"{done:,} of {len(corpus):,} documents encoded", file=sys.stderr, flush=True)
            self.environment = RetrievalEnvironment(corpus, self.config.environment, seed=self.config.loop.seed)
            if self.config.min_positive_rank > 1 or self.config.max_positive_rank is not None:
                self._train_on(self._at_wanted_ranks(encoder, self.environment))
        return self.environment

    def _order(self, queries: Sequence[Query]) -> QueryOrder:
        return QueryOrder(len(queries), self.config.queries_per_step, self.config.loop.seed)

    def _train_on(self, kept: list[int] | None) -> None:
        self.kept = kept
        if kept is not None:
            queries = [self.dataset.train[number] for number in kept]
            self.collector.queries, self.collector.order = queries, self._order(queries)

    def _at_wanted_ranks(self, encoder: SearchR3, environment: RetrievalEnvironment) -> list[int]:
        """Which training queries stand, directly embedded, at the ranks that the recipe wants; the same everywhere."""
        queries, config = self.dataset.train, self.config
        direct = encoder.encode_query([query.text for query in queries], reasoning=False, show_progress_bar=False)
        deepest = config.max_positive_rank or len(environment.corpus)
        ranks = rank_of_positive(environment, direct, queries)
        found = [[number for number, rank in enumerate(ranks) if config.min_positive_rank <= rank <= deepest]]
        found = collectives.all_gather_object(found[0])[:1]
        if self.rank == 0:
            print(f"{len(found[0]):,} of {len(queries):,} queries are at the ranks to train on", file=sys.stderr)
        return found[0]

    def _dev_queries(self) -> list[Query]:
        return self.dataset.held_out[: self.config.staleness_eval_queries]

    def _write(self, records: list[dict[str, Any]]) -> None:
        if self.rank == 0 and records:
            path = Path(self.config.output) / ROLLOUTS_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def load_stage_one(name: str) -> tuple[Checkpoint, Path]:
    """A stage 1 adapter merged into its base in float32, and its folder.

    Raises:
        InputError: no adapter of that name, or one without a contract.
    """
    folder = resolve(name)
    record = checkpoints.read_record(folder)
    if record is None:
        raise InputError(
            f"{name} has no contract ({checkpoints.CONTRACT_FILE}), so it is no stage 1 adapter; give the `adapter` "
            "folder of a run of search-r3 train sft"
        )
    if record["kind"] != "adapter":
        raise InputError(f"{name} is a {record['kind']} model; give the stage 1 adapter that it was made from")
    return checkpoints.load(name, dtype=torch.float32), folder


def train_grpo(recipe: str | Path, overrides: Sequence[str] = (), resume: bool = True) -> Path:
    """Train stage 2 from a YAML recipe; returns the folder of the adapter, loaded once and with golden vectors.

    Raises:
        InputError: anything wrong with the recipe, the adapter, the queries, the corpus or the disk.
    """
    config = load_config(recipe, GRPOConfig, overrides)
    start_processes()
    checkpoint, first = load_stage_one(config.adapter)
    pools = [dev_pool(name, config.data_root, config.dev_queries, config.dev_documents, 0) for name in config.dev]
    dataset = load_rl_dataset(config, {text for pool in pools for text in pool.queries.values()})
    on_gpu = torch.cuda.is_available()
    attention = config.attention if config.attention != "auto" else ("sdpa" if on_gpu else "eager")
    checkpoint.model.set_attn_implementation(attention)
    torch.manual_seed(config.loop.seed)  # the adapter's own initialisation
    task = GRPOTask(config, checkpoint, first, dataset)
    free = ("output", "data_root", "queries", "corpus", "loop", "activation_checkpointing", "mini_batch_size",
            "adapter", "shard_corpus")  # fmt: skip
    describe = {key: value for key, value in to_dict(config).items() if key not in free} | {
        "dataset_sha256": dataset.sha256,
        "adapter_contract": checkpoint.contract.hash,
        "trained_on": [source.trained_on for source in config.queries],
    }
    best = "ndcg@10.on" if config.dev else ("live.reward" if dataset.held_out else None)
    folder = run_training(task, config.loop, Path(config.output), resume=resume, best_metric=best, describe=describe)
    if task.rank == 0 and (folder / checkpoints.CONTRACT_FILE).is_file():
        SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
    return folder
