"""With vLLM's tokens a model gives what it gives with its own; here a stand-in runs the merged folder greedily."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm_stand_in
from token_rows import token_rows
from typer.testing import CliRunner
from vllm_stand_in import StandInVllm

from search_r3 import InputError, SearchR3
from search_r3.cli import app
from search_r3.model.engines.vllm import vllm_generation
from search_r3.model.engines.vllm.vllm_engine import GPU_MEMORY, VllmEngine
from search_r3.model.engines.vllm.vllm_generation import SETTINGS, check_device

PREFIX = [5, 60, 7, 80, 9]
CLOSE = 1e-5
TEXTS = ["How do I read a file line by line in Python?", "Paris", "def mean(values):\n    return sum(values)", "x"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and an environment that it may change."""
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    for name in SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path / "cache"


@pytest.fixture
def open_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[SearchR3, StandInVllm]]:
    """Load a folder on engine vllm, with a stand-in of these settings as vLLM."""

    def opened(folder: Path, *args: Any, **settings: Any) -> tuple[SearchR3, StandInVllm]:
        vllm = StandInVllm(*args, **settings).install(monkeypatch)
        return SearchR3.from_pretrained(folder, engine="vllm", device="cpu"), vllm

    return opened


@pytest.fixture
def rows() -> list[list[int]]:
    """Eight rows of mixed lengths, no special token among them."""
    return token_rows(3, 9, 1, 27, 4, 4, 90, 2)


def generate(engine: Any, rows: list[list[int]], **changes: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0, "batch_size": 32}
    return engine.generate(PREFIX, rows, **settings | changes)


def assert_same(found: Any, expected: Any) -> None:
    assert (found.token_ids, found.forced, found.ended) == (expected.token_ids, expected.forced, expected.ended)
    assert np.abs(found.embedding - expected.embedding).max() < CLOSE


def endings(engine: VllmEngine) -> Callable[[int, list[int]], int]:
    """A will for requests in turn: the embed token, an ended turn, no end, the token at once, an end too late."""
    embed, stop = engine.embed_id, int(engine.stop_ids[0])
    scripts = [[11, 12, embed], [13, stop], [20, 21, 22, 23, 24, 25, 26], [embed], [31, 32, 33, 34, 35, 36, stop]]
    return lambda number, written: scripts[number % len(scripts)][len(written)]


class TestAgainstTheTorchEngine:
    def test_an_adapters_golden_vectors_and_reasoning_are_the_same(self, tiny_adapter: Path, open_model: Any) -> None:
        model, vllm = open_model(tiny_adapter, chunk=16)
        distance = model.check_golden()
        assert distance is not None
        assert distance < 1e-4
        expected = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        assert (model.contract_hash, model.dtype) == (expected.contract_hash, "float32")
        for budget in (0, 7):
            for one, other in zip(
                model.reason(TEXTS, max_reasoning_tokens=budget),
                expected.reason(TEXTS, max_reasoning_tokens=budget),
                strict=True,
            ):
                assert (one.text, one.token_ids, one.forced) == (other.text, other.token_ids, other.forced)
                assert np.abs(one.embedding - other.embedding).max() < CLOSE
        assert vllm.engine.seen, "vLLM must have written them"

    def test_documents_and_direct_queries_never_reach_vllm(self, tiny_model: Path, open_model: Any) -> None:
        model, vllm = open_model(tiny_model)
        expected = SearchR3.from_pretrained(tiny_model, device="cpu")
        assert np.abs(model.encode_document(TEXTS) - expected.encode_document(TEXTS)).max() < CLOSE
        direct = [each.encode_query(TEXTS, reasoning=False) for each in (model, expected)]
        assert np.abs(direct[0] - direct[1]).max() < CLOSE
        assert vllm.engine.seen == []

    def test_padding_ids_are_never_written(self, tiny_model: Path, open_model: Any, rows: Any, tmp_path: Path) -> None:
        tempting = SearchR3.from_pretrained(tiny_model, device="cpu")
        first, padding = generate(tempting.engine, rows)[0].token_ids[0], tempting.engine.vocab_size
        with torch.no_grad():
            weight = tempting.checkpoint.model.get_input_embeddings().weight
            weight[padding:] = 1.5 * weight[first]  # likelier than what is likeliest now
        tempting.save_pretrained(tmp_path / "tempting")
        with torch.inference_mode():
            logits_V = tempting.checkpoint.model(torch.tensor([PREFIX + rows[0]])).logits[0, -1]
        assert logits_V.argmax() >= padding
        model, vllm = open_model(tmp_path / "tempting")
        for one, other in zip(generate(model.engine, rows), generate(tempting.engine, rows), strict=True):
            assert_same(one, other)
        assert set(vllm.engine.seen[0].params.logit_bias) == set(range(padding, weight.shape[0]))


