"""Documents that stay as they are while queries are trained: embedded once, and all of them negatives in every step.

The cosines of a batch's queries with a whole corpus are one matrix product. What is trained becomes a query adapter,
which searches the indexes of the documents' model (ANCE-PRF, arXiv 2108.13454, trains its query encoder this way).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.data.beir import load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.searchr3 import SearchR3
from search_r3.progress import on_terminal, progress_bar
from search_r3.training.dev_evaluation import load_dev_pools
from search_r3.training.distributed import collectives
from search_r3.training.distributed.sharding import start_processes
from search_r3.training.precision import resolve_mixed_precision
from search_r3.training.sft.contrastive import Candidates, document_key

BLOCK = 512
"""Texts that are embedded between two writes, the most work that a kill can lose."""


class FixedDocuments:
    """The documents' embeddings, and the model that made them.

    Args:
        embedding_ND: unit rows, float32. The first `negatives` of them are compared with every query.
        key_N: each row's key (see `contrastive.document_key`); the chunks of a document share one.
        documents: name and source of the model that embeds documents, for `checkpoint.save_adapter`.
        negatives: all rows by default; further ones are only looked up, for validation.
    """

    def __init__(
        self, embedding_ND: np.ndarray, key_N: np.ndarray, documents: tuple[str, str], negatives: int | None = None
    ) -> None:
        self.documents = documents
        self._embedding_ND, self._negatives = embedding_ND, len(key_N) if negatives is None else negatives
        self._row_of = {int(key): row for row, key in reversed(list(enumerate(key_N)))}
        self._chunked = len(self._row_of) < len(key_N)
        self._candidates = Candidates(torch.from_numpy(embedding_ND[: self._negatives]), key_N[: self._negatives])

    @property
    def sha256(self) -> str:
        """SHA-256 of the negatives' keys, by which a run knows its documents."""
        return hashlib.sha256(self._candidates.key_M.tobytes()).hexdigest()

    def candidates(self, device: torch.device) -> Candidates:
        """The documents as candidates of every query."""
        if self._candidates.embedding_MD.device != device:
            self._candidates.embedding_MD = self._candidates.embedding_MD.to(device)
        return self._candidates

    def nearest_chunks(self, grade_BN: Tensor, query_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Of several rows of a relevant document, only the nearest counts, as in a search.

        Returns:
            The grades, 0 at the other rows of the same document; and (B, N) bool, where those are.
        """
        others_BN = torch.zeros(grade_BN.shape, dtype=torch.bool)
        if not self._chunked:
            return grade_BN, others_BN
        candidates = self.candidates(query_BD.device)
        with torch.autocast(query_BD.device.type, enabled=False):  # bfloat16 would make ties of chunks that differ
            near_BN = (query_BD.detach().float() @ candidates.embedding_MD.T).cpu().numpy()
        for line, grade_N in enumerate(grade_BN.numpy()):
            places = np.flatnonzero(grade_N)
            order = places[np.argsort(-near_BN[line, places], kind="stable")]
            first = np.unique(candidates.key_M[order], return_index=True)[1]
            others_BN[line, torch.from_numpy(np.delete(order, first))] = True
        return grade_BN.masked_fill(others_BN, 0), others_BN

    def rows(self, texts: Sequence[str]) -> list[int]:
        """The row of each document."""
        return [self._row_of[document_key(text)] for text in texts]

    def encoder(self, queries: SearchR3) -> FixedDocumentEncoder:
        """An encoder of `queries`' model for queries, with these embeddings for documents."""
        return FixedDocumentEncoder(queries, self)

    def embeddings(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), D) float32."""
        return self._embedding_ND[self.rows(texts)]


@dataclass
class FixedDocumentEncoder:
    """A SearchR3 for queries, whose documents are looked up."""

    queries: SearchR3
    fixed: FixedDocuments

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queries, name)

    def encode_document(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        return self.fixed.embeddings(texts)


def fixed_documents(config: Any, checkpoint: Checkpoint, pairs: Sequence[TrainingPair]) -> FixedDocuments:
    """The embeddings of all documents of the pairs, of the recipe's corpora and of its dev pools.

    Those of the dev pools alone are no negatives. All are kept in the run's folder, so that a run which is started
    again embeds only what is missing.

    Args:
        config: an `SFTConfig` with `documents: fixed`.
        checkpoint: `init_adapter`; its `documents` embed them, if it is a query adapter.

    Raises:
        InputError: a corpus or a dev pool is missing or broken, `init_adapter` is no adapter, or the disk is full.
    """
    model = checkpoint.documents or checkpoint
    if checkpoint.contract.adapter_weights and not hasattr(checkpoint.model, "peft_config"):
        raise InputError(f"{config.init_adapter} is a merged model; give the adapter that it was made from")
    texts = dict.fromkeys(text for pair in pairs for text in (*pair.relevant, *pair.negatives))
    for name in config.corpora:
        corpus = load_beir(find_dataset(name, config.data_root)).corpus
        texts |= dict.fromkeys(document.full_text for document in corpus.values() if document.full_text)
    negatives = len(texts)
    texts |= dict.fromkeys(document.full_text for pool in load_dev_pools(config) for document in pool.corpus.values())
    accelerator = start_processes()
    bf16 = resolve_mixed_precision(config.loop.mixed_precision, accelerator.device) == "bf16"
    engine = config.documents_engine
    about = {"contract": model.contract.hash, "tokens": config.max_document_tokens, "bf16": bf16}
    about |= {} if engine == "torch" else {"engine": engine}

    def load() -> SearchR3:
        dtype = torch.bfloat16 if bf16 and engine == "torch" else torch.float32
        return SearchR3(checkpoints.load(model.source, dtype=dtype, device=accelerator.device), engine)

    folder = Path(config.output) / "documents"
    for turn in (True, False):  # one process embeds, then the others read
        if (collectives.rank() == 0) == turn:
            embedding_ND = embed_in_blocks(list(texts), load, config.max_document_tokens, folder, about)
        accelerator.wait_for_everyone()
    keys = np.array([document_key(text) for text in texts], dtype=np.int64)
    return FixedDocuments(embedding_ND, keys, (model.name, model.source), negatives)


def embed_in_blocks(
    texts: Sequence[str], load: Callable[[], SearchR3], max_tokens: int, folder: Path, about: dict[str, Any]
) -> np.ndarray:
    """The embeddings of `texts`, float32 (N, D), block by block from `folder`, or from the model that `load` returns.

    Args:
        about: what else determines the embeddings; a folder of others, or of other texts, is begun anew.
    """
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    digest = hashlib.sha256(json.dumps([texts[i] for i in order]).encode()).hexdigest()
    written = json.dumps(about | {"texts": digest, "block": BLOCK}, sort_keys=True) + "\n"
    record = folder / "about.json"
    if not record.is_file() or record.read_text(encoding="utf-8") != written:
        shutil.rmtree(folder, ignore_errors=True)
        atomic_write_text(record, written)
    starts = range(0, len(texts), BLOCK)
    blocks = {start: read for start in starts if (read := _read(folder / f"{start}.npy")) is not None}
    missing = [start for start in starts if start not in blocks]
    if missing:
        model, size = load(), sum(min(BLOCK, len(texts) - start) for start in missing)
        with progress_bar("embedding documents", size, on_terminal()) as advance:
            for start in missing:
                some = [texts[i] for i in order[start : start + BLOCK]]
                blocks[start] = model.encode_document(some, max_length=max_tokens, show_progress_bar=False)
                with atomic_path(folder / f"{start}.npy") as scratch, open(scratch, "wb") as handle:
                    np.save(handle, blocks[start])
                advance(len(some))
    sorted_ND = np.concatenate([blocks[start] for start in starts])
    out_ND = np.empty_like(sorted_ND)
    out_ND[order] = sorted_ND
    return out_ND


def _read(file: Path) -> np.ndarray | None:
    """A block of an earlier run; None if it is missing or damaged."""
    try:
        return np.asarray(np.load(file, allow_pickle=False), dtype=np.float32)
    except (OSError, ValueError, EOFError):
        return None
