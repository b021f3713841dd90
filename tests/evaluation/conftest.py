"""A tiny data root, and an encoder with SearchR3's methods that needs no weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.evaluation.publish.model_card import keep_run
from search_r3.evaluation.suite import evaluate, evaluate_system, load_dataset
from search_r3.evaluation.systems import SearchR3System
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


@pytest.fixture
def results(data_root, make_model, tmp_path):
    """BM25 and a fake model in both modes on "tiny" and "nested/en"."""
    output = tmp_path / "results"
    evaluate(["tiny", "nested/en"], ["bm25"], output, data_root=data_root, use_cache=False)
    for name in ("search-r3-x-sft", "search-r3-x-base"):
        for mode in ("on", "off"):
            system = SearchR3System(make_model(), name, mode, max_length=128)
            evaluate_system(load_dataset("tiny", None, data_root), "test", system, output, None)
    return output


@pytest.fixture
def trained_run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "lora": {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"},
        "weights": {"sft": 0.1, "kl": 0.0},
        "loop": {"seed": 3, "learning_rate": 0.001},
        "global_batch_size": 8,
        "temperature": 0.05,
        "max_query_tokens": 16,
        "max_document_tokens": 64,
        "reasoning_ratio": 0.25,
        "max_reasoning_tokens": 20,
        "dev": ["cosqa"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    log = [
        {"step": 0, "dev": {"cosqa.dev.off": 0.125}, "seconds": 900},
        {"step": 7, "loss": 1.0, "tokens": 2_500_000, "seconds": 2700},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    (folder / "curves.png").write_bytes(b"png")
    manifest = {"count": 1234, "sources": [{"kind": "titles", "dataset": "scifact", "count": 1234}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "search-r3-tiny-sft"
    folder.mkdir()
    contract = {"base": "smollm2-135m", "base_weights": "b" * 64, "dimension": 32, "embed_token_id": 49152}
    (folder / "search_r3.json").write_text(
        json.dumps({"kind": "adapter", "contract": contract, "contract_hash": "c" * 64})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 1_500_000)
    return folder


@pytest.fixture
def kept_run(trained_run: Path, tmp_path: Path) -> Path:
    """What documents that run, as it is kept beside the results."""
    keep_run(trained_run, tmp_path / "kept", [tmp_path / "manifest.json"], "search-r3 train sft configs/x.yaml")
    return tmp_path / "kept"
