"""Extension point for engines, which run the LLM: token ids in, hidden states at the embed token out.

An engine does not know about prompts, only about a shared prefix and the rows that follow it. All engines are tested
against the same golden vectors. docs/write-your-own/engine.md explains how to add one.

A complete engine that runs one text at a time. Its package declares it under the entry point `search_r3.engines`,
`plain = "my_package.plain:PLAIN"`, and `SearchR3.from_pretrained(..., engine="plain")` uses it::

    import numpy as np
    import torch

    from search_r3.model.engines.base import EngineSpec, Generation, broadcast_budget

    class PlainEngine:
        def __init__(self, model, embed_id, stop_ids, vocab_size):
            self.model, self.embed_id, self.stop_ids, self.vocab_size = model, embed_id, stop_ids, vocab_size
            self.dimension = model.config.get_text_config().hidden_size

        @torch.inference_mode()
        def _run(self, ids):
            out = self.model(input_ids=torch.tensor([ids], device=self.model.device), output_hidden_states=True)
            return out.hidden_states[-1][0, -1].float(), out.logits[0, -1, : self.vocab_size].float()

        def embed(self, prefix, rows, batch_size, progress=None):
            embeddings = np.empty((len(rows), self.dimension), dtype=np.float32)
            for i, row in enumerate(rows):
                state, _ = self._run([*prefix, *row])
                embeddings[i] = torch.nn.functional.normalize(state, dim=-1).cpu().numpy()
                if progress:
                    progress(1)
            return embeddings

        def generate(
            self, prefix, rows, *, max_new_tokens, temperature, seed, batch_size, progress=None, samples=1,
            on_token=None,
        ):
            assert temperature == 0, "this engine does not sample"
            generated = []
            for row, budget in zip(rows, broadcast_budget(max_new_tokens, len(rows)), strict=True):
                written = []
                while True:
                    _, logits = self._run([*prefix, *row, *written])
                    token = int(logits.argmax())
                    if token == self.embed_id or token in self.stop_ids or len(written) == budget:
                        break
                    written.append(token)
                    if on_token:
                        on_token(len(generated), token)
                embedding = self.embed(prefix, [[*row, *written, self.embed_id]], 1)[0]
                ended = token if token in self.stop_ids else None
                generated += [Generation(written, embedding, token != self.embed_id, ended)] * samples
                if progress:
                    progress(1)
            return generated

    def open_plain(inputs):
        return PlainEngine(inputs.checkpoint.model, **inputs.settings)

    PLAIN = EngineSpec("plain", "one text at a time, with transformers alone", open_plain)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from search_r3.model.checkpoint import Checkpoint
    from search_r3.prompts import PromptTemplate


class Engine(Protocol):
    """Runs one LLM. Results must not depend on batching or on the calling thread.

    The two methods here are required. Two more are optional and declared by flags of the `EngineSpec`:
    `continuous_batch(prefix)` (see `ContinuousBatchingEngine`) and `load_weights(model)` (see `TrainableEngine`). The
    docstring of the module shows a complete engine.
    """

    dimension: int
    """The dimension of an embedding."""

    def embed(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """The unit embedding at the last token of each `prefix + row`: float32 (len(rows), dimension).

        `progress` is called with the number of rows that have been finished since the last call.
        """
        ...

    def generate(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        *,
        max_new_tokens: int | Sequence[int],
        temperature: float,
        seed: int | Sequence[int],
        batch_size: int,
        progress: Callable[[int], None] | None = None,
        samples: int = 1,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """Continue each `prefix + row` until the embed token, and return the state at that token.

        Args:
            max_new_tokens: token budget without the embed token, one for all rows or one per row.
            temperature: 0 is greedy.
            seed: one for all samples, or one per sample; a sample then does not depend on the others in its batch.
            batch_size: number of samples generated at once.
            progress: called with the number of rows that have been finished since the last call.
            samples: number of samples per row, which are adjacent in the result.
            on_token: called for each generated token, except the embed token, with the index of the sample in the
                result and the token id; an exception in it ends the call.
        """
        ...


class ContinuousBatchingEngine(Engine, Protocol):
    """An engine whose spec has `continuous_batching`."""

    def continuous_batch(self, prefix: Sequence[int]) -> Any:
        """An object with the methods `join`, `step`, `leave` and `clear` of `continuous_batching.ContinuousBatch`."""
        ...


class TrainableEngine(Engine, Protocol):
    """An engine whose spec has `supports_weight_sync`, so that GRPO can sample its rollouts with it."""

    def load_weights(self, model: Any) -> None:
        """Run the weights of `model` from now on: the same model after an update, or another of the same shape."""
        ...


@dataclass
class Generation:
    """The continuation of one row.

    Attributes:
        token_ids: the tokens before the embed token, at most the budget.
        embedding: float32 (dimension,), L2-normalized: the state at the embed token.
        forced: whether the embed token was appended rather than sampled, because the budget was used up or the model
            ended its turn.
        ended: the end-of-turn token, if the model sampled one; it was not fed in.
    """

    token_ids: list[int]
    embedding: np.ndarray
    forced: bool
    ended: int | None = None


@dataclass(frozen=True)
class EngineInputs:
    """What an engine is created from.

    Attributes:
        checkpoint: the loaded model (adapter merged), its tokenizer and its contract.
        templates: the conversations as token ids, under "document", "query" and "reasoning"; and "latent" if the
            checkpoint has it.
        stop_ids: the end-of-turn tokens.
        vocab_size: ids from this one on are padding rows, which must never be sampled.
        training_folder: a folder for the engine's files if it samples rollouts during training; None otherwise. In
            training, `load_weights` is called after each update, and most of the device's memory is needed elsewhere.
    """

    checkpoint: Checkpoint
    templates: Mapping[str, PromptTemplate]
    stop_ids: list[int]
    vocab_size: int
    training_folder: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that every engine needs: `embed_id`, `stop_ids` and `vocab_size`."""
        embed_id = self.checkpoint.contract.embed_token_id
        return {"embed_id": embed_id, "stop_ids": self.stop_ids, "vocab_size": self.vocab_size}


