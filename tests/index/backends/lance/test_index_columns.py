"""The types of metadata columns: whole numbers are exact, a value that does not fit is named, and a type can change."""

import json
import uuid

import pyarrow as pa
import pytest
from nightly import nightly

from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index, compact_index, open_source
from search_r3.index.backends.lance import lance_table
from search_r3.index.backends.lance.table_columns import as_type
from search_r3.index.row_keys import VECTOR


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.index"


def docs(*values, field="n", start=0):
    return [SourceDocument(f"d{i}", "", f"text {i}", {field: value}) for i, value in enumerate(values, start)]


def where(path, condition, model):
    hits = SearchIndex.open(path).search("text", model, mode="vector", reasoning=False, where=condition).hits
    return sorted(hit.id for hit in hits)


def column(path, name):
    rows = SearchIndex.open(path).table.search().select(["id", name]).to_arrow().to_pylist()
    return {row["id"]: row[name] for row in sorted(rows, key=lambda row: row["id"])}


BIG = 2**53


@pytest.mark.parametrize("kind", ["objects", "jsonl", "csv"])
@pytest.mark.parametrize("values", [(BIG, BIG + 1), (2**63 - 1, 2**63 - 2), (-(2**63), -(2**63) + 1), (-BIG - 1, 0)])
def test_whole_numbers_are_exact(tmp_path, path, model, kind, values):
    documents = docs(*values)
    if kind != "objects":
        source = tmp_path / f"docs.{kind}"
        rows = [{"id": d.id, "text": d.text} | d.metadata for d in documents]
        jsonl = "".join(json.dumps(row) + "\n" for row in rows)
        csv = "id,text,n\n" + "".join(f"{row['id']},{row['text']},{row['n']}\n" for row in rows)
        source.write_text(csv if kind == "csv" else jsonl)
        documents = open_source(source)
    build_index(path, documents, model)
    assert SearchIndex.open(path).columns["n"] == "integer"
    for place, value in enumerate(values):
        assert where(path, f"n = {value}", model) == [f"d{place}"]
        assert where(path, f"title != 'n = {value}' AND n IN ({value}, 12)", model) == [f"d{place}"]
    assert list(column(path, "n").values()) == list(values)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_integers_beyond_64_bits_are_refused_by_name(path, model, value):
    with pytest.raises(
        InputError, match=rf'document "d1".*n is {value}.*beyond 64-bit integers; make the column text: --type n=text$'
    ):
        build_index(path, docs(1, value), model)
    build_index(path, docs(1, value), model, types={"n": "text"})
    assert column(path, "n") == {"d0": "1", "d1": str(value)}


@pytest.mark.parametrize("cell", ["9223372036854775808", "1" * 40, "12345678901234567890"])
def test_a_csv_column_that_no_number_holds_exactly_is_text(tmp_path, path, model, cell):
    source = tmp_path / "docs.csv"
    source.write_text(f"id,text,n\na,x,1\nb,y,{cell}\n")
    build_index(path, open_source(source), model)
    assert column(path, "n") == {"a": "1", "b": cell}
    source.write_text(f"id,text,n\na,x,1.5\nb,y,{BIG + 1}\n")  # a float holds one of them only
    build_index(path.with_name("y.index"), open_source(source), model)
    assert column(path.with_name("y.index"), "n") == {"a": "1.5", "b": str(BIG + 1)}


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("values", [(2020, 1.5, 7), (1.5, 2020, 7), (1, 2, 0.25)])
def test_whole_numbers_and_fractions_become_numbers(path, model, values, once):
    if once:
        build_index(path, docs(*values), model)
    else:
        for end in range(1, len(values) + 1):
            build_index(path, docs(*values[:end]), model)
    assert SearchIndex.open(path).columns["n"] == "number"
    assert list(column(path, "n").values()) == [float(value) for value in values]
    assert len(model.encoded) == len(values)
    build_index(path, docs(*values, 8), model, commit_every=1)
    assert where(path, "n = 8", model) == [f"d{len(values)}"]


