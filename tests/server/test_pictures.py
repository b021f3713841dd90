"""`make pictures` takes the pages as they are, and refuses to show a search that misses what it should find."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from serving_tools import running

from search_r3 import SearchR3
from search_r3.index.build.build_index import build_index
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.server.service import Loaded

sys.path.insert(0, str(Path(__file__).parents[2] / ".ci"))
import pictures


def test_pictures_of_a_server(tiny: SearchR3, tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [SourceDocument(name, "", text, {}, name, 1) for name, text in (("a.md", "the sea"), ("b.md", "bread"))]
    build_index(tmp_path / "index", documents, tiny, progress=False)
    index = SearchIndex.open(tmp_path / "index")
    monkeypatch.setattr(pictures, "QUESTIONS", {"the sea": "a.md", "bread": "b.md", "the moon": "c.md"})
    with running(lambda: Loaded.of(tiny, index)) as server:
        assert pictures.rank(server.url, "the moon", False) == 3
        question = pictures.best_question(server.url)
        assert pictures.rank(server.url, question, True) == 1
        written = pictures.search_pictures(browser, server.url, question, tmp_path / "images")
        monkeypatch.setattr(pictures, "QUESTIONS", {"the moon": "c.md"})
        with pytest.raises(SystemExit, match="no question finds its file first"):
            pictures.best_question(server.url)
    assert [path.name for path in written] == [
        f"server-{screen}-{scheme}.png" for screen in ("desktop", "phone") for scheme in ("light", "dark")
    ]
    sizes = [struct.unpack(">II", path.read_bytes()[16:24]) for path in written]
    assert sizes == [(1280, 800), (1280, 800), (390, 844), (390, 844)]
    assert len({path.read_bytes() for path in written}) == 4
