"""Stage 1: supervised fine-tuning with contrastive learning (arXiv 2510.07048, section 3).

L = w_sft L_SFT + w_kl L_KL + w_infonce L_InfoNCE + w_triplet L_triplet, over two conversations of the same query: the
direct one, and the one with an analysis before the embed token, for the pairs that have one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search_r3.data.dev_pools import dev_pool
from search_r3.data.mining.teacher import TeacherRows
from search_r3.data.pairs import TrainingPair, read_pairs
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.searchr3 import SearchR3, encode_as_text
from search_r3.prompts import render
from search_r3.training.config import load_config, to_dict
from search_r3.training.distributed import collectives
from search_r3.training.distributed.sharding import start_processes
from search_r3.training.loop import run_training
from search_r3.training.lora.live_encoder import LiveEncoder
from search_r3.training.lora.policy import Encoded, Policy, Rows, add_lora
from search_r3.training.losses import kl_to_base, sft_cross_entropy
from search_r3.training.sft.batch_sampler import Sampler
from search_r3.training.sft.contrastive import Candidates, Memory, Settings, contrastive_terms, document_key
from search_r3.training.sft.self_reasoning import OwnSamples
from search_r3.training.sft.sft_config import LossWeights as LossWeights
from search_r3.training.sft.sft_config import SFTConfig
from search_r3.training.sft.topics import halve_into_topics
from search_r3.training.sft.validation import dev_figures


@dataclass
class Batch:
    """One step: this process's rows of each conversation, and what the rows of all processes come from.

    Attributes:
        parts: "document", "query", and "reasoning" if any pair of the batch reasons. Of each, every W-th row of all.
        pairs: the batch; document i answers query i.
        documents: the pairs' positives, then their explicit negatives.
        behind: indices of the pairs that are also trained behind an analysis.
        sampled: which of `behind` stand behind the model's own analysis.
    """

    parts: dict[str, Rows]
    pairs: list[TrainingPair]
    documents: list[str]
    behind: list[int]
    sampled: list[bool]


class SFTTask:
    """Stage 1 as the loop sees it: batches that are a function of the step, a loss, dev figures, an adapter to save."""

    def __init__(self, config: SFTConfig, checkpoint: Checkpoint, pairs: Sequence[TrainingPair]) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        dimension = checkpoint.contract.dimension
        if any(size > dimension for size in config.matryoshka):
            raise InputError(f"matryoshka: an embedding of this model has {dimension} dimensions, not more")
        adapted = hasattr(checkpoint.model, "peft_config")
        model = checkpoint.model if adapted else add_lora(checkpoint, config.lora)
        for weight in model.parameters():
            if weight.requires_grad:  # float32 whatever the base is in
                weight.data = weight.data.float()
        self.policy = Policy(
            model,
            checkpoint.contract.embed_token_id,
            vocabulary=len(checkpoint.tokenizer),
            chunk_size=config.rows_per_chunk,
            gradient_cache=config.gradient_cache,
        )
        self.module: nn.Module = self.policy
        prompts = checkpoint.contract.prompts
        self.document = render(prompts.document, self.tokenizer, give_answer=True)
        self.query = render(prompts.query, self.tokenizer, give_answer=True)
        self.reasoning = render(prompts.reasoning, self.tokenizer, give_answer=False)
        self.query_answer = len(self.query.suffix) - len(
            render(prompts.query, self.tokenizer, give_answer=False).suffix
        )
        self.teacher = TeacherRows(config.teacher) if config.teacher else None
        self.sampler = make_sampler(pairs, config, self.teacher)
        self.answers: dict[str, set[int]] = defaultdict(set)
        for pair in pairs:
            self.answers[pair.query].add(document_key(pair.positive))
        self.memory = Memory(config.memory)
        self._live = LiveEncoder(self.policy, checkpoint, config.loop.mixed_precision)
        self.own = OwnSamples(
            config.samples_from,
            config.samples_every,
            config.max_analysis_tokens,
            config.sample_temperature,
            config.loop.seed,
        )
        wanted = {name for name in ("infonce", "triplet", "distil") if getattr(config.weights, name)}
        self.settings = Settings(
            config.temperature,
            config.symmetric,
            config.margin,
            config.teacher_temperature,
            config.matryoshka,
            frozenset(wanted | {"infonce"}),
        )
        self.pools = [
            dev_pool(name, config.data_root, config.dev_queries, config.dev_documents, 0) for name in config.dev
        ]

    def batch(self, step: int) -> Batch:
        """The rows of `step`: they follow from the seed, the step and the process, and from the model's own samples.

        The batch is the same whatever the number of processes; each has its part of every conversation's rows.
        """
        config = self.config
        if config.pairs_per_step < collectives.world_size():
            raise InputError(
                f"pairs_per_step is {config.pairs_per_step}, too few for {collectives.world_size()} processes: the "
                "batch is shared out between them"
            )
        if config.sample_share:
            self.own.refresh(step, self._sampled_queries, self._encoder)
        pairs, behind, sampled = self._plan(step)
        documents = [pair.positive for pair in pairs]
        for pair in pairs:
            documents.extend(pair.negatives[: config.negatives_per_pair])
        queries = [pairs[i].query for i in collectives.strided_indices(len(pairs))]
        parts = {
            "document": self._rows(
                self.document,
                [documents[i] for i in collectives.strided_indices(len(documents))],
                config.max_document_tokens,
                0,
            ),
            "query": self._rows(self.query, queries, config.max_query_tokens, self.query_answer),
        }
        if behind:
            parts["reasoning"] = self._rows_behind(pairs, behind, sampled)
        if not (config.weights.sft or config.weights.kl):  # no logits then: they take 200 kB a token
            for rows in parts.values():
                rows.answers = [0] * len(rows.rows)
        return Batch(parts, pairs, documents, behind, sampled)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the terms; over processes, its mean is that of the whole batch, and so is its gradient.

        The contrastive terms are averaged over the rows of both conversations, cross-entropy and KL over the
        conversations: a turn that is written token by token would be lost among those that are given.
        """
        weights = self.config.weights
        asked = [part for part in ("query", "reasoning") if part in batch.parts]
        encoded: dict[str, Encoded] = module(batch.parts, with_base=asked if weights.kl else ())
        rows_of = {"document": range(len(batch.documents)), "query": range(len(batch.pairs)), "reasoning": batch.behind}
        names = ["document", *asked]
        everyones = collectives.all_gather_rows(
            [encoded[name].embedding_BD for name in names], [len(rows_of[n]) for n in names]
        )
        embedding = dict(zip(names, everyones, strict=True))
        own = self._candidates(batch, embedding["document"])
        candidates = self.memory.extend(own)
        total = sum(len(rows_of[part]) for part in asked)
        terms: dict[str, Tensor] = {}
        figures: dict[str, float] = {"tokens": float(sum(rows.tokens for rows in batch.parts.values()))}
        # Every step logs the same keys, or processes could not average them; 0 rows behind reasoning means no figure.
        figures |= {"rows_reasoning": float(len(batch.behind)), "infonce_reasoning": 0.0, "accuracy_reasoning": 0.0}
        for part in asked:
            target_B = list(rows_of[part])
            queries = [batch.pairs[i].query for i in target_B]
            mask_BM = candidates.false_negatives([self.answers[query] for query in queries], target_B)
            teacher = None
            if self.teacher is not None and weights.distil:
                teacher = torch.from_numpy(self.teacher.queries(queries)).to(candidates.embedding_MD.device)
            query_BD = embedding[part]
            found = contrastive_terms(query_BD, target_B, candidates, mask_BM, self.settings, teacher)
            shares = dict.fromkeys(found, len(target_B) / total)
            said = self._language_terms(encoded[part])
            shares |= dict.fromkeys(said, 1 / len(asked))
            for name, value in (found | said).items():
                terms[name] = terms.get(name, query_BD.new_zeros(())) + shares[name] * value
            figures[f"infonce_{part}"] = found["infonce"].item()
            near_BM = (query_BD.detach() @ candidates.embedding_MD.detach().T).cpu().masked_fill(mask_BM, -2)
            figures[f"accuracy_{part}"] = (near_BM.argmax(1) == torch.tensor(target_B)).float().mean().item()
        self.memory.add(own)
        loss = candidates.embedding_MD.new_zeros(())
        for name, value in terms.items():
            loss = loss + getattr(weights, name) * value
            figures[name] = value.item()
        return loss, figures

    def _plan(self, step: int) -> tuple[list[TrainingPair], list[int], list[bool]]:
        """The pairs of a step, which of them are trained behind an analysis, and which of these behind their own."""
        config = self.config
        pairs = self.sampler.batch(step)
        rng = np.random.default_rng([config.loop.seed, step, 0])
        reason_B, own_B = rng.random(len(pairs)) < config.reasoning_share, rng.random(len(pairs)) < config.sample_share
        if step < config.samples_from:
            own_B[:] = False
        behind = [i for i in range(len(pairs)) if reason_B[i] and (own_B[i] or pairs[i].analysis)]
        return pairs, behind, [bool(own_B[i]) for i in behind]

    def _sampled_queries(self, step: int) -> list[tuple[str, str]]:
        pairs, behind, sampled = self._plan(step)
        return [(pairs[i].id, pairs[i].query) for i, own in zip(behind, sampled, strict=True) if own]

    def _rows(self, frame: Any, texts: list[str], limit: int, answers: int) -> Rows:
        rows = [[*ids, *frame.suffix] for ids in self._ids(texts, limit)]
        return Rows(frame.prefix, rows, [answers] * len(rows))

    def _rows_behind(self, pairs: Sequence[TrainingPair], behind: Sequence[int], sampled: Sequence[bool]) -> Rows:
        """This process's rows of those behind an analysis."""
        rows, answers = [], []
        mine = [(pairs[behind[i]], sampled[i]) for i in collectives.strided_indices(len(behind))]
        texts = [self.own.texts[pair.id] if own else pair.analysis or "" for pair, own in mine]
        analyses = self._ids(texts, self.config.max_analysis_tokens)
        queries = self._ids([pair.query for pair, _ in mine], self.config.max_query_tokens)
        embed = self.checkpoint.contract.embed_token_id
        for (pair, own), query, said in zip(mine, queries, analyses, strict=True):
            rows.append([*query, *self.reasoning.suffix, *said, embed])
            answers.append(int(pair.id in self.own.cut) if own else len(said) + 1)
        return Rows(self.reasoning.prefix, rows, answers)

    def _candidates(self, batch: Batch, document_MD: Tensor) -> Candidates:
        """The batch's documents: every process knows them all."""
        teacher = None
        if self.teacher is not None and self.config.weights.distil:
            teacher = torch.from_numpy(self.teacher.documents(batch.documents)).to(document_MD.device)
        keys = np.array([document_key(text) for text in batch.documents], dtype=np.int64)
        return Candidates(document_MD, keys, teacher)

    def _language_terms(self, encoded: Encoded) -> dict[str, Tensor]:
        """Cross-entropy and KL of this process's rows, so that their mean over processes is that over all rows."""
        weights = self.config.weights
        terms: dict[str, Tensor] = {}
        if not (weights.sft or weights.kl):
            return terms
        embed_id, target_T = self.checkpoint.contract.embed_token_id, encoded.target_T
        keep_T = None if target_T is None else target_T != embed_id
        counts = [0, 0] if target_T is None or keep_T is None else [len(target_T), int(keep_T.sum())]
        said, kept = collectives.rank_weights(*counts, device=encoded.embedding_BD.device)
        if encoded.logits_TV is None or target_T is None:
            return terms
        if weights.sft:
            terms["sft"] = said * sft_cross_entropy(encoded.logits_TV, target_T)
        if weights.kl and encoded.base_logits_TV is not None:
            terms["kl"] = kept * kl_to_base(encoded.logits_TV, encoded.base_logits_TV, keep_T, exclude_ids=(embed_id,))
        return terms

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """See `devset.dev_figures`, of each pool and their mean."""
        if not self.pools:
            return {}
        encoder, config = self._encoder(), self.config
        found = {
            pool.name: dev_figures(encoder, pool, config.max_document_tokens, config.max_analysis_tokens)
            for pool in self.pools
        }
        figures = {f"{name}.{key}": value for name, values in found.items() for key, value in values.items()}
        for mode in ("off", "on"):
            figures[f"ndcg@10.{mode}"] = float(np.mean([values[mode] for values in found.values()]))
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The model's own analyses and the remembered documents; batches follow from the step."""
        return {"own": self.own.state_dict(), "memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self.own.load_state_dict(state["own"])
        self.memory.load_state_dict(state["memory"])

    def save(self, folder: Path) -> None:
        """Write the adapter and its contract; beside it, the dimensions that embeddings may be cut at."""
        more = {"dimensions": sorted(self.config.matryoshka)} if self.config.matryoshka else {}
        checkpoints.save_adapter(self.policy.saved_model, self.checkpoint.contract, folder, **more)

    def _encoder(self) -> SearchR3:
        """A SearchR3 with the weights of now, merged, in the precision of training."""
        return self._live.sync()

    def _ids(self, texts: list[str], limit: int) -> list[list[int]]:
        return [ids[:limit] for ids in encode_as_text(self.tokenizer, texts)]


def make_sampler(pairs: Sequence[TrainingPair], config: SFTConfig, teacher: TeacherRows | None) -> Sampler:
    """The batches of a recipe: of one source, kind or topic, or of all together; weighted, and bucketed by length."""
    named = list(pairs)
    if config.batch_of in ("kind", "topic"):
        named = [replace(pair, source=pair.source.partition(":")[0]) for pair in pairs]
    return Sampler(
        named,
        config.pairs_per_step,
        config.loop.seed,
        config.batch_of != "any",
        lengths=[len(pair.positive) for pair in named],
        bucket=config.length_bucket,
        weights=config.source_weights,
        pieces=True,
        topics=topics_of(named, config, teacher) if teacher and config.batch_of == "topic" else None,
    )


def topics_of(pairs: Sequence[TrainingPair], config: SFTConfig, teacher: TeacherRows) -> list[int]:
    """The topic of each pair within its source, by the teacher's rows of query and document together."""
    rows_ND = teacher.queries([pair.query for pair in pairs]) + teacher.documents([pair.positive for pair in pairs])
    topic_N = np.zeros(len(pairs), dtype=np.int64)
    for source in {pair.source for pair in pairs}:
        chosen = np.array([i for i, pair in enumerate(pairs) if pair.source == source])
        size = config.topic_batches * config.pairs_per_step
        topic_N[chosen] = halve_into_topics(rows_ND[chosen], size, config.loop.seed)
    return topic_N.tolist()


def train_sft(recipe: str | Path, overrides: Sequence[str] = (), resume: bool = True) -> Path:
    """Train stage 1 from a YAML recipe; returns the folder of the adapter, loaded once and with golden vectors.

    Raises:
        InputError: anything wrong with the recipe, the pairs, the base or the disk.
    """
    config = load_config(recipe, SFTConfig, overrides)
    start_processes()
    pairs = [pair for path in config.pairs for pair in read_pairs(path)]
    if config.start_from:
        checkpoint = checkpoints.load(config.start_from, dtype=getattr(torch, config.base_dtype), merge=False)
    else:
        checkpoint = checkpoints.load_base(config.base, dtype=getattr(torch, config.base_dtype))
    on_gpu = torch.cuda.is_available()
    attention = config.attention if config.attention != "auto" else ("sdpa" if on_gpu else "eager")
    checkpoint.model.set_attn_implementation(attention)
    torch.manual_seed(config.loop.seed)  # the adapter's own initialisation
    task = SFTTask(config, checkpoint, pairs)
    # What the figures depend on. Where things stand and how memory is used are left out: a run may be moved and go on.
    free = ("output", "data_root", "pairs", "teacher", "loop", "gradient_cache", "rows_per_chunk")
    describe = {key: value for key, value in to_dict(config).items() if key not in free} | {
        "pairs_sha256": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in config.pairs],
        "base_contract": checkpoint.contract.hash,
    }
    folder = run_training(
        task, config.loop, Path(config.output), resume=resume, best_metric="ndcg@10.off", describe=describe
    )
    if collectives.rank() == 0 and (folder / checkpoints.CONTRACT_FILE).is_file():
        SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
    return folder
