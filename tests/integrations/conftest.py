"""A tiny model, a tiny adapter on it, and an index of five documents that the model made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # no test tells anybody anything
os.environ["LANGSMITH_TRACING"] = "false"

from search_r3 import SearchR3

DOCUMENTS = [
    {"id": "bread", "title": "Baking", "text": "Bread needs flour, water and yeast.", "lang": "en"},
    {"id": "zug", "text": "Der Zug nach Wien fährt um neun.", "lang": "de"},
    {"id": "train", "text": "The train to Vienna leaves at nine.", "lang": "en"},
    {"id": "lines", "text": "Open a file and iterate over it to read it line by line.", "lang": "en"},
    {"id": "aspirin", "text": "Aspirin lowers the risk of heart attack.", "lang": "en"},
]
TEXTS = [
    "Bread needs flour, water and yeast.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Der Zug nach Wien fährt um neun.",
    "x",
    "A long text about trains. " * 60,
]


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def tiny_index(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from search_r3.index import build_index, open_source

    folder = tmp_path_factory.mktemp("indexes")
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    build_index(folder / "tiny-index", open_source(source), tiny, progress=False)
    return folder / "tiny-index"


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that nobody trained, far from its base, with a README."""
    folder = save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "tiny-adapter")
    head = "---\nlicense: apache-2.0\nbase_model: someone/tiny\n---\n"
    body = "\n# tiny-adapter\n\n```sh\n# a comment\n```\n\n## Use\n"
    (folder / "README.md").write_text(head + body, encoding="utf-8")
    return folder
