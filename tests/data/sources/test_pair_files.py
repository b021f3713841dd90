"""A researcher's own pairs: the formats that people have them in, and what is wrong with a line is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from search_r3.data.io.line_reader import MissingSource
from search_r3.data.pairs import TrainingPair
from search_r3.data.recipe import build_pairs
from search_r3.data.sources.pair_files import own_pairs
from search_r3.errors import InputError

ROWS = [{"q": "  first ", "good": "an answer", "bad": ["x", "y", "x"]}, {"q": "second", "good": "another", "bad": None}]


def read(path: Path, content: str | bytes, **settings):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return own_pairs(str(path), license="CC0", **settings)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "ndjson"])
def test_json_lines_with_a_list_of_negatives(tmp_path: Path, suffix: str) -> None:
    content = "\ufeff" + "\n\n".join(map(json.dumps, ROWS))
    packed = gzip.compress(content.encode()) if suffix.endswith("gz") else content
    built = read(tmp_path / f"mine.{suffix}", packed, query="q", positive="good", negatives=["bad"])
    assert built.pairs == [
        TrainingPair("pairs:mine:1", "first", "an answer", ("x", "y"), source="pairs:mine"),
        TrainingPair("pairs:mine:3", "second", "another", source="pairs:mine"),
    ]
    assert built.origin == {"license": "CC0"}


def test_csv_with_quotes_and_line_ends_in_cells_and_negatives_in_several_columns(tmp_path: Path) -> None:
    content = 'query,positive,n1,n2\r\n"a ""b"", c","two\nlines",no,"[""x"", ""y""]"\r\n\r\nq,p,,[sic] a text\r\n'
    built = read(tmp_path / "mine.csv", content, negatives=["n1", "n2"])
    assert [(pair.id, pair.query, pair.positive, pair.negatives) for pair in built.pairs] == [
        ("pairs:mine:2", 'a "b", c', "two\nlines", ("no", "x", "y")),
        ("pairs:mine:5", "q", "p", ("[sic] a text",)),
    ]


def test_tsv_knows_no_quotes_and_may_have_no_header(tmp_path: Path) -> None:
    content = 'what is "x\tx is y\tz\nwhat is "x\tx is y\tother\nwho\tme\tyou\n'
    built = read(tmp_path / "triples.tsv", content, query="1", positive="2", negatives=["3"], header=False, name="ms")
    assert [(pair.id, pair.query, pair.negatives) for pair in built.pairs] == [
        ("pairs:ms:1", 'what is "x', ("z",)),
        ("pairs:ms:3", "who", ("you",)),
    ]
    assert built.dropped == {"duplicate": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"query": "a"}', 'no column "positive" \\(found: query\\)'),
        ('{"query": "a", "positive": " "}', '"positive" must contain a text'),
        ('{"query": 7, "positive": "b"}', "\"query\" must contain a text, got '7'"),
        ('{"query": "a", "positive": "b", "no": ["b"]}', "the positive is among the negatives"),
        ('{"query": "a", "positive": "b", "no": [""]}', "texts, none empty"),
        ('{"query": "a \\ud800", "positive": "b", "no": []}', "surrogate"),
        ('{"query": "a \\u0000", "positive": "b", "no": []}', "NUL"),
        ('["a", "b"]', "got a list"),
        ('{"query": "a", ', "not valid JSON"),
    ],
)
def test_a_line_that_holds_no_pair_is_refused_or_skipped(tmp_path: Path, line: str, said: str) -> None:
    content = '{"query": "q", "positive": "p", "no": []}\n' + line + "\n"
    with pytest.raises(InputError, match=said) as caught:
        read(tmp_path / "mine.jsonl", content, negatives=["no"])
    assert "mine.jsonl, line 2: " in str(caught.value)
    built = read(tmp_path / "mine.jsonl", content, negatives=["no"], damaged="skip")
    assert len(built.pairs) == 1
    assert sum(built.dropped.values()) == 1
    assert list(built.damaged_places.values()) == [["mine.jsonl, line 2"]]


def test_a_quote_that_is_never_closed_costs_its_own_line_only(tmp_path: Path) -> None:
    content = 'query,positive\na,b\n"open,c\nd,e\nf,"g"\n"h,i\n'
    with pytest.raises(InputError, match=r"mine\.csv, line 3: not valid CSV"):
        read(tmp_path / "mine.csv", content)
    built = read(tmp_path / "mine.csv", content, damaged="skip")
    assert [(pair.query, pair.positive) for pair in built.pairs] == [("a", "b"), ("d", "e"), ("f", "g")]
    assert built.damaged_places == {"not CSV": ["mine.csv, line 3", "mine.csv, line 6"]}


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ending in \.jsonl"):
        read(tmp_path / "mine.parquet", "x")
    with pytest.raises(InputError, match=r'line 1: unknown column "query"; .*known: question, positive'):
        read(tmp_path / "mine.csv", "question,positive\na,b\n", damaged="skip")
    with pytest.raises(InputError, match='names "a" twice'):
        read(tmp_path / "mine.tsv", "a\ta\n", damaged="skip")
    with pytest.raises(MissingSource, match="does not exist"):
        own_pairs(str(tmp_path / "none.csv"), license="CC0")
    with pytest.raises(InputError, match="license"):
        own_pairs(str(tmp_path / "mine.csv"), license=" ")


def test_two_sources_of_one_name_are_refused_since_their_ids_would_meet(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "sources: [{kind: pairs, path: a/x.csv, license: CC0}, {kind: pairs, path: b/x.tsv, license: CC0}]"
    )
    with pytest.raises(InputError, match=r'source 2 .*source 1 is also called "x"; give one another "name"'):
        build_pairs(tmp_path / "r.yaml", tmp_path / "out.jsonl")
    (tmp_path / "r.yaml").write_text("sources: [{kind: pairs, path: a/x.csv}]")
    with pytest.raises(InputError, match='"license" is missing'):
        build_pairs(tmp_path / "r.yaml", tmp_path / "out.jsonl")
