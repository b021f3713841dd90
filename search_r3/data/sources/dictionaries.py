"""Dictionaries: WordNet's synsets (words <-> gloss) and any dictd dictionary (headword -> article), such as FOLDOC.

WordNet's files are read as described in wndb(5WN); a dictd dictionary is NAME.index (headword, offset and length in
base 64) next to NAME.dict or NAME.dict.dz (RFC 2229's DICT; the format is dictd's).
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from search_r3.data.io.line_reader import BrokenFile, MissingSource, TooLong, read_lines, read_up_to
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.records import MAX_RECORD, BuiltPairs, Records, clip, without_generic
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

WORDNET = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")
DIRECTIONS = ("both", "words", "gloss")
MAX_DICTIONARY = 1_000_000_000
"""Maximum size in bytes after decompression; a dictionary is kept in memory, because its index points into it."""
MIN_GLOSS_WORDS, MIN_ARTICLE_WORDS = 4, 12
LICENSES = {
    "foldoc": "GFDL-1.1-or-later (The Free On-line Dictionary of Computing, https://foldoc.org, editor Denis Howe)",
    "jargon": "public domain (the Jargon File)",
}
MAX_DIGITS = 11
"""64 bits in base 64."""
_BASE64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_MARKER = re.compile(r"\((a|p|ip)\)$")  # an adjective's syntactic position: wndb(5WN)
_DATE_LINE = re.compile(r"^\(\d{4}-\d{2}-\d{2}\)$")
_CATEGORY = re.compile(r"^(\s*)<[a-z][a-z ,/-]*>\s*")


def wordnet_pairs(
    path: str | None = None, *, direction: str = "both", damaged: str = "refuse", max_chars: int = 1200
) -> BuiltPairs:
    """Synsets as pairs: words -> gloss with examples, and definition -> words.

    Args:
        path: the folder with data.noun, data.verb, data.adj and data.adv.
        direction: "words" uses the words as query, "gloss" the definition, "both" gives two pairs per synset.
        damaged: "refuse" or "skip" lines that do not conform to wndb(5WN).
        max_chars: maximum length of a gloss, which is cut there.

    Raises:
        MissingSource: a file is missing.
        InputError: the direction is unknown, or a line is damaged and `damaged` is "refuse".
    """
    refuse_unknown([direction], DIRECTIONS, "direction", what="value")
    files = wordnet_files(path)
    records = Records(damaged, files[0].parent)
    pairs: list[TrainingPair] = []
    for part, file in zip(PARTS, files, strict=True):
        for number, raw in _lines(file, records):
            if isinstance(raw, bytes) and raw.startswith(b"  "):  # the license comes first, indented
                continue
            where = f"{file.name}, line {number}"
            line = records.text(raw, where)
            synset = parse_synset(line) if line is not None else None
            if synset:
                pairs += _synset_pairs(part, *synset, direction, max_chars, records.dropped)
            elif line is not None:
                records.fault(where, "no synset", "not a line of WordNet's data files")
    return records.built(without_generic(pairs, records.dropped), {"license": "WordNet-3.0 (Princeton University)"})


def wordnet_names(path: str | None = None) -> list[str]:
    """The nouns with a capital: names of people, places, peoples and works.

    Raises:
        MissingSource: see `wordnet_files`.
    """
    names: dict[str, None] = {}
    for line in wordnet_files(path)[PARTS.index("noun")].read_text(encoding="utf-8").splitlines():
        synset = None if line.startswith("  ") else parse_synset(line)
        names |= dict.fromkeys(word for word in (synset[1] if synset else ()) if word != word.lower())
    return list(names)


def wordnet_files(path: str | None = None) -> list[Path]:
    """The files that `wordnet_pairs` reads.

    Raises:
        MissingSource: one is missing.
    """
    folder = Path(path) if path else WORDNET
    files = [folder / f"data.{part}" for part in PARTS]
    for file in files:
        if not file.is_file():
            raise MissingSource(f"{file} does not exist; install wordnet-base, or set path to its folder")
    return files


def parse_synset(line: str) -> tuple[str, list[str], str, list[str]] | None:
    """(offset, words, definition, examples) of a line such as `00001740 02 r 01 a_cappella 0 000 | without ...`."""
    data, bar, gloss = line.partition(" | ")
    columns = data.split()
    try:
        count = int(columns[3], 16)
        words = [_MARKER.sub("", columns[4 + 2 * i]).replace("_", " ") for i in range(count)]
    except (IndexError, ValueError):
        return None
    if not bar or not words or not columns[0].isdecimal():
        return None
    definition, quote, rest = gloss.strip().partition('; "')
    examples = [text.strip(' ";') for text in rest.split('"; "')] if quote else []
    return columns[0], list(dict.fromkeys(words)), definition.strip(" ;"), [text for text in examples if text]


def _synset_pairs(
    part: str,
    offset: str,
    words: list[str],
    definition: str,
    examples: list[str],
    direction: str,
    max_chars: int,
    dropped: Counter[str],
) -> list[TrainingPair]:
    if len(definition.split()) < MIN_GLOSS_WORDS:
        dropped["short gloss"] += 1
        return []
    names, pairs = ", ".join(words), []
    identity, source = f"wordnet:{part}:{offset}", f"wordnet:{part}"
    if direction in ("both", "words"):
        said = definition + "".join(f'; "{text}"' for text in examples)
        pairs.append(TrainingPair(f"{identity}:words", names, clip(said, max_chars), source=source))
    if direction in ("both", "gloss"):
        pairs.append(TrainingPair(f"{identity}:gloss", definition, clip(names, max_chars), source=source))
    return pairs


def dictd_pairs(path: str, *, license: str | None = None, damaged: str = "refuse", max_chars: int = 1200) -> BuiltPairs:
    """The articles of a dictd dictionary: headword -> article without its headword, once per article.

    Args:
        path: the dictionary's path without suffix, such as /usr/share/dictd/foldoc.
        license: for the manifest; not required for FOLDOC and the Jargon File.
        damaged: "refuse" or "skip" broken lines of the index and articles that are not text.
        max_chars: maximum length of an article, which is cut there.

    Raises:
        MissingSource: a file is missing.
        InputError: the license of another dictionary is missing, or an entry is damaged and `damaged` is "refuse".
    """
    base = Path(path)
    known = license or LICENSES.get(base.name)
    if not known:
        raise InputError(f'the license of the dictionary "{base.name}" is not known; set license')
    index, dictionary = dictd_files(path)
    records = Records(damaged, base.parent)
    content, problem = read_up_to(dictionary, MAX_DICTIONARY)
    if problem:
        records.fault(dictionary.name, "broken file", f"it cannot be read to its end ({problem}); download it again")
    elif not content:
        records.fault(dictionary.name, "empty file", "an empty file")
    pairs: list[TrainingPair] = []
    seen: set[tuple[int, int]] = set()
    for number, raw in _lines(index, records):
        where = f"{index.name}, line {number}"
        line = records.text(raw, where)
        if line is None or line.startswith("00-database"):
            continue
        columns = line.split("\t")
        place = _place(columns)
        if place is None or sum(place) > len(content):
            records.fault(where, "no entry", "expected headword, offset and length (base 64) within the dictionary")
        elif place in seen:
            records.dropped["another name of an article"] += 1
        else:
            seen.add(place)
            text = records.text(content[place[0] : sum(place)], f"{where} ({columns[0]})")
            if text is None:
                continue
            headword, article = parse_article(text)
            if len(article.split()) < MIN_ARTICLE_WORDS:
                records.dropped["short article"] += 1
            elif headword:
                identity = f"dictd:{base.name}:{place[0]}"
                pairs.append(TrainingPair(identity, headword, clip(article, max_chars), source=f"dictd:{base.name}"))
    return records.built(without_generic(pairs, records.dropped), {"license": known})


def dictd_files(path: str) -> tuple[Path, Path]:
    """The index and the dictionary that `dictd_pairs` reads.

    Raises:
        MissingSource: one is missing.
    """
    base = Path(path)
    index, packed = base.with_name(f"{base.name}.index"), base.with_name(f"{base.name}.dict.dz")
    dictionary = packed if packed.exists() else base.with_name(f"{base.name}.dict")
    for file in (index, dictionary):
        if not file.is_file():
            hint = f"install dict-{base.name}, or fix path (without .index and .dict.dz)"
            raise MissingSource(f"{file} does not exist; {hint}")
    return index, dictionary


def parse_article(text: str) -> tuple[str, str]:
    """(headword, article): the first line, and the text after the first blank line in plain paragraphs."""
    head, _, body = html.unescape(text).partition("\n\n")
    paragraphs = []
    for block in re.split(r"\n\s*\n", body):
        plain = " ".join(_CATEGORY.sub(r"\1", block).split()).replace("{", "").replace("}", "")
        if plain and not _DATE_LINE.match(plain):
            paragraphs.append(plain)
    return " ".join(head.split("\n", 1)[0].split()), "\n".join(paragraphs)


def _lines(file: Path, records: Records) -> Iterator[tuple[int, bytes | TooLong]]:
    """The non-blank lines of a file without line ends; if the file is truncated, `records` counts it."""
    number = 0
    try:
        for number, raw in read_lines(file, MAX_RECORD):
            line = raw.removesuffix(b"\n") if isinstance(raw, bytes) else raw
            if isinstance(line, TooLong) or line.strip():
                yield number, line
    except BrokenFile as error:
        where = f"{file.name}, line {number + 1}"
        records.fault(where, "broken file", f"it cannot be read to its end ({error.problem}); download it again")
    if not number:
        records.fault(file.name, "empty file", "an empty file")


def _place(columns: list[str]) -> tuple[int, int] | None:
    if len(columns) < 3 or not all(0 < len(digits) <= MAX_DIGITS for digits in columns[1:3]):
        return None
    try:
        return _number(columns[1]), _number(columns[2])
    except KeyError:
        return None


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _BASE64[digit]
    return value
