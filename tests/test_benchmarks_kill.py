"""The kill harness on its lightest victim, and that it finds what is wrong: broken writing, lost and torn files."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmark_scripts import FOLDER, fresh_benchmarks
from processes import run

pytest.importorskip("lancedb")
if sys.platform != "linux":
    pytest.skip("inotify and CPU clocks of other processes are Linux's", allow_module_level=True)
MODULES = ("kill_process", "kill_victims", "kill_stores")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    with fresh_benchmarks(monkeypatch):
        yield SimpleNamespace(**{name.removeprefix("kill_"): importlib.import_module(name) for name in MODULES})


def harness(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "kill.py"), "--only", "data", "--output", str(output), *arguments]
    return run(command, env=os.environ | {"LC_ALL": "C.UTF-8"}, check=False)


@pytest.mark.nightly
def test_a_build_that_is_killed_is_found_sound_and_a_second_run_kills_nobody_again(tmp_path: Path) -> None:
    output = tmp_path / "kill.json"
    done = harness(output, "--kills", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "kill.jsonl").read_text()
    kills = [json.loads(line) for line in log.splitlines()[1:]]
    assert [(kill["what"], kill["kill"], kill["wrong"]) for kill in kills] == [("data", 0, []), ("data", 1, [])]
    assert "ms after file event" in kills[0]["when"]
    assert "of CPU time" in kills[1]["when"]
    figures = json.loads(output.read_text())["figures"]
    assert (figures["kills"], figures["kills_that_lost_something"]) == (2, 0)
    again = harness(output, "--kills", "2")
    assert again.returncode == 0
    assert "data" not in again.stdout
    assert (tmp_path / "kill.jsonl").read_text() == log


@pytest.mark.nightly
def test_broken_writing_is_found(tmp_path: Path) -> None:
    done = harness(tmp_path / "kill.json", "--kills", "6", "--sabotage")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is not whole" in done.stdout


# ---------------------------------------------------------------------------------------------------------- the checks


def test_a_checkpoint_that_is_torn_or_lost_is_found(modules: SimpleNamespace, tmp_path: Path) -> None:
    import torch

    from search_r3.training.run_checkpoint import TrainingState, write_checkpoint

    victim, ended = modules.victims.SFT(tmp_path), modules.process.Ended
    for step in (2, 4):
        one = {"w": torch.full((3,), float(step))}
        write_checkpoint(tmp_path / "run", TrainingState(step, one, one, {}, None), keep=2)
    (tmp_path / "run/log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    events = [("moved in", "run/checkpoints/step-000004")]
    assert victim.inspect(tmp_path, tmp_path, ended(-9, 1.0, None, events)) == (
        "checkpoint of step 4 of 12, 3 lines of log",
        [],
    )
    events.append(("moved in", "run/checkpoints/step-000006"))
    assert "step 6 was written and is lost" in str(victim.inspect(tmp_path, tmp_path, ended(-9, 1.0, None, events)))
    weights = tmp_path / "run/checkpoints/step-000004/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    assert "half-written checkpoint" in str(victim.inspect(tmp_path, tmp_path, ended(-9, 1.0)))
    (tmp_path / "run/best").mkdir()
    (tmp_path / "run/best/search_r3.json").write_text('{"kind": "ad')
    assert "best: it cannot be read" in str(victim.inspect(tmp_path, tmp_path, ended(-9, 1.0)))


def test_trees_that_differ_in_a_byte_or_by_a_leftover_are_told_apart(modules: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/file").write_bytes(b"same")
    same = modules.victims.same_trees
    assert same(tmp_path / "a", tmp_path / "b", Path.read_bytes) == []
    (tmp_path / "a/.file.0123abcd.tmp").write_bytes(b"x")
    (tmp_path / "a/sub/file").write_bytes(b"sane")
    found = same(tmp_path / "a", tmp_path / "b", Path.read_bytes)
    assert found == [".file.0123abcd.tmp is there, but not in the undisturbed run", "sub/file differs"]


@pytest.fixture
def make_index(tmp_path: Path) -> Callable[..., Path]:
    from search_r3.index import SourceDocument, build_index

    class Model:
        name, source, contract_hash, dimension = "fake", "fake", "c" * 64, 4

        def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
            rows = [[len(text), text.count("e"), self.shift, 1.0] for text in texts]
            return np.asarray(rows, dtype=np.float32) / 100

        shift = 0.0

    def make(name: str, count: int, shift: float = 0.0) -> Path:
        model = Model()
        model.shift = shift
        documents = [SourceDocument(f"d{i}", "", f"The unique{i} text of number {i}.") for i in range(count)]
        build_index(tmp_path / name / "it.index", documents, model, progress=False)
        return tmp_path / name

    return make


def test_documents_and_vectors_that_are_lost_or_wrong_are_found(
    modules: SimpleNamespace, make_index: Callable[..., Path], tmp_path: Path
) -> None:
    whole, ended = make_index("whole", 12), modules.process.Ended
    victim = modules.stores.Index(tmp_path)
    assert victim.inspect(make_index("part", 7), whole, ended(-9, 1.0)) == ("7 chunks, 7 of 12 as they shall be", [])
    assert modules.stores.same_index(make_index("again", 12) / "it.index", whole / "it.index") == []
    assert modules.stores.same_index(tmp_path / "part/it.index", whole / "it.index") == ["5 chunks are missing"]
    shifted = make_index("shifted", 12, shift=0.1)
    assert "neither old nor new" in str(victim.inspect(shifted, whole, ended(-9, 1.0)))
    assert "neither old nor new" in str(modules.stores.same_index(shifted / "it.index", whole / "it.index"))
    newest = f"it.index/chunks.lance/_versions/{2**64 - 1 - 10**6}.manifest"
    assert "version 1000000 was committed" in str(
        victim.inspect(whole, whole, ended(-9, 1.0, None, [("created", newest)]))
    )
    assert "is lost" in str(victim.inspect(tmp_path, whole, ended(-9, 1.0, None, [("created", newest)])))


def test_a_document_whose_post_was_answered_and_that_is_gone_is_found(
    modules: SimpleNamespace, make_index: Callable[..., Path], tmp_path: Path
) -> None:
    whole, part = make_index("whole", 36), make_index("part", 34)
    victim, ended = modules.stores.Server(tmp_path), modules.process.Ended
    (part / "notes.jsonl").write_text('{"answered": ["d31", "d33"]}\n')
    assert victim.inspect(part, whole, ended(-9, 1.0)) == ("2 documents answered, 4 in the index", [])
    (part / "notes.jsonl").write_text('{"answered": ["d31", "d33"]}\n{"answered": ["d34"]}\n')
    assert "1 documents whose POST was answered are lost, d34" in str(victim.inspect(part, whole, ended(-9, 1.0)))
