"""Stage 1: supervised fine-tuning with contrastive learning (arXiv 2510.07048, section 3).

L = w_sft L_SFT + w_kl L_KL + w_infonce L_InfoNCE + w_triplet L_triplet, over two conversations of the same query: the
direct one, and the one with an analysis before the embed token, for the pairs that have one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search_r3 import metrics
from search_r3.data.beir import BeirDataset
from search_r3.data.dev import dev_pool
from search_r3.data.pairs import TrainingPair, read_pairs
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.searchr3 import SearchR3, encode_as_text
from search_r3.prompts import render
from search_r3.training.config import LoopConfig, LoraSettings, load_config, to_dict
from search_r3.training.loop import run_training
from search_r3.training.losses import info_nce, kl_to_base, sft_cross_entropy, triplet_margin
from search_r3.training.policy import Encoded, Policy, Rows, add_lora


@dataclass
class LossWeights:
    """How much each term counts. The paper sums them unweighted; these are our choice (method.md, [O])."""

    sft: float = 0.1
    """Cross-entropy on the assistant's turn: the format, and where the token goes."""
    kl: float = 0.1
    """KL(tuned || base) on the same positions, without those that predict the embed token."""
    infonce: float = 1.0
    """In-batch contrastive loss with explicit hard negatives."""
    triplet: float = 0.0
    """Margin loss against the hardest negative of the batch."""

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if not value >= 0:
                raise InputError(f"weights.{name} must be 0 or more, not {value}")


