"""The batches of stage 1: which pairs, which of them in which conversation, and the token rows of each.

A pair's query is always embedded directly. Some pairs are also trained with reasoning before the embed token, in latent
steps, or with the passages that a search found; `batch` draws them by the seed and the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.searchr3 import SearchR3, encode_as_text
from search_r3.model.tokenization import Text, normalized
from search_r3.prompts import PromptTemplate, reading_conversation, render, templates_of
from search_r3.training.distributed import collectives
from search_r3.training.lora.policy import Rows
from search_r3.training.sft.batch import Batch
from search_r3.training.sft.batch_sampler import BatchSampler
from search_r3.training.sft.contrastive import batch_documents
from search_r3.training.sft.in_batch_lm import CONVERSATION, InBatchLM
from search_r3.training.sft.query_augmentation import draw_texts
from search_r3.training.sft.reading_rows import ReadingRows, plan_reading, trace_name
from search_r3.training.sft.self_reasoning import SelfReasoning
from search_r3.training.sft.sft_config import SFTConfig
from search_r3.training.sft.trust import false_reasoning


class SFTCollator:
    """Makes the batches of a run, each process its share of every conversation's rows.

    Args:
        checkpoint: provides the tokenizer and the contract, whose prompts include the conversations of the recipe.
        sampler: chooses the pairs of a step.
        answers: the keys of the documents that answer each query, with their grades (`contrastive.known_answers`).
        encoder: returns a SearchR3 with the current weights, which writes the self-generated reasoning.

    Attributes:
        self_reasoning: the self-generated reasoning, which is part of a run's state.
        in_batch_lm: None unless the recipe weights that term.
    """

    def __init__(
        self,
        config: SFTConfig,
        checkpoint: Checkpoint,
        sampler: BatchSampler,
        answers: Mapping[str, Mapping[int, float]],
        encoder: Callable[[], SearchR3],
    ) -> None:
        self.config, self.sampler, self.answers, self.encoder = config, sampler, answers, encoder
        self.tokenizer, contract = checkpoint.tokenizer, checkpoint.contract
        self.embed_id = contract.embed_token_id
        self.normalize_query = checkpoint.normalizer(queries=True)
        self.normalize_document = checkpoint.normalizer(queries=False)
        templates = templates_of(contract.prompts, self.tokenizer)
        self.document, self.query, self.reasoning = (templates[name] for name in ("document", "query", "reasoning"))
        self.latent: PromptTemplate | None = templates.get("latent")
        self.reading = templates.get("reading", self.query)
        conversation = contract.prompts.reading or reading_conversation()
        self.reading_rows = ReadingRows(
            conversation, self.tokenizer, config.max_query_tokens, self.normalize_query, self.normalize_document
        )
        self.in_batch_lm: InBatchLM | None = None
        if config.weights.in_batch_lm:
            template = render(CONVERSATION, self.tokenizer, give_answer=False)
            self.in_batch_lm = InBatchLM(config, template, self._ids)
        self.query_answer = len(self.query.suffix) - len(
            render(contract.prompts.query, self.tokenizer, give_answer=False).suffix
        )
        self.self_reasoning = SelfReasoning(
            config.self_reasoning_start_step,
            config.self_reasoning_refresh_steps,
            config.max_reasoning_tokens,
            config.self_reasoning_temperature,
            config.loop.seed,
        )

    def batch(self, step: int) -> Batch:
        """The batch of `step`: a function of the seed, the step, the process, and the self-generated reasoning.

        It does not depend on the number of processes, each of which gets its share of every conversation's rows.
        """
        config = self.config
        if config.global_batch_size < collectives.world_size():
            raise InputError(
                f"global_batch_size is {config.global_batch_size}, too few for {collectives.world_size()} processes: "
                "each needs at least one pair of the batch"
            )
        if config.self_reasoning_ratio:
            self.self_reasoning.refresh(step, self._self_reasoning_queries, self.encoder)
        pairs, with_reasoning, self_generated = self._plan(step)
        false_words = false_reasoning(config, step, pairs)
        true_words = sorted({*with_reasoning} - {*false_words})  # false words follow no passages, as in the target
        reading = plan_reading(config, step, pairs, true_words, self.answers)
        documents: list[str] = []
        if config.documents == "trained":
            documents = batch_documents(
                pairs, config.positives_per_pair, config.negatives_per_pair, config.loop.seed, step
            )
        texts = draw_texts(config, step, [pair.query for pair in pairs], documents)
        parts = {
            "query": self._rows(self.query, process_share(texts.queries), config.max_query_tokens, self.query_answer)
        }
        if config.documents == "trained":
            mine = process_share(texts.documents)
            parts = {"document": self._rows(self.document, mine, config.max_document_tokens, 0)} | parts
        if with_reasoning:
            shown = [replace(pair, query=text) for pair, text in zip(pairs, texts.queries, strict=True)]
            parts["reasoning"] = self._reasoning_rows(
                shown, with_reasoning, self_generated, reading.before_reasoning, false_words
            )
        with_latent = self._latent_pairs(step, len(pairs))
        if with_latent:
            mine = process_share([texts.queries[i] for i in with_latent])
            assert self.latent is not None  # the recipe has latent steps
            parts["latent"] = self._rows(self.latent, mine, config.max_query_tokens, 0)
            parts["latent"].latent_steps = config.latent_steps
        with_passages = list(reading.direct)
        if with_passages:
            queries = process_share([texts.queries[i] for i in with_passages])
            passages = [reading.direct[with_passages[i]] for i in collectives.strided_indices(len(with_passages))]
            parts["reading"] = self.reading_rows.rows(self.reading, queries, passages, self.query_answer)
        if texts.changed_of:
            parts["changed"] = self._rows(self.query, process_share(texts.changed), config.max_query_tokens, 0)
        if not (config.weights.sft or config.weights.kl):  # no logits: they take 200 kB per token
            for rows in parts.values():
                rows.num_target_tokens = [0] * len(rows.rows)
        query_documents = None
        if self.in_batch_lm is not None:
            query_documents = self.in_batch_lm.choose(step, len(pairs), len(documents))
            parts["in_batch_lm"] = self.in_batch_lm.rows(query_documents, [pair.query for pair in pairs], documents)
        return Batch(
            parts,
            pairs,
            documents,
            with_reasoning,
            self_generated,
            texts.changed_of,
            with_latent,
            with_passages,
            query_documents,
            false_words,
        )

    def _plan(self, step: int) -> tuple[list[TrainingPair], list[int], list[bool]]:
        """The pairs of a step, the indices of those also trained with reasoning, and whether that is self-generated."""
        config = self.config
        pairs = self.sampler.batch(step)
        rng = np.random.default_rng([config.loop.seed, step, 0])
        reason_B = rng.random(len(pairs)) < config.reasoning_ratio
        self_B = rng.random(len(pairs)) < config.self_reasoning_ratio
        if step < config.self_reasoning_start_step:
            self_B[:] = False
        false = false_reasoning(config, step, pairs)
        chosen = [i for i in range(len(pairs)) if reason_B[i] and (i in false or self_B[i] or pairs[i].reasoning)]
        return pairs, chosen, [bool(self_B[i]) and i not in false for i in chosen]

    def _latent_pairs(self, step: int, pairs: int) -> list[int]:
        """Pairs also trained in latent mode, chosen by the same random numbers as those with reasoning."""
        config = self.config
        if not config.latent_steps:
            return []
        draw_B = np.random.default_rng([config.loop.seed, step, 0]).random(pairs)
        return [i for i in range(pairs) if draw_B[i] < config.latent_ratio]

    def _self_reasoning_queries(self, step: int) -> list[tuple[str, Text]]:
        pairs, with_reasoning, self_generated = self._plan(step)
        read = plan_reading(self.config, step, pairs, with_reasoning, self.answers).before_reasoning
        chosen = [i for i, generated in zip(with_reasoning, self_generated, strict=True) if generated]
        return self.reading_rows.to_reason_about(pairs, chosen, read)

    def _rows(self, template: PromptTemplate, texts: list[str], limit: int, answers: int) -> Rows:
        normalize = self.normalize_document if template is self.document else self.normalize_query
        rows = [[*ids, *template.suffix] for ids in self._ids(normalized(texts, normalize), limit)]
        return Rows(template.prefix, rows, [answers] * len(rows))

    def _reasoning_rows(
        self,
        pairs: Sequence[TrainingPair],
        chosen: Sequence[int],
        generated: Sequence[bool],
        read: Mapping[int, Sequence[str]],
        false_words: Mapping[int, str],
    ) -> Rows:
        """This process's rows of the conversation with reasoning; `read` has the passages of the pairs that read."""
        rows, answers = [], []
        places = collectives.strided_indices(len(chosen))
        mine = [(pairs[chosen[i]], trace_name(pairs[chosen[i]], chosen[i] in read), generated[i]) for i in places]
        false = [false_words.get(chosen[i]) for i in places]
        true = [self.self_reasoning.texts[name] if is_own else pair.reasoning or "" for pair, name, is_own in mine]
        texts = [words if untrue is None else untrue for words, untrue in zip(true, false, strict=True)]
        traces = self._ids(texts, self.config.max_reasoning_tokens)
        turns = self.reading_rows.turns([pair.query for pair, *_ in mine], [read.get(chosen[i], ()) for i in places])
        for (_, name, is_own), untrue, turn, trace in zip(mine, false, turns, traces, strict=True):
            rows.append([*turn, *self.reasoning.suffix, *trace, self.embed_id])
            targets = int(name in self.self_reasoning.cut) if is_own else len(trace) + 1
            answers.append(targets if untrue is None else 0)
        return Rows(self.reasoning.prefix, rows, answers)

    def _ids(self, texts: list[str], limit: int) -> list[list[int]]:
        return [ids[:limit] for ids in encode_as_text(self.tokenizer, texts)]


def process_share(texts: Sequence[str]) -> list[str]:
    """This process's share of a batch's texts."""
    return [texts[i] for i in collectives.strided_indices(len(texts))]
