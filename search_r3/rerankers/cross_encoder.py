"""A cross-encoder of sentence-transformers as a reranker: one pass of a transformer over query and document together.

Nogueira & Cho (2019), "Passage Re-ranking with BERT", https://arxiv.org/abs/1901.04085. The models are those that
`sentence_transformers.CrossEncoder` loads and that give one score for a pair.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError, first_line
from search_r3.files import expand_user
from search_r3.model.complete_weights import watched_loading
from search_r3.model.quiet_loading import quiet_transformers
from search_r3.model.text_limit import TextTooLong
from search_r3.optional import optional_imports
from search_r3.rerankers.base import Kind, ReadingLimit, Scores, TooManyTokens, nothing

MAX_PAIR_TOKENS = 8192
"""Tokens of a pair that are read at most, also by a model that names no limit of its own, or a higher one."""
BATCH = 32
"""Pairs in one pass."""
TOKEN_CHARACTERS = 40
"""Characters of a text that are looked at for each token of the limit, so that a text of megabytes is not tokenized
whole. No language needs as many."""
HEADS = ("ForSequenceClassification", "ForCausalLM")
"""Endings of the architectures that score a pair; another one would get a random head."""


class CrossEncoderReranker:
    """Scores pairs by a cross-encoder: `raw` is its logit, `relevance` the logistic function of it. A score does not
    depend on the other documents, up to rounding. Concurrent calls alternate after every pass of 32 pairs.

    Args:
        name_or_path: a folder, or a hub id such as "cross-encoder/ms-marco-MiniLM-L6-v2". Only safetensors are read,
            and no code of the model's is run.
        device: "cpu", "cuda", ...; None uses a GPU if there is one.

    Raises:
        InputError: there is no such model, it lacks weights, or it is not a cross-encoder with one score for a pair.
    """

    kind: Kind = "cross-encoder"

    def __init__(self, name_or_path: str | Path, device: str | None = None) -> None:
        given = str(name_or_path)
        folder = expand_user(given)
        self.name = folder.name if folder.is_dir() else given
        self._model = _load(given, device)
        own: int | None = self._model.max_seq_length
        self.max_tokens = min(own or MAX_PAIR_TOKENS, MAX_PAIR_TOKENS)
        """The number of tokens of query and document together, with special tokens, that are read."""
        self._model.max_seq_length = self.max_tokens
        self._lock = threading.Lock()

    def score(
        self,
        query: str,
        documents: Sequence[str],
        *,
        limit: ReadingLimit = ReadingLimit(),  # noqa: B008  # frozen
        between: Callable[[], None] = nothing,
    ) -> Scores:
        """See `search_r3.rerankers.base.Reranker`. Of a pair over `max_tokens`, the ends of the longer text are left
        out first.

        Raises:
            TooManyTokens, TextTooLong: beyond `limit`.
            InputError: the model returned something that is no number; its weights are damaged.
        """
        from torch.nn import Identity

        query = query[: self.max_tokens * TOKEN_CHARACTERS]
        pairs, tokens = self._read(query, documents, limit, between)
        raw = np.zeros(len(pairs), dtype=np.float32)
        by_length = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][1]))
        for start in range(0, len(pairs), BATCH):
            between()
            chosen = by_length[start : start + BATCH]
            with self._lock:
                logits = self._model.predict(
                    [pairs[i] for i in chosen], batch_size=BATCH, activation_fn=Identity(), show_progress_bar=False
                )
            raw[chosen] = np.asarray(logits, dtype=np.float32).reshape(-1)
        if not np.isfinite(raw).all():
            raise InputError(f"the reranker {self.name} returned no usable score; check its weights")
        relevance = 1 / (1 + np.exp(-np.clip(raw.astype(np.float64), -700, 700)))
        return Scores(relevance, raw, tokens)

    def _read(
        self, query: str, documents: Sequence[str], limit: ReadingLimit, between: Callable[[], None]
    ) -> tuple[list[tuple[str, str]], int]:
        """The pairs as far as they are read, and their tokens."""
        pairs, total = [], 0
        for start in range(0, len(documents), BATCH):
            between()
            batch = [self._begin(text, limit) for text in documents[start : start + BATCH]]
            with self._lock:
                rows = self._model.tokenizer([query] * len(batch), batch, truncation=False, verbose=False)["input_ids"]
            for number, row in enumerate(rows, start=start + 1):
                if len(row) > self.max_tokens and not limit.truncate:
                    raise TextTooLong(
                        f"document {number} has {len(row):,} tokens with the query; the reranker {self.name} reads "
                        f"{self.max_tokens:,}: shorten it, or let it be truncated"
                    )
                total += min(len(row), self.max_tokens)
            if limit.total_tokens is not None and total > limit.total_tokens:
                raise TooManyTokens(
                    f"the documents, each with the query, have over {limit.total_tokens:,} tokens, the limit; send "
                    "several requests"
                )
            pairs += [(query, text) for text in batch]
        return pairs, total

    def _begin(self, text: str, limit: ReadingLimit) -> str:
        """The part of a document that is read, or a longer one."""
        begin = text[: self.max_tokens * TOKEN_CHARACTERS]
        if limit.document_tokens is None or limit.document_tokens >= self.max_tokens:
            return begin
        with self._lock:
            found = self._model.tokenizer(
                begin, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
            )
        ends = [end for _, end in found["offset_mapping"]]
        return begin if len(ends) <= limit.document_tokens else begin[: ends[limit.document_tokens - 1]]


def _load(name_or_path: str, device: str | None) -> Any:
    with optional_imports("rerank", "a cross-encoder"):
        from sentence_transformers import CrossEncoder
    looks_local = name_or_path.startswith((".", "/", "~")) or Path(name_or_path).exists()
    source = str(expand_user(name_or_path)) if looks_local else name_or_path
    if looks_local and not Path(source).is_dir():
        raise InputError(f"no cross-encoder at {name_or_path}; expected a folder")
    try:
        with quiet_transformers() if looks_local else nullcontext():  # downloads show their progress
            _check_head(source, name_or_path)
            with watched_loading(name_or_path):
                model = CrossEncoder(
                    source, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
                )
    except InputError:
        raise
    except Exception as error:  # as many kinds as there are damaged files
        raise InputError(
            f"cannot load the cross-encoder {name_or_path}: {first_line(error)} (a local folder or a hub id)"
        ) from error
    if model.num_labels != 1:
        raise InputError(
            f"{name_or_path} gives {model.num_labels} scores for a pair, so it is a classifier; a reranker gives one"
        )
    if model.config.architectures[0].endswith(HEADS[0]):  # a causal model's template needs its special tokens
        model.tokenizer.split_special_tokens = True  # "[SEP]" in a text is text
    return model


def _check_head(source: str, name: str) -> None:
    from transformers import AutoConfig

    architecture = (AutoConfig.from_pretrained(source, trust_remote_code=False).architectures or ["unknown"])[0]
    if not architecture.endswith(HEADS):
        raise InputError(
            f"{name} is a {architecture}, which gives no score for a pair; a cross-encoder's architecture ends in "
            f"{' or '.join(HEADS)}"
        )
