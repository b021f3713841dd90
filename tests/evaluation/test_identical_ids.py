"""Queries that are documents of the corpus, as ArguAna's: left out as MTEB leaves them out, and said in the results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from search_r3 import metrics
from search_r3.cli import main
from search_r3.config import load_config
from search_r3.data.beir import BeirDataset, Document, load_beir, small, write_beir
from search_r3.errors import InputError
from search_r3.evaluation.measures import MRR, NDCG
from search_r3.evaluation.publish.tables import results_markdown
from search_r3.evaluation.remarks import remarks
from search_r3.evaluation.rollouts.reasoning_rewards import score_embeddings
from search_r3.evaluation.rollouts.rollout_measurement import RolloutConfig, measure_rollouts
from search_r3.evaluation.runs import drop_identical_ids, read_gzip_lines, read_run
from search_r3.evaluation.study.adaptive_curve import best_cosines
from search_r3.evaluation.study.controls import ControlConfig
from search_r3.evaluation.study.fusion_controls import fuse_runs
from search_r3.evaluation.study.reasoning_cache import ReasoningCache
from search_r3.evaluation.study.study import StudyConfig, make_context, run_study
from search_r3.evaluation.suite import evaluate, load_dataset
from search_r3.evaluation.suite_config import SuitePlan, run_suite
from search_r3.evaluation.systems import open_systems

TOPICS = ("aspirin", "bread", "moon", "python", "Paris", "tides", "yeast", "heart", "sea", "list", "mean", "file")
COUNT = 130
"""Documents: more than a run keeps, so that what is left out makes room for another."""
QUERIES = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """arguments: each query is a document, with its id and its text, and the next one answers it. plain: the same
    under other ids. numbered: ids that meet by chance, as Cranfield's, with texts of their own."""
    rng = np.random.default_rng(0)
    words = rng.choice(TOPICS, 4 * COUNT + 4)
    texts = [" ".join(words[4 * i : 4 * i + 8]) for i in range(COUNT)]  # half of each is half of the next one
    folder = tmp_path_factory.mktemp("data")
    corpus = {f"a{i}": Document(f"a{i}", "Title" if i % 2 else "", text) for i, text in enumerate(texts)}
    queries = {f"a{i}": (f"Title  {texts[i]}" if i == 1 else texts[i]) + " \n" for i in range(QUERIES)}
    qrels = {qid: {f"a{int(qid[1:]) + 1}": 1} for qid in queries}
    write_beir(folder / "arguments", BeirDataset("arguments", corpus, queries, qrels), "test")
    renamed = {f"q{qid[1:]}": text for qid, text in queries.items()}
    plain = BeirDataset("plain", corpus, renamed, {f"q{qid[1:]}": grades for qid, grades in qrels.items()})
    write_beir(folder / "plain", plain, "test")
    numbered = {qid: "what of " + text for qid, text in queries.items()}
    write_beir(folder / "numbered", BeirDataset("numbered", corpus, numbered, qrels), "test")
    return folder


def measure(root: Path, output: Path, dataset: str = "arguments", system: str = "bm25", **options) -> dict:
    return evaluate([dataset], [system], output, data_root=root, use_cache=False, **options)[0]


def test_a_query_that_is_a_document_is_its_own_best_answer_unless_that_is_left_out(root: Path, tmp_path: Path) -> None:
    plain = measure(root, tmp_path)
    path = tmp_path / "runs/arguments/bm25.trec.gz"
    before = read_run(path)
    assert all(next(iter(scores)) == qid for qid, scores in before.items())
    record = measure(root, tmp_path, ignore_identical_ids=True)
    after = read_run(path)
    assert record["measures"][NDCG] > plain["measures"][NDCG] + 0.02
    assert record["measures"][MRR] > plain["measures"][MRR]
    qrels = load_dataset("arguments", None, root).qrels
    assert record["measures"][NDCG] == pytest.approx(metrics.mean(metrics.run_ndcg(after, qrels, 10)))
    for qid, scores in after.items():
        assert qid not in scores
        kept = [did for did in before[qid] if did != qid]
        assert list(scores)[:50] == kept[:50]  # nothing else moved
        assert scores.keys() >= set(kept)
        assert len(scores) == 100
    assert measure(root, tmp_path, ignore_identical_ids=True)["run_sha256"] == record["run_sha256"]
    assert measure(root, tmp_path)["measures"] == plain["measures"]  # the switch is one of the settings


