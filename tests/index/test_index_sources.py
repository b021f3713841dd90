"""Each document belongs to a source, and a run replaces and removes only its own: nothing is lost in silence."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from search_r3.errors import InputError
from search_r3.index import (
    Deleted,
    SearchIndex,
    SourceDocument,
    build_index,
    delete_source,
    open_source,
    update_documents,
)
from search_r3.index.row_keys import SOURCE


def jsonl(path, *ids, **fields):
    path.write_text("".join(json.dumps({"id": i, "text": f"text of {i} in {path.name}"} | fields) + "\n" for i in ids))
    return path


def held(path):
    """{document: source}, and no document twice."""
    rows = SearchIndex.open(path).table.search().select(["id", "document", SOURCE]).to_arrow().to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["document"]: row[SOURCE] for row in rows}


def sources(path):
    return {source.name: source.documents for source in SearchIndex.open(path).sources}


def counts(report):
    return report.added, report.updated, report.unchanged, report.removed


# ------------------------------------------------------------------------------------------------------------ survival


def test_posted_documents_survive_every_run_of_a_folder(path, make, model):
    folder = make("notes", "a.md", "b.md")
    build_index(path, open_source(folder), model)
    update_documents(path, [SourceDocument("posted", "", "said by a client")], model)
    make("notes", "c.md")
    (folder / "a.md").unlink()
    assert counts(build_index(path, open_source(folder), model)) == (1, 0, 1, 1)
    assert held(path) == {"b.md": str(folder), "c.md": str(folder), "posted": "api"}
    assert sources(path) == {str(folder): 2, "api": 1}


def test_documents_given_as_objects_are_a_source_too(path, make, model):
    build_index(path, [SourceDocument("one", "", "x"), SourceDocument("two", "", "y")], model)
    update_documents(path, [SourceDocument("three", "", "z")], model)
    build_index(path, open_source(make("notes", "a.md")), model)
    assert counts(build_index(path, [SourceDocument("one", "", "x")], model)) == (0, 0, 1, 1)
    assert set(held(path)) == {"one", "three", "a.md"}
    build_index(path, [SourceDocument("five", "", "v")], model, source="mine")
    assert held(path)["five"] == "mine"
    assert counts(build_index(path, [SourceDocument("six", "", "v")], model, source="mine")) == (1, 0, 0, 1)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "beir"])
def test_files_of_records_are_sources_of_their_own(tmp_path, path, model, kind):
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        file = jsonl(tmp_path / name / "corpus.jsonl", f"{name}1", f"{name}2")
        if kind == "csv":
            file = tmp_path / name / "corpus.csv"
            file.write_text(f"id,text\n{name}1,x\n{name}2,y\n")
        files.append(file.parent if kind == "beir" else file)
        build_index(path, open_source(files[-1]), model)
    assert held(path) == {
        f"{file}{n}": str(at) for file, at in zip(("first", "second"), files, strict=True) for n in "12"
    }
    assert counts(build_index(path, open_source(files[0]), model)) == (0, 0, 2, 0)


# ------------------------------------------------------------------------------------------------- folders and subsets


@pytest.mark.parametrize("part", ["a.md", "sub", "sub/deep", "sub/b.md"])
def test_a_part_of_a_folder_leaves_the_rest_and_keeps_its_ids(path, make, model, part):
    folder = make("notes", "a.md", "sub/b.md", "sub/c.md", "sub/deep/d.md")
    build_index(path, open_source(folder), model)
    before = held(path)
    report = build_index(path, open_source(folder / part), model)
    assert (report.added, report.updated, report.removed) == (0, 0, 0)
    assert held(path) == before
    assert sources(path) == {str(folder): 4}


def test_a_part_of_a_folder_is_brought_up_to_date(path, make, model):
    folder = make("notes", "a.md", "sub/b.md", "sub/c.md", "subordinate.md")
    build_index(path, open_source(folder), model)
    (folder / "a.md").unlink()
    (folder / "sub/b.md").unlink()
    make("notes", "sub/new.md")
    assert counts(build_index(path, open_source(folder / "sub"), model)) == (1, 0, 1, 1)
    assert set(held(path)) == {"a.md", "sub/c.md", "sub/new.md", "subordinate.md"}
    assert counts(build_index(path, open_source(folder), model)) == (0, 0, 3, 1)


def test_a_part_that_the_folder_passes_over_is_a_source_of_its_own(path, make, model):
    folder = make("notes", "a.md", ".drafts/b.md", "data.bin")
    build_index(path, open_source(folder), model)
    for part in (".drafts", "data.bin"):
        build_index(path, open_source(folder / part), model)
    expected = {"a.md": str(folder), ".drafts/b.md": f"{folder}/.drafts", "data.bin": f"{folder}/data.bin"}
    assert held(path) == expected
    build_index(path, open_source(folder), model)
    assert held(path) == expected


def test_a_folder_around_sources_takes_them_over(path, make, model):
    folder = make("notes", "a/x.md", "a/y.md", "b/x.md", "z.md")
    other = make("other", "x.md")
    build_index(path, open_source(other), model)
    for part in ("a", "b/x.md", "z.md"):
        build_index(path, open_source(folder / part), model)
    assert set(held(path)) == {"x.md", "a/x.md", "a/y.md", "b/x.md", "z.md"}
    (folder / "a/y.md").unlink()
    asked = []
    report = build_index(path, open_source(folder), model, may_prune=lambda removal: asked.append(removal) or True)
    assert held(path) == {"x.md": str(other)} | {f"notes/{name}": str(folder) for name in ("a/x.md", "b/x.md", "z.md")}
    assert [removal.documents for removal in asked] == [1]  # a/y.md; the others only have another name now
    assert report.source == str(folder)
    assert set(sources(path)) == {str(other), str(folder)}
    build_index(path, open_source(folder / "a"), model)
    assert len(held(path)) == 4


def test_what_a_folder_takes_over_is_not_doubled_when_nothing_may_be_removed(path, make, model):
    folder = make("notes", "a/x.md", "a/y.md", "z.md")
    build_index(path, open_source(folder / "a"), model)
    (folder / "a/y.md").unlink()
    build_index(path, open_source(folder), model, prune=False)
    assert set(held(path)) == {"a/x.md", "y.md", "z.md"}
    assert sources(path) == {str(folder): 2, f"{folder}/a": 1}


# ------------------------------------------------------------------------------------------------------- equal names


def test_folders_with_equal_file_names_stand_side_by_side(tmp_path, path, make, model):
    folders = [make(name, "README.md", "sub/x.md") for name in ("a/notes", "b/notes", "c/b/notes", "d")]
    for _ in range(2):
        for folder in folders:
            build_index(path, open_source(folder), model)
        assert held(path) == {
            prefix + name: str(folder)
            for prefix, folder in zip(("", "notes/", "b/notes/", "d/"), folders, strict=True)
            for name in ("README.md", "sub/x.md")
        }
    hit = SearchIndex.open(path).search("text of b/notes/README.md", model, mode="vector").hits[0]
    assert (hit.document, hit.path) == ("notes/README.md", "notes/README.md")
    assert len(model.encoded) == 8  # each once


def test_a_prefix_never_meets_a_folder_of_the_first_source(path, make, model):
    first, second = make("a", "notes/README.md"), make("b/notes", "README.md")
    build_index(path, open_source(first), model)
    build_index(path, open_source(second), model)
    assert held(path) == {"notes/README.md": str(first), "b/notes/README.md": str(second)}


def test_files_with_equal_names_stand_side_by_side(path, make, model):
    for folder in ("a", "b", "c/b"):
        build_index(path, open_source(make(folder, "README.md") / "README.md"), model)
    assert set(held(path)) == {"README.md", "b/README.md", "c/b/README.md"}


def test_names_that_sql_could_misread(path, make, model):
    first, second = make("it's 100%", "o'clock_%.md"), make("b/it's 100%", "o'clock_%.md")
    for _ in range(2):
        build_index(path, open_source(first), model)
        build_index(path, open_source(second), model)
        assert set(held(path)) == {"o'clock_%.md", "it's 100%/o'clock_%.md"}
    delete_source(path, str(second))
    assert held(path) == {"o'clock_%.md": str(first)}


# ----------------------------------------------------------------------------------------------------------- conflicts


def test_an_id_of_another_source_is_left_to_it_and_reported(tmp_path, path, model):
    first = jsonl(tmp_path / "a.jsonl", "one", "two")
    second = jsonl(tmp_path / "b.jsonl", "two", "three")
    build_index(path, open_source(first), model)
    for _ in range(2):
        report = build_index(path, open_source(second), model)
        assert [skipped.path for skipped in report.conflicts] == ["two"]
        assert f'the source "{first}" has' in report.conflicts[0].reason
        assert "--take-over" in report.conflicts[0].reason
        assert report.documents == 1
        assert held(path) == {"one": str(first), "two": str(first), "three": str(second)}
    assert SearchIndex.open(path).search("two", model, mode="text").hits[0].text == "text of two in a.jsonl"
    report = build_index(path, open_source(second), model, take_over=True)
    assert not report.conflicts
    assert held(path)["two"] == str(second)
    assert [skipped.path for skipped in build_index(path, open_source(first), model).conflicts] == ["two"]


def test_an_equal_document_of_another_source_is_no_conflict(path, make, model):
    same = [SourceDocument("same", "T", "the same text", {"year": 1})]
    build_index(path, same, model, source="first")
    report = build_index(path, [*same, SourceDocument("new", "", "y")], model, source="second")
    assert (report.conflicts, counts(report)) == ([], (1, 0, 1, 0))
    assert held(path) == {"same": "first", "new": "second"}


@pytest.mark.parametrize("posted", [False, True])
def test_records_that_are_equal_in_text_title_and_metadata_are_equal_in_files_of_any_name(
    tmp_path, path, model, posted
):
    long = " ".join(f"word{i}" for i in range(900))
    rows = [{"id": "a", "text": "same", "title": "T", "year": 1}, {"id": "long", "text": long}]
    files = [tmp_path / "k1.jsonl", tmp_path / "k2.jsonl"]
    for shift, file in enumerate(files):
        file.write_text("\n" * shift + "".join(json.dumps(row) + "\n" for row in rows))
    if posted:
        build_index(path, open_source(files[0]), model)
        update_documents(path, [SourceDocument("a", "T", "same", {"year": 1}), SourceDocument("long", "", long)], model)
    else:
        build_index(path, open_source(files[0]), model)
    before = held(path)
    report = build_index(path, open_source(files[1]), model)
    assert (report.conflicts, report.added, report.updated, report.embedded) == ([], 0, 0, 0)
    assert report.unchanged == len(SearchIndex.open(path)) > 2
    assert held(path) == before
    for change in ({"text": "other"}, {"title": "U"}, {"year": 2}, {"title": "", "text": "T same"}):
        files[1].write_text(json.dumps(rows[0] | change) + "\n")
        conflicts = build_index(path, open_source(files[1]), model, prune=False).conflicts
        assert [conflict.path for conflict in conflicts] == ["a"]


def test_what_was_posted_over_a_file_stays_until_it_is_said_otherwise(path, make, model):
    folder = make("notes", "a.md", "b.md")
    build_index(path, open_source(folder), model)
    update_documents(path, [SourceDocument("a.md", "", "better words")], model)
    assert held(path) == {"a.md": "api", "b.md": str(folder)}
    (folder / "b.md").unlink()
    report = build_index(path, open_source(folder), model)
    assert [skipped.path for skipped in report.conflicts] == ["a.md"]
    assert held(path) == {"a.md": "api"}
    assert SearchIndex.open(path).search("better", model, mode="text").hits[0].document == "a.md"


def test_a_long_document_is_left_out_or_taken_over_as_a_whole(path, model):
    long = "\n\n".join(" ".join(f"{name}{i}" for i in range(300)) for name in ("alpha", "beta", "gamma"))
    build_index(path, [SourceDocument("p", "", long, kind="text")], model, source="first")
    before = SearchIndex.open(path).table.version
    report = build_index(path, [SourceDocument("p", "", "short now")], model, source="second", prune=False)
    assert len(report.conflicts) == 1
    assert len(SearchIndex.open(path)) > 2
    build_index(path, [SourceDocument("p", "", "short now")], model, source="second", take_over=True)
    assert (len(SearchIndex.open(path)), held(path)) == (1, {"p": "second"})
    assert before < SearchIndex.open(path).table.version


# ------------------------------------------------------------------------------------------------------ names, moves


def test_a_named_source_may_move(tmp_path, path, make, model):
    folder = make("v1/docs", "a.md", "b.md")
    build_index(path, open_source(folder), model, source="manual")
    shutil.copytree(folder, tmp_path / "v2/docs")
    (tmp_path / "v2/docs/b.md").unlink()
    assert counts(build_index(path, open_source(tmp_path / "v2/docs"), model, source="manual")) == (0, 0, 1, 1)
    assert held(path) == {"a.md": "manual"}
    assert counts(build_index(path, open_source(tmp_path / "v2/docs"), model)) == (0, 0, 1, 0)  # found by its place
    assert sources(path) == {"manual": 1}


def test_a_folder_that_was_renamed_is_known_by_its_files(tmp_path, path, make, model):
    folder = make("notes", "a.md", "sub/b.md", "c.md")
    build_index(path, open_source(folder), model)
    renamed = shutil.move(folder, tmp_path / "papers")
    (tmp_path / "papers/d.md").write_text("new")
    with pytest.raises(InputError, match=rf'{folder} is not on this machine: if .*papers .* --source "{folder}"'):
        build_index(path, open_source(renamed), model)
    other = make("other", "x.md", "a.md", "y.md")  # one name in common is no sign
    assert counts(build_index(path, open_source(other), model)) == (3, 0, 0, 0)
    assert counts(build_index(path, open_source(renamed), model, source=str(folder))) == (1, 0, 3, 0)


def test_a_source_that_seems_to_have_moved_is_refused_with_what_to_say(tmp_path, path, make, model):
    folder = make("old/notes", "a.md")
    build_index(path, open_source(folder), model)
    shutil.move(folder, tmp_path / "new")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "new", tmp_path / "elsewhere/notes")
    moved = tmp_path / "elsewhere/notes"
    with pytest.raises(InputError, match=rf'{folder} is not on this machine: if {moved} is .* --source "{folder}"'):
        build_index(path, open_source(moved), model)
    assert counts(build_index(path, open_source(moved), model, source=str(folder))) == (0, 0, 1, 0)
    assert counts(build_index(path, open_source(moved), model)) == (0, 0, 1, 0)


@pytest.mark.parametrize("name", ["", "  ", "unknown", "api"])
def test_names_that_mean_something_else_are_refused(path, make, model, name):
    with pytest.raises(InputError, match="another name"):
        build_index(path, open_source(make("notes", "a.md")), model, source=name)
    assert not path.exists()


def test_one_place_is_one_source(path, make, model):
    folder = make("notes", "a.md", "sub/b.md")
    build_index(path, open_source(folder), model)
    for place in (folder, folder / "sub"):
        with pytest.raises(InputError, match="omit --source"):
            build_index(path, open_source(place), model, source="second")
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert counts(build_index(path, open_source(link), model)) == (0, 0, 2, 0)
    assert sources(path) == {str(folder): 2}


def test_a_source_is_deleted_by_its_name_or_place(path, make, model):
    folder = make("notes", "a.md", "b.md")
    build_index(path, open_source(folder), model, source="mine")
    update_documents(path, [SourceDocument("posted", "", "x")], model)
    with pytest.raises(InputError, match='no source "nix"; its sources are: "api", "mine"'):
        delete_source(path, "nix")
    assert delete_source(path, str(folder)) == Deleted(2, source="mine")
    assert sources(path) == {"api": 1}
    assert SearchIndex.open(path).complete
    assert delete_source(path, "api") == Deleted(1, source="api")
    assert (len(SearchIndex.open(path)), sources(path)) == (0, {})
    build_index(path, open_source(folder), model)
    assert held(path) == dict.fromkeys(["a.md", "b.md"], str(folder))


# -------------------------------------------------------------------------------------------------------- lines, size


def row_ids(path):
    """{id: LanceDB's row id}, which changes when a row is written again."""
    rows = SearchIndex.open(path).table.search().with_row_id(True).select(["id"]).to_arrow()
    return dict(zip(rows["id"].to_pylist(), rows["_rowid"].to_pylist(), strict=True))


def lines_of(count):
    return [json.dumps({"id": f"d{i}", "text": f"text number {i}", "n": i}) for i in range(count)]


@pytest.mark.parametrize("change", ["first", "middle", "reversed", "removed", "blank"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_records_that_moved_within_their_file_cost_nothing(tmp_path, path, model, change, kind):
    lines = [f"d{i},text number {i},{i}" for i in range(300)] if kind == "csv" else lines_of(300)
    head = ["id,text,n"] if kind == "csv" else []
    new = "new,text that is new,1" if kind == "csv" else json.dumps({"id": "new", "text": "text that is new", "n": 1})
    source = tmp_path / f"docs.{kind}"
    source.write_text("\n".join(head + lines) + "\n")
    build_index(path, open_source(source), model)
    before = row_ids(path)
    changed = {
        "first": [new, *lines],
        "middle": [*lines[:150], new, *lines[150:]],
        "reversed": [*reversed(lines), new],
        "removed": [*lines[1:], new],
        "blank": ["", *lines, new] if kind == "jsonl" else [*lines, new],
    }[change]
    source.write_text("\n".join(head + changed) + "\n")
    report = build_index(path, open_source(source), model)
    gone = int(change == "removed")
    assert (*counts(report), report.embedded) == (1, 0, 300 - gone, gone, 1)
    row = SearchIndex.open(path).search("new", model, mode="text").hits[0]
    assert (row.start_line, row.end_line, row.path) == (0, 0, source.name)
    after = row_ids(path)
    assert len(before) == 300
    assert after.items() - before.items() == {("new", after["new"])}  # no other row was written


def test_one_line_put_in_at_the_top_of_3000_writes_one_row(tmp_path, path, model):
    source = tmp_path / "docs.jsonl"
    source.write_text("\n".join(lines_of(3000)) + "\n")
    build_index(path, open_source(source), model)
    before = size(path)
    source.write_text("\n".join([json.dumps({"id": "new", "text": "first"}), *lines_of(3000)]) + "\n")
    assert counts(build_index(path, open_source(source), model)) == (1, 0, 3000, 0)
    assert size(path) < before + 100_000


def size(folder):
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


# ----------------------------------------------------------------------------------------------------------- migration


@pytest.fixture
def old(tmp_path):
    """An index of format 1, and the model that made it."""
    with tarfile.open(Path(__file__).parent / "data" / "sources-f444c4d.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "old.index"


def test_an_index_of_format_1_is_read_as_it_is(old, make_model):
    index = SearchIndex.open(old)
    assert index.info.format_version == 3
    assert [(source.name, source.documents) for source in index.sources] == [("unknown", 4)]
    assert index.describe()["documents"] == 4
    hits = index.search("harbour fee", make_model(dimension=16), where="year = 2020").hits
    assert hits[0].document == "fee"
    assert SOURCE not in SearchIndex.open(old).table.schema.names


def test_a_run_adopts_what_it_brings_and_keeps_what_nobody_claims(old, tmp_path, make_model):
    model = make_model(dimension=16)
    source = tmp_path / "docs.jsonl"
    rows = [
        {"id": "fee", "text": "Pay the harbour fee at the office.", "year": 2020},
        {"id": "tide", "text": "The tide is low at noon.", "year": 2021},
        {"id": "new", "text": "A new pier was built.", "year": 2022.5},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = build_index(old, open_source(source), model)
    assert (report.added, report.removed, report.embedded, report.unknown) == (1, 0, 1, 2)
    assert held(old) == dict.fromkeys(["fee", "tide", "new"], str(source)) | dict.fromkeys(["boat", "rope"])
    assert sources(old) == {str(source): 3, "unknown": 2}
    assert SearchIndex.open(old).columns["year"] == "number"  # as it was
    again = build_index(old, open_source(source), model)
    assert (*counts(again), again.unknown) == (0, 0, 3, 0, 2)
    assert delete_source(old, "unknown").chunks == 2
    assert sources(old) == {str(source): 3}


@pytest.mark.parametrize("write", ["update", "folder", "delete"])
def test_any_write_migrates_and_loses_nothing(old, make, make_model, write):
    model = make_model(dimension=16)
    folder = make("notes", "a.md")
    if write == "update":
        update_documents(old, [SourceDocument("a.md", "", "x")], model)
    elif write == "folder":
        assert build_index(old, open_source(folder), model).unknown == 4
    else:
        build_index(old, open_source(folder), model)
        delete_source(old, str(folder))
    assert {"fee", "tide", "boat", "rope"} <= set(held(old))
    assert SearchIndex.open(old).complete
