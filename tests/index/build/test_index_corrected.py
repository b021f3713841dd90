"""Values that are corrected in the file, types of fields that nobody has, and sources that were emptied."""

import json

import pytest

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index, delete_documents, open_source, update_documents


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.index"


@pytest.fixture
def write(tmp_path):
    """Writes a CSV or JSONL file whose documents a, b, c, ... have `values` in the field `field`; gives its source."""

    def written(*values, name="docs.csv", field="year", start="a"):
        file = tmp_path / name
        rows = [
            {"id": chr(ord(start) + i), "text": f"text {i}"} | ({} if value is None else {field: value})
            for i, value in enumerate(values)
        ]
        lines = [json.dumps(row) for row in rows]
        if name.endswith("csv"):
            lines = [f"id,text,{field}", *(f"{row['id']},{row['text']},{row.get(field, '')}" for row in rows)]
        file.write_text("".join(line + "\n" for line in lines))
        return open_source(file)

    return written


def column(path, name="year"):
    rows = SearchIndex.open(path).table.search().select(list({"id", name})).to_arrow().to_pylist()
    return [row[name] for row in sorted(rows, key=lambda row: row["id"])]


def changed(report):
    return report.added, report.updated, report.unchanged, report.embedded


# ------------------------------------------------------------------------------------------------------ text in tables


def test_cells_of_a_column_that_is_text_by_its_content_stay_as_written(path, write, model):
    build_index(path, write("2020", "unknown", "1.50"), model)
    report = build_index(path, write("2020", "2021", "1.50"), model)
    assert changed(report) == (0, 1, 2, 0)
    assert column(path) == ["2020", "2021", "1.50"]
    build_index(path, write("7", "8", name="other.csv", start="p"), model)
    assert column(path)[3:] == ["7", "8"]
    version = SearchIndex.open(path).table.version
    assert changed(build_index(path, write("2020", "2021", "1.50"), model)) == (0, 0, 3, 0)
    assert SearchIndex.open(path).table.version == version


def test_a_whole_number_does_not_change_when_a_fraction_comes_or_goes(path, write, model):
    build_index(path, write("1", "2"), model)
    assert changed(build_index(path, write("1", "2.5"), model)) == (0, 1, 1, 0)
    assert column(path) == [1.0, 2.5]
    assert changed(build_index(path, write("1", "3"), model)) == (0, 1, 1, 0)
    assert column(path) == [1.0, 3.0]


# ------------------------------------------------------------------------------------------------- corrected values


@pytest.mark.parametrize("name", ["docs.csv", "docs.jsonl"])
@pytest.mark.parametrize("correction", [2021, None])
def test_a_value_that_the_run_replaces_does_not_keep_a_column_from_its_type(path, write, model, name, correction):
    build_index(path, write("2020", "unknown", "2022", name=name), model)
    build_index(path, write(2020, correction, 2022, name=name), model, types={"year": "integer"})
    index = SearchIndex.open(path)
    assert index.columns["year"] == "integer"
    assert column(path) == [2020, correction, 2022]
    assert index.complete


def test_what_still_has_the_value_is_named_with_its_place(path, write, model):
    build_index(path, write("2020", "unknown"), model)
    with pytest.raises(
        InputError, match=r"docs.csv line 3 \(document \"b\"\): year is 'unknown', which is not of type int"
    ):
        build_index(path, write("2020", "unknown"), model, types={"year": "integer"})
    assert column(path) == ["2020", "unknown"]


@pytest.mark.parametrize("posted", [False, True])
def test_a_value_that_the_run_does_not_replace_is_called_the_indexs_and_the_remedy_works(path, write, model, posted):
    build_index(path, write("2020", "unknown"), model)
    if posted:  # to another source; else it is not in the file any more
        update_documents(path, [SourceDocument("b", "", "posted", {"year": "unknown"})], model)
    again = write("2020", "2021") if posted else write("2020")
    with pytest.raises(InputError) as error:
        build_index(path, again, model, types={"year": "integer"})
    assert str(error.value).startswith("document \"b\" of the index: year is 'unknown', which is not of type integer; ")
    assert "remove it (search-r3 delete INDEX b) and run this again" in str(error.value)
    assert column(path) == ["2020", "unknown"]
    delete_documents(path, ["b"])
    build_index(path, again, model, types={"year": "integer"})
    assert column(path) == ([2020, 2021] if posted else [2020])


def test_a_conversion_works_after_all_documents_are_deleted(path, write, model):
    build_index(path, write("unknown"), model)
    delete_documents(path, ["a"])
    build_index(path, write("2020"), model, types={"year": "integer"})
    assert column(path) == [2020]


def test_an_interruption_between_conversion_and_correction_loses_nothing(path, write, model):
    build_index(path, write("2020", "unknown"), model)
    model.fail_after = len(model.encoded)
    file = write("2020", "2021").path
    file.write_text(file.read_text().replace("text 1", "a new text"))
    with pytest.raises(RuntimeError, match="out of memory"):
        build_index(path, open_source(file), model, types={"year": "integer"})
    index = SearchIndex.open(path)
    held = [json.loads(row["r3_metadata"]) for row in index.table.search().select(["r3_metadata"]).to_list()]
    assert {"year": "unknown"} in held
    model.fail_after = None
    build_index(path, open_source(file), model)
    assert column(path) == [2020, 2021]
    assert SearchIndex.open(path).complete


@pytest.mark.parametrize("types", [None, {"n": "number"}])
def test_a_large_integer_that_is_corrected_beside_a_fraction_does_not_block(path, write, model, types):
    build_index(path, write(2**53 + 1, 3, name="docs.jsonl", field="n"), model)
    build_index(path, write(7, 0.5, name="docs.jsonl", field="n"), model, types=types)
    assert column(path, "n") == [7.0, 0.5]


