"""The engines that sample rollouts: for each query a group of reasoning traces, each with its embedding.

Sampling is by temperature alone: no top-p or top-k (they would bias the ratio), and no padding ids. Source: arXiv
2510.07048, stage 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from search_r3.model.engines.base import Generation
from search_r3.model.engines.vllm.vllm_generation import VllmWriter, check_device, continue_rows, import_vllm
from search_r3.model.searchr3 import SearchR3, encode_as_text
from search_r3.training.grpo.rollout import Rollout


class RolloutEngine(Protocol):
    """Samples rollouts."""

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
        """`group` rollouts for each query, those of a query one after another: len(queries) * group of them.

        Args:
            max_tokens: reasoning tokens at most; the embed token may still follow them.
            max_query_tokens: tokens kept of a query.
            temperature: above 0; 0 is greedy.
            seed: one for all, or one for each query. With the torch engine, the same seed, weights and query give the
                same rollouts, whatever else is in the batch.
        """
        ...


class TorchRollouts:
    """Samples with our own engine: a query is prefilled once for its group, the conversation's prefix once for all.

    Args:
        batch_size: rollouts that are generated at once.
    """

    def __init__(self, batch_size: int = 64) -> None:
        self.batch_size = batch_size
        self.encoder: SearchR3 | None = None

    def sync(self, encoder: SearchR3) -> None:
        """See `RolloutEngine.sync`."""
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
        """See `RolloutEngine.sample`."""
        if self.encoder is None:
            raise RuntimeError("sync first: there are no weights to sample with")
        encoder = self.encoder
        prompts = query_rows(encoder, queries, max_query_tokens)
        generations = self._generate(
            encoder,
            prompts,
            max_new_tokens=max_tokens,
            temperature=temperature,
            seed=seeds_of(seed, len(queries), group),
            batch_size=self.batch_size,
            samples=group,
        )
        return [
            Rollout(
                prompt_ids=prompts[i // group],
                token_ids=generation.token_ids,
                text=encoder.tokenizer.decode(generation.token_ids).strip(),
                embedding=generation.embedding,
                forced=generation.forced,
                ended=generation.ended,
            )
            for i, generation in enumerate(generations)
        ]

    def _generate(self, encoder: SearchR3, rows: list[list[int]], **settings: Any) -> list[Generation]:
        return encoder.engine.generate(encoder.templates["reasoning"].prefix, rows, **settings)


class VLLMRollouts(TorchRollouts):
    """Samples with vLLM in this process, into which the merged weights are pushed at each sync.

    vLLM does not return hidden states at a sampled token, so the embeddings take one more prefill by the torch engine.
    Whether the same seed gives the same rollouts depends on vLLM's kernels.

    Args:
        workspace: a folder for the merged model that vLLM is started from.
        gpu_memory: the share of the GPU's memory that vLLM may take; training needs the rest.
        module: replaces the `vllm` package (tests).
    """

    def __init__(self, workspace: Path, gpu_memory: float = 0.3, module: Any = None) -> None:
        """Raises InputError if vLLM is not installed."""
        super().__init__()
        self.vllm = import_vllm() if module is None else module
        self.workspace, self.gpu_memory = Path(workspace), gpu_memory
        self._writer: VllmWriter | None = None

    def sync(self, encoder: SearchR3) -> None:
        """See `RolloutEngine.sync`. The first one writes the merged model and starts vLLM on it.

        Raises:
            InputError: vLLM finds no GPU, does not run on the model's, or does not start on the model.
        """
        self.encoder = encoder
        model, engine = encoder.checkpoint.model, encoder.engine
        if self._writer is None:
            check_device(self.vllm, model.device)
            model.save_pretrained(str(self.workspace))
            encoder.tokenizer.save_pretrained(str(self.workspace))
            self._writer = VllmWriter(
                self.workspace,
                self.vllm,
                dtype=encoder.dtype,
                embed_id=engine.embed_id,
                stop_ids=engine.stop_ids.tolist(),
                padding=range(engine.vocabulary, engine.head.weight.shape[0]),
                gpu_memory=self.gpu_memory,
            )
            return
        # One matrix at a time, as vLLM merges q, k, v and gate, up by itself. A tied head has no weights of its own.
        weights = model.state_dict(keep_vars=True)
        tied = getattr(model.config, "tie_word_embeddings", False)
        self._writer.load_weights(
            [(name, value.data) for name, value in weights.items() if not (tied and name == "lm_head.weight")]
        )

    def _generate(self, encoder: SearchR3, rows: list[list[int]], **settings: Any) -> list[Generation]:
        if self._writer is None:
            raise RuntimeError("sync first: there are no weights to sample with")
        prefix, embed = encoder.templates["reasoning"].prefix, encoder.engine.embed
        return continue_rows(self._writer, embed, prefix, rows, **settings, progress=None, on_token=None)


def seeds_of(seed: int | Sequence[int], queries: int, group: int) -> list[int]:
    """A seed for each of `group` rollouts of each query, from one for all or one for each query."""
    entropy = [(seed, i) for i in range(queries)] if isinstance(seed, int) else [(one,) for one in seed]
    return [int(np.random.SeedSequence([*words, i]).generate_state(1)[0]) for words in entropy for i in range(group)]


def query_rows(encoder: SearchR3, queries: Sequence[str], max_query_tokens: int) -> list[list[int]]:
    """Token ids of the reasoning conversation between its shared prefix and the assistant's turn, for each query."""
    suffix = encoder.templates["reasoning"].suffix
    return [[*ids[:max_query_tokens], *suffix] for ids in encode_as_text(encoder.tokenizer, list(queries))]