def test_a_whole_number_is_never_rounded_beside_fractions(path, model):
    for values in ((0.5, BIG + 1), (BIG + 1, 0.5)):
        with pytest.raises(
            InputError,
            match=rf"{BIG + 1}.*too large to be exact in a column of numbers.* make the column text: --type n=text$",
        ):
            build_index(path, docs(*values), model)
    build_index(path, docs(BIG + 1), model)
    with pytest.raises(InputError, match=rf'"d0" of the index: n is {BIG + 1}.*"d1" has 0.5.*delete INDEX d0'):
        build_index(path, docs(BIG + 1, 0.5), model)
    assert column(path, "n") == {"d0": BIG + 1}


def test_a_text_in_a_csv_column_of_numbers_names_its_own_row(tmp_path, path, model):
    source = tmp_path / "films.csv"
    source.write_text("id,text,year\na,x,2020\nb,y,2021\n")
    build_index(path, open_source(source), model)
    source.write_text("id,text,year\na,x,2020\nb,y,2021\nc,z,unknown\n")
    with pytest.raises(InputError) as error:
        build_index(path, open_source(source), model)
    for part in ("films.csv line 4", 'document "c"', "'unknown'", "elsewhere it is integer", "--type year=text"):
        assert part in str(error.value)
    assert column(path, "year") == {"a": 2020, "b": 2021}
    version = SearchIndex.open(path).table.version
    report = build_index(path, open_source(source), model, types={"year": "text"})
    assert (report.added, report.removed, report.embedded) == (1, 0, 1)
    assert column(path, "year") == {"a": "2020", "b": "2021", "c": "unknown"}
    assert where(path, "year = '2020'", model) == ["a"]
    assert SearchIndex.open(path).table.version > version
    again = build_index(path, open_source(source), model)  # it is kept
    assert (again.unchanged, again.embedded) == (3, 0)
    source.write_text("id,text,year\na,x,2020\nb,y,2021\n")
    assert build_index(path, open_source(source), model).removed == 1
    assert column(path, "year") == {"a": "2020", "b": "2021"}


def table(path, kind, rows):
    """Write `rows` (dictionaries with the same keys) as CSV or JSONL; gives the source."""
    source = path.with_name(f"docs.{kind}")
    lines = [json.dumps(row) for row in rows]
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    source.write_text("".join(line + "\n" for line in lines))
    return open_source(source)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("first", [True, False])
def test_a_type_is_kept_also_where_it_made_the_column(path, model, kind, first):
    rows = [{"id": f"d{i}", "text": f"text {i}"} for i in range(3)]
    if not first:
        build_index(path, table(path, kind, rows), model)
    rows = [row | {"year": 2020 + i} for i, row in enumerate(rows)]
    build_index(path, table(path, kind, rows), model, types={"year": "text"})
    version = SearchIndex.open(path).table.version
    report = build_index(path, table(path, kind, rows), model)
    assert (report.unchanged, report.updated, report.embedded) == (3, 0, 0)
    assert SearchIndex.open(path).table.version == version
    for row in ({"id": "d3", "text": "text 3", "year": 2023}, {"id": "d4", "text": "text 4", "year": "unknown"}):
        rows.append(row)
        build_index(path, table(path, kind, rows), model)
    assert list(column(path, "year").values()) == ["2020", "2021", "2022", "2023", "unknown"]