@dataclass(frozen=True)
class EngineSpec:
    """An engine's name and capabilities, which are known without importing anything heavy.

    Attributes:
        name: the name for `--engine` and `SearchR3.from_pretrained(engine=...)`.
        summary: one line for the command line's help.
        open: creates the engine; raises InputError if it cannot run this model, or cannot run on this machine.
        check: raises InputError if the engine cannot run here at all; called before any weights are read.
        device: the default device; None uses a GPU if there is one.
        precision: the precision of the embeddings, such as "int8"; None means the dtype of the weights.
        golden_tolerance: accepted cosine distance from the golden vectors; None uses that of the dtype.
        continuous_batching: whether the engine is a `ContinuousBatchingEngine`; if not, a server batches whole
            requests.
        supports_weight_sync: whether the engine is a `TrainableEngine`.
        busy_threads: whether the engine runs threads that keep all cores busy, so that torch's idle ones must sleep.
        query_adapters: whether two models can be run side by side, as a query adapter needs: its own, and the one that
            embeds documents.
        latent_steps: whether the engine is a `latent_steps.LatentEngine`; if not, queries cannot be embedded with
            `reasoning="latent"`.
    """

    name: str
    summary: str
    open: Callable[[EngineInputs], Engine]
    check: Callable[[], object] = lambda: None
    device: str | None = None
    precision: str | None = None
    golden_tolerance: float | None = None
    continuous_batching: bool = False
    supports_weight_sync: bool = False
    busy_threads: bool = False
    latent_steps: bool = False
    query_adapters: bool = False


def broadcast_budget(budget: int | Sequence[int], rows: int) -> list[int]:
    """The budget of each row, given one per row or one for all."""
    return [budget] * rows if isinstance(budget, int) else list(budget)
