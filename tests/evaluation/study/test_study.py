"""A study runs every control once, from run files to one JSON file, and goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from search_r3.cli import main
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.measures import NDCG, measure_run
from search_r3.evaluation.publish.markdown_blocks import regenerate, regenerate_all
from search_r3.evaluation.publish.model_card import card
from search_r3.evaluation.publish.recompute import Rebuilder
from search_r3.evaluation.publish.tables import load_records
from search_r3.evaluation.runs import read_run, write_run
from search_r3.evaluation.significance import randomization_test
from search_r3.evaluation.study import adaptive_curve, study_table
from search_r3.evaluation.study.controls import ControlConfig
from search_r3.evaluation.study.latency import MIN_CALLS, time_queries
from search_r3.evaluation.study.reasoning_cache import ReasoningCache
from search_r3.evaluation.study.study import StudyConfig, families, read_study, run_study
from search_r3.evaluation.suite import load_dataset
from search_r3.model.adaptive_reasoning import AdaptiveRule

TOPICS = (
    "aspirin", "bread", "moon", "python", "Paris", "tides", "yeast", "heart",
    "sea", "list", "mean", "file", "line", "capital", "France", "risk",
)  # fmt: skip
CONFIG = ControlConfig(budget=4, budgets=(0, 2, 4), samples=2)
MODES = [
    "empty",
    "shuffled",
    "repeat",
    "bm25+reasoning",
    "off+bm25",
    "off+on-mean",
    "off+on-rrf",
    "samples-rrf",
    "on-2",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of 32 documents and 24 queries about pairs of topics."""
    rng = np.random.default_rng(0)
    texts = {f"d{i}": " ".join(rng.choice(TOPICS, 6)) for i in range(32)}
    queries = {f"q{i}": "what of " + " ".join(texts[f"d{i}"].split()[:2]) for i in range(24)}
    corpus = {did: Document(did, "", text) for did, text in texts.items()}
    qrels = {qid: {f"d{qid[1:]}": 2, f"d{(int(qid[1:]) + 3) % 32}": 1} for qid in queries}
    folder = tmp_path_factory.mktemp("data")
    write_beir(folder / "topics", BeirDataset("topics", corpus, queries, qrels), "test")
    return folder


def run(place, root, tiny_model, report=None, **options):
    settings = {"controls": MODES, "modes": CONFIG, "latency_queries": 2, "adaptive": False, "device": "cpu"}
    return run_study(
        "topics",
        f"mine={tiny_model}",
        place / "results",
        config=StudyConfig(**settings | options),
        data_root=root,
        cache=EmbeddingCache(place / "embeddings"),
        reasoning_cache=ReasoningCache(place / "reasoning", shard_size=8),
        show_progress=False,
        report=report,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, root, tiny_model):
    place = tmp_path_factory.mktemp("study")
    return place, run(place, root, tiny_model, adaptive=True)


def test_every_mode_has_an_ordinary_run_and_its_figures_are_those_of_the_run(whole, root):
    place, found = whole
    qrels = load_dataset("topics", None, root).qrels
    assert [mode["mode"] for mode in found["modes"]][:2] == ["off", "on"]
    assert {mode["mode"] for mode in found["modes"]} == {"off", "on", "bm25", "auto", *MODES}
    for mode in found["modes"]:
        measured = measure_run(read_run(place / f"results/runs/topics/{mode['system']}.trec.gz"), qrels)
        assert mode["measures"] == measured.mean
        per_query = dict(zip(found["queries"], found["per_query"][mode["mode"]], strict=True))
        assert per_query == pytest.approx(measured.per_query[NDCG], abs=1e-6)
        assert mode["description"]


def test_the_file_holds_what_was_returned_with_its_provenance_and_no_path_of_the_machine(whole):
    place, found = whole
    path = place / "results/studies/topics/mine.json"
    assert read_study(path) == json.loads(json.dumps(found))
    assert {"command", "commit", "seed", "versions", "hardware", "settings"} <= set(found)
    assert str(place) not in path.read_text()
    longest = max(path.read_text().splitlines(), key=len)
    assert "," in longest  # a row of numbers is one line
    assert [record["system"] for record in load_records(place / "results")] == ["bm25", "mine.off", "mine.on"]


def test_comparisons_are_paired_and_corrected_within_their_family(whole):
    found = whole[1]
    by_name = {family["against"]: family["comparisons"] for family in found["families"]}
    assert set(by_name) == {"off", "on", "baseline"}
    off, on = (np.array(found["per_query"][mode]) for mode in ("off", "on"))
    row = next(row for row in by_name["off"] if row["mode"] == "on")
    assert row["difference"] == pytest.approx((on - off).mean(), abs=1e-5)
    assert row["p"] == pytest.approx(randomization_test(on - off), abs=1e-3)
    assert row["p_corrected"] >= row["p"]
    assert row["low"] <= row["difference"] <= row["high"]
    assert (row["wins"], row["losses"]) == (int((on > off + 1e-9).sum()), int((on < off - 1e-9).sum()))
    assert {row["mode"] for row in by_name["on"]} >= {"off", "empty", "shuffled", "repeat"}
    assert [(row["mode"], row["against"]) for row in by_name["baseline"]] == [("bm25+reasoning", "bm25")]
    assert len(by_name["off"]) == len(found["modes"]) - 2  # neither off itself nor the baseline alone