@dataclass
class SFTConfig:
    """A stage 1 recipe."""

    pairs: list[str]
    """JSONL files of training pairs, as `search-r3 data build` writes them."""
    output: str
    """The run's folder: log, checkpoints, and at the end `adapter/`."""
    base: str = "smollm2-135m"
    """Base model: a bundled name, a folder, or a hub id."""
    start_from: str | None = None
    """An adapter to go on training from, instead of a new one."""
    pairs_per_step: int = 32
    """Pairs of a batch; each other pair's document is a negative."""
    negatives_per_pair: int = 0
    """Explicit hard negatives taken from each pair."""
    one_source_per_batch: bool = True
    """Draw each batch from one source, so that in-batch negatives are of one kind and harder."""
    max_query_tokens: int = 48
    """Tokens kept of a query."""
    max_document_tokens: int = 128
    """Tokens kept of a document while training."""
    max_analysis_tokens: int = 32
    """Tokens kept of an analysis."""
    reasoning_share: float = 0.5
    """Share of the pairs with an analysis that are also trained behind it, in each batch."""
    temperature: float = 0.03
    """InfoNCE's tau."""
    symmetric: bool = True
    """Also classify the query among the batch's queries, given the document."""
    margin: float = 0.15
    """The triplet loss's theta."""
    weights: LossWeights = field(default_factory=LossWeights)
    """The four terms' weights."""
    gradient_cache: bool = False
    """Compute activations again in the backward pass, a chunk at a time: memory for one chunk, a third more work."""
    rows_per_chunk: int = 32
    """Rows of one backbone call."""
    attention: str = "auto"
    """"eager", "sdpa", or "auto": eager on a CPU (its fused backward pass is slower there), sdpa on a GPU."""
    dev: list[str] = field(default_factory=lambda: ["cosqa", "scifact"])
    """Dev pools that choose the best adapter; the first metric is their mean nDCG@10 without reasoning."""
    data_root: str | None = None
    """Where the dev sets stand; SEARCH_R3_DATA otherwise."""
    dev_queries: int = 100
    """Queries of each dev pool."""
    dev_documents: int = 400
    """Documents of each dev pool."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        if self.pairs_per_step < 2:
            raise InputError(f"pairs_per_step must be 2 or more, not {self.pairs_per_step}: InfoNCE needs negatives")
        if not 0 <= self.reasoning_share <= 1:
            raise InputError(f"reasoning_share must be in 0..1, not {self.reasoning_share}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, not {self.temperature}")
        if self.rows_per_chunk < 1:
            raise InputError(f"rows_per_chunk must be 1 or more, not {self.rows_per_chunk}")
        if self.attention not in ("auto", "eager", "sdpa"):
            raise InputError(f"attention must be auto, eager or sdpa, not {self.attention!r}")
        if not self.pairs:
            raise InputError("pairs is empty: name at least one JSONL file of training pairs")


@dataclass
class Batch:
    """One step: the rows of each conversation, and what they come from.

    Attributes:
        parts: "document", "query", and "reasoning" if any pair of the batch reasons.
        pairs: the batch; document i answers query i.
        documents: the pairs' positives, then their explicit negatives.
        behind: indices of the pairs that are also trained behind their analysis.
    """

    parts: dict[str, Rows]
    pairs: list[TrainingPair]
    documents: list[str]
    behind: list[int]


class SFTTask:
    """Stage 1 as the loop sees it: batches that are a function of the step, a loss, dev figures, an adapter to save."""

    def __init__(self, config: SFTConfig, checkpoint: Checkpoint, pairs: Sequence[TrainingPair]) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        adapted = hasattr(checkpoint.model, "peft_config")
        model = checkpoint.model if adapted else add_lora(checkpoint, config.lora)
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
        self.sampler = Sampler(pairs, config.pairs_per_step, config.loop.seed, config.one_source_per_batch)
        self.positives: dict[str, set[str]] = defaultdict(set)
        for pair in pairs:
            self.positives[pair.query].add(pair.positive)
        self.pools = [
            dev_pool(name, config.data_root, config.dev_queries, config.dev_documents, 0) for name in config.dev
        ]

    def batch(self, step: int) -> Batch:
        """The rows of `step`: a pure function of the seed, the step and the process."""
        config = self.config
        rank, world = _rank(), _world_size()
        pairs = self.sampler.batch(step * world + rank)
        rng = np.random.default_rng([config.loop.seed, step, rank])
        documents = [pair.positive for pair in pairs]
        for pair in pairs:
            documents.extend(pair.negatives[: config.negatives_per_pair])
        with_analysis = [i for i, pair in enumerate(pairs) if pair.analysis]
        behind = [i for i in with_analysis if rng.random() < config.reasoning_share]
        queries = self._ids([pair.query for pair in pairs], config.max_query_tokens)
        parts = {
            "document": Rows(
                self.document.prefix,
                [[*ids, *self.document.suffix] for ids in self._ids(documents, config.max_document_tokens)],
                [0] * len(documents),
            ),
            "query": Rows(
                self.query.prefix, [[*ids, *self.query.suffix] for ids in queries], [self.query_answer] * len(queries)
            ),
        }
        if behind:
            analyses = self._ids([pairs[i].analysis or "" for i in behind], config.max_analysis_tokens)
            embed = [self.checkpoint.contract.embed_token_id]
            parts["reasoning"] = Rows(
                self.reasoning.prefix,
                [[*queries[i], *self.reasoning.suffix, *ids, *embed] for i, ids in zip(behind, analyses, strict=True)],
                [len(ids) + 1 for ids in analyses],
            )
        return Batch(parts, pairs, documents, behind)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the terms, each averaged over the conversations that the batch holds."""
        weights = self.config.weights
        asked = [part for part in ("query", "reasoning") if part in batch.parts]
        encoded: dict[str, Encoded] = module(batch.parts, with_base=asked if weights.kl else ())
        document_ND = encoded["document"].embedding_BD
        terms: dict[str, Tensor] = {}
        rows_of = {"query": list(range(len(batch.pairs))), "reasoning": batch.behind}
        total = sum(len(rows_of[part]) for part in asked)
        figures: dict[str, float] = {"tokens": float(sum(rows.tokens for rows in batch.parts.values()))}
        # Every step logs the same keys, or processes could not average them; 0 rows behind reasoning means no figure.
        figures |= {"rows_reasoning": float(len(batch.behind)), "infonce_reasoning": 0.0, "accuracy_reasoning": 0.0}
        for part in asked:
            rows = rows_of[part]
            share = len(rows) / total
            found = self._terms(encoded[part], document_ND, rows, batch)
            for name, value in found.items():
                terms[name] = terms.get(name, document_ND.new_zeros(())) + share * value
            figures[f"infonce_{part}"] = found["infonce"].item()
            similarity_BN = (encoded[part].embedding_BD.detach() @ document_ND.detach().T).cpu()
            hits = similarity_BN.masked_fill(self._false_negatives(rows, batch), -2).argmax(1)
            figures[f"accuracy_{part}"] = (hits == torch.tensor(rows)).float().mean().item()
        loss = document_ND.new_zeros(())
        for name, value in terms.items():
            loss = loss + getattr(weights, name) * value
            figures[name] = value.item()
        return loss, figures

    def _terms(self, encoded: Encoded, document_ND: Tensor, rows: list[int], batch: Batch) -> dict[str, Tensor]:
        config, weights = self.config, self.config.weights
        target_B = torch.tensor(rows, device=document_ND.device)
        mask_BN = self._false_negatives(rows, batch).to(document_ND.device)
        query_BD = encoded.embedding_BD
        contrast = info_nce(query_BD, document_ND, target_B, config.temperature, mask_BN)
        if config.symmetric:
            # Each row's own document against this conversation's queries: the square part of the same matrix.
            own = torch.arange(len(rows), device=document_ND.device)
            backward = info_nce(document_ND[target_B], query_BD, own, config.temperature, mask_BN[:, target_B].T)
            contrast = (contrast + backward) / 2
        terms = {"infonce": contrast}
        if weights.triplet:
            similarity_BN = query_BD.detach() @ document_ND.detach().T
            similarity_BN[torch.arange(len(rows)), target_B] = -2
            hardest_B = similarity_BN.masked_fill(mask_BN, -2).argmax(1)
            terms["triplet"] = triplet_margin(query_BD, document_ND[target_B], document_ND[hardest_B], config.margin)
        assert encoded.logits_TV is not None
        assert encoded.target_T is not None
        if weights.sft:
            terms["sft"] = sft_cross_entropy(encoded.logits_TV, encoded.target_T)
        if weights.kl and encoded.base_logits_TV is not None:
            embed_id = self.checkpoint.contract.embed_token_id
            keep_T = encoded.target_T != embed_id
            terms["kl"] = kl_to_base(encoded.logits_TV, encoded.base_logits_TV, keep_T, exclude_ids=(embed_id,))
        return terms

    def _false_negatives(self, rows: list[int], batch: Batch) -> Tensor:
        """True where a document answers the query although it is another pair's: (len(rows), N) bool."""
        columns: dict[str, list[int]] = defaultdict(list)
        for column, text in enumerate(batch.documents):
            columns[text].append(column)
        mask = torch.zeros(len(rows), len(batch.documents), dtype=torch.bool)
        for line, row in enumerate(rows):
            for text in self.positives[batch.pairs[row].query]:
                mask[line, columns.get(text, [])] = True
            mask[line, row] = False
        return mask

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """nDCG@10 on the dev pools, without and with reasoning, and the share of analyses that end by themselves."""
        if not self.pools:
            return {}
        encoder = self._encoder()
        figures: dict[str, float] = {}
        for pool in self.pools:
            figures |= {f"{pool.name}.{name}": value for name, value in dev_figures(encoder, pool, self.config).items()}
        for mode in ("off", "on"):
            figures[f"ndcg@10.{mode}"] = float(np.mean([figures[f"{pool.name}.{mode}"] for pool in self.pools]))
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Nothing beyond the weights: batches follow from the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""

    def save(self, folder: Path) -> None:
        """Write the adapter and its contract."""
        checkpoints.save_adapter(self.policy.model, self.checkpoint.contract, folder)

    def _encoder(self) -> SearchR3:
        # The adapter stays in place: nothing is copied, and training goes on with the same tensors.
        now = self.checkpoint
        return SearchR3(Checkpoint("dev", self.policy.causal_lm, self.tokenizer, now.contract, now.path))

    def _ids(self, texts: list[str], limit: int) -> list[list[int]]:
        return [ids[:limit] for ids in encode_as_text(self.tokenizer, texts)]


