"""A tiny data root, and an encoder with SearchR3's methods that needs no weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.model.searchr3 import Reasoned

CORPUS = {
    "d1": Document("d1", "Aspirin", "Aspirin lowers the risk of a heart attack."),
    "d2": Document("d2", "", "Yeast makes bread rise."),
    "d3": Document("d3", "Tides", "The moon moves the sea."),
    "d4": Document("d4", "", ""),
}
QUERIES = {"q1": "does aspirin prevent a heart attack", "q2": "why does bread rise", "q3": "what moves the sea"}
QRELS = {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1, "d4": 1}, "q3": {"d3": 1}}


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Two data sets: "tiny" with a test split, "nested/en" with a dev split too."""
    root = tmp_path / "data"
    for name in ("tiny", "nested/en"):
        write_beir(root / name, BeirDataset(name, CORPUS, QUERIES, QRELS), "test")
    write_beir(root / "nested/en", BeirDataset("nested/en", CORPUS, QUERIES, {"q1": QRELS["q1"]}), "dev")
    return root


class FakeModel:
    """Bag-of-words rows by hashing; reasoning appends the query to itself. Counts what it encodes."""

    def __init__(self, contract_hash: str = "a" * 64) -> None:
        self.contract_hash = contract_hash
        self.dtype = "float32"
        self.documents = 0
        self.queries = 0

    def encode_document(self, texts, *, batch_size=32, show_progress_bar=None, max_length=None):
        self.documents += len(texts)
        return np.stack([_row(" ".join(text.split()[:max_length])) for text in texts])

    def encode_query(self, texts, *, reasoning=True, batch_size=32, show_progress_bar=None):
        assert reasoning is False
        self.queries += len(texts)
        return np.stack([_row(text) for text in texts])

    def reason(self, texts, *, max_reasoning_tokens=32, batch_size=32, show_progress_bar=None):
        self.queries += len(texts)
        return [
            Reasoned(f"about {text}", _row(f"about {text} {text}"), i + 1, i == 0, []) for i, text in enumerate(texts)
        ]


def _row(text: str) -> np.ndarray:
    row = np.full(64, 1e-3, dtype=np.float32)
    for word in text.lower().replace(".", "").split():
        row[hashlib.sha256(word.encode()).digest()[0] % 64] += 1
    return row / np.linalg.norm(row)


@pytest.fixture
def make_model() -> type[FakeModel]:
    return FakeModel