class TestGenerate:
    @pytest.mark.parametrize("keeps_stop_token", [True, False])
    def test_rows_end_as_with_the_torch_engine(
        self, tiny_model: Path, open_model: Any, rows: Any, keeps_stop_token: bool
    ) -> None:
        model, vllm = open_model(tiny_model, keeps_stop_token=keeps_stop_token)
        engine = model.engine
        vllm.will, stop = endings(engine), int(engine.stop_ids[0])
        found = generate(engine, rows[:5])
        assert [(g.token_ids, g.forced, g.ended) for g in found] == [
            ([11, 12], False, None),
            ([13], True, stop),
            ([20, 21, 22, 23, 24, 25], True, None),
            ([], False, None),
            ([31, 32, 33, 34, 35, 36], True, stop),
        ]
        for row, g in zip(rows, found, strict=False):
            ids = torch.tensor([[*PREFIX, *row, *g.token_ids, engine.embed_id]])
            with torch.inference_mode():
                state_D = engine.model.model(input_ids=ids).last_hidden_state[0, -1]
            assert np.abs(g.embedding - torch.nn.functional.normalize(state_D, dim=-1).numpy()).max() < CLOSE

    def test_tokens_and_rows_are_told_as_they_come(self, tiny_model: Path, open_model: Any, rows: Any) -> None:
        model, vllm = open_model(tiny_model)
        vllm.will = endings(model.engine)
        reported: list[tuple[int, int]] = []
        done: list[int] = []
        found = generate(
            model.engine, rows, samples=2, on_token=lambda *one: reported.append(one), progress=lambda n: done.append(n)
        )
        assert len(found) == 2 * len(rows)
        assert sum(done) == len(rows)
        for place, g in enumerate(found):
            assert [token for row, token in reported if row == place] == g.token_ids
        assert [row for row, _ in reported] != sorted(row for row, _ in reported), "rows are written side by side"

    def test_a_listener_that_raises_ends_the_call_and_leaves_nothing_behind(
        self, tiny_model: Path, open_model: Any, rows: Any
    ) -> None:
        model, vllm = open_model(tiny_model)
        expected = generate(model.engine, rows[:2])

        def enough(row: int, token: int) -> None:
            raise KeyError(row)

        with pytest.raises(KeyError):
            generate(model.engine, rows, on_token=enough)
        assert not vllm.engine.has_unfinished_requests()
        for one, other in zip(generate(model.engine, rows[:2]), expected, strict=True):
            assert_same(one, other)

    def test_samples_are_decided_by_their_seeds_and_not_by_their_neighbours(
        self, tiny_model: Path, open_model: Any, rows: Any
    ) -> None:
        engine = open_model(tiny_model)[0].engine

        def tokens(**changes: Any) -> list[list[int]]:
            return [g.token_ids for g in generate(engine, rows[:3], temperature=1.0, **changes)]

        assert tokens(seed=3) == tokens(seed=3) != tokens(seed=4)
        both = tokens(seed=[1, 2, 3, 4, 5, 6], samples=2)
        assert both[2:4] == [g.token_ids for g in generate(engine, rows[1:2], temperature=1.0, seed=[3, 4], samples=2)]
        assert len({tuple(ids) for ids in both}) == 6

    def test_a_row_at_the_end_of_the_models_positions_is_forced(self, tiny_model: Path, open_model: Any) -> None:
        model, _ = open_model(tiny_model)
        (found,) = generate(model.engine, [[11] * 1000], max_new_tokens=100)
        assert 0 < len(found.token_ids) < 30
        assert (found.forced, found.ended) == (True, None)

    def test_no_rows(self, tiny_model: Path, open_model: Any) -> None:
        assert generate(open_model(tiny_model)[0].engine, []) == []


