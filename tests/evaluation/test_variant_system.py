"""Changed queries have separate run files and records, which no table of results includes."""

from __future__ import annotations

import json

import pytest

from search_r3.cli import main
from search_r3.config import load_config
from search_r3.data.query_variants import VARIANTS, vary
from search_r3.errors import InputError
from search_r3.evaluation import suite
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.publish.markdown_blocks import regenerate
from search_r3.evaluation.publish.recompute import Rebuilder
from search_r3.evaluation.publish.tables import load_records
from search_r3.evaluation.report.load_results import load_results
from search_r3.evaluation.runs import read_run
from search_r3.evaluation.suite import evaluate, load_dataset
from search_r3.evaluation.suite_config import SuitePlan, run_suite
from search_r3.evaluation.systems import SearchR3System

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fake(monkeypatch, make_model):
    """The spec "fake" is a model that notes the queries it is asked."""
    asked = []

    class Noting(make_model):
        def encode_query(self, texts, **options):
            asked.append(list(texts))
            return super().encode_query(texts, **options)

    def open_fake(spec, *, modes, **_):
        return [SearchR3System(Noting(), spec, mode, max_length=5) for mode in modes]

    monkeypatch.setattr(suite, "open_systems", open_fake)
    monkeypatch.setattr(suite, "check_spec", lambda spec: None)
    return asked


def test_changed_queries_get_files_of_their_own_and_leave_the_others_as_they_were(data_root, tmp_path):
    output = tmp_path / "results"
    evaluate(["tiny"], ["bm25"], output, data_root=data_root, use_cache=False)
    before = contents(output)
    records = evaluate(
        ["tiny"], ["bm25"], output, data_root=data_root, use_cache=False, queries=["original", "upper", "typos"]
    )
    after = contents(output)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        "runs/tiny/bm25.upper.trec.gz",
        "runs/tiny/bm25.typos.trec.gz",
        "query_variants/tiny/bm25/upper.json",
        "query_variants/tiny/bm25/typos.json",
    }
    assert [record["system"] for record in records] == ["bm25", "bm25.upper", "bm25.typos"]
    assert records[1]["measures"] == records[0]["measures"]  # BM25 folds case
    assert (records[1]["queries"], records[1]["queries_of"]) == ("upper", "bm25")
    assert records[2]["settings"]["identity"]["queries"] == "typos"
    assert read_run(output / "runs/tiny/bm25.upper.trec.gz") == read_run(output / "runs/tiny/bm25.trec.gz")


def test_a_model_is_asked_the_changed_queries_in_every_mode_and_embeds_the_documents_once(fake, data_root, tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    records = evaluate(
        ["tiny"], ["fake"], tmp_path / "results", data_root=data_root, cache=cache, show_progress=False,
        queries=["keywords"],
    )  # fmt: skip
    assert [record["system"] for record in records] == ["fake.off.keywords", "fake.on.keywords"]
    assert fake == [[vary(text, "keywords") for text in load_dataset("tiny", None, data_root).queries.values()]]
    assert fake[0][0] == "aspirin prevent heart attack"
    assert (tmp_path / "results/runs/tiny/fake.on.keywords.reasoning.jsonl.gz").is_file()
    assert not (tmp_path / "results/metrics").exists()
    again = evaluate(
        ["tiny"], ["fake"], tmp_path / "results", data_root=data_root, cache=cache, show_progress=False,
        queries=["keywords"],
    )  # fmt: skip
    assert again == records
    assert len(fake) == 1  # finished work is not repeated


def test_tables_and_reports_of_results_leave_them_out_and_their_own_table_shows_them(data_root, tmp_path):
    output = tmp_path / "results"
    evaluate(["tiny"], ["bm25"], output, data_root=data_root, use_cache=False, queries=["original", "lower", "upper"])
    assert [record["system"] for record in load_records(output)] == ["bm25"]
    assert [record["system"] for record in load_results(output, data_root=data_root).records] == ["bm25"]
    page = tmp_path / "page.md"
    page.write_text("<!-- table: queries -->\n<!-- /table -->\n")
    made = regenerate(page, Rebuilder(output, data_root)).new.splitlines()
    value = f"{load_records(output)[0]['measures']['nDCG@10']:.3f}"
    assert [line for line in made if line.startswith("|")] == [
        "| | | as they are | upper | lower |",
        "|---|---|---:|---:|---:|",
        f"| tiny | bm25 | {value} | {value} | {value} |",
    ]


def test_a_table_of_changed_queries_is_made_from_the_run_files(data_root, tmp_path):
    output = tmp_path / "results"
    evaluate(["tiny"], ["bm25"], output, data_root=data_root, use_cache=False, queries=["original", "upper"])
    path = output / "query_variants/tiny/bm25/upper.json"
    record = json.loads(path.read_text())
    record["measures"]["nDCG@10"] = 0.123
    path.write_text(json.dumps(record))
    results = Rebuilder(output, data_root)
    assert results.variants()[0]["measures"]["nDCG@10"] != 0.123
    assert "bm25.upper: nDCG@10 is" in results.check.problems[0]


def test_a_suite_has_them_too(data_root, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("systems: [bm25]\ndatasets: [tiny]\nqueries: [original, upper]\n")
    plan = load_config(path, SuitePlan, [f"output={tmp_path / 'results'}"])
    outcome = run_suite(plan, data_root=data_root, cache=EmbeddingCache(tmp_path / "cache"), show_progress=False)
    assert [record["system"] for record in outcome.records] == ["bm25", "bm25.upper"]
    assert "changed queries" in outcome.summary()
    with pytest.raises(InputError, match="unknown kind of query"):
        SuitePlan(["bm25"], ["tiny"], queries=["shouted"])


def test_the_command_prints_the_table_and_refuses_what_it_does_not_know(data_root, tmp_path, capsys):
    command = ["evaluate", "--dataset", "tiny", "--system", "bm25", "--data", str(data_root)]
    command += ["--output", str(tmp_path / "results")]
    assert main([*command, "--queries", "original", "--queries", "title"]) == 0
    shown = capsys.readouterr().out
    assert "changed queries" in shown
    assert "as they are | title |" in shown
    assert main([*command, "--queries", "tittle"]) != 0
    assert 'did you mean "title"?' in capsys.readouterr().err


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_system_called_like_the_variant_of_another_is_refused(kind, data_root, tmp_path):
    with pytest.raises(InputError, match="LABEL=SPEC"):
        evaluate(["tiny"], [f"bm25.{kind}=bm25"], tmp_path / "results", data_root=data_root, use_cache=False)
