"""A deterministic encoder without a model: words are hashed into a bag, so texts that share words are near."""

from __future__ import annotations

import re
import uuid
import zlib
from types import SimpleNamespace

import numpy as np
import pytest


class FakeEncoder:
    """The encoder protocol, with counters. `fail_after` texts, it raises; `spoil` turns good rows into bad ones."""

    def __init__(self, name="fake", contract_hash="a" * 64, dimension=64):
        self.name, self.contract_hash, self.dimension = name, contract_hash, dimension
        self.encoded: list[str] = []
        self.fail_after: int | None = None
        self.spoil = lambda matrix: matrix

    def encode_document(self, texts, *, batch_size=32, show_progress_bar=None, max_length=None):
        if self.fail_after is not None and len(self.encoded) + len(texts) > self.fail_after:
            raise RuntimeError("out of memory")
        self.encoded.extend(texts)
        return self.spoil(self._bags(texts))

    def encode_query(self, texts, *, reasoning=True, max_reasoning_tokens=32, batch_size=32):
        return self._bags(texts)

    def reason(self, texts, *, max_reasoning_tokens=32):
        return [
            SimpleNamespace(text="about: " + text, embedding=row, num_tokens=3, forced=False)
            for text, row in zip(texts, self._bags(texts), strict=True)
        ]

    def _bags(self, texts):
        matrix = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in zip(matrix, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[zlib.crc32(word.encode()) % self.dimension] += 1
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.fixture
def model():
    return FakeEncoder()


@pytest.fixture(scope="session")
def shared_model():
    """For what several tests only read; its counters belong to nobody."""
    return FakeEncoder()


@pytest.fixture
def make_model():
    return FakeEncoder


@pytest.fixture
def path(tmp_path):
    """Where an index is to be made."""
    return tmp_path / "x.index"


@pytest.fixture(scope="session")
def milvus_folder(tmp_path_factory):
    """A folder of Milvus Lite, which this process has open to its end."""
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'search-r3[milvus]'")
    pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed: pip install 'search-r3[milvus]'")
    return tmp_path_factory.mktemp("milvus") / "lite.db"


@pytest.fixture
def milvus(milvus_folder):
    """The address of an index in Milvus that is to be made."""
    return f"milvus://{milvus_folder}/index_{uuid.uuid4().hex[:8]}"


@pytest.fixture
def make(tmp_path):
    """`make("a/notes", "one.md", "sub/two.md")`: a folder with files that say their path."""

    def write(folder, *names):
        for name in names:
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"The text of {folder}/{name} stands here.\n")
        return tmp_path / folder

    return write
