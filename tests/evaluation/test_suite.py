"""An evaluation leaves a run and a record that suffices to reproduce the metric, and repeats nothing."""

from __future__ import annotations

import json
import re

import pytest

from search_r3.cli import main
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.errors import InputError
from search_r3.evaluation import provenance, suite, systems
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.measures import NDCG, measure_run
from search_r3.evaluation.publish.model_card import card
from search_r3.evaluation.publish.tables import results_markdown
from search_r3.evaluation.runs import read_gzip_lines, read_run
from search_r3.evaluation.suite import evaluate, load_dataset
from search_r3.evaluation.systems import SearchR3System, model_name, open_systems, split_label

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")


@pytest.fixture
def run_fake(monkeypatch, data_root, tmp_path):
    """Call `evaluate` with the spec "fake", which opens the given model in the modes asked for."""

    def run(model, datasets=("tiny",), **options):
        def open_fake(spec, *, modes, max_length, max_reasoning_tokens, **_):
            settings = {"max_length": max_length, "max_reasoning_tokens": max_reasoning_tokens}
            return [SearchR3System(model, spec, mode, **settings) for mode in modes]

        monkeypatch.setattr(suite, "open_systems", open_fake)
        monkeypatch.setattr(suite, "check_spec", lambda spec: None)  # "fake" is no model's name
        cache = EmbeddingCache(tmp_path / "cache")
        return evaluate(
            datasets, ["fake"], tmp_path / "results", data_root=data_root, cache=cache, show_progress=False, **options
        )

    return run


def test_bm25_end_to_end_writes_a_run_and_its_record(data_root, tmp_path):
    lines = []
    records = evaluate(
        ["tiny", "nested/en"], ["bm25"], tmp_path / "results", data_root=data_root, use_cache=False, report=lines.append
    )
    record = json.loads((tmp_path / "results/metrics/nested/en/bm25.json").read_text())
    assert record == records[1]
    run = read_run(tmp_path / "results/runs/nested/en/bm25.trec.gz")
    assert measure_run(run, load_dataset("tiny", None, data_root).qrels).mean == pytest.approx(record["measures"])
    assert all(score > 0 for scores in run.values() for score in scores.values())
    assert lines[0].startswith("tiny bm25: nDCG@10 ")
    assert (record["num_queries"], record["num_documents"], record["num_empty_documents"]) == (3, 4, 1)
    assert {"command", "commit", "seed", "versions", "hardware", "dtype", "max_length", "seconds"} <= set(record)
    assert {"python", "torch", "transformers", "peft", "numpy", "ir_measures"} <= set(record["versions"])
    assert str(tmp_path) not in json.dumps(record)


def test_both_modes_share_document_embeddings_and_keep_their_reasonings(run_fake, make_model, tmp_path):
    fake_model = make_model()
    off, on = run_fake(fake_model, max_length=5, max_reasoning_tokens=7)
    assert (off["system"], on["system"]) == ("fake.off", "fake.on")
    assert fake_model.documents == 3  # the empty document is never encoded, the others once
    assert off["max_length"] == on["max_length"] == 5
    assert "reasoning" not in off
    assert on["reasoning"] == {"budget": 7, "emission_rate": pytest.approx(2 / 3), "mean_tokens": 2.0}
    kept = [json.loads(line) for line in read_gzip_lines(tmp_path / "results/runs/tiny/fake.on.reasoning.jsonl.gz")]
    assert kept[0] == {
        "qid": "q1",
        "text": "about does aspirin prevent a heart attack",
        "num_tokens": 1,
        "forced": True,
    }
    assert [record["qid"] for record in kept] == ["q1", "q2", "q3"]
    assert on["seconds"]["documents"] == off["seconds"]["documents"]