class TestSlots:
    def test_rows_that_join_at_different_steps_give_what_generate_gives(
        self, tiny_model: Path, open_model: Any, rows: Any
    ) -> None:
        model, _ = open_model(tiny_model, chunk=16)
        budgets = [0, 6, 2, 9, 1, 4, 5, 3]
        expected = [
            generate(model.engine, [row], max_new_tokens=budget)[0] for row, budget in zip(rows, budgets, strict=True)
        ]
        slots, places, written, done = model.engine.continuous_batch(PREFIX), {}, {i: [] for i in range(len(rows))}, {}
        waiting = list(range(len(rows)))
        while waiting or len(slots):
            if waiting:
                now, waiting = waiting[:2], waiting[2:]
                handles = slots.join([rows[i] for i in now], [budgets[i] for i in now])
                places.update(zip(handles, now, strict=True))
            if len(done) == 1:  # another user of the engine takes nothing away
                generate(model.engine, rows[:1])
            for step in slots.step():
                if step.done is None:
                    written[places[step.handle]].append(step.token)
                else:
                    done[places[step.handle]] = step.done
        for place, one in enumerate(expected):
            assert_same(done[place], one)
            assert written[place] == one.token_ids
        assert slots.step() == []

    def test_who_leaves_is_given_up_by_vllm_and_changes_nobody_else(
        self, tiny_model: Path, open_model: Any, rows: Any
    ) -> None:
        model, vllm = open_model(tiny_model)
        expected = generate(model.engine, rows[1:2])[0]
        slots = model.engine.continuous_batch(PREFIX)
        first, second = slots.join(rows[:2], [6, 6])
        slots.step()
        slots.leave([first, 12345])
        assert len(slots) == 1
        assert len(vllm.engine.aborted) == 1
        done = {}
        while len(slots):
            done.update({step.handle: step.done for step in slots.step() if step.done})
        assert_same(done[second], expected)
        slots.join(rows[:3], [6] * 3)
        slots.clear()
        assert len(slots) == 0
        assert not vllm.engine.has_unfinished_requests()

    def test_if_one_cannot_join_none_does(self, tiny_model: Path, open_model: Any, rows: Any) -> None:
        model, vllm = open_model(tiny_model)
        slots = model.engine.continuous_batch(PREFIX)
        with pytest.raises(InputError, match=r"vLLM rejects a row of 2005 tokens: The decoder prompt .* longer than"):
            slots.join([rows[0], [11] * 2000], [6, 6])
        assert len(slots) == 0
        assert not vllm.engine.has_unfinished_requests()


