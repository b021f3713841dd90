"""`search-r3 index --watch`, as a process that is told to stop."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import eventually, start

from search_r3.cli import main
from search_r3.index import SearchIndex

pytestmark = pytest.mark.slow


def documents(index: Path) -> set[str]:
    return {row["document"] for row in SearchIndex.open(index).backend.rows()}


def test_a_watched_folder_is_followed_until_it_is_told_to_stop(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("watchfiles")
    folder, index = tmp_path / "notes", tmp_path / "notes" / "notes.index"  # its own writes are no changes
    folder.mkdir()
    (folder / "a.md").write_text("flour and water")
    command = [sys.executable, "-m", "search_r3", "index", str(folder), "--into", str(index), "--watch", "--json"]
    command += ["--model", str(tiny_model), "--device", "cpu", "--dtype", "float32"]
    with start(command) as child:
        child.line("^watching ", "stderr", 600)
        (folder / "b.md").write_text("a train to Vienna")
        (folder / "a.md").rename(folder / "c.md")
        eventually(lambda: documents(index) == {"b.md", "c.md"}, 300)
        child.send_signal(signal.SIGINT)
        assert child.wait(300) == 0
    assert child.stderr.endswith("Stopped.\n")
    updates: list[dict[str, Any]] = [
        json.loads(line) for line in child.stdout.splitlines() if line.startswith('{"index"')
    ]
    paths = set().union(*(one["paths"] for one in updates))
    assert paths - {"notes.index"} == {"a.md", "b.md", "c.md"}, "nothing in the index is a change"
    assert sum(one["added"] for one in updates) == 2
    assert sum(one["removed"] for one in updates) == 1
    assert SearchIndex.open(index).complete


def test_watching_is_refused_where_it_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.md").write_text("text")
    assert main(["index", str(tmp_path), "--watch", "--ray", "local"]) == 2
    assert "--watch keeps the model loaded here" in capsys.readouterr().err
    assert main(["index", str(tmp_path), "--watch", "--backend", "numpy"]) == 2
    assert "the index backend 'numpy' does not support --watch" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.md"]
