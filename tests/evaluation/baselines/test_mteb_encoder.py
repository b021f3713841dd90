"""MTEB gives our model the metric that we report, keeps queries and documents apart, and gets correct metadata."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from nightly import nightly

from search_r3.cli import main
from search_r3.data.beir import BeirDataset, Document
from search_r3.errors import InputError
from search_r3.evaluation.measures import MRR, NDCG, RECALL, measure_run
from search_r3.evaluation.suite import evaluate_system
from search_r3.evaluation.systems import SearchR3System
from search_r3.model.searchr3 import SearchR3

TOPICS = ["file", "line", "Python", "mean", "values", "capital", "France", "Paris", "aspirin", "heart", "bread", "sea"]


@pytest.fixture(scope="module")
def mteb() -> ModuleType:
    """Imported where it is used: it takes six seconds, which each of `make test`'s processes would spend."""
    return pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def mteb_encoder(mteb: ModuleType) -> ModuleType:
    """Our module for it, which imports it."""
    from search_r3.evaluation.baselines import mteb_encoder

    return mteb_encoder


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def dataset() -> BeirDataset:
    """Sixty documents, some with titles, one empty; twelve queries with graded judgments, some of 0."""
    rng = np.random.default_rng(0)
    corpus = {}
    for n in range(60):
        words = " ".join(rng.choice(TOPICS, 12))
        corpus[f"d{n}"] = Document(f"d{n}", f"On {TOPICS[n % len(TOPICS)]}" if n % 3 else "", words)
    corpus["empty"] = Document("empty", "", " ")
    queries = {f"q{n}": " ".join(rng.choice(TOPICS, 4)) for n in range(12)}
    qrels = {q: {f"d{d}": int(rng.integers(0, 3)) for d in rng.choice(60, 8, replace=False)} for q in queries}
    qrels["q0"]["empty"] = 1
    return BeirDataset("made", corpus, queries, qrels)


