"""One small, sound folder for every kind of source that a recipe may name, and a recipe over all of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

WORDS = "and so it goes on, one word after the other, until the text is long enough to be kept in here"
FUNCTION = '''def {name}(values):
    """Return the {what} of all the values in a list."""
    found = [{number} * value for value in values]
    return found[{number}:]
'''
RECIPE = """
seed: 3
damaged: refuse
sources:
  - {kind: docstrings, packages: [smallbox, no_such_package_here], optional: true, min_body_lines: 1}
  - {kind: titles, dataset: toy}
  - {kind: cloze, dataset: toy}
  - {kind: queries, dataset: toy, split: train}
  - {kind: debian, path: files/Translation-en.gz, limit: 8}
  - {kind: wordnet, path: files}
  - {kind: dictd, path: files/mine, license: CC0}
  - {kind: man, path: files/man}
  - {kind: pydoc, path: files/html}
  - {kind: pairs, path: files/own.jsonl, license: CC0, negatives: [wrong]}
  - {kind: pairs, path: files/own.csv, name: quoted, license: CC0, query: question, positive: answer}
  - {kind: pairs, path: files/own.tsv, name: tabbed, license: CC0, header: false,
     query: "1", positive: "2", negatives: ["3"]}
  - {kind: dictd, path: files/none, license: CC0, optional: true}
decontaminate:
  against: [{dataset: toy, split: test}]
deduplicate: true
"""


def make(root: Path, *, backwards: bool = False) -> Path:
    """Write the sources below `root` (data sets in data/, the others in files/ and packages/); returns `root`.

    `backwards` writes the same files in the opposite order, so that a folder may list them otherwise.
    """
    files = contents()
    for name in sorted(files, reverse=backwards):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(files[name])
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return root


def contents() -> dict[str, bytes]:
    """Name below the root -> content of every file."""
    return {name: text if isinstance(text, bytes) else text.encode() for name, text in _contents().items()}


def _contents() -> dict[str, str | bytes]:
    sentence = "Sleep number {i} promotes the removal of waste number {i} from the brain of mice. "
    corpus = [
        {"_id": f"d{i}", "title": f"A title of number {i}", "text": sentence.format(i=i) + f"It is {i}, {WORDS}."}
        for i in range(12)
    ]
    queries = [{"_id": str(i), "text": f"question {i} about sleep"} for i in range(12)]
    train = "".join(f"{i}\td{i}\t1\n" for i in range(8))
    test = "".join(f"{i}\td{i}\t1\n" for i in range(8, 12))
    articles = [f"word {i}\n\n   The article of word {i}, {WORDS}.\n".encode() for i in range(6)]
    begins = [sum(map(len, articles[:i])) for i in range(6)]
    index = "".join(f"word {i}\t{_base64(begins[i])}\t{_base64(len(articles[i]))}\n" for i in range(6))
    descriptions = "".join(
        f"Package: p{i}\nDescription-en: synopsis of package {i}\n It is number {i}, {WORDS}.\n\n" for i in range(10)
    )
    page = (
        '.\\" SPDX-License-Identifier: MIT\n.SH NAME\np{i} \\- print number {i}\n.SH DESCRIPTION\nIt is {i}, {words}.\n'
    )
    synset = "  1 the license  \n0000000{i} 03 n 01 {part}_{i} 0 000 | the sense of {part} {i}\n"
    html = "<!DOCTYPE html><html><body><section><h1>Heading {i}</h1><p>It is {i}, {words}.</p></section></body></html>"
    twice = FUNCTION.format(name="same", what="same thing twice", number=7)  # the first file's counts: order matters
    return {
        "packages/smallbox/__init__.py": FUNCTION.format(name="total", what="first total", number=1),
        "packages/smallbox/Upper.py": FUNCTION.format(name="mean", what="running mean", number=2) + twice,
        "packages/smallbox/lower.py": FUNCTION.format(name="best", what="best median", number=3) + twice,
        "data/toy/corpus.jsonl": _lines(corpus),
        "data/toy/queries.jsonl": _lines(queries),
        "data/toy/qrels/train.tsv": "query-id\tcorpus-id\tscore\n" + train,
        "data/toy/qrels/test.tsv": "query-id\tcorpus-id\tscore\n" + test,
        "data/toy/SOURCE.txt": "license: CC0\n",
        "files/Translation-en.gz": gzip.compress(descriptions.encode(), mtime=0),
        **{
            f"files/data.{part}": synset.format(i=i, part=part) for i, part in enumerate(("noun", "verb", "adj", "adv"))
        },
        "files/mine.index": index,
        "files/mine.dict.dz": gzip.compress(b"".join(articles), mtime=0),
        **{f"files/man/man1/p{i}.1": page.format(i=i, words=WORDS) for i in range(3)},
        **{f"files/man/man1/{name}.1": page.format(i=9, words=WORDS) for name in ("Same", "again")},
        "files/man/man3/p3.3.gz": gzip.compress(page.format(i=3, words=WORDS).encode(), mtime=0),
        **{f"files/html/{name}.html": html.format(i=i, words=WORDS) for i, name in enumerate("aBcD", start=20)},
        "files/html/E.html": html.format(i=23, words=WORDS),
        "files/own.jsonl": _lines(
            [{"query": f"own query {i}", "positive": f"own answer {i}", "wrong": [f"no {i}"]} for i in range(3)]
            + [{"query": "question 9 about sleep", "positive": "contaminated", "wrong": []}]
            + [{"query": "OWN  query 1", "positive": "Own answer 1", "wrong": []}]
        ),
        "files/own.csv": 'question,answer\n"a, b","two\nlines"\nplain,cells\nthird,row\n',
        "files/own.tsv": 'left "one\tright one\twrong one\nleft two\tright two\twrong two\n',
    }


def _lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _base64(number: int) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (_base64(number // 64) if number >= 64 else "") + alphabet[number % 64]
