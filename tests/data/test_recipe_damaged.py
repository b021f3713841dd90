"""Poisoned input of every kind of source: one clear refusal with file and line, or skipped, counted and named."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import small_sources
from processes import run

from search_r3.data.io import line_reader
from search_r3.data.pairs import read_pairs
from search_r3.data.recipe import build_pairs
from search_r3.errors import InputError

FILES = {
    "docstrings": "packages/smallbox/lower.py",
    "titles": "data/toy/corpus.jsonl",
    "queries": "data/toy/queries.jsonl",
    "qrels": "data/toy/qrels/train.tsv",
    "debian": "files/Translation-en.gz",
    "wordnet": "files/data.verb",
    "dictd": "files/mine.index",
    "man": "files/man/man1/p1.1",
    "packed man": "files/man/man3/p3.3.gz",
    "pydoc": "files/html/a.html",
    "jsonl": "files/own.jsonl",
    "csv": "files/own.csv",
    "tsv": "files/own.tsv",
}
"""Where each kind of source is poisoned."""
SOURCES = {
    "docstrings": "{kind: docstrings, packages: [smallbox], min_body_lines: 1}",
    "titles": "{kind: titles, dataset: toy}",
    "queries": "{kind: queries, dataset: toy, split: train}",
    "qrels": "{kind: queries, dataset: toy, split: train}",
    "debian": "{kind: debian, path: files/Translation-en.gz}",
    "wordnet": "{kind: wordnet, path: files}",
    "dictd": "{kind: dictd, path: files/mine, license: CC0}",
    "man": "{kind: man, path: files/man}",
    "packed man": "{kind: man, path: files/man}",
    "pydoc": "{kind: pydoc, path: files/html}",
    "jsonl": "{kind: pairs, path: files/own.jsonl, license: CC0}",
    "csv": "{kind: pairs, path: files/own.csv, license: CC0, query: question, positive: answer}",
    "tsv": '{kind: pairs, path: files/own.tsv, license: CC0, query: "1", positive: "2", header: false}',
}
WHOLE_FILE = {"docstrings", "man", "packed man", "pydoc"}
"""Kinds whose files are one record: all of the file goes."""
POISON = {
    "bad UTF-8": (b"caf\xe9\xff ol\xe9\n", "not UTF-8"),
    "NUL": (b"nul \0 byte\n", "NUL|binary"),
    "long line": (b"x" * 11_000_000 + b"\n", "11,000,0[0-9]{2} bytes|bytes"),
    "HTML": (b"<!DOCTYPE html>\n<html><body><p>404 Not Found</p></body></html>\n", "HTML|must begin"),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_sources.make(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(source: str, damaged: str | None = None) -> dict[str, Any]:
    recipe = f"sources: [{source}]\n" + (f"damaged: {damaged}\n" if damaged else "")
    Path("r.yaml").write_text(recipe, encoding="utf-8")
    return build_pairs("r.yaml", "out.jsonl", "data")


def poison(file: Path, bad: bytes, name: str) -> None:
    """Put the bad bytes behind the first record; a file that is one record begins with them."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if name == "debian":
        first, rest = content.split(b"\n\n", 1)
        content = first + b"\n\nPackage: bad\nDescription-en: bad one here\n " + bad + b"\n" + rest
    elif name in WHOLE_FILE:
        content = bad + content
    else:
        first, rest = content.split(b"\n", 1)
        content = first + b"\n" + bad + rest
    file.write_bytes(gzip.compress(content, 1) if file.suffix == ".gz" else content)


@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize("name", FILES)
def test_a_poisoned_file_is_refused_by_its_line_or_skipped_and_counted(root: Path, name: str, kind: str) -> None:
    if (name, kind) == ("pydoc", "HTML"):
        pytest.skip("HTML is what it reads")
    build(SOURCES[name])
    texts = {(pair.query, pair.positive) for pair in read_pairs("out.jsonl")}
    Path("out.jsonl").unlink()
    bad, said = POISON[kind]
    poison(Path(FILES[name]), bad, name)
    with pytest.raises(InputError, match=said) as caught:
        build(SOURCES[name])
    message = str(caught.value)
    assert FILES[name].rsplit("/", 1)[1] in message
    assert name in WHOLE_FILE or ", line " in message
    assert 'damaged: skip"' in message
    assert len(message) < 600
    assert not Path("out.jsonl").exists()

    manifest = build(SOURCES[name], "skip")
    report = manifest["sources"][0]
    skipped = {reason: count for reason, count in report["dropped"].items() if reason.startswith("damaged: ")}
    assert sum(skipped.values()) >= 1
    assert set(report["damaged_places"]) == {reason.removeprefix("damaged: ") for reason in skipped}
    assert all(str(root) not in place for places in report["damaged_places"].values() for place in places)
    kept = {(pair.query, pair.positive) for pair in read_pairs("out.jsonl")}
    assert kept <= texts
    lost = len(texts) - len(kept)
    if name in WHOLE_FILE:
        assert 1 <= lost < len(texts)
    else:
        assert lost == 0


