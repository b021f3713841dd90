"""Rows that share an id: equal copies are removed, and rows that differ only where their source is read again."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from search_r3.cli import main
from search_r3.index import SearchIndex, SourceDocument, build_index, compact_index, update_documents
from search_r3.index.backends.lance.duplicates import Differing, remove_equal_copies
from search_r3.index.build.build_index import ONE_COMMIT
from search_r3.index.row_keys import CONTENT, ROW_HASH, SOURCE

DOCUMENTS = [SourceDocument(f"d{number}", "", f"text number {number} of water") for number in range(10)]


@pytest.fixture
def path(tmp_path, model):
    build_index(tmp_path / "index", DOCUMENTS, model)
    return tmp_path / "index"


def add_rows(path: Any, ids: list[str], **values: str | None) -> None:
    """The rows `ids` once more, as a second writer would add them, with other values in the columns `values`."""
    table = SearchIndex.open(path).table
    rows = table.search().where(f"id IN ({str(ids)[1:-1]})").to_arrow()
    for name, value in values.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(name), pa.array([value] * len(rows), pa.string()))
    table.add(rows)


def older_and_newer(path: Any, ids: list[str]) -> None:
    """Each of `ids` twice, the second with other text."""
    add_rows(path, ids, **{CONTENT: "another text", ROW_HASH: "other"})


def contents(path: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in SearchIndex.open(path).table.to_arrow().select(["id", CONTENT]).to_pylist():
        found.setdefault(row["id"], []).append(row[CONTENT])
    return found


def test_equal_copies_are_removed_and_rows_that_differ_stay(path):
    add_rows(path, ["d1", "d2"])
    add_rows(path, ["d2"])
    older_and_newer(path, ["d3"])
    add_rows(path, ["d4"], **{SOURCE: "elsewhere"})
    assert SearchIndex.open(path).describe()["duplicate_ids"] == 4
    done = compact_index(path)
    assert done.duplicates_removed == 4  # one of d1, three of d2
    assert done.differing == Differing(2, "d3", ["documents", "elsewhere"])
    found = contents(path)
    assert {name for name, texts in found.items() if len(texts) > 1} == {"d3", "d4"}
    assert sorted(found["d3"]) == ["another text", "text number 3 of water"]
    assert SearchIndex.open(path).describe()["duplicate_ids"] == 2
    assert compact_index(path).duplicates_removed == 0


@pytest.mark.parametrize("older", ["before", "behind"])
def test_a_run_that_reads_the_source_again_decides_which_row_is_right(path, model, older):
    """Also where an update, as a compaction may, has put the older row behind the newer one."""
    older_and_newer(path, ["d3", "d7"])
    if older == "behind":
        table = SearchIndex.open(path).table
        table.update(where=f"{CONTENT} != 'another text'", values={"title": "x"})
        table.update(where="title = 'x'", values={"title": ""})
        rows = table.search().where("id = 'd3'").select([CONTENT]).with_row_id(True).to_list()
        assert max(rows, key=lambda row: row["_rowid"])[CONTENT] == "text number 3 of water"
    report = build_index(path, DOCUMENTS, model)
    assert (report.updated, report.unchanged, report.embedded) == (2, 8, 0)
    assert (report.duplicates_removed, report.differing) == (2, None)
    assert contents(path) == {document.id: [document.text] for document in DOCUMENTS}
    index = SearchIndex.open(path)
    assert (index.complete, index.describe()["duplicate_ids"]) == (True, 0)
    again = build_index(path, DOCUMENTS, model)
    assert (again.unchanged, again.duplicates_removed) == (10, 0)


def test_a_change_at_once_writes_a_document_again_whose_rows_differ(path, model):
    older_and_newer(path, ["d3"])
    update_documents(path, DOCUMENTS[3:4], model, source="documents", commit_every=ONE_COMMIT)
    assert contents(path)["d3"] == ["text number 3 of water"] * 2
    assert compact_index(path).duplicates_removed == 1


def test_versions_of_a_document_with_more_and_fewer_chunks_become_that_of_the_source(path, model):
    paragraphs = [" ".join(f"{word}{number}" for number in range(250)) for word in ("one", "two", "three")]
    long, longer = (SourceDocument("long", "", "\n\n".join(paragraphs[:count]), kind="text") for count in (2, 3))
    build_index(path, [longer], model, source="texts")
    rows = SearchIndex.open(path).table.search().where("document = 'long'").to_arrow()
    assert len(rows) > 2
    build_index(path, [long], model, source="texts")
    expected = contents(path)
    SearchIndex.open(path).table.add(rows)
    report = build_index(path, [long], model, source="texts")
    assert report.removed > 0
    assert contents(path) == expected


def test_what_the_source_no_longer_has_goes_with_all_of_its_rows(path, model):
    older_and_newer(path, ["d9"])
    report = build_index(path, DOCUMENTS[:9], model)
    assert report.differing is None
    assert "d9" not in contents(path)


def test_a_run_of_another_source_leaves_rows_that_differ_and_names_them(path, model):
    older_and_newer(path, ["d3"])
    report = build_index(path, [SourceDocument("new", "", "something else")], model, source="other")
    assert report.differing == Differing(1, "d3", ["documents"])
    assert len(contents(path)["d3"]) == 2


def test_rows_of_two_sources_are_a_conflict_until_one_takes_the_document_over(path, model):
    add_rows(path, ["d3"], **{SOURCE: "elsewhere", CONTENT: "theirs", ROW_HASH: "other"})
    report = build_index(path, DOCUMENTS, model)
    assert [conflict.path for conflict in report.conflicts] == ["d3"]
    assert report.differing == Differing(1, "d3", ["documents", "elsewhere"])
    assert sorted(contents(path)["d3"]) == ["text number 3 of water", "theirs"]
    report = build_index(path, DOCUMENTS, model, take_over=True)
    assert (report.conflicts, report.differing, report.duplicates_removed) == ([], None, 1)
    assert contents(path)["d3"] == ["text number 3 of water"]


def test_the_command_line_says_what_to_do_about_rows_that_differ(path, tmp_path, tiny_model, capsys):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a b.md").write_text("# Boats\n\nWooden boats.\n")
    where = tmp_path / "notes.index"
    run = ["index", str(folder), "--into", str(where), "--model", str(tiny_model)]
    assert main(run) == 0
    older_and_newer(where, ["a b.md"])
    add_rows(where, ["a b.md"])
    capsys.readouterr()
    assert main(["compact", str(where), "--json"]) == 0
    shown = capsys.readouterr()
    done = json.loads(shown.out)
    assert done["differing"] == {"ids": 1, "document": "a b.md", "sources": [str(folder)]}
    [line] = shown.err.strip().splitlines()
    assert line.startswith(f'warning: 1 id has rows that differ (one is of the document "a b.md"; source: "{folder}")')
    assert line.endswith(f"or remove the document: search-r3 delete {where} 'a b.md'")
    assert main(run) == 0
    shown = capsys.readouterr()
    assert "duplicates removed" in shown.out
    assert "differ" not in shown.err
    assert SearchIndex.open(where).describe()["duplicate_ids"] == 0


def test_an_index_of_format_1_has_no_sources_to_compare(path):
    table = SearchIndex.open(path).table
    add_rows(path, ["d1"])
    older_and_newer(path, ["d2"])
    table.checkout_latest()
    table.drop_columns([SOURCE])
    assert remove_equal_copies(table) == (1, Differing(1, "d2", ["unknown"]))


def test_many_copies_are_removed_in_several_conditions(path, monkeypatch):
    monkeypatch.setattr("search_r3.index.backends.lance.duplicates.AT_ONCE", 3)
    add_rows(path, [document.id for document in DOCUMENTS])
    assert compact_index(path).duplicates_removed == 10
    assert len(SearchIndex.open(path)) == 10


def test_sources_are_named_up_to_three():
    assert str(Differing(1200, "d", ["a", "b", "c", "d", "e"])) == (
        '1,200 ids have rows that differ (one is of the document "d"; sources: "a", "b", "c" and 2 others)'
    )
