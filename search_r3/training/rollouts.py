"""Rollouts: for each query a group of sampled analyses, each with the embedding behind it. Two engines, one protocol.

Sampling is plain: temperature, no top-p or top-k (they would bias the ratio), padding ids never. A rollout is what the
policy loss needs: the query's own ids, the ids that were sampled, and how the turn ended (arXiv 2510.07048, stage 2).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from search_r3.errors import InputError
from search_r3.model.searchr3 import SearchR3, encode_as_text


@dataclass
class Rollout:
    """One sampled analysis.

    Attributes:
        row: ids after the reasoning conversation's prefix, up to where the assistant begins to write.
        token_ids: what it wrote before the embed token; at most the budget.
        embedding: float32 (dim,), unit: the state at the embed token.
        forced: the embed token was put there and not sampled (out of budget, or the turn was ended).
        ended: the end-of-turn token that was sampled instead, if that is why.
        text: `token_ids` as text.
    """

    row: list[int]
    token_ids: list[int]
    embedding: np.ndarray
    forced: bool
    ended: int | None
    text: str


class Rollouts(Protocol):
    """An engine that samples."""

    def sync(self, encoder: SearchR3) -> None:
        """Sample with these weights from now on. `encoder` may be the same object each time, with other weights."""
        ...

    def sample(
        self,
        queries: Sequence[str],
        group: int,
        *,
        max_tokens: int,
        max_query_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
    ) -> list[Rollout]:
        """`group` rollouts of each query, those of a query together: len(queries) * group of them.

        Args:
            max_tokens: reasoning tokens at most; the embed token may still follow them.
            max_query_tokens: tokens kept of a query.
            temperature: above 0; 0 is greedy.
            seed: one for all, or one for each query. The same seed, weights and query give the same rollouts with the
                torch engine, whatever is sampled beside them.
        """
        ...


class TorchRollouts:
    """Samples with our own engine: a query is prefilled once for its group, the conversation's prefix once for all.

    Args:
        batch_size: rollouts that are written side by side.
    """

    def __init__(self, batch_size: int = 64) -> None:
        self.batch_size = batch_size
        self.encoder: SearchR3 | None = None

    def sync(self, encoder: SearchR3) -> None:
        """See `Rollouts.sync`."""
        self.encoder = encoder

    def sample(
        self,
        queries: Sequence[str],
        group: int,
        *,
        max_tokens: int,
        max_query_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
    ) -> list[Rollout]:
        """See `Rollouts.sample`."""
        if self.encoder is None:
            raise RuntimeError("sync first: there are no weights to sample with")
        frame, tokenizer = self.encoder.frames["reasoning"], self.encoder.tokenizer
        rows = query_rows(self.encoder, queries, max_query_tokens)
        written = self.encoder.engine.generate(
            frame.prefix,
            rows,
            max_new_tokens=max_tokens,
            temperature=temperature,
            seed=seeds_of(seed, len(queries), group),
            batch_size=self.batch_size,
            samples=group,
        )
        return [
            Rollout(
                rows[i // group],
                g.token_ids,
                g.embedding,
                g.forced,
                g.ended,
                tokenizer.decode(g.token_ids).strip(),
            )
            for i, g in enumerate(written)
        ]


class VLLMRollouts:
    """Samples with vLLM in this process, into which the merged weights are pushed at each sync.

    vLLM hands out no hidden states at a sampled token, so the embeddings take one more prefill by the torch engine.

    Args:
        workspace: a folder for the merged model that vLLM is started from.
        gpu_memory: the share of the GPU's memory that vLLM may take; training needs the rest.
        module: stands in for the `vllm` package (tests).
    """

    def __init__(self, workspace: Path, gpu_memory: float = 0.3, module: Any = None) -> None:
        """Raises InputError if vLLM is not installed."""
        if module is None:
            # In this process, or the weights could not be handed over.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            try:
                module = importlib.import_module("vllm")
            except ImportError as error:
                raise InputError("engine vllm needs vLLM on a GPU: pip install 'search-r3[vllm]'") from error
        self.vllm, self.workspace, self.gpu_memory = module, Path(workspace), gpu_memory
        self.encoder: SearchR3 | None = None
        self._llm: Any = None

    def sync(self, encoder: SearchR3) -> None:
        """See `Rollouts.sync`. The first one writes the merged model and starts vLLM on it."""
        self.encoder = encoder
        if self._llm is None:
            encoder.checkpoint.model.save_pretrained(str(self.workspace))
            encoder.tokenizer.save_pretrained(str(self.workspace))
            self._llm = self.vllm.LLM(
                model=str(self.workspace),
                dtype=encoder.dtype,
                enable_prefix_caching=True,  # the conversation's prefix and a group's query
                gpu_memory_utilization=self.gpu_memory,
            )
            return
        # One matrix at a time, as vLLM merges q, k, v and gate, up by itself. A tied head has no weights of its own.
        weights = encoder.checkpoint.model.state_dict(keep_vars=True)
        tied = getattr(encoder.checkpoint.model.config, "tie_word_embeddings", False)
        named = [(name, value.data) for name, value in weights.items() if not (tied and name == "lm_head.weight")]
        worker = self._llm.llm_engine.model_executor.driver_worker.model_runner.model
        worker.load_weights(named)
        self._llm.reset_prefix_cache()  # its keys and values are of the old weights

    def sample(
        self,
        queries: Sequence[str],
        group: int,
        *,
        max_tokens: int,
        max_query_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
    ) -> list[Rollout]:
        """See `Rollouts.sample`. The same seed gives the same rollouts only as far as vLLM's kernels do."""
        if self.encoder is None or self._llm is None:
            raise RuntimeError("sync first: there are no weights to sample with")
        encoder, engine = self.encoder, self.encoder.engine
        frame = encoder.frames["reasoning"]
        rows = query_rows(encoder, queries, max_query_tokens)
        stops = [engine.embed_id, *engine.stop_ids.tolist()]
        padding = range(engine.vocabulary, encoder.checkpoint.model.get_output_embeddings().weight.shape[0])
        settings = [
            self.vllm.SamplingParams(
                n=group,
                temperature=temperature,
                top_p=1.0,
                max_tokens=max_tokens + 1,
                stop_token_ids=stops,
                seed=own,
                detokenize=False,
                logit_bias=dict.fromkeys(padding, -100.0) or None,
            )
            for own in seeds_of(seed, len(queries), 1)
        ]
        prompts = [{"prompt_token_ids": [*frame.prefix, *row]} for row in rows]
        found: list[tuple[list[int], list[int], int | None]] = []
        for row, answer in zip(rows, self._llm.generate(prompts, settings, use_tqdm=False), strict=True):
            for output in answer.outputs:
                ids = list(output.token_ids)
                end = next((i for i, token in enumerate(ids) if token in stops), None)
                # Some versions leave the token that stopped a sample out of its ids, and say it apart.
                stop = ids[end] if end is not None else output.stop_reason
                found.append((row, ids[: min(max_tokens, len(ids)) if end is None else end], stop))
        texts = [[*row, *ids, engine.embed_id] for row, ids, _ in found]
        embeddings = engine.embed(frame.prefix, texts, 64, None)
        return [
            Rollout(
                row,
                ids,
                embedding,
                forced=stop != engine.embed_id,
                ended=stop if isinstance(stop, int) and stop != engine.embed_id else None,
                text=encoder.tokenizer.decode(ids).strip(),
            )
            for (row, ids, stop), embedding in zip(found, embeddings, strict=True)
        ]


def seeds_of(seed: int | Sequence[int], queries: int, group: int) -> list[int]:
    """A seed for each of `group` rollouts of each query, from one for all or one for each query."""
    owns = [(seed, i) for i in range(queries)] if isinstance(seed, int) else [(own,) for own in seed]
    return [int(np.random.SeedSequence([*own, i]).generate_state(1)[0]) for own in owns for i in range(group)]


def query_rows(encoder: SearchR3, queries: Sequence[str], max_query_tokens: int) -> list[list[int]]:
    """What follows the prefix of the reasoning conversation, up to where the assistant begins to write."""
    suffix = encoder.frames["reasoning"].suffix
    return [[*ids[:max_query_tokens], *suffix] for ids in encode_as_text(encoder.tokenizer, list(queries))]
