"""The stage 1 benchmark on tiny random models: both sides do the same, and the report is whole. No time is asserted."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import FOLDER, benchmark_script, fresh_benchmarks

from search_r3.data.pairs import write_pairs
from search_r3.data.sources.docstrings import docstring_pairs

pytest.importorskip("sentence_transformers")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/sft.py, its workers in this process."""
    with benchmark_script("sft", monkeypatch) as module:
        yield module


@pytest.fixture
def given(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the script's arguments: those for a tiny run, and more."""

    def given(*arguments: str | Path) -> None:
        write_pairs(tmp_path / "pairs.jsonl", docstring_pairs(["json", "logging", "email"])[0])
        fixed = ["--tiny", "--model", tiny_model, "--pairs", tmp_path / "pairs.jsonl"]
        options = ["--dtype", "float32", "--rounds", "2", "--chunk", "3", "--cached-pairs", "8"]
        monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, fixed), *options, *map(str, arguments)])

    return given


@pytest.fixture
def run(script: ModuleType, given: Callable[..., None], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        given("--json", tmp_path / "out.json", *arguments)
        script.main()
        return json.loads((tmp_path / "out.json").read_text())

    return run


def test_an_earlier_checkout_takes_turns_and_gets_the_specification_in_its_own_words(
    run: Callable[..., dict[str, Any]], script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "before" / "benchmarks").mkdir(parents=True)
    source = "class Spec:\n    pairs_per_step: int\n    activation_checkpointing: bool\n"
    (tmp_path / "before" / "benchmarks" / "sft_systems.py").write_text(source)
    sent = script.fields_of(tmp_path / "before", {"global_batch_size": 4, "activation_checkpointing": True, "chunk": 3})
    assert sent == {"pairs_per_step": 4, "activation_checkpointing": True, "chunk": 3}
    speed = run("--only", "speed", "--peer-attention", "eager", "--against", str(FOLDER.parent))["figures"]["speed"]
    assert speed["before_plain"]["first_loss"] == speed["ours_plain"]["first_loss"]
    assert 0 < speed["before"]["times_its_speed_min"] <= speed["before"]["times_its_speed"]


@pytest.mark.nightly
def test_the_report_has_its_fields_and_both_systems_did_the_same(run: Callable[..., dict[str, Any]]) -> None:
    report = run()
    assert {"benchmark", "command", "commit", "seed", "versions", "hardware", "figures"} <= set(report)
    figures = report["figures"]
    assert figures["precision"] == "float32"
    speed = figures["speed"]
    assert set(speed["peer_trial_seconds"]) == {"eager", "sdpa"}
    assert speed["peer"]["attention"] in ("eager", "sdpa")
    ours, cached, peer = (speed[name] for name in ("ours_plain", "ours_cached", "peer"))
    for one in (ours, cached, peer):
        assert one["first_loss"] == pytest.approx(ours["first_loss"], abs=1e-4)
        assert one["first_gradient_norm"] == pytest.approx(ours["first_gradient_norm"], rel=1e-3)
        assert one["first_tokens_sha256"] == ours["first_tokens_sha256"]
        assert one["lora_parameters"] == ours["lora_parameters"] > 0
        assert one["pairs_per_second"] > 0
        assert one["peak_bytes"] > 0
    assert ours["other_parameters"] == 32  # the embed token's row, which the peer has not
    assert peer["other_parameters"] == 0
    assert not ours["activation_checkpointing"]
    assert cached["activation_checkpointing"]
    for one in (ours, cached):
        assert one["times_the_peers_speed_min"] <= one["times_the_peers_speed"] <= one["times_the_peers_speed_max"]
        assert one["peak_of_peer"] > 0
    large = figures["activation_checkpointing"]
    assert (large["plain"]["global_batch_size"], large["cached"]["global_batch_size"]) == (2, 8)
    assert (large["plain"]["activation_checkpointing"], large["cached"]["activation_checkpointing"]) == (False, True)
    assert large["times_per_pair_min"] <= large["times_per_pair"] <= large["times_per_pair_max"]


@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["temperature", "tokens", "adapter", "first weights"])
def test_a_peer_that_is_not_the_same_is_refused(
    fault: str, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = sys.modules["sft_systems"]
    original = systems.Peer

    def wrong(spec: Any, pairs: Any) -> Any:
        if fault == "tokens":
            spec = replace(spec, document_tokens=5)
        if fault == "first weights":
            monkeypatch.setattr(systems, "SEED", 1)
        peer = original(spec, pairs)
        if fault == "temperature":
            peer.criterion.scale *= 1.5
        if fault == "adapter":
            next(p for name, p in peer.module.named_parameters() if "lora_" in name).requires_grad_(False)
        return peer

    monkeypatch.setattr(systems, "Peer", wrong)
    message = {"temperature": "loss", "tokens": "tokens", "adapter": "adapters", "first weights": "gradient norm"}[
        fault
    ]
    with pytest.raises(SystemExit, match=message):
        run("--only", "speed", "--peer-attention", "eager")


@pytest.mark.nightly
def test_a_tiny_run_writes_nothing_where_real_results_are(
    script: ModuleType, given: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr("common.write_report", lambda *a, **k: written.append(a))
    given("--only", "cache", "--rounds", "1")
    script.main()
    assert not written


def test_a_worker_answers_line_by_line_and_its_death_shows_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with fresh_benchmarks(monkeypatch):
        common = importlib.import_module("common")
    script = tmp_path / "echo.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "from common import peak_memory, serve\n"
        "def answer(line):\n"
        "    print('noise')\n"
        "    if line == 'grow':\n"
        "        held = b'x' * 200_000_000\n"
        "    return {'line': int(line)} if line.isdigit() else {'peak': peak_memory('cpu')}\n"
        "serve(lambda: ({'spec': sys.argv[2]}, answer))\n"
    )
    held = b"x" * 300_000_000  # a child's own peak is not its parent's
    with common.Worker(str(script), {"a": 1}) as worker:
        assert json.loads(worker.ready()["spec"]) == {"a": 1}
        assert worker.ask("7") == {"line": 7}
        before, after = worker.ask("peak")["peak"], worker.ask("grow")["peak"]
        assert before < len(held)
        assert 190_000_000 < after - before < 230_000_000
        with pytest.raises(SystemExit, match=r"(?s)ended with code 1.*invalid literal"):
            worker.ask("²")
