"""`search-r3 index --watch`, as a process that is told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import pytest
from processes import eventually

from search_r3.cli import main
from search_r3.index import SearchIndex

pytestmark = pytest.mark.slow


class Lines:
    """What a process writes, line by line."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self.all: list[str] = []
        self._stream = stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            self.all.append(line)

    def end(self) -> None:
        """Wait for the last line."""
        self._thread.join(60)
        self._stream.close()


def documents(index: Path) -> set[str]:
    return {row["document"] for row in SearchIndex.open(index).backend.rows()}


def test_a_watched_folder_is_followed_until_it_is_told_to_stop(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("watchfiles")
    folder, index = tmp_path / "notes", tmp_path / "notes" / "notes.index"  # its own writes are no changes
    folder.mkdir()
    (folder / "a.md").write_text("flour and water")
    command = [sys.executable, "-m", "search_r3", "index", str(folder), "--into", str(index), "--watch", "--json"]
    command += ["--model", str(tiny_model), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, said = Lines(process.stdout), Lines(process.stderr)
    try:
        eventually(lambda: any(line.startswith("watching ") for line in said.all) or process.poll() is not None, 600)
        assert process.poll() is None, said.all
        (folder / "b.md").write_text("a train to Vienna")
        (folder / "a.md").rename(folder / "c.md")
        eventually(lambda: documents(index) == {"b.md", "c.md"}, 300)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0, said.all
    finally:
        process.kill()
        process.wait()
    out.end()
    said.end()
    assert said.all[-1] == "Stopped.\n"
    updates: list[dict[str, Any]] = [json.loads(line) for line in out.all if line.startswith('{"index"')]
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
