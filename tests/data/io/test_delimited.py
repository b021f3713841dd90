"""Tables are read alike for an index and for training data, whatever splits their cells."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from search_r3.cli import main
from search_r3.data.io.delimited import MAX_JOINED, parse_delimiter
from search_r3.data.recipe import build_pairs
from search_r3.data.sources.pair_files import own_pairs
from search_r3.errors import InputError
from search_r3.index.readers.path_source import open_source

ROWS = [
    ["a", "Bread needs flour, water; and yeast | salt.", "2020"],
    ["b", 'A "quoted" word\nand a second line, 3,50', "2021"],
    ["c", "plain", ""],
]


def indexed(path: Path, delimiter: str | None = None) -> list[tuple[str, str]]:
    """(id, text) of each row as an index has them."""
    return [(document.id, document.text) for document in open_source(path, delimiter=delimiter)]


def paired(path: Path, **settings) -> list[tuple[str, str]]:
    """The same as training data has them."""
    built = own_pairs(str(path), license="CC0", query="id", positive="text", **settings)
    return [(pair.query, pair.positive) for pair in built.pairs]


def both(path: Path, content: str | bytes, delimiter: str | None = None) -> list[tuple[str, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = indexed(path, delimiter)
    assert paired(path, delimiter=delimiter) == found
    return found


def written(rows: list[list[str]], delimiter: str, **dialect) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, **dialect).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_whatever_the_files_ending(
    tmp_path: Path, delimiter: str, mark: str, end: str, quoting: int, suffix: str
) -> None:
    table = [["id", "text", "year"], *ROWS]
    content = mark + written(table, delimiter, quoting=quoting, lineterminator=end)
    assert both(tmp_path / f"a.{suffix}", content) == [(row[0], row[1]) for row in ROWS]
    first = next(iter(open_source(tmp_path / f"a.{suffix}")))
    assert first.metadata == {"year": 2020}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # more commas than semicolons, in cells that no quote encloses
        ("id;text;price\na;one, two, three;3,50\nb;five, six;4,00\n", [("a", "one, two, three"), ("b", "five, six")]),
        # a header whose own names hold other delimiters
        ("_id;text;a,b|c\nx;y;z\n", [("x", "y")]),
        ('"id";"text"\n"x";"y; z"\n', [("x", "y; z")]),
        ("ID | text\nx | y, z\n", [("x ", " y, z")]),
        # what spreadsheets write to say how they split
        ("sep=;\nid;text\na;b, c\n", [("a", "b, c")]),
        ("sep=^\r\nid^text\r\na^b, c\r\n", [("a", "b, c")]),
        # blank lines in front, no line end behind
        ("\n\nid;text\na;b", [("a", "b")]),
        # the ends of lines of old Macs
        ("id;text\ra;b\rc;d\r", [("a", "b"), ("c", "d")]),
    ],
)  # fmt: skip
def test_the_header_decides(tmp_path: Path, content: str, expected: list[tuple[str, str]]) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    assert indexed(path) == expected
    if not content.startswith(("_id", "ID")):  # a recipe spells its columns as the header does
        assert paired(path) == expected


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('a\t"quoted" start', '"quoted" start'),
        ('a\tan inch is 1"', 'an inch is 1"'),
        ('a\t"never closed', '"never closed'),
        ('a\t"a whole cell"', "a whole cell"),
        ('a\t"a ""whole"" cell"', 'a "whole" cell'),
        ('a\t"with a\ttab"', "with a\ttab"),
        ('a\t"over\ntwo lines"', "over\ntwo lines"),
        ('a\t"over\n\n\nfour lines, and ""more"""', 'over\n\n\nfour lines, and "more"'),
        ('a\t""', None),
        ('a\t"x" and "y"', '"x" and "y"'),
        ("a\t'single'", "'single'"),
    ],
)
def test_a_quote_between_tabs_counts_only_where_it_encloses_a_cell(tmp_path: Path, line: str, text: str | None) -> None:
    content = f'id\ttext\n{line}\nb\tthe next row\nc\t"one more" row\n'
    if text is None:
        (tmp_path / "a.tsv").write_text(content)
        with pytest.raises(InputError, match=r'line 2: the field "text" is empty'):
            indexed(tmp_path / "a.tsv")
        return
    assert both(tmp_path / "a.tsv", content) == [("a", text), ("b", "the next row"), ("c", '"one more" row')]


