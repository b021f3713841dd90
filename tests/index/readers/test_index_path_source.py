"""Sources in: what is read, what is refused with its place, and what a folder skips."""

import datetime
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r3.data.io.jsonl import read_jsonl
from search_r3.errors import InputError
from search_r3.index.readers.path_source import open_source, summarize_skipped


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_jsonl_keeps_everything_else_as_metadata(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"_id": 7, "title": "T", "text": "x", "year": 2020, "open": True, "tags": ["a", "é"], "gone": None},
        {"id": "b", "text": "y", "metadata": {"url": "u"}},
    )
    first, second = open_source(path)
    assert (first.id, first.title, first.text, first.path, first.line, first.record) == ("7", "T", "x", "a.jsonl", 0, 1)
    assert first.metadata == {"year": 2020, "open": True, "tags": '["a", "é"]'}
    assert second.metadata == {"url": "u"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"id": "a", "text": "x"}\n{"id": "b"', ["a.jsonl", "line 2", "JSON"]),
        ('{"id": "a", "title": "x"}\n', ["line 1", '"text"']),
        ('{"text": "x"}\n', ["line 1", '"id"']),
        ('{"id": "a", "text": " "}\n', ["line 1", '"text"', "empty"]),
        ('{"id": "", "text": "x"}\n', ["line 1", '"id"', "empty"]),
        ('{"id": "a", "text": "x"}\n\n{"id": "a", "text": "y"}\n', ["line 3", '"a"', "line 1"]),
        ("\n", ["nothing to index"]),
    ],
)
def test_a_broken_jsonl_line_is_named(tmp_path, content, parts):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(InputError) as error:
        list(open_source(path))
    assert all(part in str(error.value) for part in parts), error.value


def test_jsonl_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "a", "text": "caf\xe9"}\n')
    with pytest.raises(InputError, match="line 1"):
        list(open_source(tmp_path / "a.jsonl"))


def test_a_beir_folder_skips_documents_without_text(tmp_path):
    jsonl(tmp_path / "corpus.jsonl", {"_id": "1", "title": "", "text": ""}, {"_id": "2", "title": "only", "text": ""})
    source = open_source(tmp_path)
    assert source.kind == "beir"
    assert [document.id for document in source] == ["2"]
    assert summarize_skipped(source.skipped) == ["1 skipped: no text (corpus.jsonl line 1)"]


def test_csv_columns_are_typed_as_a_whole(tmp_path):
    rows = 'ID,text,year,price,open,code,mixed\na,"one\ntwo",2020,1.5,true,007,1\nb,x,,2,False,7,n/a\n'
    first, second = open_source(write(tmp_path / "a.csv", rows))
    assert first.text == "one\ntwo"
    assert first.metadata == {"year": 2020, "price": 1.5, "open": True, "code": "007", "mixed": "1"}
    assert second.metadata == {"price": 2.0, "open": False, "code": "7", "mixed": "n/a"}
    assert (first.record, second.record) == (2, 4)


@pytest.mark.parametrize(
    "cell", ["e1", "E60", "+e5", "-E-3", "e", "+", ".", "-.", ".e1", "1.e5", "00.5", "1e400", "nan"]
)
def test_what_only_looks_like_a_number_is_text(tmp_path, cell):
    (row,) = open_source(write(tmp_path / "a.csv", f"id,text,code\na,x,{cell}\n"))
    assert row.metadata == {"code": cell}


@pytest.mark.parametrize("cell", ["1e5", ".5", "-.5E-3", "+0.25", "0e1"])
def test_what_is_a_number_is_one(tmp_path, cell):
    (row,) = open_source(write(tmp_path / "a.csv", f"id,text,code\na,x,{cell}\n"))
    assert row.metadata == {"code": float(cell)}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("id,title\na,b\n", ['no "text"', "id, title"]),
        ("id,text,id\n", ["twice"]),
        ("id,text\na,b,c\n", ["line 2", "3 cells"]),
        ("id,text\na,x\n ,y\n", ["line 3", '"id"']),
        ("id,text\na,\n", ["line 2", '"text"']),
        ('id,text\na,"x', ["line 2", "CSV"]),
        ("", ["empty"]),
        ("id,text\n", ["nothing to index"]),
    ],
)
def test_a_broken_csv_row_is_named(tmp_path, content, parts):
    with pytest.raises(InputError) as error:
        list(open_source(write(tmp_path / "a.csv", content)))
    assert all(part in str(error.value) for part in parts), error.value


