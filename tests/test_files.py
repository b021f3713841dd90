"""Files are replaced at once, leftovers of killed writers go, and a full disk is one line whichever library met it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from search_r3 import files
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text, disk_is_full, remove_leftovers

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("lance error: LanceError(IO): Generic LocalFileSystem error: ... (os error 28), /src/local.rs:51:9"),
]


def write_folder(target: Path, text: str) -> None:
    with atomic_path(target) as scratch:
        scratch.mkdir()
        (scratch / "a.txt").write_text(text)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange two folders in one step")
def test_a_folder_is_replaced_without_an_instant_in_which_there_is_none(tmp_path, monkeypatch):
    write_folder(tmp_path / "best", "old")
    monkeypatch.setattr(os, "replace", lambda *names: pytest.fail(f"moved away first: {names}"))
    write_folder(tmp_path / "best", "new")
    assert (tmp_path / "best/a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_where_folders_cannot_be_exchanged_they_are_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    write_folder(tmp_path / "best", "old")
    write_folder(tmp_path / "best", "new")
    assert (tmp_path / "best/a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path):
    left = [".log.jsonl.0123abcd.tmp.jsonl", ".best.0123abcd.tmp", ".best.89abcdef.old"]
    kept = [".log.jsonl", ".notes.0123abcd.tmp", ".best.tmp", ".best.0123abcd.tmp.txt", "best"]
    for name in [*left, *kept]:
        (tmp_path / name).mkdir() if "best" in name else (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path / "log.jsonl", tmp_path / "best")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    remove_leftovers(tmp_path / "no such folder" / "best")


def test_a_folder_that_a_killed_writer_had_moved_away_comes_back(tmp_path):
    (tmp_path / ".best.89abcdef.old").mkdir()
    (tmp_path / ".best.89abcdef.old" / "a.txt").write_text("old")
    (tmp_path / ".best.01234567.tmp").mkdir()
    remove_leftovers(tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best/a.txt").read_text() == "old"


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(error, tmp_path):
    atomic_write_text(tmp_path / "a.txt", "old")

    def write() -> None:
        with atomic_path(tmp_path / "a.txt") as scratch:
            scratch.write_text("ne")
            raise error

    with pytest.raises(InputError, match=r"a\.txt: no space left, the disk is full; free some space and run the same"):
        write()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe"):
        atomic_write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_what_a_full_disk_caused_counts_and_other_errors_do_not():
    wrapped = RuntimeError("the writer failed")
    wrapped.__cause__ = FULL[0]
    assert disk_is_full(wrapped)
    for other in (OSError(errno.ENOENT, "No such file"), SafetensorError("invalid header (os error 2)"), ValueError()):
        assert not disk_is_full(other)
    with pytest.raises(SafetensorError), atomic_path("x"):
        raise SafetensorError("invalid header")


@pytest.mark.parametrize("error", FULL)
def test_the_command_line_says_what_to_do_when_the_disk_is_full(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("search_r3.data.recipe.build_pairs", fail)
    assert main(["data", "build", "a", "b"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "free some space and run the same command again" in said
    assert "Rust" not in said


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_what_safetensors_writes_gets_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "rows.safetensors") as scratch:
            save_file({"x": np.ones(2)}, scratch)
        with atomic_path(tmp_path / "adapter") as folder:
            folder.mkdir()
            save_file({"x": np.ones(2)}, folder / "weights.safetensors")
            (folder / "secret").touch(0o600)
        (tmp_path / "any").touch()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    usual = 0o666 & ~umask
    assert modes == {"rows.safetensors": usual, "weights.safetensors": usual, "any": usual, "secret": 0o600}