class TestStart:
    def test_the_process_draws_what_it_would_have_drawn(self, tiny_model: Path, open_model: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            SearchR3.from_pretrained(tiny_model, device="cpu")
            expected = torch.get_rng_state()
            torch.manual_seed(5)
            open_model(tiny_model)
            assert torch.equal(torch.get_rng_state(), expected)

    def test_merged_weights_are_written_once_and_again_if_they_are_damaged(
        self, tiny_adapter: Path, open_model: Any, cache: Path
    ) -> None:
        model, vllm = open_model(tiny_adapter)
        folder = vllm.started[0].folder
        assert folder == cache / "vllm" / f"{model.contract_hash}-float32"
        assert vllm.started[0].gpu_memory_utilization == GPU_MEMORY
        weights = folder / "model.safetensors"
        stamp, whole = weights.stat().st_mtime_ns, weights.read_bytes()
        open_model(tiny_adapter)
        assert weights.stat().st_mtime_ns == stamp
        weights.write_bytes(whole[:-40] + bytes(40))
        open_model(tiny_adapter)
        assert weights.read_bytes() == whole
        weights.write_bytes(whole[:1000])
        open_model(tiny_adapter)
        assert weights.read_bytes() == whole

    def test_a_merged_checkpoint_is_taken_where_it_stands(
        self, tiny: SearchR3, open_model: Any, cache: Path, tmp_path: Path
    ) -> None:
        tiny.save_pretrained(tmp_path / "merged")
        _, vllm = open_model(tmp_path / "merged")
        assert vllm.started[0].folder == tmp_path / "merged"
        assert not (cache / "vllm").exists()


class TestRefusals:
    def test_vllm_is_missing(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(InputError, match=r"needs the package vllm; run: pip install 'search-r3\[vllm\]'"):
            SearchR3.from_pretrained(tiny_model, engine="vllm")
        answer = CliRunner().invoke(app, ["models", "--check", str(tiny_model), "--engine", "vllm"])
        assert isinstance(answer.exception, InputError)

    def test_vllm_finds_no_gpu(self, tiny_model: Path, open_model: Any) -> None:
        with pytest.raises(InputError, match="needs a GPU, and vLLM finds none"):
            open_model(tiny_model, device_type="")

    def test_the_model_is_elsewhere(self, tiny_model: Path, open_model: Any) -> None:
        with pytest.raises(InputError, match="runs on cuda here, but the model is on cpu; omit device"):
            open_model(tiny_model, device_type="cuda")
        with pytest.raises(InputError, match="not cuda:1; set CUDA_VISIBLE_DEVICES=1"):
            check_device(StandInVllm(device_type="cuda"), torch.device("cuda:1"))
        check_device(StandInVllm(device_type="cuda"), torch.device("cuda:0"))

    def test_vllm_does_not_start(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vllm = StandInVllm().install(monkeypatch)

        def refuse(**_: Any) -> Any:
            raise ValueError("Free memory on device is less than desired GPU memory utilization.\nMore.")

        monkeypatch.setattr(vllm, "LLM", refuse)
        with pytest.raises(InputError, match=r"vLLM does not start on .*: Free memory .* utilization\.; or use engine"):
            SearchR3.from_pretrained(tiny_model, engine="vllm", device="cpu")

    @pytest.mark.parametrize("said", ["much", "0", "1.5"])
    def test_a_share_of_memory_that_is_none(
        self, said: str, tiny_model: Path, open_model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SEARCH_R3_VLLM_MEMORY", said)
        with pytest.raises(InputError, match=f"SEARCH_R3_VLLM_MEMORY is '{said}'"):
            open_model(tiny_model)

    def test_a_temperature_that_vllm_does_not_take(self, tiny_model: Path, open_model: Any) -> None:
        with pytest.raises(InputError, match=r"vLLM rejects .* temperature must be in \[0, 2\]"):
            open_model(tiny_model)[0].reason(["x"], temperature=3.0)

    def test_a_row_that_vllm_gives_up_is_an_error(self, tiny_model: Path, open_model: Any, rows: Any) -> None:
        model, vllm = open_model(tiny_model)
        answer = SimpleNamespace(token_ids=[], finish_reason="error", stop_reason=None)
        vllm.engine.step = lambda: [
            SimpleNamespace(request_id=key, outputs=[answer], finished=True) for key in vllm.engine._requests
        ]
        with pytest.raises(RuntimeError, match="gave up a row: error"):
            generate(model.engine, rows)
        vllm.engine.step, vllm.engine.has_unfinished_requests = (lambda: []), (lambda: False)
        with pytest.raises(RuntimeError, match="nothing left to do, but 8 rows have not ended"):
            generate(model.engine, rows)


def test_vllm_is_told_to_be_quiet_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    StandInVllm().install(monkeypatch)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    vllm_generation.import_vllm()
    assert {name: os.environ[name] for name in SETTINGS} == SETTINGS | {"VLLM_LOGGING_LEVEL": "DEBUG"}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_stand_in_has_vllms_names() -> None:
    from vllm import LLM, LLMEngine, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMClientError
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind

    def names(function: Any) -> set[str]:
        return set(inspect.signature(function).parameters) - {"self"}

    ours = vllm_stand_in.LLM
    assert names(ours.__init__) - {"package"} <= names(LLM.__init__) | names(EngineArgs.__init__)
    assert names(vllm_stand_in.SamplingParams.__init__) <= set(SamplingParams.__annotations__)
    for kind, real in ((ours, LLM), (vllm_stand_in.LLMEngine, LLMEngine)):
        for name, function in inspect.getmembers(kind, inspect.isfunction):
            if not name.startswith("_"):
                given = list(inspect.signature(function).parameters)
                assert given == list(inspect.signature(getattr(real, name)).parameters)[: len(given)], name
    assert {"request_id", "outputs", "finished"} <= names(RequestOutput.__init__)
    assert {"index", "text", "token_ids", "finish_reason", "stop_reason"} <= names(CompletionOutput.__init__)
    assert RequestOutputKind.DELTA.value == vllm_stand_in.RequestOutputKind.DELTA.value
    assert isinstance(current_platform.device_type, str)
    with pytest.raises(VLLMClientError):
        SamplingParams(temperature=3.0)