def test_the_results_say_that_it_was_left_out_or_that_queries_find_themselves(root: Path, tmp_path: Path) -> None:
    record = measure(root, tmp_path)
    assert record["num_queries_in_corpus"] == QUERIES
    assert "ignore_identical_ids" not in record
    assert "ignore_identical_ids" not in record["settings"]  # results of earlier versions stay as they are
    assert remarks(record) == [
        f"{QUERIES} queries are documents of the corpus, by id and text, and find themselves; --ignore-identical-ids "
        "leaves these out"
    ]
    assert "Queries that are documents of the corpus and find themselves: 24 of arguments." in results_markdown(
        [record]
    )

    record = measure(root, tmp_path, ignore_identical_ids=True)
    assert (record["ignore_identical_ids"], record["num_identical_ids"]) == (True, QUERIES)
    assert record["settings"]["ignore_identical_ids"] is True
    assert remarks(record) == ["a document with a query's own id is left out, for 24 queries"]
    table = results_markdown([record])
    assert "Queries whose own id a document has, which is left out (`ignore_identical_ids`): 24 of arguments." in table
    assert "find themselves" not in table


@pytest.mark.parametrize("dataset", ["plain", "numbered"])
def test_ids_that_do_not_meet_or_meet_by_chance_are_not_remarked_on(root: Path, tmp_path: Path, dataset: str) -> None:
    record = measure(root, tmp_path, dataset)
    assert "num_queries_in_corpus" not in record
    assert remarks(record) == []


def test_a_data_set_whose_ids_never_meet_has_the_same_figures_either_way(root: Path, tmp_path: Path) -> None:
    plain = measure(root, tmp_path, "plain")
    ignored = measure(root, tmp_path, "plain", ignore_identical_ids=True)
    assert ignored["measures"] == plain["measures"]
    assert ignored["run_sha256"] == plain["run_sha256"]
    assert ignored["num_identical_ids"] == 0


def test_the_small_part_keeps_the_switch(root: Path) -> None:
    dataset = load_beir(root / "arguments", "test")
    dataset.ignore_identical_ids = True
    assert small(dataset, queries=3, documents=20).ignore_identical_ids


def test_what_takes_the_place_of_the_left_out_is_the_next_best() -> None:
    run = {
        "q": {"q": 3.0, "a": 2.0, "b": 1.0, "c": 0.5},
        "r": {"a": 2.0, "b": 1.0, "c": 0.5, "d": 0.1},
        "s": {"s": 1.0},
    }
    assert drop_identical_ids(run, 3) == {
        "q": {"a": 2.0, "b": 1.0, "c": 0.5},
        "r": {"a": 2.0, "b": 1.0, "c": 0.5},
        "s": {},
    }


@pytest.mark.parametrize(
    ("given", "ignored"),
    [("true", {"arguments", "numbered"}), ("[arguments]", {"arguments"}), ("[]", set()), ("false", set())],
)
def test_a_suite_says_it_for_all_data_sets_or_for_some(
    root: Path, tmp_path: Path, given: str, ignored: set[str]
) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(f"systems: [bm25]\ndatasets: [arguments, numbered]\nignore_identical_ids: {given}\n")
    plan = load_config(file, SuitePlan)
    plan.output = tmp_path / "results"
    records = run_suite(plan, data_root=root).records
    assert {record["dataset"] for record in records if record.get("ignore_identical_ids")} == ignored
    file.write_text("systems: [bm25]\ndatasets: [arguments]\nignore_identical_ids: [argument]\n")
    with pytest.raises(
        InputError, match=r'ignore_identical_ids: unknown data set "argument"; did you mean "arguments"'
    ):
        load_config(file, SuitePlan)