class Sampler:
    """Batches of pairs: each epoch shuffles, then cuts every source (or all of them together) into full batches."""

    def __init__(self, pairs: Sequence[TrainingPair], size: int, seed: int, one_source: bool) -> None:
        self.pairs, self.size, self.seed = pairs, size, seed
        self.groups: dict[str, list[int]] = defaultdict(list)
        for i, pair in enumerate(pairs):
            self.groups[pair.source if one_source else ""].append(i)
        self.per_epoch = sum(len(group) // size for group in self.groups.values())
        if self.per_epoch == 0:
            raise InputError(
                f"{len(pairs)} pairs are too few for a batch of {size}; lower pairs_per_step, "
                "or set one_source_per_batch to false"
            )
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, number: int) -> list[TrainingPair]:
        """The pairs of batch `number`, counted over all epochs."""
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._cut(epoch))
        return [self.pairs[i] for i in self._epoch[1][place]]

    def _cut(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch, 77])
        batches = []
        for name in sorted(self.groups):
            order = rng.permutation(self.groups[name]).tolist()
            batches += [order[i : i + self.size] for i in range(0, len(order) - self.size + 1, self.size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def dev_figures(encoder: SearchR3, pool: BeirDataset, config: SFTConfig) -> dict[str, float]:
    """nDCG@10 of `encoder` on a dev pool with reasoning "off" and "on", the emission rate and the mean tokens."""
    documents = encoder.encode_document(
        [document.full_text for document in pool.corpus.values()],
        max_length=config.max_document_tokens,
        show_progress_bar=False,
    )
    queries = list(pool.queries.values())
    columns = {did: i for i, did in enumerate(pool.corpus)}
    relevance = np.zeros((len(queries), len(columns)))
    for line, qid in enumerate(pool.queries):
        for did, grade in pool.qrels.get(qid, {}).items():
            if did in columns:
                relevance[line, columns[did]] = grade
    direct = encoder.encode_query(queries, reasoning=False, show_progress_bar=False)
    reasoned = encoder.reason(
        queries, max_reasoning_tokens=config.max_analysis_tokens, batch_size=64, show_progress_bar=False
    )
    behind = np.stack([r.embedding for r in reasoned])
    return {
        "off": float(metrics.ndcg(direct @ documents.T, relevance, 10).mean()),
        "on": float(metrics.ndcg(behind @ documents.T, relevance, 10).mean()),
        "emission": float(np.mean([not r.forced for r in reasoned])),
        "tokens": float(np.mean([r.num_tokens for r in reasoned])),
    }


def train_sft(recipe: str | Path, overrides: Sequence[str] = (), resume: bool = True) -> Path:
    """Train stage 1 from a YAML recipe; returns the folder of the adapter, loaded once and with golden vectors.

    Raises:
        InputError: anything wrong with the recipe, the pairs, the base or the disk.
    """
    config = load_config(recipe, SFTConfig, overrides)
    pairs = [pair for path in config.pairs for pair in read_pairs(path)]
    if config.start_from:
        checkpoint = checkpoints.load(config.start_from, dtype=torch.float32, merge=False)
    else:
        checkpoint = checkpoints.load_base(config.base, dtype=torch.float32)
    on_gpu = torch.cuda.is_available()
    attention = config.attention if config.attention != "auto" else ("sdpa" if on_gpu else "eager")
    checkpoint.model.set_attn_implementation(attention)
    torch.manual_seed(config.loop.seed)  # the adapter's own initialisation
    task = SFTTask(config, checkpoint, pairs)
    # What the figures depend on. Where things stand and how memory is used are left out: a run may be moved and go on.
    free = ("output", "data_root", "pairs", "loop", "gradient_cache", "rows_per_chunk")
    describe = {key: value for key, value in to_dict(config).items() if key not in free} | {
        "pairs_sha256": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in config.pairs],
        "base_contract": checkpoint.contract.hash,
    }
    folder = run_training(
        task, config.loop, Path(config.output), resume=resume, best_metric="ndcg@10.off", describe=describe
    )
    if _rank() == 0 and (folder / checkpoints.CONTRACT_FILE).is_file():
        SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
    return folder


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if _distributed() else 1
