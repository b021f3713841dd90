"""Distinct short texts of real sources: the sentences that a machine with Debian's packages has at hand.

Sources are read by the functions that training data are read by (`search_r3.data.sources`). A text is cut at so many
tokens, as an encoder with that limit would see it, and what is then the same is one text.
"""

from __future__ import annotations

import gzip
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import say

TEXT_FILES = (".txt", ".pod", ".rst", ".md", ".txt.gz", ".pod.gz", ".rst.gz", ".md.gz")
MIN_WORDS, MAX_CHARACTERS = 4, 400
MIN_LETTERS = 0.75
"""Share of a sentence's characters that are ASCII letters or spaces: tables and code have fewer."""
PIECE = 5000  # texts tokenized at a time
_PAGE_END = re.compile(r"\n.*\[Page \d+\]\n\f?\n?.*\n|\f")  # of an RFC: its foot and the next page's head
_NOTE = re.compile(r"\s*\[[^\[\]]{1,30}\]")  # GCIDE names the source of each paragraph
_MARKUP = re.compile(r"(?m)^(\.\. .*|=\w+ ?.*|[#*=~^-]{3,}.*)$|``?|\*\*|[A-Z]<+([^<>]*)>+")


def read_texts(sources: Sequence[tuple[str, Path]], seed: int = 0) -> tuple[list[str], dict[str, int]]:
    """Each sentence once, in random order, and how many each source had that no earlier one has.

    Args:
        sources: (kind, path); for a package its name, and for WordNet the folder of its files.
    """
    found: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for kind, path in sources:
        before = len(found)
        for paragraph in READERS[kind](path):
            for sentence in sentences(paragraph):
                found.setdefault(sentence.casefold(), sentence)
        counts[kind] += len(found) - before
        say(f"{kind} {path.name}: {len(found) - before:,} new sentences, {len(found):,} in all")
    texts = list(found.values())
    random.Random(seed).shuffle(texts)
    return texts, dict(counts)


def sentences(paragraph: str) -> Iterator[str]:
    """The sentences of prose that are no table, code or fragment."""
    from search_r3.data.sources.beir_pairs import split_sentences

    for sentence in split_sentences(paragraph):
        letters = sum((c.isascii() and c.isalpha()) or c == " " for c in sentence)
        if len(sentence) > MAX_CHARACTERS or letters < MIN_LETTERS * len(sentence) or not sentence[0].isalnum():
            continue
        if sum(len(word) > 1 and word[0].isalpha() for word in sentence.split()) >= MIN_WORDS:
            yield sentence


def cut(tokenizer: Any, texts: Iterable[str], longest: int, most: int) -> tuple[list[str], int]:
    """At most `most` texts of at most `longest` tokens, each once, and how many of them were cut."""
    texts = list(texts)
    kept: dict[str, None] = {}
    shortened: set[str] = set()
    for start in range(0, len(texts), PIECE):
        some = texts[start : start + PIECE]
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        for text, spans in zip(some, tokenizer(some, **options)["offset_mapping"], strict=True):
            short = text[: spans[longest - 1][1]].strip() if len(spans) > longest else text
            if len(short) < len(text):
                shortened.add(short)
            kept[short] = None
        if len(kept) >= most:
            break
    chosen = list(kept)[:most]
    return chosen, len(shortened.intersection(chosen))


def read_questions(data: Path, longest: int, seed: int, most: int) -> list[str]:
    """Real questions: at most `most` queries in ASCII of the BEIR folders in `data`, each once, in random order."""
    from search_r3.data.io.jsonl import read_jsonl

    found: dict[str, None] = {}
    for file in sorted(data.glob("*/queries.jsonl")):
        for _, value in read_jsonl(file):
            text = " ".join(str(value.get("text", "")).split())
            if text.isascii() and 2 <= len(text.split()) <= longest:
                found[text] = None
    questions = list(found)
    random.Random(seed).shuffle(questions)
    return questions[:most]


def _data(path: Path) -> Iterator[str]:
    from search_r3.data.io.jsonl import read_jsonl

    for _, value in read_jsonl(path):
        for name in ("title", "text"):
            if isinstance(value.get(name), str):
                yield value[name]


def _debian(path: Path) -> Iterator[str]:
    from search_r3.data.sources.debian import debian_pairs

    for pair in debian_pairs(str(path), damaged="skip", max_chars=100_000).pairs:
        yield pair.query
        yield from pair.positive.split("\n")


def _dictionary(path: Path) -> Iterator[str]:
    from search_r3.data.sources.dictionaries import dictd_pairs

    for pair in dictd_pairs(str(path), license="not copied", damaged="skip", max_chars=100_000).pairs:
        yield from _NOTE.sub("", pair.positive).split("\n")


def _wordnet(path: Path) -> Iterator[str]:
    from search_r3.data.sources.dictionaries import parse_synset, wordnet_files

    for file in wordnet_files(str(path)):
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("  ") and (synset := parse_synset(line)):
                yield synset[2]
                yield from synset[3]


def _manuals(path: Path) -> Iterator[str]:
    from search_r3.data.sources.manuals import man_files
    from search_r3.data.sources.roff import plain_sections

    for file in man_files(str(path)):
        for _, text in plain_sections(_text(file)):
            yield from text.split("\n")


def _package(path: Path) -> Iterator[str]:
    from search_r3.data.sources.docstrings import find_package

    yield from _python(find_package(str(path)))


def _python(path: Path) -> Iterator[str]:
    import inspect

    from search_r3.data.sources.docstrings import read_functions
    from search_r3.data.sources.querystyle import without_markup
    from search_r3.data.sources.records import Records

    for function in read_functions(path, path.name, Records("skip")):
        for paragraph in inspect.cleandoc(function.docstring).split("\n\n"):
            if text := without_markup(" ".join(paragraph.split())):
                yield text


def _documents(path: Path) -> Iterator[str]:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and not f.is_symlink())
    for file in files:
        if file.name.endswith(TEXT_FILES):
            plain = _MARKUP.sub(r"\2", _PAGE_END.sub("\n", _text(file)))
            for paragraph in re.split(r"\n\s*\n", plain):
                text = " ".join(paragraph.split())
                if text.endswith((".", "!", "?")):
                    yield text


def _text(file: Path) -> str:
    raw = file.read_bytes()
    if file.suffix == ".gz":
        raw = gzip.decompress(raw)
    return raw.decode("utf-8", "replace")


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "data": _data,
    "debian": _debian,
    "dictionary": _dictionary,
    "documents": _documents,
    "manuals": _manuals,
    "package": _package,
    "python": _python,
    "wordnet": _wordnet,
}
"""Kind of a source -> the function that reads its paragraphs. "data" is one .jsonl file of texts with titles, "debian"
a Translation-en file, "dictionary" a dictd one without suffix, "documents" a folder of plain text, "manuals" one with
man1 to man9, "package" an installed Python package, "python" a folder of Python files."""