def test_a_folder_reads_text_and_skips_the_rest_with_reasons(tmp_path):
    root = tmp_path / "docs"
    for name in ("b.md", "sub/a.py", "README", "n.rst", ".git/config.txt", "node_modules/x.js", "__pycache__/y.py"):
        write(root / name, "some text")
    write(root / "empty.txt", " \n")
    write(root / "big.txt", "x" * 2000)
    write(root / "photo.jpg", "x")
    write(root / "rows.csv", "id,text\n")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "bin.txt").write_bytes(b"a\0b")
    (root / "wide.txt").write_bytes("text".encode("utf-16"))
    (root / "fifo.txt").unlink(missing_ok=True)
    os.mkfifo(root / "fifo.txt")
    write(tmp_path / "secret.txt", "secret")
    (root / "out.txt").symlink_to(tmp_path / "secret.txt")
    (root / "loop").symlink_to(root)
    source = open_source(root, max_file_bytes=1000)
    documents = list(source)
    assert [(d.id, d.kind) for d in documents] == [
        ("README", "text"), ("b.md", "markdown"), ("n.rst", "rst"), ("sub/a.py", "python")
    ]  # fmt: skip
    reasons = {skipped.path: skipped.reason for skipped in source.skipped}
    expected = {
        "empty.txt": "empty", "big.txt": "larger", "photo.jpg": "not a text", "rows.csv": "records",
        "latin.txt": "UTF-8",         "bin.txt": "binary", "wide.txt": "UTF-16", "fifo.txt": "regular",
        "out.txt": "out of the folder", "loop": "link",
    }  # fmt: skip
    assert set(reasons) == set(expected)
    assert all(expected[name] in reasons[name] for name in expected)
    assert list(source) == documents  # a source can be read again


