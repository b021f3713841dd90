"""The stage 2 benchmark on tiny random models: ours and TRL do the same, the report is whole. No time is asserted."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from benchmark_scripts import benchmark_script

from search_r3.data.pairs import write_pairs
from search_r3.data.sources.docstrings import docstring_pairs

pytest.importorskip("trl", reason="TRL is not installed: pip install 'search-r3[trl]'")
PARTS = {"sample", "embed", "sync", "refresh", "reward", "forward_backward", "other"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/grpo.py, its workers in this process."""
    from accelerate.state import AcceleratorState
    from transformers.utils import logging

    environment, verbosity = dict(os.environ), logging.get_verbosity()
    with benchmark_script("grpo", monkeypatch) as module:
        yield module
    logging.set_verbosity(verbosity)
    os.environ.clear()
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)  # TRL's settings are not the next test's


@pytest.fixture
def run(
    script: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        write_pairs(tmp_path / "pairs.jsonl", docstring_pairs(["json", "logging", "email"])[0])
        fixed = ["--tiny", "--adapter", tiny_model, "--pairs", tmp_path / "pairs.jsonl", "--json", tmp_path / "o.json"]
        options = ["--dtype", "float32", "--documents", "24", "--peer-attention", "sdpa"]
        monkeypatch.setattr(sys, "argv", ["grpo.py", *map(str, fixed), *options, *arguments])
        script.main()
        return json.loads((tmp_path / "o.json").read_text())

    return run


@pytest.mark.nightly
def test_the_report_has_its_parts_and_both_did_the_same(run: Callable[..., dict[str, Any]]) -> None:
    report = run("--steps", "2", "--peer-rows", "3")
    assert {"benchmark", "command", "commit", "seed", "versions", "hardware", "figures"} <= set(report)
    figures = report["figures"]
    assert figures["precision"] == "float32"
    assert figures["peer_trial_seconds"] == {}
    assert figures["job"]["temperature"] == 1.0
    assert figures["job"]["refresh"]["budget"] == 6
    ours, theirs = figures["agreement"]["ours"], figures["agreement"]["peer"]
    assert ours["tokens_sha256"] == theirs["tokens_sha256"]
    assert theirs["least_cosine"] > 0.9999
    assert ours["kl"] > 1e-3  # the weights are shaken: with the reference's own, the comparison would say little
    for name in ("loss", "kl", "entropy"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-4)
    for name in ("gradient_norm", "row_gradient_norm"):
        assert theirs[name] == pytest.approx(ours[name], rel=2e-3)
        assert ours[name] > 0
    for system in ("ours", "ours_contrastive", "peer"):
        one = figures[system]
        assert set(one["parts"]) == PARTS
        seconds = one["seconds_per_step"]
        assert seconds["min"] <= seconds["median"] <= seconds["max"]
        lowest = sum(part["min"] for part in one["parts"].values())
        assert 0 < lowest <= 1.01 * seconds["max"]
        assert sum(part["max"] for part in one["parts"].values()) >= 0.99 * seconds["min"]
        for part in ("sample", "refresh", "reward", "forward_backward", "other"):
            assert one["parts"][part]["min"] > 0, (system, part)
        assert one["lora_parameters"] == figures["ours"]["lora_parameters"] > 0
        assert one["other_parameters"] == 32  # the embed token's row
        assert one["rollouts"] == [6, 6]
        assert all(0 < tokens <= 6 * 5 for tokens in one["rollout_tokens"])
        assert one["peak_bytes"] > 0
    assert figures["ours"]["parts"]["embed"]["max"] == 0  # they come out of sampling
    assert figures["peer"]["parts"]["embed"]["min"] > 0
    assert figures["peer"]["rows_per_pass"] == 3
    assert figures["ours_contrastive"]["contrastive_weight"] > 0
    for system in ("ours", "ours_contrastive"):
        least, ratio, most = (figures[system]["times_the_peers_speed" + end] for end in ("_min", "", "_max"))
        assert 0 < least <= ratio <= most
    assert figures["peak_of_peer"] > 0
    assert any("prefix" in line for line in figures["not_alike"])


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("beta", "gradient_norm|loss"),
        ("advantages", "gradient_norm|loss"),
        ("temperature", "loss|kl|entropy"),
        ("tokens", "tokens"),
        ("adapter", "adapters"),
        ("base", "kl|entropy|gradient_norm|cosine"),
        ("embedding", "cosine"),
    ],
)
def test_a_peer_that_is_not_the_same_is_refused(
    fault: str, message: str, script: ModuleType, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("grpo_peer")
    original = module.Peer

    def wrong(spec: Any) -> Any:
        setting = {"beta": "beta=0.5", "temperature": "temperature=0.5", "tokens": "max_query_tokens=3"}.get(fault)
        spec = replace(spec, settings=[*spec.settings, setting]) if setting else spec
        peer = original(spec)
        if fault == "advantages":
            peer.trainer.scale_rewards = "none"
        if fault == "adapter":
            next(p for name, p in peer.model.named_parameters() if "lora_" in name).requires_grad_(False)
        if fault == "base":
            next(p for name, p in peer.model.named_parameters() if "q_proj.base_layer" in name).data.mul_(0.5)
        if fault == "embedding":
            peer.embed_id -= 1
        return peer

    monkeypatch.setattr(module, "Peer", wrong)
    with pytest.raises(SystemExit, match=f"(?s)ours and the peer.*({message})"):
        run("--steps", "1")


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_a_lighter_peer_in_bfloat16_agrees_too_and_the_report_shows_it(
    precision: str, run: Callable[..., dict[str, Any]]
) -> None:
    options = ["--dtype", "bfloat16", "--peer-precision", precision, "--peer-without-row"]
    figures = run("--steps", "1", *options)["figures"]
    assert (figures["ours"]["precision"], figures["peer"]["precision"]) == ("autocast", precision)
    assert (figures["ours"]["other_parameters"], figures["peer"]["other_parameters"]) == (32, 0)
    assert figures["agreement"]["tolerance"]["loss"] > 1e-3


@pytest.mark.nightly
def test_what_fails_in_the_trainers_thread_fails_here(
    script: ModuleType, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("no reward today")

    module = importlib.import_module("grpo_peer")
    monkeypatch.setattr(module.Peer, "embed", broken)
    monkeypatch.setattr(script, "agree", lambda *_: {})
    with pytest.raises(ZeroDivisionError, match="no reward today"):
        run("--steps", "1")


def test_a_completion_ends_as_our_rollouts_do(script: ModuleType) -> None:
    embed, stop = 9, 7
    peer = importlib.import_module("grpo_peer").Peer.__new__(importlib.import_module("grpo_peer").Peer)
    peer.embed_id, peer.config = embed, SimpleNamespace(max_reasoning_tokens=3)
    peer.trainer = SimpleNamespace(eos_token_ids=[stop, embed])
    assert peer.finished([1, 2, embed]) == ([1, 2], True)
    assert peer.finished([1, 2, 3, embed]) == ([1, 2, 3], True)
    assert peer.finished([1, stop]) == ([1], False)
    assert peer.finished([1, 2, 3, 4]) == ([1, 2, 3], False)  # out of budget: what came last is not fed
    assert peer.finished([embed]) == ([], True)


def test_the_peer_takes_the_precision_and_then_the_attention_that_are_fastest(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes = {("autocast", "sdpa"): 3.0, ("bfloat16", "sdpa"): 2.0, ("float32", "sdpa"): 4.0, ("bfloat16", "eager"): 1.0}

    class Fake(script.System):  # type: ignore[name-defined,misc]
        def __init__(self, name: str, spec: Any, warmup: int) -> None:
            self.spec = spec

        def load(self) -> None: ...

        def warm_up(self) -> None: ...

        def step(self, number: int) -> float:
            return takes[self.spec.precision, self.spec.attention]

    monkeypatch.setattr(script, "System", Fake)
    values = dict.fromkeys(script.Spec.__dataclass_fields__, "") | {"precision": "autocast"}
    options = SimpleNamespace(peer_precision="auto", peer_attention="auto")
    chosen, trial = script.chosen_peer(script.Spec(**values), options)
    assert (chosen.precision, chosen.attention) == ("bfloat16", "eager")
    assert sorted(trial.values()) == [1.0, 2.0, 3.0, 4.0]
    options = SimpleNamespace(peer_precision="autocast", peer_attention="eager")
    chosen, trial = script.chosen_peer(script.Spec(**values), options)
    assert (chosen.precision, chosen.attention, trial) == ("autocast", "eager", {})


def test_a_tiny_run_writes_nothing_where_real_results_are(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr("common.write_report", lambda *a, **k: written.append(a))
    monkeypatch.setattr(script, "prepare", lambda *_: (None, {}))
    monkeypatch.setattr(script, "speed", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--tiny"])
    script.main()
    assert not written