@pytest.mark.parametrize("name", ["n", "Pa-ge", "path", "meta_path", "meta_n"])
def test_cells_of_a_column_that_was_made_text_stay_as_they_are(path, model, name):
    rows = [{"id": f"d{i}", "text": f"text {i}", name: cell} for i, cell in enumerate(("1.50", "2.0", "1e3", "3"))]
    build_index(path, table(path, "csv", rows[:1]), model, types={name: "text"})
    for some in (rows[:1], rows):
        report = build_index(path, table(path, "csv", some), model)
        assert (report.updated, report.unchanged, report.added) == (0, 1, len(some) - 1)
    held = {"n": "n", "Pa-ge": "pa_ge"}.get(name, name if name.startswith("meta_") else f"meta_{name}")
    assert list(column(path, held).values()) == ["1.50", "2.0", "1e3", "3"]
    build_index(path, table(path, "csv", rows[:1]), model, types={name: "number"})
    build_index(path, table(path, "csv", [*rows[:1], {"id": "d5", "text": "y", name: "2.5"}]), model)
    assert column(path, held) == {"d0": 1.5, "d5": 2.5}


@pytest.mark.parametrize("column_kind", ["integer", "number"])
def test_the_remedy_for_a_large_integer_works(path, model, column_kind):
    large = 10**30
    build_index(path, docs(1 if column_kind == "integer" else 1.5), model)
    expected = "beyond 64-bit integers" if column_kind == "integer" else "too large to be exact in a column of numbers"
    with pytest.raises(InputError) as error:
        build_index(path, docs(large, start=1), model, prune=False)
    assert str(error.value) == (
        f'document "d1": the metadata field n is {large}, {expected}; make the column text: --type n=text'
    )
    build_index(path, docs(large, start=1), model, prune=False, types={"n": "text"})
    assert column(path, "n")["d1"] == str(large)


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ("1e400", 'the field "n" is 1e400'),
        ("-1E+999", 'the field "n" is -1E'),
        ("[[1, 2e308]]", 'the field "n" holds 2e308'),
    ],
)
def test_a_number_beyond_floats_is_refused_with_its_field(tmp_path, path, model, item, what):
    source = tmp_path / "docs.jsonl"
    source.write_text('{"id": "a", "text": "Infinity"}\n' + f'{{"id": "b", "text": "x", "m": 1.5, "n": {item}}}\n')
    with pytest.raises(InputError) as error:
        build_index(path, open_source(source), model)
    assert str(error.value).startswith(f"{source}, line 2: {what}")
    assert "beyond 64-bit floats" in str(error.value)


@pytest.mark.parametrize("cell", ["1e400", "-1e400", "inf", "Infinity", "nan"])
def test_a_cell_beyond_floats_is_text_and_never_infinity(tmp_path, path, model, cell):
    source = tmp_path / "docs.csv"
    source.write_text(f"id,text,n\na,x,1.5\nb,y,{cell}\n")
    with pytest.raises(InputError, match=cell):
        build_index(path, open_source(source), model, types={"n": "number"})
    build_index(path, open_source(source), model)
    assert column(path, "n") == {"a": "1.5", "b": cell}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_object_with_no_finite_number_is_refused(path, model, value):
    with pytest.raises(InputError, match=r'document "d1".*"n" is -?(inf|nan), which is not a finite number'):
        build_index(path, docs(1.5, value), model)


