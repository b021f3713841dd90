"""Tables say what the runs say, and the README's block cannot drift from them."""

from __future__ import annotations

import json

import pytest

from search_r3.errors import InputError
from search_r3.evaluation import tables
from search_r3.evaluation.runs import read_run, write_run
from search_r3.evaluation.suite import evaluate, evaluate_pair, load_dataset
from search_r3.evaluation.systems import SearchR3System
from search_r3.evaluation.tables import BEGIN, END, check_readme, load_records, results_markdown, update_readme

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")


@pytest.fixture
def results(data_root, make_model, tmp_path):
    """BM25 and a fake model in both modes on "tiny" and "nested/en"."""
    output = tmp_path / "results"
    evaluate(["tiny", "nested/en"], ["bm25"], output, data_root=data_root, use_cache=False)
    for name in ("search-r3-x-sft", "search-r3-x-base"):
        for mode in ("on", "off"):
            system = SearchR3System(make_model(), name, mode, max_length=128)
            evaluate_pair(load_dataset("tiny", None, data_root), "test", system, output, None)
    return output


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    return path


def test_the_table_has_data_sets_as_rows_and_systems_in_order(results):
    text = results_markdown(load_records(results))
    systems = ["bm25", "search-r3-x-base.off", "search-r3-x-base.on", "search-r3-x-sft.off", "search-r3-x-sft.on"]
    assert text.count(f"| | {' | '.join(systems)} |") == 3
    first, folded = text.split("<details>")
    rows = [line.split(" | ")[0].strip("| ") for line in first.splitlines() if "|" in line][2:]
    assert sorted(rows) == ["nested/en", "tiny"]
    assert folded.index("**MRR@10**") < folded.index("**Recall@100**") < folded.index("</details>")
    assert "tiny 3 (test) over 4" in text
    assert "whole for bm25; cut at 128 tokens for search-r3-x-base.off" in text
    assert "float32 for bm25" in text
    assert "at most 32 tokens, token emitted for 67% of the queries by search-r3-x-base.on" in text


def test_the_best_of_a_row_is_bold():
    records = [
        {
            "dataset": "scifact",
            "system": system,
            "measures": {"nDCG@10": value},
            "num_queries": 3,
            "num_documents": 4,
            "hardware": "CPU",
            "dtype": "float32",
            "settings": {"split": "test"},
        }
        for system, value in (("bm25", 0.66251), ("st", 0.6634), ("other", 0.66349))
    ]
    table = results_markdown(records, ["nDCG@10"])
    assert table.splitlines()[2:5] == [
        "| | bm25 | other | st |",
        "|---|---:|---:|---:|",
        "| scifact | **0.663** | **0.663** | **0.663** |",
    ]
    assert "details" not in table
    records[1]["measures"]["nDCG@10"] = 0.7
    assert "| scifact | 0.663 | 0.663 | **0.700** |" in results_markdown(records, ["nDCG@10"])


def test_the_readme_block_is_replaced_and_then_passes_its_check(results, readme, data_root):
    assert check_readme(readme, results, data_root).problems
    assert update_readme(readme, results) is True
    assert update_readme(readme, results) is False
    text = readme.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nThe end.\n")
    check = check_readme(readme, results, data_root)
    assert (check.problems, check.unchecked) == ([], [])


def test_an_edited_figure_is_found(results, readme, data_root):
    update_readme(readme, results)
    text = readme.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| tiny"))
    readme.write_text(text.replace(row, row.replace("0.", "9."), 1))
    problems = check_readme(readme, results, data_root).problems
    assert len(problems) == 1
    assert "9." in problems[0]


def test_a_metrics_file_that_its_run_does_not_support_is_found(results, readme, data_root):
    path = results / "metrics/tiny/bm25.json"
    record = json.loads(path.read_text())
    record["measures"]["nDCG@10"] += 0.1
    path.write_text(json.dumps(record))
    update_readme(readme, results)
    problems = check_readme(readme, results, data_root).problems
    assert any("tiny bm25: nDCG@10 is" in problem for problem in problems)


def test_a_changed_or_missing_run_is_found(results, readme, data_root):
    update_readme(readme, results)
    path = results / "runs/tiny/bm25.trec.gz"
    run = read_run(path)
    write_run(path, {qid: {"d3": 1.0, **scores, "d1": 99.0} for qid, scores in run.items()}, "bm25")
    assert any("tiny bm25" in problem for problem in check_readme(readme, results, data_root).problems)
    path.unlink()
    assert any("is missing" in problem for problem in check_readme(readme, results, data_root).problems)


def test_without_the_data_the_check_says_what_it_could_not_remake(results, readme, tmp_path):
    update_readme(readme, results)
    check = check_readme(readme, results, tmp_path / "nowhere")
    assert check.problems == []
    assert "tiny bm25" in check.unchecked


def test_bad_places_are_named(tmp_path, readme):
    with pytest.raises(InputError, match="no results"):
        load_records(tmp_path / "none")
    with pytest.raises(InputError, match="markers"):
        tables.replace_block("no markers here", "block")
    with pytest.raises(InputError, match="markers"):
        tables.replace_block(f"{BEGIN} {END} {BEGIN} {END}", "block")