def test_a_bare_quote_never_swallows_the_rows_behind_it(tmp_path: Path) -> None:
    rows = [(str(i), f'"row {i}') for i in range(3 * MAX_JOINED)] + [("z", 'the end"')]
    content = "id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in rows)
    assert both(tmp_path / "a.tsv", content) == rows


def test_cells_over_several_lines_side_by_side(tmp_path: Path) -> None:
    content = 'text\tid\n"a\nb"\t"c\nd"\n"e\nf"\tg\nh\ti\n'
    assert both(tmp_path / "a.tsv", content) == [("c\nd", "a\nb"), ("g", "e\nf"), ("i", "h")]


@pytest.mark.parametrize(
    ("given", "mark"),
    [("^", "^"), ("tab", "\t"), ("\\t", "\t"), ("Semicolon", ";"), ("pipe", "|"), (":", ":"), (" ", " ")],
)
def test_a_delimiter_may_be_given(tmp_path: Path, given: str, mark: str) -> None:
    assert parse_delimiter(given) == mark
    content = written([["id", "text"], ["a", f"b{mark}c"]], mark, lineterminator="\n")
    assert both(tmp_path / "a.csv", content, given) == [("a", f"b{mark}c")]
    (tmp_path / "a.txt").write_text(content)
    assert indexed(tmp_path / "a.txt", given) == [("a", f"b{mark}c")]


@pytest.mark.parametrize("given", ["", "||", "a", "7", '"', "\n", "comma,"])
def test_what_cannot_be_a_delimiter_is_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "a.csv").write_text("id,text\na,b\n")
    for read in (lambda: indexed(tmp_path / "a.csv", given), lambda: paired(tmp_path / "a.csv", delimiter=given)):
        with pytest.raises(InputError, match=r"the delimiter .* cannot be used; give one character .* semicolon, tab"):
            read()


def test_a_delimiter_for_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "b"}\n')
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(InputError, match=r"only a table such as a \.csv file has one"):
            open_source(path, delimiter=";")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("id;body;year\na;b;c\n", ['no "text"', "split at semicolons: id, body, year", "--delimiter"]),
        ("identifier\ttext\na\tb\n", ['no "id"', "split at tabs: identifier, text"]),
        ("id^text\na^b\n", ['no "id"', "split at commas: id^text", "--delimiter"]),
        ("id;text\na;b;c\n", ["line 2: 3 cells", "split at semicolons", "--delimiter"]),
        ('id;text\na;"b\n', ["line 2: not valid CSV", "a quote not closed"]),
    ],
)
def test_what_does_not_fit_says_how_it_was_split(tmp_path: Path, content: str, parts: list[str]) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError) as caught:
        indexed(tmp_path / "a.csv")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_without_a_header_the_rows_decide(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("what is bread, anyway\tflour, water, yeast\nwho\tme, you\nhow, so\tso\n")
    pairs = own_pairs(str(tmp_path / "a.csv"), license="CC0", query="1", positive="2", header=False).pairs
    assert [pair.query for pair in pairs] == ["what is bread, anyway", "who", "how, so"]


def test_the_command_line_and_a_recipe_take_a_delimiter(tmp_path: Path, tiny_model: Path, capsys) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id^text\na^Bread needs yeast, and time.\n")
    arguments = ["index", str(path), "--into", str(tmp_path / "made"), "--model", str(tiny_model)]
    assert main(arguments) == 2
    assert "--delimiter" in capsys.readouterr().err
    assert main([*arguments, "--delimiter", "^", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 1
    recipe = tmp_path / "recipe.yaml"
    source = f'{{kind: pairs, path: "{path}", license: CC0, query: id, positive: text, delimiter: "^"}}'
    recipe.write_text(f"sources: [{source}]\n")
    build_pairs(recipe, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["positive"] == "Bread needs yeast, and time."
