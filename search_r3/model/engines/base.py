"""Extension point for ways to run the LLM. An engine takes token ids and returns hidden states at the embed token.

An engine knows nothing of prompts, only of a shared prefix and of rows that follow it. Each is tested against the same
golden vectors. docs/write-your-own/engine.md adds one.

A complete engine, one text at a time. Its package names it under the entry point `search_r3.engines`,
`plain = "my_package.plain:PLAIN"`, and `SearchR3.from_pretrained(..., engine="plain")` finds it::

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
    """Runs one LLM. Results do not depend on batching or on the calling thread.

    `dimension` is the width of an embedding. Its `EngineSpec` lists any further capabilities. The docstring of the
    module shows a complete engine.
    """

    dimension: int

    def embed(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """The unit embedding at the last token of `prefix + row`, for each row: float32 (len(rows), dimension)."""
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
        """Continue each `prefix + row` until the embed token, feed that token, and return the state at it.

        Each row is sampled `samples` times; a row's samples stand together in the list. `max_new_tokens` is one number
        or one for each row. `seed` is one number or one for each sample: then a sample does not depend on those beside
        it. `on_token` is called with a sample's place in the list and each token's id as it is written, the embed token
        excepted; what it raises ends the call.
        """
        ...


@dataclass
class Generation:
    """One continued row.

    Attributes:
        token_ids: what was written before the embed token; at most the budget.
        embedding: float32 (dimension,), L2-normalized: the state at the embed token.
        forced: the model did not emit the token (out of budget, or it ended its turn), so it was appended.
        ended: the end-of-turn token that it wrote instead, if that is why; it was not fed in.
    """

    token_ids: list[int]
    embedding: np.ndarray
    forced: bool
    ended: int | None = None


@dataclass(frozen=True)
class EngineInputs:
    """What an engine is opened on.

    Attributes:
        checkpoint: the loaded model (adapter merged), its tokenizer and its contract.
        templates: the conversations as token ids, under "document", "query" and "reasoning"; and "latent" if the
            checkpoint has it.
        stop_ids: the end-of-turn tokens.
        vocab_size: ids from here on are padding rows, which must never be sampled.
        training_folder: set if the engine samples rollouts while the model is trained: `load_weights` is called after
            each update, the rest of the device's memory is training's, and this folder is for the engine's files.
    """

    checkpoint: Checkpoint
    templates: Mapping[str, PromptTemplate]
    stop_ids: list[int]
    vocab_size: int
    training_folder: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The tokens that every engine must know: `embed_id`, `stop_ids` and `vocab_size`."""
        embed_id = self.checkpoint.contract.embed_token_id
        return {"embed_id": embed_id, "stop_ids": self.stop_ids, "vocab_size": self.vocab_size}


@dataclass(frozen=True)
class EngineSpec:
    """An engine's name and what it can do, known before anything heavy is imported.

    Attributes:
        name: what `--engine` and `SearchR3.from_pretrained(engine=...)` take.
        summary: one line for the command line's help.
        open: makes the engine; raises InputError if it cannot run this model, or not on this machine.
        check: raises InputError if it cannot run here at all; called before any weights are read.
        device: where it runs if no device is named; None uses a GPU if there is one.
        precision: what its embeddings are computed in, such as "int8"; None: in the weights' own dtype.
        golden_tolerance: cosine distance allowed between its golden vectors and the stored ones; None: the dtype's.
        continuous_batching: it has `continuous_batch(prefix)`, as `TorchEngine` does, whose rows join and leave between
            two tokens; without it a server batches whole requests.
        supports_weight_sync: it has `load_weights(model)`, so GRPO can sample its rollouts with it.
        busy_threads: it runs threads of its own, beside which torch's idle ones must sleep.
        latent_steps: it has `embed_latent`, as `TorchEngine` does, which feeds soft tokens; without it queries cannot
            be embedded with `reasoning="latent"`.
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


def broadcast_budget(budget: int | Sequence[int], rows: int) -> list[int]:
    """The budget of each row, where there may be one for all."""
    return [budget] * rows if isinstance(budget, int) else list(budget)
