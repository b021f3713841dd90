"""Each control is what its name says, and asks the model nothing twice."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.evaluation.study import controls
from search_r3.evaluation.study.controls import ControlConfig, ControlSystem, StudyContext, derangement, mode_paths
from search_r3.evaluation.study.fusion_controls import fuse_runs
from search_r3.evaluation.study.reasoning_cache import ReasoningCache
from search_r3.evaluation.systems import Answers, SearchR3System
from search_r3.retrievers.dense import exact_search

DOCUMENTS = {
    "d1": "Aspirin lowers the risk of a heart attack.",
    "d2": "Yeast makes bread rise.",
    "d3": "The moon moves the sea.",
    "d4": "def mean(values):\n    return sum(values) / len(values)",
    "d5": "Paris is the capital of France.",
}
QUERIES = {
    "q1": "does aspirin prevent a heart attack",
    "q2": "why does bread rise",
    "q3": "what moves the sea",
    "q4": "the mean of a list in Python, line by line and file by file",
}


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture
def make_context(tiny, tmp_path):
    def make(queries=QUERIES, **settings):
        config = ControlConfig(**{"budget": 6, "budgets": (0, 3, 6), "samples": 2, **settings})
        system = SearchR3System(tiny, "mine", "off", max_reasoning_tokens=6)
        cache = ReasoningCache(tmp_path / "reasoning")
        return StudyContext(system, "mine", DOCUMENTS, queries, config, depth=4, embeddings=None, reasoning_cache=cache)

    return make


def run_of(context: StudyContext, rows: np.ndarray) -> dict[str, dict[str, float]]:
    scores, indices = exact_search(rows, context.document_rows, context.depth)
    ids = list(DOCUMENTS)
    return {q: {ids[i]: float(s) for s, i in zip(*row, strict=True)} for q, *row in zip(QUERIES, scores, indices)}  # noqa: B905


def same(a, b):
    assert a.keys() == b.keys()
    for qid in a:
        assert a[qid] == pytest.approx(b[qid], abs=1e-5)


def test_off_and_on_are_those_of_an_ordinary_evaluation(make_context, tiny):
    context = make_context()
    for mode in ("off", "on"):
        usual = SearchR3System(tiny, "mine", mode, max_reasoning_tokens=6)
        control = ControlSystem(context, mode)
        assert (control.name, control.identity) == (usual.name, usual.identity)
        expected = usual.answer(DOCUMENTS, QUERIES, 4, None)
        found = control.answer(DOCUMENTS, QUERIES, 4, None)
        same(found.run, expected.run)
        assert found.reasoning == expected.reasoning


def test_what_stands_before_the_token_is_what_the_mode_says(make_context, tiny):
    context, texts = make_context(), list(QUERIES.values())
    written = [r.reasoning_ids for r in tiny.reason(texts, max_reasoning_tokens=6)]
    assert len({tuple(ids) for ids in written}) == 4
    same(context.answers("empty").run, run_of(context, tiny.encode_with_reasoning(texts, [""] * 4)))
    same(context.answers("empty").run, run_of(context, tiny.encode_query(texts, max_reasoning_tokens=0)))
    same(
        context.answers("repeat").run, run_of(context, tiny.encode_with_reasoning(texts, texts, max_reasoning_tokens=6))
    )
    places = derangement(4, 0)
    shuffled = context.answers("shuffled")
    same(shuffled.run, run_of(context, tiny.encode_with_reasoning(texts, [written[i] for i in places])))
    assert [record["from"] for record in shuffled.reasoning] == [list(QUERIES)[i] for i in places]
    same(context.answers("on-3").run, run_of(context, tiny.encode_query(texts, max_reasoning_tokens=3)))
    runs = [str(context.answers(mode).run) for mode in ("off", "on", "empty", "repeat", "shuffled", "on-3")]
    assert len(set(runs)) == 6


def test_fused_modes_are_fused_from_their_parts(make_context, tiny):
    context, texts = make_context(), list(QUERIES.values())
    off, on = tiny.encode_query(texts, reasoning=False), tiny.encode_query(texts, max_reasoning_tokens=6)
    mean = (off + on) / np.linalg.norm(off + on, axis=1, keepdims=True)
    same(context.answers("off+on-mean").run, run_of(context, mean))
    parts = {mode: context.answers(mode).run for mode in ("off", "on", "bm25")}
    same(context.answers("off+on-rrf").run, fuse_runs([parts["off"], parts["on"]], 4))
    same(context.answers("on+bm25").run, fuse_runs([parts["on"], parts["bm25"]], 4))
    same(context.answers("off+bm25").run, fuse_runs([parts["off"], parts["bm25"]], 4))
    drawn = [context.traces(sample=i) for i in range(2)]
    assert drawn[0].token_ids != drawn[1].token_ids
    total = drawn[0].rows + drawn[1].rows
    same(context.answers("samples-mean").run, run_of(context, total / np.linalg.norm(total, axis=1, keepdims=True)))
    same(context.answers("samples-rrf").run, fuse_runs([run_of(context, part.rows) for part in drawn], 4))


class Echo:
    """A baseline that keeps the queries it was asked."""

    name, device, identity = "echo", "cpu", {"max_length": None, "dtype": "none"}

    def answer(self, documents, queries, k, cache):
        self.queries = dict(queries)
        return Answers({qid: {"d1": 1.0} for qid in queries}, 0.0, 0.0)


@pytest.mark.parametrize("baseline", ["bm25", "all-minilm-l6-v2"])
def test_rewriting_gives_a_baseline_the_query_with_the_reasoning_as_text(make_context, monkeypatch, baseline):
    echo = Echo()
    monkeypatch.setattr(controls, "open_systems", lambda name, **_: [echo] if name == baseline else [])
    context = make_context()
    context.answers(f"{baseline}+reasoning")
    texts = context.traces().texts
    assert any(texts)
    assert echo.queries == {
        qid: f"{query} {text}".strip() for (qid, query), text in zip(QUERIES.items(), texts, strict=True)
    }
    assert context.identity(f"{baseline}+reasoning")["baseline"] == echo.identity


def test_identities_tell_apart_whatever_changes_a_ranking(make_context):
    def identities(**settings):
        context = make_context(**settings)
        return {m: context.identity(m) for m in context.config.modes if "minilm" not in m}

    first = identities()
    assert len({str(identity) for identity in first.values()}) == len(first)
    changed = {
        "budget": {"on", "shuffled", "repeat", "bm25+reasoning", "on+bm25", "off+on-mean", "off+on-rrf", "samples-mean",
                   "samples-rrf"},
        "seed": {"shuffled", "samples-mean", "samples-rrf"},
        "samples": {"samples-mean", "samples-rrf"},
        "temperature": {"samples-mean", "samples-rrf"},
    }  # fmt: skip
    for name, value in (("budget", 7), ("seed", 1), ("samples", 3), ("temperature", 0.5)):
        other = identities(**{name: value})
        assert {m for m in first if m in other and first[m] != other[m]} == changed[name]


def test_budgets_name_their_modes():
    config = ControlConfig(budget=32, budgets=(64, 0, 4, 32))
    assert [config.mode_of_budget(b) for b in (0, 4, 32, 64)] == ["empty", "on-4", "on", "on-64"]
    assert config.modes[-2:] == ["on-4", "on-64"]
    assert len(config.modes) == len(set(config.modes))


@pytest.mark.parametrize("count", [2, 3, 50])
def test_no_query_keeps_its_own_reasoning(count):
    for seed in range(20):
        places = derangement(count, seed)
        assert sorted(places) == list(range(count))
        assert all(place != i for i, place in enumerate(places))
    assert derangement(50, 1) == derangement(50, 1) != derangement(50, 2)


def test_a_controls_record_stays_out_of_the_tables_of_results(tmp_path):
    assert mode_paths(tmp_path, "cosqa", "mine", "on").metrics == tmp_path / "metrics/cosqa/mine.on.json"
    files = mode_paths(tmp_path, "cosqa", "mine-1.5", "empty")
    assert files.run == tmp_path / "runs/cosqa/mine-1.5.empty.trec.gz"
    assert files.metrics == tmp_path / "studies/cosqa/mine-1.5/empty.json"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"samples": 1}, "samples is 1"),
        ({"budgets": (4, 4)}, r"budgets \[4, 4\]"),
        ({"budgets": (-1,)}, r"budgets \[-1\]"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ControlConfig(**settings)


def test_a_single_query_and_an_unknown_control_are_refused(make_context):
    with pytest.raises(InputError, match="needs at least 2"):
        make_context({"q1": QUERIES["q1"]}).answers("shuffled")
    with pytest.raises(InputError, match="unknown control 'maybe'"):
        make_context().answers("maybe")
