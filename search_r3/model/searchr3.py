"""SearchR3: one language model that reasons about a query and embeds it, and embeds documents.

The embedding is the L2-normalized final hidden state at `<|embed_token|>` (arXiv 2510.07048); no projection head.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from search_r3.errors import InputError
from search_r3.files import allow_no_temporary_folder, atomic_path, expand_user
from search_r3.model import checkpoint as checkpoints
from search_r3.model import golden
from search_r3.model.adaptive_reasoning import ADAPTIVE_FILE, AdaptiveRule
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.contract import Contract
from search_r3.model.engines.base import Engine, EngineInputs, EngineSpec, Generation
from search_r3.model.engines.registry import FASTEST, FASTEST_ENGINES, engine_spec
from search_r3.model.latent_steps import check_latent, latent_engine
from search_r3.model.quiet_loading import quiet_transformers
from search_r3.model.reading import Passages, conversation_of, what_is_read, with_passages
from search_r3.model.reasoned import REASONING_TEXT_TOKENS, Reasoned, check_reasoning_text, checked_budgets
from search_r3.model.resolve import default_model
from search_r3.model.tokenization import (
    DEFAULT_QUERY_TOKENS,
    MAX_CHARACTERS,
    CountedTexts,
    Text,
    Tokens,
    check_queries,
    check_texts,
    count_tokens,
    encode_as_text,
    reasoning_tokens,
    token_rows,
)
from search_r3.progress import on_terminal, progress_bar
from search_r3.prompts import PromptTemplate, ReadingConversation, templates_of

__all__ = ["MAX_CHARACTERS", "Reasoned", "SearchR3", "check_texts", "encode_as_text", "stop_ids"]

DEFAULT_DOCUMENT_TOKENS = 512
DOCUMENTS = "documents"
"""The folder, inside that of a merged query adapter, of the model that embeds documents."""
MANY_ROWS = 200
"""A progress bar is shown by default for more rows than this."""


class SearchR3:
    """A reason-then-embed model: `encode_document`, `encode_query`, `reason`, `similarity`.

    Example:
        >>> model = SearchR3.from_pretrained()  # doctest: +SKIP
        >>> documents = model.encode_document(["Paris is the capital of France."])
        >>> queries = model.encode_query(["capital of France"], reasoning=True)
        >>> model.similarity(queries, documents)
    """

    def __init__(self, checkpoint: Checkpoint, engine: str = "torch") -> None:
        self.checkpoint = checkpoint
        self.name: str = checkpoint.name
        self.source: str = checkpoint.name  # the argument of `from_pretrained`, by which an index finds its model again
        self.contract: Contract = checkpoint.contract
        self.contract_hash: str = checkpoint.contract.hash
        self.dimension: int = checkpoint.contract.dimension
        self.tokenizer = checkpoint.tokenizer
        self._rule: AdaptiveRule | None = None
        self.engine_spec: EngineSpec = engine_spec(engine)
        if checkpoint.documents is not None and not self.engine_spec.query_adapters:
            raise InputError(
                f"{self.name} is a query adapter, which engine {self.engine_spec.name} cannot run: it needs a second "
                "model for documents; use engine torch, int8 or llama.cpp"
            )
        self.dtype: str = self.engine_spec.precision or str(checkpoint.model.dtype).removeprefix("torch.")
        self.templates = templates_of(self.contract.prompts, self.tokenizer)
        self.engine: Engine = self.open_engine(self.engine_spec)
        self._counted = CountedTexts(self.tokenizer)
        self._documents: SearchR3 | None = None
        self._documents_lock = threading.Lock()

    @property
    def is_query_adapter(self) -> bool:
        """Whether another model embeds the documents."""
        return self.checkpoint.documents is not None

    @property
    def documents(self) -> SearchR3:
        """The model that embeds documents: itself, unless it is a query adapter, which loads it on first use."""
        if self.checkpoint.documents is None:
            return self
        with self._documents_lock:
            if self._documents is None:
                self._documents = SearchR3(self.checkpoint.documents.checkpoint, self.engine_spec.name)
            return self._documents

    @property
    def documents_contract(self) -> Contract:
        """The contract of the model that embeds documents."""
        return (self.checkpoint.documents or self.checkpoint).contract

    @property
    def document_spaces(self) -> tuple[str, ...]:
        """The document space of this model, and the contract that older indexes of this space name instead."""
        return self.contract.document_space, self.documents_contract.hash

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        device: str | None = None,
        engine: str = "auto",
        dtype: str = "auto",
    ) -> SearchR3:
        """Load a model.

        Args:
            name_or_path: a name that `search-r3 models` lists, a folder, or a hub id; None loads the default adapter.
            device: "cpu", "cuda", ...; None uses a GPU if there is one.
            engine: "auto" or "torch" is the reference. "fastest" is the first of "int8", "llama.cpp" and "torch" that
                runs the model here (on a GPU, "torch"). "int8" runs the Llama family on a CPU faster than float32, at a
                small cosine distance from it; its weights are quantized on first use and cached (docs/engines.md).
                "llama.cpp" does the same on CPUs without its instructions.
                "vllm" generates the reasoning with vLLM on a GPU. Installed packages can add engines.
            dtype: "auto" (float32 on a CPU, bfloat16 on a GPU), "float32" or "bfloat16". On CPUs with AMX, bfloat16 is
                about four times as fast, at a cosine distance of about 0.001 from float32.

        Raises:
            InputError: the name, engine, device or dtype is unknown, or the checkpoint is damaged.
        """
        allow_no_temporary_folder()
        import torch

        name_or_path = default_model() if name_or_path is None else name_or_path

        if engine == FASTEST:
            return cls._fastest(name_or_path, device, dtype)
        spec = engine_spec(engine)
        spec.check()
        chosen = device or spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"cannot use device {chosen!r}: {str(error).splitlines()[0]}") from error
        if dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"unknown dtype {dtype!r}: choose auto, float32 or bfloat16")
        if dtype == "auto":
            dtype = "float32" if chosen == "cpu" else "bfloat16"
        model = cls(checkpoints.load(name_or_path, dtype=getattr(torch, dtype), device=chosen), engine)
        folder = expand_user(name_or_path)
        model.source = str(folder.resolve()) if folder.is_dir() else str(name_or_path)
        return model

    @classmethod
    def _fastest(cls, name_or_path: str | Path, device: str | None, dtype: str) -> SearchR3:
        """`from_pretrained` with the first of `FASTEST_ENGINES` that accepts the model, its device and its dtype."""
        import torch

        on_gpu = device != "cpu" and (device is not None or torch.cuda.is_available())
        *others, reference = FASTEST_ENGINES
        for engine in () if on_gpu else others:
            with contextlib.suppress(InputError):
                return cls.from_pretrained(name_or_path, device, engine, dtype)
        return cls.from_pretrained(name_or_path, device, reference, dtype)

    def open_engine(self, spec: EngineSpec, training_folder: Path | None = None) -> Engine:
        """An engine on this model's weights; see `EngineInputs` for `training_folder`.

        Raises:
            InputError: the engine cannot run this model, or cannot run on this machine.
        """
        stops = stop_ids(self.checkpoint.model, self.tokenizer)
        return spec.open(EngineInputs(self.checkpoint, self.templates, stops, len(self.tokenizer), training_folder))

    @property
    def adaptive_rule(self) -> AdaptiveRule | None:
        """The rule for searches with `reasoning="auto"`; None if the checkpoint has none.

        Raises:
            InputError: the checkpoint's rule is damaged, or was fitted on another model.
        """
        path = Path(self.checkpoint.path) / ADAPTIVE_FILE
        if self._rule is None and path.is_file():
            self._rule = AdaptiveRule.load(path, self.contract_hash)
        return self._rule

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the merged model (safetensors), its tokenizer, contract and golden vectors to `folder`, atomically.

        The model that embeds a query adapter's documents is written to a folder of its own inside it.

        Raises:
            InputError: the adapter is not merged, or the engine has another precision than the weights.
        """
        if hasattr(self.checkpoint.model, "peft_config"):
            raise InputError("the adapter is not merged into its base; load the model merged, then save it")
        if self.engine_spec.precision is not None:  # the golden vectors would have that precision
            raise InputError(
                f"a model on the {self.engine_spec.name} engine cannot be saved; load it with engine torch, then save "
                "it"
            )
        with atomic_path(folder) as scratch:
            scratch.mkdir()
            with quiet_transformers():
                self.checkpoint.model.save_pretrained(str(scratch))
            self.tokenizer.save_pretrained(str(scratch))
            weights = checkpoints.weights_sha256(scratch)
            more: dict[str, Any] = {}
            if self.is_query_adapter:
                self.documents.save_pretrained(scratch / DOCUMENTS)
                more["documents"] = {"name": self.documents.name, "source": DOCUMENTS}
            checkpoints.write_record(scratch, "merged", self.contract, name=self.name, weights=weights, **more)
            if self.checkpoint.query_normalizer is not None:
                self.checkpoint.query_normalizer.save(scratch)
            if self.checkpoint.query_projection is not None:
                self.checkpoint.query_projection.save(scratch)
            self.write_golden(scratch)

    def encode_document(
        self,
        texts: Sequence[Text],
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        max_length: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Embed documents, without reasoning, with one prefill each.

        Args:
            texts: non-empty texts. Here and in all other methods, a text may also be given as `Tokens`.
            batch_size: rows per forward pass; it does not affect the result. Texts of similar length share a pass.
            show_progress_bar: None shows a bar on a terminal for more than 200 texts.
            max_length: texts are truncated to this many tokens; 512 by default.
            on_batch: called after each forward pass with the number of texts that it embedded; no bar is shown then.

        Returns:
            float32 (len(texts), dimension), unit rows.

        Raises:
            InputError: a text is empty or not a string; the message names its position.
        """
        limit = DEFAULT_DOCUMENT_TOKENS if max_length is None else max_length
        return self.documents._embed("document", texts, batch_size, show_progress_bar, limit, on_batch)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text as counted by `max_length`: without prompt and special tokens.

        A text whose case the contract changes, such as one in capitals, may have fewer tokens when it is embedded.
        """
        return self._counted.count(texts)

    def token_rows(
        self,
        texts: Sequence[Text],
        limit: int | None = None,
        between: Callable[[Sequence[list[int]]], None] = lambda rows: None,
        *,
        queries: bool = False,
    ) -> list[list[int]]:
        """The ids of users' texts, normalized as the contract says; see `search_r3.model.tokenization.token_rows`.

        Every text that is embedded goes through here, whichever way it came.

        Args:
            queries: the texts are queries, not documents.
        """
        normalize = self.checkpoint.normalizer(queries=queries)
        return token_rows(self.tokenizer, texts, limit, between, normalize=normalize)

    def normalize_query(self, text: str) -> str:
        """What is embedded in place of the query `text`: typos corrected and case restored, as far as the checkpoint
        has a query normalizer and its contract folds capitals; else `text` itself."""
        normalize = self.checkpoint.normalizer(queries=True)
        return text if normalize is None else normalize(text)

    @property
    def token_counter(self) -> Callable[[Sequence[str]], list[int]]:
        """`count_tokens` as a function that only needs the tokenizer and can be sent to another process."""
        return partial(count_tokens, self.tokenizer)

    def tokenize_documents(self, texts: Sequence[str], limit: int) -> tuple[list[Tokens], list[int]]:
        """Tokenize texts for `encode_document`.

        Returns:
            The first `limit` tokens of each text, and the number of tokens of each text, where `limit` + 1 stands for
            any larger number.

        Raises:
            InputError: a text is empty or not a string.
        """
        check_texts(texts)
        normalize = self.checkpoint.normalizer(queries=False) or str
        same = [text for text in texts if isinstance(text, str) and normalize(text) == text]
        known = self._counted.take(same)  # those that `count_tokens` has just counted
        others = iter(self.token_rows([text for text in texts if text not in known], limit + 1))
        rows = [known[text][: limit + 1] if text in known else next(others) for text in texts]
        return [Tokens(tuple(row[:limit])) for row in rows], [len(row) for row in rows]

    def encode_query(
        self,
        texts: Sequence[Text],
        *,
        passages: Passages | None = None,
        reasoning: bool | Literal["latent"] = True,
        max_reasoning_tokens: int = 32,
        reasoning_text: Sequence[str] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Embed queries, with or without reasoning first.

        Args:
            texts, batch_size, show_progress_bar: see `encode_document`.
            passages: for each query, the texts that a first search found, best first, which are read before reasoning
                and embedding (`search_r3.model.reading`), if the checkpoint was trained for it.
            reasoning: True generates at most `max_reasoning_tokens` tokens before the embed token (greedily, so the
                result is always the same); False embeds directly. "latent" uses a few soft tokens instead of words
                (`latent_steps`), if the checkpoint was trained for it. "auto" is available only in searches, because it
                depends on the scores of a direct search (see `SearchIndex.search`).
            max_reasoning_tokens: the maximum number of reasoning tokens.
            reasoning_text: reasoning about each query in someone's own words, which the model reads in place of its own
                (its first 512 tokens; may be empty). It generates nothing then, and `reasoning` must be True.

        Returns:
            float32 (len(texts), dimension), unit rows.

        Raises:
            InputError: a text is empty or has over 100,000 characters, the budget is below 0, or `reasoning` is "auto",
                or it is "latent" and `check_latent` refuses the model; `reading.reading_turns` refuses the passages; or
                `reasoning_text` does not have one string per text.
        """
        if reasoning_text is not None:
            check_reasoning_text(reasoning)
            return self.encode_with_reasoning(
                texts,
                reasoning_text,
                passages=passages,
                max_reasoning_tokens=REASONING_TEXT_TOKENS,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
            )
        if reasoning == "auto":
            raise InputError(
                'reasoning="auto" depends on the scores of a search, which encode_query does not have; use it to '
                f"search an index, with a model that has a rule ({ADAPTIVE_FILE}, fitted by search-r3 study)"
            )
        texts = with_passages(self, texts, passages)
        if reasoning == "latent":
            check_latent(self, texts)
            check_queries(texts)
            return self._embed("latent", texts, batch_size, show_progress_bar, DEFAULT_QUERY_TOKENS)
        if not isinstance(reasoning, bool):
            raise InputError(f'reasoning must be True, False or "latent", got {reasoning!r}')
        if not reasoning:
            check_queries(texts)
            conversation = conversation_of(self, texts)
            return self._embed(conversation, texts, batch_size, show_progress_bar, DEFAULT_QUERY_TOKENS)
        reasoned = self.reason(
            texts,
            max_reasoning_tokens=max_reasoning_tokens,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )
        return np.stack([r.embedding for r in reasoned]) if reasoned else self._no_embeddings()

    @property
    def latent_steps(self) -> int:
        """Soft tokens that are fed with `reasoning="latent"`; 0 if the checkpoint has no latent mode."""
        latent = self.contract.prompts.latent
        return 0 if latent is None else latent.steps

    @property
    def reading(self) -> ReadingConversation | None:
        """How many passages are read, and how much of each; None if the checkpoint has no reading mode."""
        return self.contract.prompts.reading

    def what_is_read(self, passages: Sequence[Text]) -> list[str]:
        """See `search_r3.model.reading.what_is_read`."""
        return what_is_read(self, passages)

    def reason(
        self,
        texts: Sequence[Text],
        *,
        passages: Passages | None = None,
        max_reasoning_tokens: int | Sequence[int] = 32,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        samples: int = 1,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Reasoned]:
        """Reason about each query in at most `max_reasoning_tokens` tokens and embed it, in one pass.

        Args:
            texts, show_progress_bar: see `encode_document`.
            passages: see `encode_query`; the reasoning follows them.
            max_reasoning_tokens: the token budget without the embed token, one for all texts or one per text; with 0,
                the embed token follows immediately.
            temperature: 0 is greedy; 1 samples from the model's own distribution.
            seed: sampling seed, not used when greedy. With one seed for all, a sample depends on its batch; with one
                per sample, only on its query and seed.
            samples: number of independently sampled traces per query, which are adjacent in the result.
            batch_size: number of traces generated at once.
            on_token: called for each generated token with the index of the trace in the result and the token id (see
                `search_r3.model.tokenization.TextStream`); an exception in it ends the call.

        Returns:
            len(texts) * samples results, query by query.

        Raises:
            InputError: a text is empty or has over 100,000 characters, or a budget, the temperature or a number is
                invalid.
        """
        texts = with_passages(self, texts, passages)
        check_queries(texts)
        budgets = checked_budgets(max_reasoning_tokens, len(texts), temperature, samples)
        _check_batch_size(batch_size)
        template = self.templates["reasoning"]
        rows = self._rows(template, texts, DEFAULT_QUERY_TOKENS)
        with progress_bar("reasoning", len(rows), _shown(show_progress_bar, rows)) as progress:
            generations = self.engine.generate(
                template.prefix,
                rows,
                max_new_tokens=budgets,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
                samples=samples,
                on_token=on_token,
            )
        prompts = (row for row in rows for _ in range(samples))
        return [self.reasoned(row, generation) for row, generation in zip(prompts, generations, strict=True)]

    def reasoned(self, row: list[int], generation: Generation) -> Reasoned:
        """The result for an engine's continuation of `row`, a query's ids after the reasoning conversation's prefix."""
        ids = generation.token_ids
        return Reasoned(
            text=self.tokenizer.decode(ids).strip(),
            embedding=self._projected(generation.embedding),
            num_tokens=len(ids),
            forced=generation.forced,
            token_ids=[*self.templates["reasoning"].prefix, *row, *ids, self.contract.embed_token_id],
        )

    def encode_with_reasoning(
        self,
        texts: Sequence[Text],
        reasoning: Sequence[str | Sequence[int]],
        *,
        passages: Passages | None = None,
        max_reasoning_tokens: int | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Embed each query with a given reasoning trace, without generating anything, with one prefill each.

        With a trace generated by `reason`, the embedding equals that of `reason`.

        Args:
            texts, batch_size, show_progress_bar: see `encode_document`.
            reasoning: one trace per text: a string (may be empty), in which "<|embed_token|>" and the like are plain
                characters, or token ids such as `Reasoned.reasoning_ids`.
            passages: see `encode_query`; the trace follows them.
            max_reasoning_tokens: truncate each trace to this many tokens; None keeps it whole.

        Returns:
            float32 (len(texts), dimension), unit rows.

        Raises:
            InputError: a text is empty, the numbers of traces and texts differ, or a token id is unknown or the embed
                token's.
        """
        texts = with_passages(self, texts, passages)
        check_queries(texts)
        _check_batch_size(batch_size)
        if isinstance(reasoning, str):
            raise InputError("give a list of reasoning traces, one per text, not one string")
        if len(reasoning) != len(texts):
            raise InputError(f"{len(reasoning)} reasoning traces for {len(texts)} texts; give one per text")
        if max_reasoning_tokens is not None and max_reasoning_tokens < 0:
            raise InputError(f"max_reasoning_tokens must be 0 or more, got {max_reasoning_tokens}")
        embed_id, template = self.contract.embed_token_id, self.templates["reasoning"]
        written = [reasoning_tokens(self.tokenizer, trace, embed_id, max_reasoning_tokens) for trace in reasoning]
        rows = [
            [*row, *ids, embed_id]
            for row, ids in zip(self._rows(template, texts, DEFAULT_QUERY_TOKENS), written, strict=True)
        ]
        if not rows:
            return self._no_embeddings()
        with progress_bar("encoding", len(rows), _shown(show_progress_bar, rows)) as progress:
            return self._projected(self.engine.embed(template.prefix, rows, batch_size, progress))

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarities of the rows of `a` and `b`, (len(a), len(b)); the rows must have unit length."""
        return np.asarray(a, dtype=np.float32) @ np.asarray(b, dtype=np.float32).T

    def golden(self) -> dict[str, np.ndarray]:
        """See `search_r3.model.golden.golden`."""
        return golden.golden(self)

    def write_golden(self, folder: Path) -> None:
        """See `search_r3.model.golden.write_golden`."""
        golden.write_golden(self, folder)

    def check_golden(self) -> float | None:
        """See `search_r3.model.golden.check_golden`."""
        return golden.check_golden(self)

    def _embed(
        self,
        side: str,
        texts: Sequence[Text],
        batch_size: int,
        show: bool | None,
        max_length: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        _check_batch_size(batch_size)
        if max_length < 1:
            raise InputError(f"max_length must be 1 or more, got {max_length}")
        template = self.templates[side]
        rows = self._rows(template, texts, max_length)
        if not rows:
            return self._no_embeddings()
        with progress_bar("encoding", len(rows), on_batch is None and _shown(show, rows)) as advance:
            progress = on_batch or advance
            if side == "document":
                return self.engine.embed(template.prefix, rows, batch_size, progress)
            if side == "latent":
                latent = latent_engine(self)
                return self._projected(
                    latent.embed_latent(template.prefix, rows, self.latent_steps, batch_size, progress)
                )
            return self._projected(self.engine.embed(template.prefix, rows, batch_size, progress))

    def _projected(self, query_QD: np.ndarray) -> np.ndarray:
        """The embeddings of queries, (Q, D) or (D,), after the query projection if the checkpoint has one."""
        projection = self.checkpoint.query_projection
        return query_QD if projection is None else projection(query_QD)

    def _rows(self, template: PromptTemplate, texts: Sequence[Text], max_length: int) -> list[list[int]]:
        queries = template is not self.templates["document"]
        return [[*ids, *template.suffix] for ids in self.token_rows(texts, max_length, queries=queries)]

    def _no_embeddings(self) -> np.ndarray:
        return np.empty((0, self.dimension), dtype=np.float32)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a turn: the end-of-sequence tokens of the tokenizer and of the generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, got {batch_size}")


def _shown(show: bool | None, rows: Sequence[object]) -> bool:
    """Whether to show a progress bar; unless the caller decides, on a terminal for more than `MANY_ROWS` rows."""
    return on_terminal() and len(rows) > MANY_ROWS if show is None else show
