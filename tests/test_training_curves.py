"""What a training log says: steps and dev metrics told apart, damaged lines, the running mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from search_r3.errors import InputError
from search_r3.training_curves import (
    PANELS,
    best_dev,
    constants,
    dev_intervals,
    dev_mean,
    metric_points,
    read_log,
    resumed_after,
    running_mean,
    words_gains,
)


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


def test_dev_means_have_intervals_only_where_all_errors_were_logged() -> None:
    first = {"step": 0, "dev": {"a.dev.off": 0.2, "b.dev.off": 0.4, "ndcg@10.off": 0.3, "ndcg@10.off_se": 0.1}}
    later = {"step": 5, "dev": {"a.dev.off": 0.4, "b.dev.off": 0.6}}
    assert dev_mean([first, later], "off") == [(0, 0.3), (5, 0.5)]
    assert dev_intervals([first], "off") == [pytest.approx((0.104, 0.496))]
    assert dev_intervals([first, later], "off") == dev_intervals([], "off") == []


def test_the_best_step_is_by_the_metric_that_the_stage_keeps() -> None:
    dev = [{"step": n, "dev": {"x.off": 0.5 + n, "x.on": 0.5 - n}} for n in (0, 1)]
    assert best_dev([step_record(1)], dev) == ("off", 1, 1.5)
    assert best_dev([step_record(1, terms={"reward": 1.0})], dev) == ("on", 0, 0.5)
    assert best_dev([step_record(1)], []) is None


def test_constants_are_words_unless_one_metric_of_the_panel_changes() -> None:
    clipped = next(panel for panel in PANELS if panel.name == "clipped")
    steps = [step_record(n, terms={"clip_low": 0.0, "clip_high": 0.25}) for n in (1, 2)]
    assert constants(steps, clipped) == [
        "share of tokens clipped, below 0", "share of tokens clipped, above 0.25"
    ]  # fmt: skip
    assert constants([*steps, step_record(3, terms={"clip_high": 0.5})], clipped) == []
    assert constants(steps[:1], clipped) == []


def test_a_fall_of_the_peak_memory_is_a_new_process() -> None:
    assert resumed_after([step_record(n, memory_gib=g) for n, g in ((1, 2.0), (2, 2.5), (3, 1.0), (4, 1.5))]) == [2]
    assert resumed_after([step_record(1)]) == []


def test_words_are_measured_against_the_direct_query_where_there_are_true_ones() -> None:
    first = {"a.dev.off": 0.5, "a.dev.on": 0.52, "a.dev.given": 0.6, "a.dev.shuffled": 0.45, "a.dev.given_se": 0.1,
             "b.dev.off": 0.4, "b.dev.on": 0.36, "b.dev.given": 0.45, "b.dev.shuffled": 0.4,
             "c.dev.off": 0.1, "c.dev.on": 0.9}  # fmt: skip
    dev = [{"step": 0, "dev": first}, {"step": 9, "dev": {"c.dev.off": 0.1, "c.dev.on": 0.2}}]
    gains = words_gains(dev)
    assert list(gains) == ["true", "another query's", "its own"]
    assert [points[0] for points in gains.values()] == [
        (0, pytest.approx(0.075)), (0, pytest.approx(-0.025)), (0, pytest.approx(-0.01))
    ]  # fmt: skip
    assert all(len(points) == 1 for points in gains.values())
    assert words_gains(dev[1:]) == {}