def test_the_command_line_takes_the_switch(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["evaluate", "--dataset", "arguments", "--system", "bm25", "--data", str(root)]
    arguments += ["--output", str(tmp_path), "--json"]
    assert main(arguments) == 0
    assert "find themselves" in capsys.readouterr().err
    assert main([*arguments, "--ignore-identical-ids"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)[0]["num_identical_ids"] == QUERIES
    assert "is left out, for 24 queries" in found.err


# ----------------------------------------------------------------------------------------- with a model that reasons


CONFIG = ControlConfig(budget=2, budgets=(2,), samples=2)
MODES = ["off+bm25", "bm25+reasoning", "off+on-mean", "off+on-rrf"]


def test_a_study_leaves_it_out_of_every_mode_and_before_anything_is_fused(
    root: Path, tmp_path: Path, tiny_model: Path
) -> None:
    config = StudyConfig(controls=MODES, modes=CONFIG, latency_queries=0, device="cpu", ignore_identical_ids=True)
    found = run_study(
        "arguments", f"mine={tiny_model}", tmp_path, config=config, data_root=root, show_progress=False,
        reasoning_cache=ReasoningCache(tmp_path / "a"),
    )  # fmt: skip
    assert found["settings"]["ignore_identical_ids"] is True
    assert found["remarks"] == ["a document with a query's own id is left out, for 24 queries"]
    names = {mode["mode"]: tmp_path / f"runs/arguments/{mode['system']}.trec.gz" for mode in found["modes"]}
    assert {"off", "on", "bm25", *MODES} <= names.keys(), found["adaptive"]
    runs = {mode: read_run(path) for mode, path in names.items()}
    for mode, run in runs.items():
        assert all(qid not in scores and len(scores) <= 100 for qid, scores in run.items()), mode
    fused = fuse_runs([runs["off"], runs["bm25"]], 100)
    for qid, scores in runs["off+bm25"].items():
        assert list(scores)[:20] == metrics.rank_documents(fused[qid])[:20]


def test_the_rule_of_auto_does_not_see_the_cosine_of_a_query_with_itself(
    root: Path, tmp_path: Path, tiny_model: Path
) -> None:
    from search_r3.evaluation.embedding_cache import EmbeddingCache

    (system,) = open_systems(f"mine={tiny_model}", modes=("off",), device="cpu", show_progress=False)
    caches = EmbeddingCache(tmp_path / "embeddings"), ReasoningCache(tmp_path / "reasoning")
    rows = {}
    for ignore in (False, True):
        data = load_dataset("arguments", None, root, ignore_identical_ids=ignore)
        context = make_context(data, system, CONFIG, *caches)
        rows[ignore] = best_cosines(context)
        own = (context.direct_rows * context.document_rows[:QUERIES]).sum(axis=1)
        cosines = np.sort(context.direct_rows @ context.document_rows.T, axis=1)[:, ::-1]
        if ignore:
            expected = [
                np.delete(line, np.argmin(abs(line - one)))[:100] for line, one in zip(cosines, own, strict=True)
            ]
            assert rows[True] == pytest.approx(np.array(expected), abs=1e-6)
    assert rows[True].shape == rows[False].shape == (QUERIES, 100)


def test_rollouts_are_paid_as_if_the_document_were_not_there(root: Path, tmp_path: Path, tiny_model: Path) -> None:
    options = {"data_root": root, "device": "cpu", "config": RolloutConfig(samples=2, budget=2)}
    options["show_progress"] = False
    folder = tmp_path / "rollouts/arguments.test"
    ranks = {}
    for ignore in (True, False):
        found = measure_rollouts(
            "arguments", "test", f"m={tiny_model}", None, tmp_path, ignore_identical_ids=ignore, **options
        )
        ranks[ignore] = [json.loads(line)["rank"] for line in read_gzip_lines(folder / "m.rollouts.jsonl.gz")]
        assert found.get("num_identical_ids") == (QUERIES if ignore else None)
        assert ("ignore_identical_ids" in found["settings"]) == ignore
    assert {before - after for before, after in zip(ranks[False], ranks[True], strict=True)} == {0, 1}


@pytest.mark.parametrize("count", [4, 30])
def test_the_rewards_are_those_of_a_corpus_without_the_document(count: int) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(count + 3, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    documents, queries = rows[:count], np.concatenate([rows[:1], rows[count:]])  # the first query is document 0
    grades = [{1: 1, 2: 2}, {0: 1}, {3: 1}, {}]
    found = score_embeddings(queries, [0, 1, 2, 3], grades, documents, k=10, ignored_Q=[0, None, 2, 1])
    for query, ignored in ((0, 0), (1, None), (2, 2), (3, 1)):
        kept = [row for row in range(count) if row != ignored]
        moved = {kept.index(row): grade for row, grade in grades[query].items()}
        alone = score_embeddings(queries[query : query + 1], [0], [moved], documents[kept], k=10)
        assert found.rank_R[query] == alone.rank_R[0]
        for name in ("dcg", "dcg_scaled"):
            assert found.rewards[name][query] == pytest.approx(alone.rewards[name][0], abs=1e-6)
    judged = score_embeddings(
        queries[:1], [0], [{0: 1}], documents, k=10, ignored_Q=[0]
    )  # its own judged answer: never found
    assert (judged.rank_R[0], judged.rewards["dcg"][0]) == (0, 0.0)