def test_a_large_integer_that_stays_is_never_rounded(path, write, model):
    build_index(path, write(2**53 + 1, 3, name="docs.jsonl", field="n"), model)
    with pytest.raises(InputError, match=r'document "a" of the index: n is .*\(search-r3 delete INDEX a\)'):
        build_index(path, write(2**53 + 1, 0.5, name="docs.jsonl", field="n"), model)
    assert column(path, "n") == [2**53 + 1, 3]


# ------------------------------------------------------------------------------------------- fields that nobody has


@pytest.mark.parametrize("name", ["docs.csv", "docs.jsonl"])
@pytest.mark.parametrize("first", [True, False])
def test_a_type_for_a_field_that_nobody_has_is_refused(path, write, model, name, first):
    if not first:
        build_index(path, write(2020, name=name), model)
    source = write(2020, 2021, name=name)
    for types, expected in (
        ({"yaer": "text"}, 'metadata field of that name; did you mean "year"?'),
        ({"year": "text", "colour": "text"}, "metadata field of that name; fields: year"),
        ({"text": "integer"}, '"text" is part of every document and is not metadata'),
        ({"_id": "integer"}, '"_id" is part of every document and is not metadata'),
        ({"Title": "integer"}, '"Title" is part of every document and is not metadata'),
    ):
        with pytest.raises(InputError) as error:
            build_index(path, source, model, types=types)
        assert expected in str(error.value)
    if first:
        assert not [item for item in path.glob("*") if item.name.endswith(".lance")]
    else:
        assert column(path) == [2020]


def test_a_type_for_a_field_of_the_documents_or_of_the_index_works(path, tmp_path, write, model):
    build_index(path, write(None, None, 2022, name="docs.jsonl"), model, types={"year": "text"})
    assert column(path) == [None, None, "2022"]
    build_index(path, write(1, name="other.jsonl", field="n", start="p"), model, types={"year": "integer"})
    assert column(path) == [None, None, 2022, None]
    build_index(path, write(None, name="empty.csv", field="Pa-ge", start="q"), model, types={"Pa-ge": "integer"})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("A note.")
    build_index(path, open_source(tmp_path / "notes"), model, types={"year": "number"})
    assert SearchIndex.open(path).columns["year"] == "number"
    nested = tmp_path / "nested.jsonl"
    nested.write_text('{"id": "x", "text": "y", "metadata": {"text": 1, "title": 2}}\n')
    build_index(path, open_source(nested), model, types={"text": "text", "title": "number"})
    assert [value for value in column(path, "meta_title") if value is not None] == [2.0]


def test_the_command_says_it_in_one_line(path, write, tiny_model, capsys):
    source = write(2020)
    assert (
        main(["index", str(source.path), "--into", str(path), "--model", str(tiny_model), "--type", "yaer=text"]) == 2
    )
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: --type yaer=text: neither ")
    assert said.endswith('did you mean "year"?')
    assert not list(path.glob("*.lance"))


# ---------------------------------------------------------------------------------------------------- emptied sources


@pytest.fixture
def run(path, tiny_model, capsys):
    def call(source, *more):
        code = main(["index", str(source), "--into", str(path), "--model", str(tiny_model), *more])
        said = capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    return call


@pytest.mark.parametrize("kind", ["jsonl", "csv", "header", "folder"])
def test_an_emptied_source_is_removed_with_prune_and_otherwise_the_remedy_is_named(run, path, tmp_path, write, kind):
    source = tmp_path / "notes"
    if kind == "folder":
        source.mkdir()
        for name in ("a.md", "b.md"):
            (source / name).write_text(f"This is {name}.")
    else:
        source = write(1, 2, name="docs.jsonl" if kind == "jsonl" else "docs.csv").path
    other = write(3, name="other.jsonl", start="z").path
    assert run(other, "--prune")[0] == run(source)[0] == 0
    if kind == "folder":
        for file in source.iterdir():
            file.unlink()
    else:
        source.write_text("id,text,year\n" if kind == "header" else "")
    code, _, err = run(source)
    assert code == 2
    if kind != "csv":  # there the header is missed
        assert (
            f"nothing to index ({'it has no files of a known format' if kind == 'folder' else 'it has no records'}"
            in err
        )
        assert f"to remove what the index has of it: search-r3 delete {path} --source {source}" in err
    assert len(SearchIndex.open(path)) == 3
    code, out, err = run(source, "--prune")
    assert (code, err) == (0, "")
    assert "0 documents in 0 chunks: 0 added, 0 updated, 0 unchanged, 2 removed" in out
    assert SearchIndex.open(path).complete
    assert column(path, "id") == ["z"]


def test_an_index_may_be_left_empty_and_filled_again(run, path, write):
    source = write(1, 2, name="docs.jsonl").path
    assert run(source)[0] == 0
    source.write_text("")
    assert run(source, "--prune")[0] == 0
    assert len(SearchIndex.open(path)) == 0
    assert run(source, "--prune")[0] == 0
    write(1, 2, name="docs.jsonl")
    assert run(source)[0] == 0
    assert column(path) == [1, 2]


def test_an_empty_source_that_the_index_does_not_know_is_refused_with_prune_too(run, path, tmp_path, write):
    source = tmp_path / "empty.jsonl"
    source.write_text("")
    for _ in range(2):
        code, _, err = run(source, "--prune")
        assert (code, err) == (2, f"error: {source}: nothing to index (it has no records)")
        run(write(1, name="docs.jsonl").path)