@pytest.mark.parametrize(
    ("value", "kind"), [("later", "text"), (True, "true/false"), (["a"], "text"), ("2020", "text")]
)
def test_a_value_that_does_not_fit_names_its_line_and_the_remedy(tmp_path, path, model, value, kind):
    source = tmp_path / "docs.jsonl"
    rows = [{"id": f"d{i}", "text": "x", "year": i} for i in range(3)] + [{"id": "bad", "text": "y", "year": value}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as error:
        build_index(path, open_source(source), model)
    for part in (
        "docs.jsonl line 4",
        'document "bad"',
        f"year is {kind}",
        "elsewhere it is integer",
        "--type year=text",
    ):
        assert part in str(error.value)
    build_index(path, open_source(source), model, types={"year": "text"})
    shown = value if isinstance(value, str) else json.dumps(value)
    assert column(path, "year") == {"d0": "0", "d1": "1", "d2": "2", "bad": shown}


def test_a_column_is_converted_in_place_as_the_user_wrote_it(path, model):
    values = (2020, 2021.0, 1e5, -3, None)
    metadata = [{"Ye ar": value, 'it\'s "q"': 5, "order": i} for i, value in enumerate(values)]
    for one in metadata:
        if one["Ye ar"] is None:
            del one["Ye ar"]
    documents = [SourceDocument(f"d{i}", "", f"text {i}", one) for i, one in enumerate(metadata)]
    build_index(path, documents, model)
    before = column(path, VECTOR)
    types = {"Ye ar": "text", 'it\'s "q"': "text", "order": "number"}
    report = build_index(path, documents, model, types=types)
    assert (report.unchanged, report.updated, report.embedded) == (5, 0, 0)
    assert list(column(path, "ye_ar").values()) == ["2020", "2021.0", "100000.0", "-3", None]
    assert set(column(path, "it_s__q_").values()) == {"5"}
    assert list(column(path, "order").values()) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert column(path, VECTOR) == before
    index = SearchIndex.open(path)
    assert {name: index.columns[name] for name in ("ye_ar", "order")} == {"ye_ar": "text", "order": "number"}
    assert not [name for name in index.table.schema.names if name.startswith(("r3_new", "r3_old"))]
    assert index.complete
    assert len(model.encoded) == 5


def test_text_that_reads_like_numbers_becomes_numbers(path, model):
    build_index(path, docs("12", " 7 ", "-3", "1, 2", field="n"), model)
    with pytest.raises(InputError, match="document \"d3\" of the index: n is '1, 2', which is not of type integer"):
        build_index(path, docs("12", " 7 ", "-3"), model, types={"n": "integer"})
    assert SearchIndex.open(path).columns["n"] == "text"
    build_index(path, docs("12", " 7 ", "-3"), model)
    build_index(path, docs("12", " 7 ", "-3"), model, types={"n": "integer"})
    assert list(column(path, "n").values()) == [12, 7, -3]
    build_index(path, docs("12", " 7 ", "-3", "8"), model)
    assert column(path, "n")["d3"] == 8
    with pytest.raises(InputError, match=r"n is text \('nine'"):
        build_index(path, docs("12", " 7 ", "-3", "nine"), model)


@pytest.mark.parametrize(
    ("before", "values", "kind", "after"),
    [
        ("number", (2020.0, 1e3, 7, -0.0), "integer", [2020, 1000, 7, 0]),
        ("text", ("1e3", "2020.0", "+5", "\t7\u00a0", "9223372036854775807"), "integer", [1000, 2020, 5, 7, 2**63 - 1]),
        ("text", ("1e3", ".5", " 7 ", "2."), "number", [1000.0, 0.5, 7.0, 2.0]),
        ("text", ("TRUE", " false", "True\n"), "true/false", [True, False, True]),
        ("number", (1.5, 2, 1e22), "text", ["1.5", "2", "1e+22"]),
        ("true/false", (True, False), "text", ["true", "false"]),
    ],
)
@pytest.mark.parametrize("remote", [False, *nightly(True)])
def test_what_can_be_converted_is_converted(path, model, request, before, values, kind, after, remote):
    if remote:
        request.getfixturevalue("s3")
        path = f"s3://bucket/convert/{uuid.uuid4().hex}"
    gone = SourceDocument("gone", "", "x", {"n": values[0]})
    build_index(path, [*docs(*values), gone, SourceDocument("without", "", "y", {"o": 1})], model)
    assert SearchIndex.open(path).columns["n"] == before
    documents = [*docs(*values), SourceDocument("without", "", "y", {"o": 1})]
    build_index(path, documents, model)  # a row of the file is deleted now
    report = build_index(path, documents, model, types={"n": kind})
    assert (report.updated, report.embedded) == (0, 0)
    assert SearchIndex.open(path).columns["n"] == kind
    assert list(column(path, "n").values()) == [*after, None]


def test_a_conversion_that_was_killed_leaves_nothing_behind(path, model, monkeypatch):
    build_index(path, docs(1, 2), model)

    def killed(self, *_):
        raise KeyboardInterrupt

    for step in ("alter_columns", "drop_columns"):
        with monkeypatch.context() as patch:
            patch.setattr("lancedb.table.LanceTable." + step, killed)
            with pytest.raises(KeyboardInterrupt):
                build_index(path, docs(1, 2), model, types={"n": "text"})
        assert set(map(str, column(path, "n").values())) == {"1", "2"}
    build_index(path, docs(1, 2), model, types={"n": "text"})
    index = SearchIndex.open(path)
    assert column(path, "n") == {"d0": "1", "d1": "2"}
    assert not [name for name in index.table.schema.names if name.startswith(("r3_new", "r3_old"))]


def test_types_that_are_none_are_refused(path, model):
    with pytest.raises(InputError, match='"date"; choose one of: text, integer, number, true/false'):
        build_index(path, docs(1), model, types={"n": "date"})
    assert not path.exists()


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (2020, pa.string(), "2020"), (True, pa.string(), "true"), (0.1, pa.string(), "0.1"), ("x", pa.string(), "x"),
        (3, pa.float64(), 3.0), (BIG + 1, pa.float64(), None), (10**400, pa.float64(), None),
        ("1e3", pa.float64(), 1000.0), (2.0, pa.int64(), 2), (2.5, pa.int64(), None), ("7", pa.int64(), 7),
        ("x", pa.int64(), None), (True, pa.int64(), None),
        ("TRUE", pa.bool_(), True), (1, pa.bool_(), None), (float("inf"), pa.int64(), None),
    ],
)  # fmt: skip
def test_a_value_as_a_column_holds_it(value, kind, expected):
    assert as_type(value, kind) == expected
    assert type(as_type(value, kind)) is type(expected)