def as_task(dataset: BeirDataset, ignore: bool = False):
    """A retrieval task of MTEB that holds `dataset` and fetches nothing."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Made(AbsTaskRetrieval):
        ignore_identical_ids = ignore
        metadata = TaskMetadata(
            name="Made",
            description="made from local data",
            dataset={"path": "local/made", "revision": "1"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *_, **__) -> None:
            if self.data_loaded:
                return
            self.corpus = {"test": {d.id: {"title": d.title, "text": d.text} for d in dataset.corpus.values()}}
            self.queries = {"test": dict(dataset.queries)}
            self.relevant_docs = {"test": {q: dict(grades) for q, grades in dataset.qrels.items()}}
            self.data_loaded = True

    return Made()


def ours(model: SearchR3, mode: str, dataset: BeirDataset, **settings) -> dict[str, float]:
    system = SearchR3System(model, "tiny", mode, **settings)
    documents = {did: document.full_text for did, document in dataset.corpus.items() if document.full_text}
    return measure_run(system.answer(documents, dataset.queries, 100, None).run, dataset.qrels).mean


@pytest.mark.parametrize(("reasoning", "budget"), [(True, 4), *nightly((False, 0), (True, 0))])
def test_mteb_and_we_agree_on_the_figures(mteb, mteb_encoder, model, dataset, reasoning, budget):
    encoder = mteb_encoder.SearchR3Encoder(model, reasoning=reasoning, max_reasoning_tokens=budget, max_length=16)
    result = mteb.evaluate(encoder, as_task(dataset), cache=None, co2_tracker=False, show_progress_bar=False)
    (theirs,) = result.task_results[0].scores["test"]
    expected = ours(model, "on" if reasoning else "off", dataset, max_reasoning_tokens=budget, max_length=16)
    assert theirs["ndcg_at_10"] == pytest.approx(expected[NDCG], abs=1e-4)
    assert theirs["recall_at_100"] >= expected[RECALL] - 1e-4  # theirs ranks the empty document too, last of all
    assert theirs["mrr_at_10"] == pytest.approx(expected[MRR], abs=1e-4)
    assert 0.02 < expected[NDCG] < 0.98  # neither nothing nor everything is found
    assert result.model_name == f"search-r3/{model.name}"
    assert result.model_revision == model.contract_hash


@pytest.mark.parametrize("ignore", [False, True])
def test_mteb_and_we_agree_on_queries_that_are_documents(mteb, mteb_encoder, model, dataset, ignore, tmp_path):
    texts = {f"d{n}": dataset.corpus[f"d{n}"].full_text for n in range(12)}
    qrels = {f"d{n}": grades for n, grades in enumerate(dataset.qrels.values())}
    qrels["d0"] = {**qrels["d0"], "d0": 2}  # judged its own answer: MTEB still leaves it out
    inside = BeirDataset("inside", {d: t for d, t in dataset.corpus.items() if d != "empty"}, texts, qrels, ignore)
    encoder = mteb_encoder.SearchR3Encoder(model, reasoning=False, max_length=16)
    result = mteb.evaluate(encoder, as_task(inside, ignore), cache=None, co2_tracker=False, show_progress_bar=False)
    (theirs,) = result.task_results[0].scores["test"]
    system = SearchR3System(model, "tiny", "off", max_length=16)
    record, _ = evaluate_system(inside, "test", system, tmp_path, None)
    assert theirs["ndcg_at_10"] == pytest.approx(record["measures"][NDCG], abs=1e-4)
    assert theirs["mrr_at_10"] == pytest.approx(record["measures"][MRR], abs=1e-4)
    assert 0.02 < record["measures"][NDCG] < 0.98


def test_a_task_of_mteb_that_ignores_identical_ids_says_so_beside_the_fetched_data(
    mteb, dataset, tmp_path, monkeypatch
):
    from search_r3.data.io.find_dataset import find_dataset

    monkeypatch.setattr(mteb, "get_task", lambda name: as_task(dataset, ignore=True))
    assert "--ignore-identical-ids" in (find_dataset("mteb:Made", tmp_path) / "SOURCE.txt").read_text()


def test_a_task_fetched_by_its_name_is_the_same_data_set(mteb, dataset, tmp_path, monkeypatch):
    from search_r3.data.beir import load_beir
    from search_r3.data.io.find_dataset import find_dataset

    monkeypatch.setattr(mteb, "get_task", lambda name: as_task(dataset))
    with pytest.warns(UserWarning, match="1 of 61 documents have an empty"):
        found = load_beir(find_dataset("mteb:Made", tmp_path), "test")
    assert (found.corpus, found.queries, found.qrels) == (dataset.corpus, dataset.queries, dataset.qrels)


def test_each_side_has_its_own_prompt_and_only_queries_are_reasoned_about(mteb, mteb_encoder, model):
    texts = ["How do I read a file?", "the mean of values", "Paris"]
    batches = [{"text": texts[:2]}, {"text": texts[2:]}]
    encoder = mteb_encoder.SearchR3Encoder(model, reasoning=True, max_reasoning_tokens=3, max_length=4)
    sides = mteb.types.PromptType
    queries = encoder.encode(batches, prompt_type=sides.query, show_progress_bar=False)
    assert queries == pytest.approx(model.encode_query(texts, max_reasoning_tokens=3), abs=1e-6)
    documents = encoder.encode(batches, prompt_type=sides.document)
    assert documents == pytest.approx(model.encode_document(texts, max_length=4), abs=1e-6)
    assert encoder.encode(batches, prompt_type=None) == pytest.approx(documents, abs=1e-6)
    off = mteb_encoder.SearchR3Encoder(model, reasoning=False).encode(batches, prompt_type="query")
    assert off == pytest.approx(model.encode_query(texts, reasoning=False), abs=1e-6)
    assert np.abs(off - queries).max() > 1e-3


def test_an_empty_text_is_ranked_behind_all_others(mteb_encoder, model):
    encoder = mteb_encoder.SearchR3Encoder(model)
    rows = encoder.encode([{"text": ["Paris", " ", "bread"]}], prompt_type="document")
    assert not rows[1].any()
    scores = encoder.similarity(rows[:1], rows)
    assert scores[0].tolist() == pytest.approx([1.0, -1.0, float(rows[0] @ rows[2])], abs=1e-5)
    assert encoder.similarity_pairwise(rows, rows).tolist() == pytest.approx([1.0, -1.0, 1.0], abs=1e-5)
    assert encoder.encode([{"text": [""]}], prompt_type="query").shape == (1, model.dimension)


def test_the_metadata_say_what_is_known_and_no_more(mteb_encoder, model, tmp_path):
    meta = mteb_encoder.SearchR3Encoder(model, reasoning=True, max_reasoning_tokens=8, max_length=99).mteb_model_meta
    network = model.checkpoint.model
    assert (meta.revision, meta.embed_dim, meta.max_tokens) == (model.contract_hash, 32, 99)
    assert meta.n_parameters == sum(p.numel() for p in network.parameters())
    assert meta.n_embedding_parameters == network.get_input_embeddings().weight.numel()
    assert meta.memory_usage_mb == pytest.approx(meta.n_parameters * 4 / 2**20, abs=0.1)
    assert meta.training_datasets is None  # unknown, not "none"
    assert meta.license is None
    assert meta.experiment_kwargs == {"reasoning": 8, "dtype": "float32"}
    off = mteb_encoder.SearchR3Encoder(model, reasoning=False).mteb_model_meta
    assert off.experiment_name != meta.experiment_name  # mteb keeps the results of both


def test_a_documented_training_names_its_data_sets_and_its_teachers(mteb, mteb_encoder, model, tmp_path):
    with pytest.raises(InputError, match=r"pairs\.manifest\.json does not say"):
        mteb_encoder.trained_on(tmp_path)
    sources = [{"kind": "man"}, {"kind": "titles", "dataset": "scifact"}, {"kind": "queries", "dataset": "mkqa/en"}]
    (tmp_path / "pairs.manifest.json").write_text(json.dumps({"sources": [*sources, {"dataset": "mine"}]}))
    encoder = mteb_encoder.SearchR3Encoder(model, training=tmp_path)
    assert encoder.mteb_model_meta.training_datasets == {"SciFact", "MKQARetrieval", "mine"}
    assert not encoder.mteb_model_meta.is_zero_shot_on([mteb.get_task("SciFact")])
    selection = {"scorer": {"teacher": "all-minilm-l6-v2"}}
    (tmp_path / "selection.manifest.json").write_text(json.dumps(selection))
    assert {"SciFact", "MSMARCO", "NQ"} <= mteb_encoder.trained_on(tmp_path)
    selection["scorer"]["teacher"] = "somebody"
    (tmp_path / "selection.manifest.json").write_text(json.dumps(selection))
    with pytest.raises(InputError, match="teacher somebody"):
        mteb_encoder.trained_on(tmp_path)


def test_bad_settings_are_refused(mteb_encoder, model):
    with pytest.raises(InputError, match="has contract"):
        mteb_encoder.SearchR3Encoder(model, revision="0" * 12)
    assert mteb_encoder.SearchR3Encoder(model, revision=model.contract_hash[:12]).model is model
    with pytest.raises(InputError, match="max_length must be 1 or more"):
        mteb_encoder.SearchR3Encoder(model, max_length=0)
    with pytest.raises(InputError, match="no model"):
        mteb_encoder.SearchR3Encoder("smolm2-135m")


def test_result_files_are_those_of_mteb_and_finished_ones_are_kept(mteb, mteb_encoder, model, dataset, tmp_path):
    from search_r3.evaluation.baselines.mteb_results import write_mteb_results

    encoder = mteb_encoder.SearchR3Encoder(model, reasoning=False)
    ((task, measure, score, file),) = write_mteb_results(encoder, [as_task(dataset)], tmp_path)
    meta = encoder.mteb_model_meta
    folder = tmp_path / "results" / f"search-r3__{model.name}" / model.contract_hash
    assert file.is_relative_to(folder)
    assert file.parts[-3:] == ("experiments", meta.experiment_name, "Made.json")
    written = json.loads(file.read_text())
    assert written.keys() >= {"task_name", "dataset_revision", "mteb_version", "scores", "evaluation_time"}
    (scores,) = written["scores"]["test"]
    assert (task, measure, score) == ("Made", "ndcg_at_10", pytest.approx(scores["main_score"]))
    assert scores["main_score"] == pytest.approx(ours(model, "off", dataset)[NDCG], abs=1e-4)
    assert json.loads((file.parent / "model_meta.json").read_text())["revision"] == model.contract_hash
    assert (file.parent / "run_settings.jsonl").is_file()
    again = mteb.results.TaskResult.from_disk(file)
    assert again.task_name == "Made"
    encoder.encode = None  # a second evaluation would fail
    assert write_mteb_results(encoder, [as_task(dataset)], tmp_path) == [(task, measure, score, file)]


def test_results_that_are_no_numbers_and_unknown_tasks_are_refused(mteb, mteb_encoder, model, dataset, tmp_path):
    from search_r3.evaluation.baselines.mteb_results import write_mteb_results

    encoder = mteb_encoder.SearchR3Encoder(model, reasoning=False)
    with pytest.raises(InputError, match="MTEB has no task 'SciFakt'"):
        write_mteb_results(encoder, ["SciFakt"], tmp_path)
    with pytest.raises(InputError, match="no MTEB task was given"):
        write_mteb_results(encoder, [], tmp_path)
    file = write_mteb_results(encoder, [as_task(dataset)], tmp_path)[0].file
    written = json.loads(file.read_text())
    written["scores"]["test"][0]["main_score"] = 2.0
    file.write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"Made\.json: ndcg_at_10 of test is 2\.0; delete it"):
        write_mteb_results(encoder, [as_task(dataset)], tmp_path)


def test_the_command_writes_the_files_and_shows_the_scores(
    mteb, mteb_encoder, tiny_model, dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mteb, "get_task", {"Made": as_task(dataset)}.__getitem__)
    command = ["mteb", "Made", "--model", str(tiny_model), "--no-reasoning", "--into", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    written = json.loads(Path(found["file"]).read_text())
    assert Path(found["file"]).is_relative_to(tmp_path)
    assert (found["task"], found["measure"]) == ("Made", "ndcg_at_10")
    assert found["value"] == pytest.approx(written["scores"]["test"][0]["main_score"])
    monkeypatch.setattr(mteb_encoder.SearchR3Encoder, "encode", None)  # a second evaluation would fail
    assert main(command) == 0
    assert capsys.readouterr().out == f"Made: ndcg_at_10 {found['value']:.4f}, {found['file']}\n"


def test_the_command_refuses_an_unknown_task_before_it_loads_a_model(mteb, tmp_path, capsys):
    assert main(["mteb", "SciFakt", "--model", str(tmp_path / "none"), "--into", str(tmp_path)]) == 2
    assert "MTEB has no task 'SciFakt'" in capsys.readouterr().err