def test_a_model_is_evaluated_with_the_engine_that_will_serve_it(data_root, tiny_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("numba")
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    command = ["evaluate", "--dataset", "tiny", "--system", f"mine={tiny_model}", "--mode", "off", "--json"]
    command += ["--data", str(data_root), "--output", str(tmp_path / "results")]
    assert main([*command, "--engine", "int8"]) == 0
    (quantized,) = json.loads(capsys.readouterr().out)
    assert (quantized["dtype"], quantized["settings"]["identity"]["engine"]) == ("int8", "int8")
    assert main(command) == 0  # another engine: nothing of the first is reused
    (reference,) = json.loads(capsys.readouterr().out)
    assert reference["dtype"] == "float32"
    assert "engine" not in reference["settings"]["identity"]
    assert reference["run_sha256"] != quantized["run_sha256"]


def test_what_is_done_is_skipped_until_something_that_decides_it_changes(run_fake, make_model, data_root, tmp_path):
    run_fake(make_model())
    again = make_model()
    assert run_fake(again)[0]["measures"][NDCG] > 0
    assert again.queries == 0

    def queries_encoded(model=None, **options):
        model = model or make_model()
        run_fake(model, **options)
        return model.queries

    assert queries_encoded(max_reasoning_tokens=8) == 3  # only mode on depends on the budget
    assert queries_encoded(max_reasoning_tokens=8) == 0
    assert queries_encoded(make_model("b" * 64), max_reasoning_tokens=8) == 6
    assert queries_encoded(make_model("b" * 64), max_reasoning_tokens=8, max_length=3) == 6
    assert queries_encoded(make_model("b" * 64), max_reasoning_tokens=8, max_length=3, force=True) == 6
    run_file = tmp_path / "results/runs/tiny/fake.off.trec.gz"
    run_file.write_bytes(run_file.read_bytes()[:-4])
    assert queries_encoded(make_model("b" * 64), max_reasoning_tokens=8, max_length=3) == 3
    (tmp_path / "results/metrics/tiny/fake.on.json").write_text("{")
    assert queries_encoded(make_model("b" * 64), max_reasoning_tokens=8, max_length=3) == 3
    qrels = data_root / "tiny/qrels/test.tsv"
    qrels.write_text(qrels.read_text().replace("q1\td1\t2", "q1\td1\t1"))
    assert queries_encoded(make_model("b" * 64), max_reasoning_tokens=8, max_length=3) == 6


def test_a_set_with_missing_documents_is_never_reported_without_saying_so(data_root, tmp_path, monkeypatch):
    whole = load_dataset("tiny", None, data_root)
    whole.qrels["q1"]["gone"] = 1
    whole.queries["q3"] = "nothing shared"
    monkeypatch.setattr(suite, "load_dataset", lambda *_: whole)
    lines = []
    options = {"data_root": data_root, "use_cache": False, "report": lines.append}
    (record,) = evaluate(["tiny"], ["bm25"], tmp_path / "results", **options)
    assert record["missing_documents"] == ["gone"]
    evaluate(["tiny"], ["bm25"], tmp_path / "results", **options)
    for line in lines:  # also when it was there already
        assert "1 relevant documents are not in the corpus (gone)" in line
        assert "1 documents are empty and never found" in line
        assert "1 of 3 queries have no answer and count as 0" in line
    assert "not in the corpus, so that no system can find them: 1 of tiny." in results_markdown([record])
    assert "not in the corpus" not in results_markdown([{**record, "num_missing_documents": 0}])


def test_a_folder_with_missing_documents_is_refused_or_says_so_wherever_its_figures_stand(
    data_root, kept_run, adapter, tmp_path, monkeypatch, capsys
):
    with open(data_root / "tiny/qrels/test.tsv", "a") as judgments:
        judgments.write("q1\tgone\t1\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("<!-- table: results -->\n<!-- /table -->\n")
    command = ["evaluate", "--dataset", "tiny", "--system", "bm25", "--data", str(data_root)]
    assert main(command) == 2
    refusal = capsys.readouterr().err
    assert 'the corpus-id "gone" is not in corpus.jsonl' in refusal
    assert "--allow-missing" in refusal
    assert not (tmp_path / "results").exists()
    for _ in range(2):  # computed, then already there
        assert main([*command, "--allow-missing", "--table"]) == 0
        printed = capsys.readouterr()
        assert "1 relevant documents are not in the corpus (gone)" in printed.err
        for text in (printed.out, (tmp_path / "README.md").read_text()):
            assert "| tiny † |" in text
            assert "that no system can find them: 1 of tiny." in text
    record = json.loads((tmp_path / "results/metrics/tiny/bm25.json").read_text())
    assert record["measures"][NDCG] < 0.8  # the missing document counts as not found
    ours = record | {"system": f"{adapter.name}.off"}
    (tmp_path / f"results/metrics/tiny/{adapter.name}.off.json").write_text(json.dumps(ours))
    assert "that no system can find them: 1 of tiny." in card(adapter, kept_run, tmp_path / "results")


def test_what_fails_loses_nothing_else(data_root, tmp_path, monkeypatch):
    with open(data_root / "tiny/qrels/test.tsv", "a") as judgments:
        judgments.write("q1\tgone\t1\n")
    real = systems.BM25System.answer

    def breaks(self, *given):
        if self.name == "broken":
            raise RuntimeError("out of\nmemory")
        return real(self, *given)

    monkeypatch.setattr(systems.BM25System, "answer", breaks)
    failures, names = [], ["tiny", "nested/en", "tyni"]
    records = evaluate(
        names,
        ["broken=bm25", "bm52", "bm25"],
        tmp_path / "results",
        data_root=data_root,
        use_cache=False,
        failed=failures.append,
    )
    assert [(record["dataset"], record["system"]) for record in records] == [("nested/en", "bm25")]
    assert [(failure.dataset, failure.system) for failure in failures] == [
        (None, "bm52"),
        ("tyni", None),
        ("tiny", None),  # told once, not for every system
        ("nested/en", "broken"),
    ]
    assert failures[1].line.startswith('tyni: no data set "tyni"')
    assert failures[3].line == "nested/en broken: RuntimeError: out of memory"


def test_splits_have_defaults_and_an_unknown_one_is_refused(data_root):
    assert len(load_dataset("nested/en", None, data_root).qrels) == 3
    assert len(load_dataset("nested/en", "dev", data_root).qrels) == 1
    write_beir(data_root / "hotpotqa", load_dataset("tiny", None, data_root), "dev")
    assert len(load_dataset("hotpotqa", None, data_root).qrels) == 3
    with pytest.raises(InputError, match=r"tiny has no split 'dev'; it has: test"):
        load_dataset("tiny", "dev", data_root)


def test_small_is_a_fixed_part_under_its_own_name(data_root, tmp_path):
    corpus = {f"d{i}": Document(f"d{i}", "", f"document {i}") for i in range(700)}
    queries = {f"q{i}": f"document {i}" for i in range(80)}
    whole = BeirDataset("large", corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(80)})
    write_beir(data_root / "large", whole, "test")
    record = evaluate(["large.small"], ["bm25"], tmp_path / "r", data_root=data_root, use_cache=False)[0]
    assert (record["dataset"], record["num_queries"], record["num_documents"]) == ("large.small", 50, 500)
    assert (tmp_path / "r/runs/large.small/bm25.trec.gz").is_file()


def test_bad_requests_are_refused_before_anything_is_computed(data_root, tmp_path):
    def attempt(datasets, names, **options):
        evaluate(datasets, names, tmp_path / "results", data_root=data_root, use_cache=False, **options)

    with pytest.raises(InputError, match="tyni"):
        attempt(["tiny", "tyni"], ["bm25"])
    with pytest.raises(InputError, match="unknown mode 'maybe'"):
        attempt(["tiny"], ["bm25"], modes=["maybe"])
    with pytest.raises(InputError, match="at least one data set"):
        attempt([], ["bm25"])
    with pytest.raises(InputError, match="max_length is 0"):
        attempt(["tiny"], ["bm25"], max_length=0)
    assert not (tmp_path / "results").exists()
    with pytest.raises(InputError, match="both called bm25"):
        attempt(["tiny"], ["bm25", "bm25=bm25"])


def test_a_real_engine_runs_in_both_modes(tiny_model, data_root, tmp_path):
    opened = open_systems(f"mine={tiny_model}", device="cpu", max_reasoning_tokens=3)
    assert [system.name for system in opened] == ["mine.off", "mine.on"]
    records = [
        suite.evaluate_system(load_dataset("tiny", None, data_root), "test", system, tmp_path, None)[0]
        for system in opened
    ]
    assert records[0]["contract_hash"] == records[1]["contract_hash"]
    assert re.fullmatch("[0-9a-f]{64}", records[0]["contract_hash"])
    assert records[0]["max_length"] == 512
    assert records[0]["dtype"] == "float32"
    assert records[1]["reasoning"]["mean_tokens"] <= 3


def test_models_are_named_by_their_folder_and_bases_as_bases(tiny_model, tmp_path):
    assert model_name(str(tiny_model)) == "search-r3-tiny-llama-base"
    adapter = tmp_path / "search-r3-tiny-sft"
    adapter.mkdir()
    (adapter / "search_r3.json").write_text('{"kind": "adapter", "contract": {"base_weights": "x"}}')
    assert model_name(f"{adapter}/") == "search-r3-tiny-sft"


def test_a_label_comes_before_an_equals_sign_and_a_path_may_hold_one():
    assert split_label("mine=runs/lr=3e-4") == ("mine", "runs/lr=3e-4")
    assert split_label("runs/lr=3e-4") == (None, "runs/lr=3e-4")
    assert split_label("bm25") == (None, "bm25")
    with pytest.raises(InputError, match="bad system"):
        split_label("my run=bm25")


def test_baselines_are_never_cut(monkeypatch):
    lengths = []
    monkeypatch.setattr(
        systems, "SentenceTransformerRetriever", lambda name, **options: lengths.append(options.get("max_length"))
    )
    monkeypatch.setattr(systems, "SentenceTransformerSystem", lambda retriever, name, show: name)
    open_systems("mini=st:anything", max_length=16)
    assert lengths == [None]


def test_a_recorded_command_holds_no_path_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = provenance.command_line(
        ["/opt/bin/search-r3", "evaluate", "--data=/secret/data", f"{tmp_path}/runs/a", "m=/secret/model", "x=1"]
    )
    assert line == "search-r3 evaluate --data=data runs/a m=model x=1"
    assert provenance.command_line(["/src/search_r3/__main__.py", "models"]) == "search-r3 models"


def test_an_unknown_system_is_refused_before_any_other_runs(data_root, tmp_path):
    with pytest.raises(InputError, match="no model 'bm52'"):
        suite.evaluate(["tiny"], ["bm25", "bm52"], tmp_path / "results", data_root=data_root)
    assert not (tmp_path / "results").exists()
