"""The benchmarks of indexing and watching a folder, small: the same files for everybody, and they run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from benchmark_scripts import FOLDER, fresh_benchmarks
from processes import run

pytest.importorskip("lancedb")

SECONDS = 300.0


def figures_of(script: str, output: Path, *arguments: str) -> dict:
    command = [sys.executable, str(FOLDER / script), *arguments, "--json", str(output)]
    run(command, env=os.environ | {"PYTHONPATH": str(FOLDER.parent)}, seconds=SECONDS)
    return json.loads(output.read_text())["figures"]


def test_files_are_taken_evenly_over_the_formats_and_no_content_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh_benchmarks(monkeypatch):
        from index_files import copy_files, real_files
    contents = {f"{number}.py": f"# {number}\n" * 99 for number in range(5)} | {
        "a.md": "word " * 99,
        "b.txt": "é" * 300,
    }
    contents |= {"copies/0.py": contents["0.py"], "short.py": "1", "page.html": "word " * 99, "long.md": "x" * 100_001}
    for name, text in contents.items():
        (path := tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "root" / "latin.txt").write_bytes("é".encode("latin-1") * 300)
    chosen = real_files([tmp_path / "root"], 3)
    assert sorted(path.suffix for path in chosen) == [".md", ".py", ".txt"]
    everything = real_files([tmp_path / "root"], 100)
    assert everything[:3] == chosen
    assert {path.name for path in everything} == {"0.py", "1.py", "2.py", "3.py", "4.py", "a.md", "b.txt"}
    assert len(everything) == 7
    about = copy_files(everything, tmp_path / "copy")
    assert about["suffixes"] == {".md": 1, ".py": 5, ".txt": 1}
    assert about == copy_files(everything, tmp_path / "again")


@pytest.mark.nightly
def test_a_second_run_embeds_nothing_and_both_checkouts_take_turns(tmp_path: Path) -> None:
    against = ("--against", str(FOLDER.parent))
    figures = figures_of("index_files.py", tmp_path / "out.json", "--files", "30", "--rounds", "1", *against)
    assert figures["systems"].keys() == {"ours", "before"}
    for runs in figures["systems"].values():
        first, again = runs["first run"], runs["nothing changed"]
        assert (first["report"]["documents"], first["report"]["embedded"]) == (30, first["report"]["added"])
        assert (again["report"]["added"], again["report"]["unchanged"]) == (0, first["report"]["added"])
        assert min(first["peak_bytes"], again["peak_bytes"]) > 1e8
    assert figures["ratios"]["first run"]["times_as_fast"] > 0


@pytest.mark.nightly
def test_a_filled_index_has_nothing_left_to_embed_but_the_changes(tmp_path: Path) -> None:
    pytest.importorskip("watchfiles", reason="watchfiles is not installed: pip install 'search-r3[files]'")
    figures = figures_of("watch.py", tmp_path / "out.json", "--files", "40", "--rounds", "1", "--tiny", "--filled")
    assert len(figures["seconds"]) == 4
    assert figures["filled"] is True
