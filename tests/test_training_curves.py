"""What a training log says: steps and dev metrics told apart, damaged lines, the running mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from search_r3.errors import InputError
from search_r3.training_curves import PANELS, metric_points, read_log, running_mean


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "terms": {}} | changes


def write_log(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_metric_without_rows_behind_it_is_left_out() -> None:
    records = [step_record(1, terms={"infonce_reasoning": 0.0, "rows_reasoning": 0.0}),
               step_record(2, terms={"infonce_reasoning": 0.7, "rows_reasoning": 3.0}),
               step_record(3, terms={"infonce_reasoning": 0.6})]  # fmt: skip
    assert metric_points(records, "infonce_reasoning") == [(2, 0.7), (3, 0.6)]
    assert metric_points([step_record(1, loss=float("nan")), step_record(2)], "loss") == [(2, 1.5)]


def test_the_running_mean_neither_lags_nor_moves_the_level() -> None:
    ramp = [float(i) for i in range(200)]
    assert running_mean(ramp)[10:190] == pytest.approx(ramp[10:190])
    assert running_mean([5.0] * 100) == pytest.approx([5.0] * 100)
    assert running_mean([1.0, 9.0]) == [1.0, 9.0]


def test_steps_and_dev_records_are_told_apart(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", [{"step": 0, "dev": {"x.off": 0.5}}, {"step": 1, "loss": 1.0, "terms": {}}])
    steps, dev = read_log(log)
    assert [r["step"] for r in steps] == [1]
    assert dev[0]["dev"] == {"x.off": 0.5}


def test_a_last_line_that_is_still_being_written_is_left_out_and_only_that(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    whole = json.dumps(step_record(1)) + "\n"
    log.write_text(whole + '{"step": 2, "lo')
    assert len(read_log(log)[0]) == 1
    log.write_text(whole + '{"step": 2, "lo\n' + whole)
    with pytest.raises(InputError, match="line 2"):
        read_log(log)


def test_every_panel_has_its_own_name_and_plots_something() -> None:
    assert len({panel.name for panel in PANELS}) == len(PANELS)
    assert all(panel.metrics or panel.dev for panel in PANELS)


def test_a_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_log(tmp_path / "log.jsonl")
