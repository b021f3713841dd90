"""Tables say what the records say, and what a reader must know beside them."""

from __future__ import annotations

import pytest

from search_r3.errors import InputError
from search_r3.evaluation.publish.tables import load_records, results_markdown

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")


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


def test_what_is_missing_or_unanswered_stands_below_the_figures(results):
    records = load_records(results)
    text = results_markdown(records)
    assert "- Empty documents, ranked by no system: 1 of nested/en; 1 of tiny." in text
    assert "†" not in text
    gone = [record | {"num_missing_documents": 7, "num_missing_queries": 2} for record in records[:1]]
    text = results_markdown(gone + records[1:])
    name, system = records[0]["dataset"], records[0]["system"]
    assert text.count(f"| {name} † |") == 3  # in the table of every measure
    assert f"- † Relevant documents that are not in the corpus, so that no system can find them: 7 of {name}." in text
    assert f"- Queries without an answer, which count as 0: {system} for 2 of {name}." in text


def test_without_results_the_command_that_makes_some_is_named(tmp_path):
    with pytest.raises(InputError, match="no results"):
        load_records(tmp_path / "none")
