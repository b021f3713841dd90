"""The environment benchmark at tiny sizes: what it measures is right, and a killed one goes on. No time is asserted."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_scripts import fresh_benchmarks

from search_r3 import SearchR3
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.errors import InputError

TESTS = Path(__file__).resolve().parent
NAMES = ("drift", "million", "plot", "record", "recording", "replay", "worlds")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """benchmarks/environment*.py."""
    with fresh_benchmarks(monkeypatch):
        yield SimpleNamespace(
            main=importlib.import_module("environment").main,
            **{name: importlib.import_module(f"environment_{name}") for name in NAMES},
        )


def world_of(bench: SimpleNamespace, scale: float = 3.0, **changes: Any) -> Any:
    """800 rows of which those that training touches move three times as far as the others."""
    sizes = {"rows": 800, "steps": 25, "dimension": 32, "queries": 200, "batch": 2, "group": 4, "dev": 16}
    drift = bench.drift.read_drift(bench.drift.ASSUMED)
    return bench.worlds.SimulatedWorld(bench.worlds.Simulation(**sizes | changes, scale=scale), drift, seed=3)


def write_recording(bench: SimpleNamespace, folder: Path, checkpoints: int = 6) -> Path:
    """The simulated world's rows as if a run had been recorded every second step; queries 0 to 15 are dev."""
    frames = list(recorded_frames(world_of(bench, steps=checkpoints, measure_every=1)))
    grades = [judged for frame in frames for judged in frame["grades"]]
    grades = [*frames[0]["dev_grades"], *grades]
    bench.recording.begin(folder, documents=800, grades=grades, dev=range(16), source="made up")
    for number, frame in enumerate(frames):
        first = 16 + 2 * number
        queries = torch.nn.functional.normalize(torch.ones(len(grades), 32), dim=1)
        queries[:16] = frame["dev"]
        queries[first : first + 2] = frame["rollouts"][::4]
        tensors = {
            "documents": frame["documents"], "queries": queries, "batch": torch.tensor([first, first + 1]),
            "rollouts": frame["rollouts"], "rollout_queries": first + frame["query_R"],
            "documents_per_second": torch.tensor(12.0),
        }  # fmt: skip
        bench.recording.write(folder, 2 * number, tensors)
    return folder


def recorded_frames(world: Any) -> Iterator[dict[str, Any]]:
    for moment in world.moments():
        yield {
            "documents": moment.truth.vectors(torch.arange(world.rows)), "dev": moment.dev_QD.clone(),
            "rollouts": moment.rollouts_RD, "query_R": moment.query_R, "grades": moment.grades,
            "dev_grades": moment.dev_grades,
        }  # fmt: skip


@pytest.mark.nightly
def test_refreshing_everything_has_no_error_and_refreshing_nothing_the_largest(bench: SimpleNamespace) -> None:
    world, budget = world_of(bench, steps=40, batch=4), 80
    found = {}
    for name, refresh in {
        "all": {"policy": "full", "every": 1},
        "selective": {"policy": "selective", "budget": budget},
        "random": {"policy": "random", "budget": budget},
        "none": {"policy": "none"},
    }.items():
        records = bench.replay.replay(world, refresh, graph=world.graph)
        assert records[0]["error"] == 0  # everybody begins with fresh rows
        assert records[0]["age"] == 0
        found[name] = bench.replay.summary(records, world.rows)
    for figure in ("error", "error_ndcg", "dev_error", "staleness_error", "age"):
        assert found["all"][figure] == 0
    for figure in ("error", "age"):
        assert found["none"][figure] == max(of[figure] for of in found.values())
    assert found["all"]["recall"] == found["all"]["dev_recall"] == 1
    assert found["selective"]["error"] < found["random"]["error"] / 3
    assert found["selective"]["recall"] > found["random"]["recall"] > found["none"]["recall"]
    assert found["selective"]["most_reencoded"] <= budget / 800
    assert found["none"]["age"] == pytest.approx(20)
    assert found["none"]["share_reencoded"] == 0
    assert found["all"]["share_reencoded"] == 1


def test_a_world_is_the_same_each_time(bench: SimpleNamespace) -> None:
    world = world_of(bench, steps=4)
    first, again = (bench.replay.replay(world, {"policy": "random", "budget": 9}) for _ in range(2))
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in first] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in again
    ]