def test_examples_stand_side_by_side_best_and_worst(whole):
    found = whole[1]
    off, on = (dict(zip(found["queries"], found["per_query"][mode], strict=True)) for mode in ("off", "on"))
    for name, sign in (("best", 1), ("worst", -1)):
        rows = found["examples"][name]
        assert 1 <= len(rows) <= 5
        gains = [sign * (on[row["qid"]] - off[row["qid"]]) for row in rows]
        assert gains == sorted(gains, reverse=True)
        assert gains[0] == max(sign * (on[qid] - off[qid]) for qid in on)
        assert gains[-1] > 0
        for row in rows:
            assert row["query"].startswith("what of")
            assert isinstance(row["reasoning"], str)
            assert row["on"][NDCG] == on[row["qid"]]
            assert len(row["off"]["top"]) == 3


def test_the_budget_curve_has_its_costs(whole):
    points = {point["budget"]: point for point in whole[1]["budgets"]}
    assert list(points) == [None, 0, 2, 4]
    assert [points[b]["mode"] for b in (None, 0, 2, 4)] == ["off", "empty", "on-2", "on"]
    assert points[0]["mean_tokens"] == 0
    assert 0 < points[2]["mean_tokens"] <= 2
    assert points[2]["mean_tokens"] <= points[4]["mean_tokens"] <= 4
    for point in points.values():
        for batch in ("batch_1", "batch_32"):
            assert 0 < point["latency"][batch]["median_ms"] <= point["latency"][batch]["p95_ms"]


def test_mode_auto_takes_each_query_from_off_or_on(whole):
    found = whole[1]
    told = found["adaptive"]
    assert "the judged queries" in told["fitted_on"]
    chosen = np.array(told["chosen"], dtype=bool)
    off, on, auto = (np.array(found["per_query"][mode]) for mode in ("off", "on", "auto"))
    assert auto == pytest.approx(np.where(chosen, on, off), abs=1e-6)
    assert told["share_of_queries"] == pytest.approx(chosen.mean(), abs=1e-6)
    assert told["gain"] == pytest.approx((auto - off).mean(), abs=1e-6)
    assert told["curve"]["quality"][0] == pytest.approx(off.mean(), abs=1e-5)
    assert told["curve"]["quality"][-1] == pytest.approx(on.mean(), abs=1e-5)
    kept = AdaptiveRule.load(
        whole[0] / "results/studies/topics/mine/adaptive.json", found["settings"]["identity"]["contract_hash"]
    )
    assert (kept.about["dataset"], kept.about["split"]) == ("topics", "test")  # so that nobody tests it on these


def test_the_table_shows_every_mode_and_the_costs(whole):
    text = study_table.study_markdown(whole[1])
    for mode in whole[1]["modes"]:
        assert f"| {mode['mode']} | {mode['measures'][NDCG]:.4f} |" in text
    assert "| none (off) |" in text
    assert "auto: " in text


def test_a_study_in_a_readme_is_made_again_from_its_runs(whole, root, tmp_path):
    place, found = whole
    marker = "<!-- table: study dataset=topics system=mine"
    readme = tmp_path / "README.md"
    readme.write_text(f"{marker} -->\n<!-- /table -->\n\n{marker} parts=modes modes=off,on -->\n<!-- /table -->\n")
    results = Rebuilder(place / "results", root)
    page, part = regenerate(readme, results).new.split("<!-- /table -->\n\n")
    assert study_table.study_markdown(found) in page
    assert "| on |" in part
    assert "| empty |" not in part
    assert "budget" not in part
    assert (results.check.problems, results.check.unchecked) == ([], [])
    path = place / "results/runs/topics/mine.empty.trec.gz"
    before, empty = path.read_bytes(), read_run(path)
    write_run(path, {qid: {"d0": 1.0} for qid in empty}, "mine.empty")
    try:
        changed = Rebuilder(place / "results", root)
        assert study_table.study_markdown(found) not in regenerate(readme, changed).new
        assert any(problem.startswith("topics mine.empty: nDCG@10 is") for problem in changed.check.problems)
    finally:
        path.write_bytes(before)
    elsewhere = Rebuilder(place / "results", tmp_path)
    assert study_table.study_markdown(found) in regenerate(readme, elsewhere).new
    assert elsewhere.check.unchecked == ["topics mine (study)"]