@pytest.mark.parametrize("name", FILES)
def test_an_empty_file_is_damage_and_with_nothing_left_so_says_the_build(root: Path, name: str) -> None:
    if name == "docstrings":
        pytest.skip("an empty __init__.py is sound")
    Path(FILES[name]).write_bytes(gzip.compress(b"") if FILES[name].endswith(".gz") else b"")
    with pytest.raises(InputError, match=r"empty file|has no|holds no") as caught:
        build(SOURCES[name])
    assert FILES[name].rsplit("/", 1)[1] in str(caught.value)
    if name in WHOLE_FILE or name == "wordnet":
        assert build(SOURCES[name], "skip")["sources"][0]["dropped"]["damaged: empty file"] == 1
        return
    with pytest.raises(InputError, match=r"it yields no pair \(.*damaged: (empty file|nothing in it): \d"):
        build(SOURCES[name], "skip")
    optional = SOURCES[name].replace("}", ", optional: true}")
    Path("r.yaml").write_text(f"sources: [{optional}, {{kind: cloze, dataset: toy, optional: true}}]\ndamaged: skip")
    assert build_pairs("r.yaml", "out.jsonl", "data")["sources"][0]["count"] == 0


@pytest.mark.parametrize("name", ["debian", "packed man", "dictd", "jsonl"])
def test_a_packed_file_that_was_cut_off_is_refused_or_skipped(root: Path, name: str) -> None:
    file = Path({"dictd": "files/mine.dict.dz", "jsonl": "files/own.jsonl.gz"}.get(name, FILES[name]))
    source = SOURCES[name].replace("own.jsonl", "own.jsonl.gz")
    if name == "jsonl":
        file.write_bytes(gzip.compress(Path("files/own.jsonl").read_bytes()))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 12])
    with pytest.raises(InputError, match="cannot be read to its end") as caught:
        build(source)
    assert file.name in str(caught.value)
    report = build(source, "skip")["sources"][0]
    assert report["count"] >= 1
    assert report["dropped"]["damaged: broken file"] == 1
    assert report["damaged_places"]["broken file"][0].startswith((file.name, "man3/" + file.name))


def test_a_line_of_100_mb_is_not_held_in_memory(root: Path) -> None:
    for name in ("data/toy/corpus.jsonl", "files/own.jsonl", "files/data.noun"):
        with open(name, "ab") as handle:
            for _ in range(100):
                handle.write(b"x" * 1_000_000)
            handle.write(b"\n")
    sources = ", ".join(SOURCES[name] for name in ("titles", "jsonl", "wordnet"))
    tracemalloc.start()
    manifest = build(sources, "skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 35_000_000
    reasons = [source["dropped"] for source in manifest["sources"]]
    assert [found.get("damaged: line too long", found.get("damaged: record over 1 MB")) for found in reasons] == [1] * 3
    with pytest.raises(InputError, match=r"corpus\.jsonl, line 13: a line of 100,000,001 bytes, expected at most"):
        build(SOURCES["titles"])


def test_lines_are_cut_by_their_ends_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345\n123456\n1234\r\n\n12345")
    found = list(line_reader.read_lines(tmp_path / "a", limit=5))
    assert found == [(1, b"12345\n"), (2, line_reader.TooLong(7)), (3, b"1234\r\n"), (4, b"\n"), (5, b"12345")]


def test_what_a_source_says_comes_before_what_the_recipe_says(root: Path) -> None:
    poison(Path(FILES["jsonl"]), b"bad\n", "jsonl")
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        build(SOURCES["jsonl"].replace("}", ", damaged: refuse}"), "skip")
    assert build(SOURCES["jsonl"].replace("}", ", damaged: skip}"), "refuse")["sources"][0]["dropped"] == {
        "damaged: not a JSON object": 1
    }
    with pytest.raises(InputError, match='unknown value "skp"; did you mean "skip"'):
        build(SOURCES["jsonl"], "skp")
    with pytest.raises(InputError, match=r'source 1.*unknown value "no"'):
        build(SOURCES["jsonl"].replace("}", ', damaged: "no"}'))


def test_only_the_first_places_are_named_and_the_rest_counted(root: Path) -> None:
    with open("files/own.tsv", "a") as handle:
        handle.write("one cell\n" * 50)
    report = build(SOURCES["tsv"], "skip")["sources"][0]
    assert report["dropped"] == {"damaged: wrong number of cells": 50}
    assert report["damaged_places"] == {"wrong number of cells": [f"own.tsv, line {i}" for i in (3, 4, 5)]}


def test_broken_fields_of_a_data_set_are_skipped_with_what_hangs_on_them(root: Path) -> None:
    corpus = Path("data/toy/corpus.jsonl")
    rows = corpus.read_text().splitlines()
    rows[0] = json.dumps({"_id": "d0", "text": 7})
    rows[1] = json.dumps({"_id": "d1", "text": "a \0 b"})
    corpus.write_text("\n".join(rows) + "\n")
    report = build(SOURCES["queries"], "skip")["sources"][0]
    assert report["dropped"] == {"damaged: broken field": 2, "damaged: no judgment": 2}
    assert report["damaged_places"]["no judgment"] == ["qrels/train.tsv, line 2", "qrels/train.tsv, line 3"]
    assert report["count"] == 6


def test_the_command_refuses_with_one_line_and_code_2(root: Path) -> None:
    poison(Path(FILES["titles"]), POISON["bad UTF-8"][0], "titles")
    Path("r.yaml").write_text("sources: [{kind: titles, dataset: toy}]")
    command = [sys.executable, "-m", "search_r3", "data", "build", "r.yaml", "out.jsonl", "--data", "data"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = run(command, check=False, env=environment)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "corpus.jsonl, line 2: not UTF-8" in errors[0]
    assert "Traceback" not in done.stderr
    assert not Path("out.jsonl").exists()