@pytest.mark.nightly
def test_drift_is_measured_as_it_was_simulated(bench: SimpleNamespace, tmp_path: Path) -> None:
    recording = bench.recording.Recording(write_recording(bench, tmp_path / "recording", 12))
    drift, given = bench.drift.measure(recording), bench.drift.read_drift(bench.drift.ASSUMED)
    assert (drift.steps, drift.stretches) == (2, 11)
    for name in ("other", "near", "touched", "query"):  # the world moved once from one checkpoint to the next
        assert drift.sizes[name][10] * 2**drift.growth == pytest.approx(3 * given.sizes[name][10], rel=0.25)
        assert drift.sizes[name] == sorted(drift.sizes[name])
    assert drift.touched_correlation > 0.2
    assert drift.common == pytest.approx(given.common, abs=0.1)
    assert drift.neighbors == pytest.approx(given.neighbors, abs=0.15)
    assert 1 <= drift.growth < 1.7
    world = bench.worlds.SimulatedWorld(bench.worlds.Simulation(900, 3, batch=2, group=4), drift, recording)
    again = world.check(rows=900).summary()
    for name, value in drift.summary().items():
        tolerance = {"abs": 0.2} if value == getattr(drift, name, None) or "_" not in name else {"rel": 0.3}
        assert again[name] == pytest.approx(value, **tolerance), name


def test_rows_between_checkpoints_lie_on_the_way(bench: SimpleNamespace, tmp_path: Path) -> None:
    recording = bench.recording.Recording(write_recording(bench, tmp_path / "recording", 3))
    first, second = (recording.frame(step).documents_ND for step in (0, 2))
    moments = bench.worlds.RecordedWorld(recording, between=2).moments()
    rows = torch.arange(800)
    steps = [(moment.step, moment.truth.vectors(rows), len(moment.grades), moment.dev_QD) for moment in moments]
    assert [step for step, *_ in steps] == [0, 1, 2, 3, 4]
    assert torch.equal(steps[0][1], first)
    assert torch.equal(steps[2][1], second)
    middle = torch.nn.functional.normalize(first + second, dim=1)
    assert torch.allclose(steps[1][1], middle, atol=1e-6)
    assert [count for _, _, count, _ in steps] == [1, 1, 1, 1, 1]  # a batch of two queries, one each step
    assert [dev is not None for *_, dev in steps] == [True, False, True, False, True]


@pytest.mark.nightly
def test_the_report_has_its_fields_and_a_second_run_computes_nothing_again(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = write_recording(bench, tmp_path / "recording")
    arguments = ["--tiny", "--recording", recording, "--work", tmp_path / "work", "--output", tmp_path / "out.json"]
    arguments += ["--save-drift", tmp_path / "drift.json", "--steps", "4", "--rows", "300"]
    bench.main([str(argument) for argument in arguments])
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"benchmark", "command", "commit", "seed", "versions", "hardware", "figures"} <= set(report)
    figures = report["figures"]
    assert figures["documents_per_second"] == {"value": 12.0, "source": "measured while recording"}
    assert figures["recorded"]["checkpoints"] == 6
    small = figures["simulated"]["300"]
    for part in (figures["recorded"], small):
        assert {"selective", "random", "random, as many rows as selective", "full every 20", "none"} <= set(
            part["policies"]
        )
        for policy, found in part["policies"].items():
            assert {"recall", "error", "age", "share_reencoded", "dev_recall", "dev_error", "seconds"} <= set(found)
            assert len(part["curves"][policy]["error"]["values"]) == found["steps"]
        matched = part["policies"]["random, as many rows as selective"]["share_reencoded"]
        assert matched == pytest.approx(part["policies"]["selective"]["share_reencoded"], abs=1 / 300)
    assert small["policies"]["selective"]["time"]["encode_seconds"] == pytest.approx(15 / 12, rel=0.05)
    assert {"share_reencoded", "error", "error_of_random", "choose_and_relink"} <= set(figures["goals"])
    assert figures["million"]["rows"] == 3000
    assert figures["million"]["rows_per_step"] == 200
    assert figures["million"]["peak_bytes"] > figures["million"]["matrix_bytes"] == 3000 * 32 * 4
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert bench.drift.read_drift(tmp_path / "drift.json").source == "made up"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for name in ("replay", "Worker"):
        monkeypatch.setattr(sys.modules["environment"], name, refuse)
    bench.main([str(argument) for argument in arguments])
    assert json.loads((tmp_path / "out.json").read_text())["figures"] == figures
    with pytest.raises(AssertionError, match="computed again"):
        bench.main([*map(str, arguments), "--seed", "1"])


