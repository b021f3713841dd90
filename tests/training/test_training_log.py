"""What a run tells: every figure is in the log and in its trackers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from search_r3.training.trackers import Trackers, tracker_names
from search_r3.training.training_log import Report, peak_memory_gib

STEP = {"step": 1, "loss": 2.5, "tokens": 100.0, "tokens_per_second": 50.0,
        "terms": {"infonce": 2.0, "distillation": 0.5}, "lr": 1e-4, "grad_norm": 3.0, "seconds": 2.0}  # fmt: skip
DEV = {"cosqa.off": 0.5, "cosqa.uniformity": -1.5, "distinct": 0.75}


def test_log_and_tensorboard_get_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackers = Trackers(
        tracker_names("auto"), tmp_path, project="search-r3", run_name="run", settings={"steps": 1}, start=0
    )
    with Report(
        tmp_path, steps=1, start=0, log_every=1, headline="cosqa.off", active=True, trackers=trackers
    ) as report:
        report.step(STEP)
        report.dev(1, DEV, 4.0)
    step, dev = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert step.pop("memory_gib") == pytest.approx(peak_memory_gib(), rel=0.1)
    assert step == STEP
    assert dev == {"step": 1, "dev": DEV, "seconds": 4.0}
    assert "loss 2.5" in capsys.readouterr().err

    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = board.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = {
        f"train/{name}": value for name, value in {**STEP, **STEP["terms"]}.items() if name not in ("step", "terms")
    }
    expected |= {f"dev/{name}": value for name, value in DEV.items()} | {"dev/seconds": 4.0}
    assert set(events.Tags()["scalars"]) == {*expected, "train/memory_gib"}
    for name, value in expected.items():
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (1, pytest.approx(value))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the same figure")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tells the GPU's memory there")
def test_peak_memory_is_in_gib() -> None:
    words = Path("/proc/self/status").read_text().split()
    assert peak_memory_gib() == pytest.approx(int(words[words.index("VmHWM:") + 1]) / 2**20, rel=0.05)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, project="p", run_name="r", settings={}, start=0)
    with Report(tmp_path, steps=1, start=0, log_every=1, headline=None, active=False, trackers=trackers) as report:
        report.step(STEP)
        report.dev(1, DEV, 4.0)
    assert list(tmp_path.iterdir()) == []
