"""An index of five documents that the tiny model made."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # no test tells anybody anything
os.environ["LANGSMITH_TRACING"] = "false"

from search_r3 import SearchR3
from search_r3.prompts import reading_conversation

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
def tiny_index(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from search_r3.index import build_index, open_source

    folder = tmp_path_factory.mktemp("indexes")
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    build_index(folder / "tiny-index", open_source(source), tiny, progress=False)
    return folder / "tiny-index"


@pytest.fixture(scope="session")
def reader(tiny: SearchR3) -> SearchR3:
    """The tiny model with a reading mode; its documents are those of `tiny_index`."""
    prompts = replace(tiny.contract.prompts, reading=reading_conversation(2, 6))
    return SearchR3(replace(tiny.checkpoint, contract=replace(tiny.contract, prompts=prompts)))