def test_a_link_says_what_it_is(tmp_path):
    root = write(tmp_path / "docs" / "real.md", "some text").parent
    write(root / ".git" / "config.txt", "hidden")
    write(root / "node_modules" / "x.js", "passed over")
    write(root / "photo.jpg", "x")
    write(tmp_path / "outside.md", "elsewhere")
    (root / "sub").mkdir()
    links = {
        "good.md": "real.md", "gone.md": "nothing.md", "gone-outside.md": "../../nothing.md", "loop.md": "loop.md",
        "out.md": "../outside.md", "hidden.txt": ".git/config.txt", "passed.js": "node_modules/x.js",
        "picture.md": "photo.jpg", "chain.md": "good.md", "broken-chain.md": "gone.md", "gone-folder": "no-folder",
        "folder": "sub",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    source = open_source(root)
    assert [document.id for document in source] == ["real.md"]
    reasons = {skipped.path: skipped.reason for skipped in source.skipped}
    own, broken, unread = (
        "a link to a file read under its own name",
        "a broken link",
        "a link to a file that is not read",
    )
    assert reasons == {
        "good.md": own, "chain.md": own, "gone.md": broken, "gone-outside.md": broken, "loop.md": broken,
        "broken-chain.md": broken, "gone-folder": broken, "out.md": "a link that leads out of the folder",
        "hidden.txt": unread, "passed.js": unread, "picture.md": unread, "folder": "a link to a folder",
        "photo.jpg": "not a text or source file (.jpg)",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.md"])
def test_a_path_that_is_a_broken_link_is_called_one(tmp_path, name):
    (tmp_path / name).symlink_to("elsewhere")
    with pytest.raises(InputError, match="is a link to elsewhere, which does not exist"):
        open_source(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is a link to elsewhere, which does not exist"):
        list(read_jsonl(tmp_path / name))


def test_ids_do_not_depend_on_where_the_folder_stands(tmp_path, monkeypatch):
    write(tmp_path / "docs" / "a.md", "text")
    monkeypatch.chdir(tmp_path)
    assert list(open_source("docs")) == list(open_source(tmp_path / "docs"))


def test_a_path_that_cannot_be_read_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        open_source(tmp_path / "nothing")
    with pytest.raises(InputError, match="nothing to index"):
        list(open_source(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"\0\1")
    with pytest.raises(InputError, match="binary"):
        list(open_source(tmp_path / "x.bin"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match="permissions"):
        open_source(tmp_path / "closed")


def test_one_file_of_any_name_is_read_as_text(tmp_path):
    (document,) = open_source(write(tmp_path / "notes.weird", "\ufeffhello"))
    assert (document.id, document.text, document.kind) == ("notes.weird", "hello", "text")


def test_parquet_has_the_columns_of_jsonl(tmp_path):
    day = datetime.date(2026, 5, 5)
    rows = [
        {"_id": 7, "title": "T", "text": "x", "year": 2020, "day": day, "tags": ["a"], "gone": None},
        {"_id": 8, "title": None, "text": "y", "year": None, "day": day, "tags": [], "gone": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = open_source(tmp_path / "a.parquet")
    assert (first.id, first.title, first.text, first.line, first.record) == ("7", "T", "x", 0, 1)
    assert first.metadata == {"year": 2020, "day": "2026-05-05", "tags": '["a"]'}
    assert (second.id, second.title) == ("8", "")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["x"]}, r'a\.parquet: no column "id" \(columns found: text\)'),
        (
            {"_id": ["x"], "year": [1]},
            r'no column "text" \(columns found: _id, year\); name those to use: --field',
        ),
        ({"id": ["a", None], "text": ["x", "y"]}, 'row 2: the column "id"'),
        ({"id": ["a", "b"], "text": ["x", " "]}, 'row 2: the column "text"'),
    ],
)
def test_a_missing_column_or_a_broken_row_of_parquet_is_named(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        list(open_source(tmp_path / "a.parquet"))


def test_parquet_has_bytes_as_text_or_in_hexadecimal(tmp_path):
    row = {"id": b"a", "text": "caf\u00e9".encode(), "digest": b"\xff\x00", "pages": [b"x", b"\xfe"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (document,) = open_source(tmp_path / "a.parquet")
    assert (document.id, document.text) == ("a", "caf\u00e9")
    assert document.metadata == {"digest": "ff00", "pages": '["x", "fe"]'}


RECORDS = {
    "a.jsonl": '{"id": 1, "text": "old", "slug": "one", "body": "first", "heading": "H", "year": 2020}',
    "a.csv": "id,text,slug,body,heading,year\n1,old,one,first,H,2020",
}
NAMED = {"id": "slug", "text": "body", "title": "heading"}


@pytest.mark.parametrize("name", RECORDS)
def test_fields_of_other_names_are_id_text_and_title(tmp_path, name):
    (document,) = open_source(write(tmp_path / name, RECORDS[name]), fields=NAMED)
    assert (document.id, document.title, document.text, document.metadata) == ("one", "H", "first", {"year": 2020})


def test_a_corpus_of_beir_may_have_other_fields(tmp_path):
    write(tmp_path / "corpus.jsonl", '{"_id": "a", "contents": "x", "text": "y"}')
    (document,) = open_source(tmp_path, fields={"text": "contents"})
    assert (document.id, document.text, document.metadata) == ("a", "x", {})


@pytest.mark.parametrize("name", RECORDS)
def test_a_named_field_that_is_not_there_is_named(tmp_path, name):
    path = write(tmp_path / name, RECORDS[name])
    with pytest.raises(InputError, match='"comment"'):
        list(open_source(path, fields={"text": "comment"}))
    with pytest.raises(InputError, match='"body" is no field of a document; name its id, text, title'):
        open_source(path, fields={"body": "text"})
    with pytest.raises(InputError, match="one field is named for two of id, text; give each its own"):
        open_source(path, fields={"id": "slug", "text": "slug"})


def test_only_records_have_fields(tmp_path):
    write(tmp_path / "a.md", "# A")
    for path in (tmp_path, tmp_path / "a.md"):
        with pytest.raises(InputError, match="only a file of records has fields"):
            open_source(path, fields={"text": "body"})


def test_what_is_not_parquet_is_refused(tmp_path):
    write(tmp_path / "a.parquet", "nothing of the kind")
    with pytest.raises(InputError, match="not a Parquet file that can be read"):
        list(open_source(tmp_path / "a.parquet"))