def test_the_card_of_a_studied_model_holds_the_controls_and_is_kept_true(whole, root, adapter, kept_run, tmp_path):
    place, found = whole
    models, results = tmp_path / "models", tmp_path / "results"
    shutil.copytree(place / "results", results)
    shutil.copytree(adapter, models / "mine")
    shutil.copytree(kept_run, results / "training/mine")
    made = regenerate_all([], results, models, root)
    made.write()
    text = (models / "mine/README.md").read_text()
    assert study_table.study_markdown(found, ("modes", "auto")) in text.partition("## Does the reasoning help?")[2]
    assert text == card(models / "mine", results / "training/mine", results)
    path = results / "runs/topics/mine.empty.trec.gz"
    write_run(path, {qid: {"d0": 1.0} for qid in read_run(path)}, "mine.empty")
    assert [file.path.parent.name for file in regenerate_all([], results, models, root).changed] == ["mine"]


def test_an_interrupted_study_goes_on_and_a_finished_one_repeats_nothing(tmp_path, root, tiny_model, monkeypatch):
    from search_r3.evaluation.study import study as module

    real, made = module.evaluate_system, []

    def failing(dataset, split, system, *args, **options):
        if system.name == "mine.repeat" and not made.count("stop"):
            made.append("stop")
            raise KeyboardInterrupt
        record, fresh = real(dataset, split, system, *args, **options)
        made.append((system.name, fresh))
        return record, fresh

    monkeypatch.setattr(module, "evaluate_system", failing)
    some = {"controls": ["empty", "repeat"]}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, root, tiny_model, **some)
    assert made == [("mine.off", True), ("mine.on", True), ("mine.empty", True), "stop"]
    made.clear()
    made.append("stop")
    first = run(tmp_path, root, tiny_model, **some)
    assert dict(made[1:]) == {"mine.off": False, "mine.on": False, "mine.empty": False, "mine.repeat": True}
    lines = []
    again = run(tmp_path, root, tiny_model, controls=[], report=lines.append)  # what is there stays part of it
    assert [mode["mode"] for mode in again["modes"]] == ["off", "on", "empty", "repeat"]
    assert all("already there" in line for line in lines)
    assert again["per_query"] == first["per_query"]
    assert again["latency"] == first["latency"]  # not timed again


def test_dev_queries_are_used_where_the_data_set_has_some(tmp_path, root, tiny_model, monkeypatch):
    test = load_dataset("topics", None, root)

    def dev_pool(name, data_root, max_queries, max_documents):
        return BeirDataset("topics.dev", test.corpus, test.queries, test.qrels)

    monkeypatch.setattr(adaptive_curve, "POOLS", {"topics": None})
    monkeypatch.setattr(adaptive_curve, "dev_pool", dev_pool)
    found = run(tmp_path, root, tiny_model, controls=[], adaptive=True, latency_queries=0)
    assert found["adaptive"]["fitted_on"] == "topics's dev queries"
    assert found["adaptive"]["rule"]["dataset"] == "topics.dev"


def test_a_family_needs_its_baseline_only():
    scores = {"off": {"a": 0.0, "b": 1.0}, "on": {"a": 1.0, "b": 1.0}}
    assert [family["against"] for family in families(scores)] == ["off", "on"]


def test_bad_requests_are_refused_before_a_model_is_loaded(tmp_path, root, tiny_model):
    with pytest.raises(InputError, match="unknown control 'emtpy'"):
        run(tmp_path, root, tiny_model, controls=["emtpy"])
    with pytest.raises(InputError, match="bm25 does not reason"):
        run_study("topics", "bm25", tmp_path, data_root=root)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="is not a study"):
        read_study(tmp_path / "x.json")


def test_calls_are_timed_whole_and_short_lists_go_round():
    asked = []
    timed = time_queries(lambda batch, size: asked.append(list(batch)), ["a", "b", "c"], 2)
    assert len(asked) == MIN_CALLS + 1  # the first is not timed
    assert asked[1:] == [["a", "b"], ["c", "a"], ["b", "c"], ["a", "b"]]
    assert timed["calls"] == MIN_CALLS
    assert time_queries(lambda *_: None, ["a"] * 9, 1)["calls"] == 9
    with pytest.raises(ValueError, match="0 queries"):
        time_queries(lambda *_: None, [], 1)


def test_the_command_prints_one_table_or_json(tmp_path, root, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    command = ["study", "--dataset", "topics", "--system", f"mine={tiny_model}", "--data", str(root), "--device", "cpu"]
    command += ["--control", "empty", "--budget", "3", "--latency", "0", "--no-adaptive", "--sample"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dataset"] == "topics.small"
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "| empty |" in table
    assert main([*command, "--budgets", "1;2"]) == 2
    assert "error: --budgets 1;2: expected whole numbers" in capsys.readouterr().err
    assert main(["study", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example:  search-r3 study" in text
    assert "Next:" in text
