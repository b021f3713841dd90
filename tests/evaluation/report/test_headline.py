"""What a report answers first follows from the scores: the best system, the kinds of reasoning, the differences."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.report import headline
from search_r3.evaluation.report.comparison import DatasetComparison
from search_r3.evaluation.report.front_section import forest, front
from search_r3.evaluation.report.headline import differences, kinds, ranking
from search_r3.evaluation.report.load_results import Results
from search_r3.evaluation.report.system_names import short_mode, short_models, short_names, split_mode
from search_r3.evaluation.significance import macro_interval

QUERIES = {"large": 120, "other": 110, "part.small": 50}
MEANS = {"bm25": 0.3, "all-minilm-l6-v2": 0.5, "r3-x-sft.off": 0.6, "r3-x-sft.on": 0.6, "r3-x-sft.read": 0.8,
         "r3-x-sft.given": 0.95, "r3-x-sft.read.shuffled": 0.4, "r3-x-grpo.off": 0.55}  # fmt: skip


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "RESAMPLES", 300)


def made(means: dict[str, float] = MEANS, without: tuple[str, ...] = ()) -> Results:
    """Scores with these means on three data sets; those in `without` cannot be measured again."""
    rng = np.random.default_rng(0)
    records, by_dataset = [], {}
    for name, count in QUERIES.items():
        noise = rng.uniform(-0.05, 0.05, count)
        scores = {s: {f"q{i}": m + n for i, n in enumerate(noise - noise.mean())} for s, m in means.items()}
        by_dataset[name] = DatasetComparison(name, scores={} if name in without else scores)
        records += [
            {"dataset": name, "system": s, "num_queries": count, "measures": {NDCG: m}, "seconds": {"queries": 2.0}}
            for s, m in means.items()
        ]
    return Results(records, "bm25", by_dataset)


def test_the_best_system_is_by_the_mean_over_the_large_data_sets():
    ranked = ranking(made())
    assert ranked.datasets == ("large", "other")
    assert ranked.best == ranked.ours == "r3-x-sft.read"  # not "given", whose reasoning no user has
    assert ranked.best_mean.value == pytest.approx(0.8)
    assert ranked.best_mean.low < 0.8 < ranked.best_mean.high
    assert ranked.against["bm25"].value == pytest.approx(0.5)
    assert "r3-x-sft.read.shuffled" not in ranked.means
    control = ranking(made(MEANS | {"r3-x-sft-control.off": 0.9}))
    assert (control.best, control.left_out) == ("r3-x-sft.read", ())
    behind = ranking(made(MEANS | {"bm25": 0.9}))
    assert (behind.best, behind.ours) == ("bm25", "r3-x-sft.read")
    assert behind.against["bm25"].high < 0


def test_a_system_measured_on_few_of_the_data_sets_does_not_decide_which_are_averaged():
    results = made()
    results.records.append({"dataset": "other", "system": "r3-x-base.off", "num_queries": 110, "measures": {NDCG: 1.0}})
    results.by_dataset["other"].scores["r3-x-base.off"] = dict.fromkeys((f"q{i}" for i in range(110)), 1.0)
    assert ranking(results).datasets == ("large", "other")
    assert "r3-x-base.off" not in ranking(results).means
    assert ranking(results).left_out == ("r3-x-base.off",)
    results.records.append({"dataset": "other", "system": "r3-x-sft.latent", "num_queries": 1, "measures": {NDCG: 1.0}})
    results.by_dataset["other"].scores["r3-x-sft.latent"] = results.by_dataset["other"].scores[
        "bm25"
    ]  # of a model that is not left out
    assert "Left out, since measured on too few of these: base." in said(results)[0]


def test_a_fixed_part_does_not_count_where_there_is_its_whole_data_set():
    results = made()
    part = results.by_dataset.pop("part.small")
    for name in ("large.small", "other.small"):
        results.by_dataset[name] = DatasetComparison(name, scores={"r3-x-old.off": part.scores["bm25"]})
    results.by_dataset["large"].scores["r3-x-old.off"] = results.by_dataset["large"].scores["bm25"]
    results.records.append({"dataset": "large", "system": "r3-x-old.off", "num_queries": 120, "measures": {NDCG: 0.3}})
    assert ranking(results).datasets == ("large", "other")
    assert ranking(results).left_out == ("r3-x-old.off",)


def test_every_kind_of_reasoning_is_compared_with_the_direct_embedding():
    found = {(kind.model, kind.mode): kind.change for kind in kinds(made())}
    assert set(found) == {("r3-x-sft", mode) for mode in ("on", "read", "given", "read.shuffled")}
    assert found["r3-x-sft", "read"].low == pytest.approx(0.2)  # the same noise: no spread
    assert found["r3-x-sft", "read.shuffled"].high == pytest.approx(-0.2)


def test_a_kind_helps_only_if_another_querys_words_do_not_help_as_much():
    by_mode = {kind.mode: kind for kind in kinds(made())}
    assert by_mode["read"].helps
    assert by_mode["read"].over_control.value == pytest.approx(0.4)
    assert by_mode["given"].over_control is None
    assert not by_mode["on"].helps
    spoiled = kinds(made(MEANS | {"r3-x-sft.read.shuffled": 0.85}))
    assert not next(kind for kind in spoiled if kind.mode == "read").helps


def test_reasoning_that_states_the_answer_proves_nothing():
    results = made()
    results.by_dataset["entailmentbank"] = results.by_dataset.pop("large")
    by_mode = {kind.mode: kind.datasets for kind in kinds(results)}
    assert by_mode["given"] == ("other",)
    assert set(by_mode["read"]) == {"other", "entailmentbank"}
    assert "given reasoning by +0.350 (+0.350 to +0.350) on other" in said(results)[1]


def test_differences_say_what_was_not_tested_and_what_is_small():
    found = differences(made(without=("other",)), "r3-x-sft.off", ["bm25", "all-minilm-l6-v2"])
    assert [d.dataset for d in found[::2]] == ["large", "other", "part.small"]
    assert [d.interval is None for d in found] == [False, False, True, True, False, False]
    assert [d.few for d in found] == [False] * 4 + [True] * 2
    assert found[0].value == pytest.approx(0.3)


def said(results: Results) -> list[str]:
    (block,) = front(results).blocks
    return [f"{answer.verdict}. {answer.sentence} {answer.note}" for answer in block.answers]


def test_the_three_answers_in_words():
    best, reasoning, cost = said(made())
    assert best.startswith("sft, reading. Mean nDCG@10 0.800 (0.79")
    assert "it is 0.500 above BM25 (0.500 to 0.500) and 0.300 above MiniLM" in best
    assert reasoning.startswith(
        "Yes: reading the first hits and given reasoning. In sft, against the direct embedding, its own reasoning "
        "changes nDCG@10 by 0.000 (0.000 to 0.000);"
    )
    assert "Controls: another query's first hits −0.200 (−0.200 to −0.200)." in reasoning
    assert "In batches, per query, with other work running: direct 17\u00a0ms, with reasoning 17\u00a0ms" in cost
    worse = said(made({"bm25": 0.9, "r3-x-sft.off": 0.6, "r3-x-sft.on": 0.5}))
    assert worse[0].startswith("BM25. ")
    assert "the best of ours, r3-x-sft, direct, is 0.300 below BM25" in worse[0]
    given = said(made({"bm25": 0.3, "r3-x-sft.off": 0.6, "r3-x-sft.on": 0.5, "r3-x-sft.given": 0.7}))
    assert given[1].startswith(
        "Only reasoning that it is given. Against the direct embedding, its own reasoning changes"
    )
    assert worse[1].startswith("No: it harms. Against the direct embedding, its own")


def test_reasoning_and_cost_are_those_of_the_best_model():
    results = made(MEANS | {"r3-x-grpo.on": 0.5})
    study = {"dataset": "large", "system": "r3-x-grpo", "budgets": [], "modes": [], "settings": {"budget": 32}}
    results.studies = [study]
    modes = {"off": {"p50_ms": 24.0, "ratio": 1.0}, "on": {"p50_ms": 279.0, "ratio": 11.6},
             "latent": {"p50_ms": 81.0, "ratio": 3.4}}  # fmt: skip
    figures = {"model": "r3-x-sft", "engine": "int8", "batches": {"1": modes}}
    results.query_modes = [{"figures": figures | {"model": "r3-x-grpo"}}, {"figures": figures, "hardware": "A machine"}]
    _, reasoning, cost = said(results)
    assert "grpo" not in reasoning
    assert cost.startswith(
        "12 times the time of a direct query. One query takes 24\u00a0ms direct and 279\u00a0ms with reasoning. "
        "Medians; encoding alone, int8 on A machine."
    )


def test_many_data_sets_are_named_below_the_sentence_and_models_listed_in_plain_english():
    results = made(MEANS | {"r3-x-grpo.on": 0.5, "r3-x-new.off": 0.5, "r3-x-new.on": 0.4, "r3-x-top.off": 0.97})
    for name in ("more", "still-more"):
        means = {"r3-x-new.off": 0.5, "r3-x-new.on": 0.4, "r3-x-top.off": 0.97}
        scores = {system: {f"q{i}": mean for i in range(110)} for system, mean in means.items()}
        results.by_dataset[name] = DatasetComparison(name, scores=scores)
    sentence = said(results)[1]
    assert "by 0.000 (0.000 to 0.000) in sft, −0.050 (−0.050 to −0.050) in grpo and −0.100" in sentence
    assert "in new, over 4 data sets;" in sentence
    assert sentence.endswith(" 4 data sets: large, other, more, still-more.")


def test_without_judgments_nothing_is_claimed():
    results = made(without=tuple(QUERIES))
    assert [line.split(".")[0] for line in said(results)] == [
        "Not tested",
        "Not tested",
        "Not timed one query at a time",
    ]
    assert forest(results, None).count("not tested") > 2


def test_data_sets_count_equally_and_queries_are_resampled_within_them():
    rng = np.random.default_rng(1)
    small, large = rng.normal(0.0, 0.1, 40), rng.normal(1.0, 0.1, 400)
    mean, low, high = macro_interval([small, large])
    assert mean == pytest.approx((small.mean() + large.mean()) / 2)
    error = np.sqrt(small.var() / 40 + large.var() / 400) / 2
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    with pytest.raises(ValueError, match="no data sets"):
        macro_interval([])


def test_names_are_shortened_to_what_tells_them_apart():
    assert split_mode("a-sft.read.shuffled") == ("a-sft", "read.shuffled")
    assert split_mode("bm25") == ("bm25", "")
    assert short_models(["r3-135m-sft", "r3-135m-grpo"]) == {"r3-135m-sft": "sft", "r3-135m-grpo": "grpo"}
    assert short_models(["r3-sft"]) == {"r3-sft": "r3-sft"}
    assert short_models(["r3", "r3-sft"]) == {"r3": "r3", "r3-sft": "r3-sft"}
    names = short_names(["bm25", "r3-sft.off", "r3-grpo.on", "org/other"])
    assert list(names.values()) == ["BM25", "sft, direct", "grpo, with reasoning", "org/other"]
    assert short_mode("all-minilm-l6-v2+reasoning") == "MiniLM+reasoning"