def test_a_broken_recording_is_refused_in_one_line(bench: SimpleNamespace, tmp_path: Path) -> None:
    folder = write_recording(bench, tmp_path / "recording", 2)
    with pytest.raises(InputError, match="other documents"):
        bench.recording.begin(folder, documents=800, grades=[{0: 1.0}], dev=[0], source="another")
    (folder / "step-000002.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit, match=r"step-000002.*record it again"):
        bench.main(["--tiny", "--recording", str(folder), "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="cannot be read as a recording"):
        bench.main(["--tiny", "--recording", str(tmp_path), "--work", str(tmp_path / "work")])


@pytest.mark.nightly
def test_a_run_is_recorded_checkpoint_by_checkpoint(
    bench: SimpleNamespace, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(TESTS / "training")
    tiny = importlib.import_module("tiny_grpo")
    train_grpo = importlib.import_module("search_r3.training.grpo.grpo_task").train_grpo
    stage_one = tiny.train_stage_one(tiny_model, tmp_path, steps=40)
    recipe = tiny.write_recipe(stage_one, tmp_path / "grpo.yaml", contrastive_weight=1.0)
    changes = ["loop.steps=4", "loop.checkpoint_every=2", "loop.keep_checkpoints=100", "loop.learning_rate=0.01"]
    adapter = train_grpo(recipe, changes)
    arguments = [str(tmp_path / "recording"), "--recipe", str(recipe), "--rollouts", "2", "--set", *changes]
    bench.record.main(arguments)
    recording = bench.recording.Recording(tmp_path / "recording")
    assert recording.steps == [0, 2, 4]
    assert recording.documents_per_second() > 0
    texts = bench.record.dataset_of(
        bench.record.read_recipe(bench.record.parse(arguments)), bench.record.parse(arguments)
    )
    for folder, step in ((stage_one, 0), (adapter, 4)):
        expected = SearchR3.from_pretrained(folder, device="cpu").encode_document(
            texts.documents, max_length=128, show_progress_bar=False
        )
        np.testing.assert_allclose(recording.frame(step).documents_ND.numpy(), expected, atol=2e-3)
    frame = recording.frame(0)
    order = importlib.import_module("search_r3.training.grpo.dataset").QueryOrder(len(texts.train), 3, 0)
    trained = {texts.train[i].positive for number in (0, 1) for i in order.batch(number)}
    assert {max(recording.grades[query]) for query in frame.batch} == trained
    assert len(frame.rollouts_RD) == 2 * len(frame.batch)
    before = (tmp_path / "recording" / "step-000000.safetensors").stat().st_mtime_ns
    (tmp_path / "recording" / "step-000002.safetensors").unlink()
    bench.record.main(arguments)  # an interrupted recording goes on
    assert bench.recording.Recording(tmp_path / "recording").steps == [0, 2, 4]
    assert (tmp_path / "recording" / "step-000000.safetensors").stat().st_mtime_ns == before


@pytest.mark.nightly
def test_a_stage_one_run_and_a_row_of_adapters_are_recorded_over_a_beir_set(
    bench: SimpleNamespace, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(TESTS / "training")
    tiny = importlib.import_module("tiny_grpo")
    adapter = tiny.train_stage_one(tiny_model, tmp_path, steps=4)
    pairs = tiny.some_pairs(24)
    greek = BeirDataset(
        "greek",
        {pair.id: Document(pair.id, "", pair.positive) for pair in pairs},
        {str(i): pair.query for i, pair in enumerate(pairs)},
        {str(i): {pair.id: 1} for i, pair in enumerate(pairs)},
    )
    write_beir(tmp_path / "greek", greek, "train")
    data = ["--beir", str(tmp_path / "greek"), "--max-tokens", "128"]
    bench.record.main([str(tmp_path / "run"), "--recipe", str(tmp_path / "sft.yaml"), *data])
    bench.record.main([str(tmp_path / "row"), "--adapters", str(adapter), str(adapter), *data])
    run, row = (bench.recording.Recording(tmp_path / name) for name in ("run", "row"))
    assert (run.steps, row.steps) == ([0, 4], [0, 1])
    assert len(run.dev) == 3  # queries 0, 8 and 16
    assert not run.facts["known_batches"]
    trained = row.frame(0).documents_ND
    assert torch.equal(trained, row.frame(1).documents_ND)
    assert torch.allclose(run.frame(4).documents_ND, trained, atol=2e-3)
    assert not torch.allclose(run.frame(0).documents_ND, trained, atol=2e-3)
    with pytest.raises(SystemExit, match="say which with --beir"):
        bench.record.main([str(tmp_path / "x"), "--recipe", str(tmp_path / "sft.yaml")])
    with pytest.raises(SystemExit, match="give --recipe or --adapters"):
        bench.record.main([str(tmp_path / "x"), *data])


def test_the_picture_shows_the_two_best_policies_against_none(bench: SimpleNamespace, tmp_path: Path) -> None:
    def curves(error: float) -> dict[str, Any]:
        return {name: {"steps": [0, 1, 2], "values": [0.0, error, error]} for name, _ in bench.plot.PANELS}

    errors = {"selective": 0.01, "selective, by age alone": 0.011, "random": 0.03, "full every 20": 0.02, "none": 0.05}
    world = {"curves": {name: curves(error) for name, error in errors.items()}}
    worlds = bench.plot.worlds_of({"simulated": {"1000": world}})
    assert list(worlds) == ["1,000 simulated"]
    assert bench.plot.shown_policies(worlds["1,000 simulated"]) == ["selective", "full every 20", "none"]
    for dark in (False, True):
        target = bench.plot.draw(worlds, tmp_path / f"{dark}.png", dark=dark)
        assert target.read_bytes().startswith(b"\x89PNG")