@pytest.mark.parametrize(("value", "shown"), [(2**63, str(2**63)), ("1.5", "1.5"), (-(2**64), "-18446744073709552000")])
def test_a_filter_on_integers_by_another_number_says_so(path, model, value, shown):
    build_index(path, docs(1), model)
    with pytest.raises(InputError) as error:
        where(path, f"n = {value}", model)
    expected = (
        f"the filter 'n = {value}' cannot be used (a column of 64-bit integers is compared with {shown}); columns: "
    )
    assert str(error.value).startswith(expected)


def test_filters_on_a_large_table_read_an_index_of_the_column_also_after_its_type_changed(path, model, monkeypatch):
    monkeypatch.setattr(lance_table, "LOOKUPS_FROM", 10)

    def documents(values, start=0):
        values = enumerate(values, start)
        return [
            SourceDocument(f"d{i}", "", f"text {i}", {"n": n, "kind": "ab"[i % 2], "long": "x" * 300})
            for i, n in values
        ]

    def plan(condition):
        return SearchIndex.open(path).table.search().where(condition).explain_plan()

    build_index(path, documents(range(20)), model)
    indexed = {name for index in SearchIndex.open(path).table.list_indices() for name in index.columns}
    assert {"n", "kind"} < indexed
    assert "long" not in indexed
    assert "n_idx" in plan("n < 3")
    assert where(path, "n < 3", model) == ["d0", "d1", "d2"]
    assert where(path, "n < 5 AND kind = 'b'", model) == ["d1", "d3"]
    build_index(path, documents([*range(20), 2.5]), model)  # n is widened, which replaces its column
    assert where(path, "n > 1 AND n < 3", model) == ["d2", "d20"]
    compact_index(path)
    assert "n_idx" in plan("n < 3")
    assert where(path, "n > 1 AND n < 3", model) == ["d2", "d20"]
