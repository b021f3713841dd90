"""Stage 1: supervised fine-tuning with contrastive learning (arXiv 2510.07048, section 3).

L = w_sft L_SFT + w_kl L_KL + w_infonce L_InfoNCE + w_triplet L_triplet, over two conversations of the same query: the
direct one, and one with reasoning before the embed token, for the pairs that have reasoning. A recipe may add a third,
in latent steps, and a fourth, with the passages that a search found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search_r3.data.mining.teacher import TeacherRows
from search_r3.data.pairs import TrainingPair, read_pairs
from search_r3.errors import InputError
from search_r3.files import sha256_of
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.query_normalizer import QueryNormalizer
from search_r3.model.searchr3 import SearchR3
from search_r3.prompts import with_latent_steps, with_reading
from search_r3.training.config import load_config
from search_r3.training.dev_evaluation import dev_metrics, load_dev_pools
from search_r3.training.distributed import collectives
from search_r3.training.distributed.sharding import start_processes
from search_r3.training.lora.live_encoder import LiveEncoder
from search_r3.training.lora.policy import Encoded, Policy, add_lora, freeze_lowest_layers
from search_r3.training.losses import kl_to_base, sft_cross_entropy
from search_r3.training.precision import resolve_attention
from search_r3.training.sft.batch import Batch
from search_r3.training.sft.batch_sampler import make_sampler
from search_r3.training.sft.collator import SFTCollator, process_share
from search_r3.training.sft.contrastive import (
    Candidates,
    ContrastiveSettings,
    CrossBatchMemory,
    contrastive_terms,
    document_key,
    known_answers,
)
from search_r3.training.sft.fixed_documents import FixedDocuments, fixed_documents
from search_r3.training.sft.query_augmentation import self_teaching
from search_r3.training.sft.sft_config import SFTConfig
from search_r3.training.sft.trust import direct_and_false
from search_r3.training.sft.view_distillation import taught_queries, view_distillation
from search_r3.training.stage import train_stage

MEMORY_STREAM = 2
"""The random stream that draws the documents with which the memory is filled."""


class SFTTask:
    """Stage 1 as the loop sees it: batches, a loss, validation, and an adapter to save."""

    def __init__(
        self,
        config: SFTConfig,
        checkpoint: Checkpoint,
        pairs: Sequence[TrainingPair],
        fixed: FixedDocuments | None = None,
    ) -> None:
        """Prepare a run; `fixed` are its documents where they are not trained."""
        self.fixed = fixed
        if fixed is not None and config.fold_capitals not in (None, checkpoint.contract.fold_capitals):
            raise InputError("fold_capitals changes documents, which are fixed; remove the key")
        if config.fold_capitals is not None:
            contract = replace(checkpoint.contract, fold_capitals=config.fold_capitals)
            checkpoint = replace(checkpoint, contract=contract)
        if config.query_normalizer is not None:
            checkpoint = checkpoint.with_query_normalizer(QueryNormalizer.load(config.query_normalizer))
        self.config = config
        contract = checkpoint.contract
        prompts = with_latent_steps(contract.prompts, config.latent_steps)
        reads = config.reading_passages if config.reading_ratio else 0
        prompts = with_reading(prompts, reads, config.reading_passage_tokens)
        if reads and not any(pair.passages for pair in pairs):
            raise InputError("reading_ratio is set, but no pair has passages; search-r3 data read adds them to a file")
        checkpoint = self.checkpoint = replace(checkpoint, contract=replace(contract, prompts=prompts))
        dimension = checkpoint.contract.dimension
        if any(size > dimension for size in config.matryoshka):
            raise InputError(f"matryoshka: an embedding of this model has {dimension} dimensions, not more")
        adapted = hasattr(checkpoint.model, "peft_config")
        model = checkpoint.model if adapted else add_lora(checkpoint, config.lora)
        freeze_lowest_layers(model, config.lora.frozen_layers)
        for weight in model.parameters():
            if weight.requires_grad:  # float32, whatever the dtype of the base
                weight.data = weight.data.float()
        self.policy = Policy(
            model,
            checkpoint.contract.embed_token_id,
            vocab_size=len(checkpoint.tokenizer),
            mini_batch_size=config.mini_batch_size,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.module: nn.Module = self.policy
        self.teacher = TeacherRows(config.teacher) if config.teacher else None
        self.pairs = pairs
        self.answers = known_answers(pairs)
        self._live = LiveEncoder(self.policy, checkpoint, config.loop.mixed_precision)
        sampler = make_sampler(pairs, config, self.teacher)
        self.collator = SFTCollator(config, checkpoint, sampler, self.answers, self._encoder)
        self.memory = CrossBatchMemory(config.cross_batch_memory_size)
        terms = {name for name in ("infonce", "triplet", "distillation") if getattr(config.weights, name)}
        self.settings = ContrastiveSettings(
            config.temperature,
            config.symmetric,
            config.margin,
            config.teacher_temperature,
            config.matryoshka,
            frozenset(terms | {"infonce"}),
            config.ranking_loss,
            config.guide_margin,
        )
        self.uses_teacher = bool(config.weights.distillation) or config.guide_margin is not None
        self.pools = load_dev_pools(config)

    def batch(self, step: int) -> Batch:
        """The batch of `step`, see `SFTCollator.batch`."""
        return self.collator.batch(step)

    def training_step(
        self, module: nn.Module, batch: Batch, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, dict[str, float]]:
        """Run `compute_loss` and the backward pass; intermediate tensors are freed in between."""
        loss, metrics = self.compute_loss(module, batch)
        backward(loss)
        return loss, metrics

    def compute_loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the terms, and metrics.

        The mean over processes, of the loss and of its gradient, is that of the whole batch.

        The contrastive terms are averaged over the rows of all conversations. Cross-entropy and KL are averaged over
        the conversations with words instead, because turns with reasoning would have little weight in a mean over rows.
        """
        weights = self.config.weights
        spoken = [part for part in ("query", "reasoning", "reading") if part in batch.parts]
        conversations = [*spoken, *(["latent"] if "latent" in batch.parts else [])]
        encoded: dict[str, Encoded] = module(
            batch.parts,
            return_base_logits=spoken if weights.kl else (),
            return_token_losses=() if weights.kl else spoken,
        )
        rows_of = {
            "document": range(len(batch.documents)),
            "query": range(len(batch.pairs)),
            "reasoning": batch.with_reasoning,
            "changed": batch.changed_of,
            "latent": batch.with_latent,
            "reading": batch.with_passages,
        }
        names = [name for name in ("document", *conversations, "changed") if name in batch.parts]
        gathered = collectives.all_gather_rows(
            [encoded[name].embedding_BD for name in names], [len(rows_of[n]) for n in names]
        )
        embedding = dict(zip(names, gathered, strict=True))
        candidates = self._all_candidates(batch, embedding)
        total = sum(len(rows_of[part]) for part in conversations)
        terms: dict[str, Tensor] = {}
        metrics: dict[str, float] = {"tokens": float(sum(rows.tokens for rows in batch.parts.values()))}
        # The keys are the same at every step, so that processes can average them; without reasoning rows, they are 0.
        metrics |= {
            "rows_reasoning": float(len(batch.with_reasoning)),
            "infonce_reasoning": 0.0,
            "accuracy_reasoning": 0.0,
        }
        if self.config.latent_steps:
            metrics |= {"rows_latent": float(len(batch.with_latent)), "infonce_latent": 0.0, "accuracy_latent": 0.0}
        if self.config.reading_ratio:
            metrics |= {
                "rows_reading": float(len(batch.with_passages)),
                "infonce_reading": 0.0,
                "accuracy_reading": 0.0,
            }
        for part in conversations:
            target_B = self._targets(batch, rows_of[part])
            queries = [batch.pairs[i].query for i in rows_of[part]]
            answers = [self.answers[query] for query in queries]
            mask_BM = candidates.false_negatives(answers, target_B)
            grade_BM = None if self.settings.ranking_loss == "infonce" else candidates.grades(answers)
            teacher = None
            if self.teacher is not None and self.uses_teacher:
                teacher = torch.from_numpy(self.teacher.queries(queries)).to(candidates.embedding_MD.device)
            query_BD = embedding[part]
            if self.fixed is not None and grade_BM is not None:
                grade_BM, others_BM = self.fixed.nearest_chunks(grade_BM, query_BD)
                mask_BM = mask_BM | others_BM
            contrastive = contrastive_terms(query_BD, target_B, candidates, mask_BM, self.settings, teacher, grade_BM)
            shares = dict.fromkeys(contrastive, len(target_B) / total)
            language = self._language_terms(encoded[part]) if part in spoken else {}
            shares |= dict.fromkeys(language, 1 / len(spoken))
            for name, value in (contrastive | language).items():
                terms[name] = terms.get(name, query_BD.new_zeros(())) + shares[name] * value
            metrics[f"infonce_{part}"] = contrastive["infonce"].item()
            near_BM = (query_BD.detach() @ candidates.embedding_MD.detach().T).cpu().masked_fill(mask_BM, -2)
            metrics[f"accuracy_{part}"] = (near_BM.argmax(1) == torch.tensor(target_B)).float().mean().item()
        if weights.self_teaching:
            original_BD, document_MD = embedding["query"], candidates.embedding_MD
            changed_KD = embedding.get("changed", original_BD[:0])
            terms["self_teaching"] = self_teaching(
                changed_KD, original_BD[batch.changed_of], document_MD, self.config.temperature
            )
        if weights.view_distillation:
            terms["view_distillation"] = self._view_distillation(batch, embedding, candidates)
        if self.config.shuffled_reasoning_ratio or self.config.empty_reasoning_ratio:
            rows = direct_and_false(embedding, batch.with_reasoning, batch.false_words)
            metrics["rows_false"] = float(len(rows[0]))
            terms["trust"] = self._fitted_to(candidates, batch, *rows)
        if self.collator.in_batch_lm is not None and batch.query_documents is not None:
            lengths = batch.parts["in_batch_lm"].num_target_tokens
            terms["in_batch_lm"] = self.collator.in_batch_lm.loss(
                batch.query_documents, encoded["in_batch_lm"], lengths, embedding
            )
        loss = candidates.embedding_MD.new_zeros(())
        for name, value in terms.items():
            loss = loss + getattr(weights, name) * value
            metrics[name] = value.item()
        return loss, metrics

    def _all_candidates(self, batch: Batch, embedding: dict[str, Tensor]) -> Candidates:
        """What queries are compared with: the batch's documents and those in memory, or the fixed ones."""
        if self.fixed is not None:
            return self.fixed.candidates(embedding["query"].device)
        documents = self._candidates(batch.documents, embedding["document"])
        if self.config.cross_batch_memory_prefill and not self.memory.steps:
            self._fill_memory(documents.embedding_MD)
        candidates = self.memory.extend(documents)
        self.memory.add(documents)
        return candidates

    def _candidates(self, documents: list[str], document_MD: Tensor) -> Candidates:
        """The documents with their embeddings, the same on every process."""
        teacher = None
        if self.teacher is not None and self.uses_teacher:
            teacher = torch.from_numpy(self.teacher.documents(documents)).to(document_MD.device)
        keys = np.array([document_key(text) for text in documents], dtype=np.int64)
        return Candidates(document_MD, keys, teacher)

    def _targets(self, batch: Batch, pairs: Sequence[int]) -> list[int]:
        """For each of these pairs of the batch, the candidate that is its positive."""
        if self.fixed is None:
            return list(pairs)
        return self.fixed.rows([batch.pairs[i].positive for i in pairs])

    def _fill_memory(self, like: Tensor) -> None:
        """Fill the memory with documents of the pairs, drawn by the seed; `like` has their dtype and device."""
        config = self.config
        known = sorted({text for pair in self.pairs for text in pair.relevant})
        drawn = np.random.default_rng([config.loop.seed, MEMORY_STREAM]).permutation(len(known))
        documents = [known[i] for i in drawn[: config.cross_batch_memory_size]]
        mine = self._encoder().encode_document(process_share(documents), max_length=config.max_document_tokens)
        (document_MD,) = collectives.all_gather_rows([torch.from_numpy(mine).to(like)], [len(documents)])
        self.memory.fill(self._candidates(documents, document_MD), config.global_batch_size)

    def _view_distillation(self, batch: Batch, embedding: dict[str, Tensor], candidates: Candidates) -> Tensor:
        """`view_distillation` of the direct and latent embeddings, over the queries with given reasoning."""
        rows_of = {"query": range(len(batch.pairs)), "latent": batch.with_latent, "reasoning": batch.with_reasoning}
        generated = zip(batch.with_reasoning, batch.self_generated, strict=True)
        no_teacher = [own or pair in batch.false_words for pair, own in generated]
        return self._fitted_to(candidates, batch, *taught_queries(embedding, rows_of, no_teacher))

    def _fitted_to(
        self, candidates: Candidates, batch: Batch, pairs: list[int], student_BD: Tensor, teacher_BD: Tensor
    ) -> Tensor:
        """`view_distillation` of the teacher's ranking into the student's embeddings of these pairs' queries."""
        answers = [self.answers[batch.pairs[i].query] for i in pairs]
        mask_BM = candidates.false_negatives(answers, self._targets(batch, pairs))
        document_MD, temperature = candidates.embedding_MD, self.config.view_temperature
        return view_distillation(student_BD, teacher_BD, document_MD, temperature, mask_BM.to(document_MD.device))

    def _language_terms(self, encoded: Encoded) -> dict[str, Tensor]:
        """Cross-entropy and KL of this process's rows, weighted so that the mean over processes is over all rows."""
        weights = self.config.weights
        terms: dict[str, Tensor] = {}
        if not (weights.sft or weights.kl):
            return terms
        embed_id, target_T = self.checkpoint.contract.embed_token_id, encoded.target_T
        keep_T = None if target_T is None else target_T != embed_id
        counts = [0, 0] if target_T is None or keep_T is None else [len(target_T), int(keep_T.sum())]
        ce_weight, kl_weight = collectives.rank_weights(*counts, device=encoded.embedding_BD.device)
        if encoded.token_loss_T is not None:
            return {"sft": ce_weight * encoded.token_loss_T.mean()}
        if encoded.logits_TV is None or target_T is None:
            return terms
        if weights.sft:
            terms["sft"] = ce_weight * sft_cross_entropy(encoded.logits_TV, target_T)
        if weights.kl and encoded.base_logits_TV is not None:
            terms["kl"] = kl_weight * kl_to_base(
                encoded.logits_TV, encoded.base_logits_TV, keep_T, exclude_ids=(embed_id,)
            )
        return terms

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """`dev_evaluation.dev_metrics` of the recipe's dev pools."""
        if not self.pools:
            return {}
        config, encoder = self.config, self._encoder()
        embedder = encoder if self.fixed is None else self.fixed.encoder(encoder)
        return dev_metrics(embedder, self.pools, config.max_document_tokens, config.max_reasoning_tokens)

    def state_dict(self) -> dict[str, Any]:
        """The self-generated reasoning and the cross-batch memory."""
        return {
            "self_reasoning": self.collator.self_reasoning.state_dict(),
            "cross_batch_memory": self.memory.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.collator.self_reasoning.load_state_dict(state["self_reasoning"])
        self.memory.load_state_dict(state["cross_batch_memory"])

    def save(self, folder: Path) -> None:
        """Write the adapter, its contract, and the dimensions to which embeddings can be truncated."""
        more = {"dimensions": sorted(self.config.matryoshka)} if self.config.matryoshka else {}
        documents = None if self.fixed is None else self.fixed.documents
        checkpoints.save_adapter(
            self.policy.saved_model,
            self.checkpoint.contract,
            folder,
            documents,
            self.checkpoint.query_normalizer,
            **more,
        )

    def _encoder(self) -> SearchR3:
        """A SearchR3 with the current weights merged, in the precision of training."""
        return self._live.sync()


def train_sft(recipe: str | Path, overrides: Sequence[str] = (), resume: bool = True) -> Path:
    """Train stage 1 from a YAML recipe; returns the adapter's folder, with golden vectors.

    Raises:
        InputError: the recipe, the pairs, the base model or the disk has a problem.
    """
    config = load_config(recipe, SFTConfig, overrides)
    start_processes()
    pairs = [pair for path in config.pairs for pair in read_pairs(path)]
    if config.init_adapter:
        checkpoint = checkpoints.load(config.init_adapter, dtype=getattr(torch, config.base_dtype), merge=False)
    else:
        checkpoint = checkpoints.load_base(config.base, dtype=getattr(torch, config.base_dtype))
    fixed = None
    if config.documents == "fixed":
        fixed = fixed_documents(config, checkpoint, pairs)
    elif checkpoint.documents is not None:
        raise InputError(f"{config.init_adapter} is a query adapter, which is trained with documents: fixed; set that")
    checkpoint.documents = None  # its documents are embedded
    checkpoint.model.set_attn_implementation(resolve_attention(config.attention))
    torch.manual_seed(config.loop.seed)  # for the initialization of the adapter
    task = SFTTask(config, checkpoint, pairs, fixed)
    return train_stage(
        task,
        config,
        resume=resume,
        best_metric="ndcg@10.off",
        ignored=("output", "data_root", "pairs", "teacher", "loop", "activation_checkpointing", "mini_batch_size"),
        identity={
            "pairs_sha256": [sha256_of(path) for path in config.pairs],
            "base_contract": checkpoint.contract.hash,
            **({} if fixed is None else {"documents_sha256": fixed.sha256}),
            **(
                {"query_normalizer_sha256": task.checkpoint.contract.query_normalizer}
                if config.query_normalizer is not None
                else {}
            ),
        },
    )
