"""Debian's package descriptions: synopsis -> description, from apt's list of English descriptions (Translation-en).

Each record names a package, a one-line synopsis and paragraphs of text (Debian Policy, section 5.6.13). To download the
file into apt's lists: `apt-get -o Acquire::Languages=en update`.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from search_r3.data.io.line_reader import BrokenFile, MissingSource, TooLong, bounded_lines, is_html_page, read_lines
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.records import MAX_RECORD, BuiltPairs, Records, clip, without_generic

LISTS = Path("/var/lib/apt/lists")
APT_HELPER = Path("/usr/lib/apt/apt-helper")
"""apt's own reader of its lists, which containers store as .lz4."""
LICENSE = "each description under its package's own license (Debian main: free by the DFSG)"
MIN_SYNOPSIS_WORDS, MIN_TEXT_WORDS = 2, 12
_EMPTY_SHELL = re.compile(r"\b(transitional|dummy|debug(ging)? symbols|metapackage|meta-package)\b", re.IGNORECASE)


def debian_pairs(path: str | None = None, *, damaged: str = "refuse", max_chars: int = 1200) -> BuiltPairs:
    """The descriptions in a Translation-en file, in order and without duplicates.

    Args:
        path: the file, plain or compressed (.gz, .bz2, .xz; .lz4 if apt is installed); None uses the one in apt's
            lists.
        damaged: "refuse" or "skip" records that are not text.
        max_chars: maximum length of a description, which is cut there.

    Raises:
        MissingSource: there is no such file.
        InputError: it is not a list of descriptions, or a record is damaged and `damaged` is "refuse".
    """
    file = descriptions_file(path)
    records = Records(damaged, file.parent)
    dropped = records.dropped
    pairs: list[TrainingPair] = []
    seen_ids: set[str] = set()
    seen_texts: set[bytes] = set()
    for line, raw in _raw_records(file, records):
        where = f"{file.name}, line {line}"
        record = records.text(raw, where)
        if record is None or not record.strip():
            continue
        package, synopsis, text = parse_record(record)
        known = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if not package or not synopsis:
            records.fault(where, "no description", 'a record without "Package" or "Description-en"')
        elif len(synopsis.split()) < MIN_SYNOPSIS_WORDS or len(text.split()) < MIN_TEXT_WORDS:
            dropped["short"] += 1
        elif _EMPTY_SHELL.search(synopsis):
            dropped["transitional, meta or debug package"] += 1
        elif package in seen_ids or known in seen_texts:
            dropped["duplicate"] += 1
        else:
            seen_ids.add(package)
            seen_texts.add(known)
            pairs.append(TrainingPair(f"debian:{package}", synopsis, clip(text, max_chars), source="debian:packages"))
    return records.built(without_generic(pairs, dropped), {"license": LICENSE})


def descriptions_file(path: str | None = None) -> Path:
    """The file that `debian_pairs` reads.

    Raises:
        MissingSource: no path is given, and apt's lists contain no such file.
    """
    return Path(path) if path else _find(LISTS)


def _raw_records(file: Path, records: Records) -> Iterator[tuple[int, bytes | TooLong]]:
    """(line, record) for each block between empty lines; an oversized one is never held in memory."""
    lines = _lines_by_apt(file) if file.suffix == ".lz4" and APT_HELPER.is_file() else read_lines(file, MAX_RECORD)
    begin, size, number = 1, 0, 0
    held: list[bytes] = []
    try:
        for number, raw in lines:
            if number == 1 and not (isinstance(raw, bytes) and raw.startswith(b"Package:")):
                start = raw[:40] if isinstance(raw, bytes) else b"a line without end"
                problem = f'not a Translation-en file: it must begin with "Package:", got {start!r}'
                records.fault(file.name, "HTML" if isinstance(raw, bytes) and is_html_page(raw) else "no list", problem)
                return
            if raw == b"\n":
                if size:
                    yield begin, TooLong(size) if size > MAX_RECORD else b"".join(held)
                begin, size, held = number + 1, 0, []
                continue
            size += raw.size if isinstance(raw, TooLong) else len(raw)
            if size > MAX_RECORD:
                held = []
            elif isinstance(raw, bytes):
                held.append(raw)
    except BrokenFile as error:
        where = f"{file.name}, line {number + 1}"
        records.fault(where, "broken file", f"it cannot be read to its end ({error.problem}); download it again")
        return
    if not number:
        records.fault(file.name, "empty file", "an empty file")
    if size:
        yield begin, TooLong(size) if size > MAX_RECORD else b"".join(held)


def parse_record(record: str) -> tuple[str, str, str]:
    """(package, synopsis, description) of one record; the lines of each paragraph are joined."""
    package = synopsis = ""
    lines: list[str] = []
    inside = False
    for line in record.splitlines():
        if inside and line.startswith(" "):
            lines.append(line)
            continue
        name, _, value = line.partition(":")
        inside = name == "Description-en"
        if inside:
            synopsis = value.strip()
        elif name == "Package":
            package = value.strip()
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == ".":
            paragraphs.append([])
        elif line.startswith("  "):  # two spaces: verbatim, such as a list item
            paragraphs[-1].append("\n" + " ".join(line.split()))
        else:
            paragraphs[-1].append(" ".join(line.split()))
    joined = (" ".join(paragraph).replace(" \n", "\n").strip() for paragraph in paragraphs)
    return package, synopsis, "\n".join(text for text in joined if text)


def _find(lists: Path) -> Path:
    found = sorted(path for path in lists.glob("*Translation-en*") if path.suffix in ("", ".gz", ".bz2", ".xz", ".lz4"))
    if not found:
        raise MissingSource(
            f"no Translation-en in {lists}; run apt-get -o Acquire::Languages=en update, or set path to a file"
        )
    return max(found, key=lambda path: (path.stat().st_size, path.name))  # the main list, not that of updates


def _lines_by_apt(file: Path) -> Iterator[tuple[int, bytes | TooLong]]:
    if not file.is_file():
        raise MissingSource(f"{file} does not exist; check the path")
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            [str(APT_HELPER), "cat-file", str(file)], stdout=subprocess.PIPE, stderr=complaints
        ) as process,
    ):
        assert process.stdout is not None
        yield from bounded_lines(process.stdout, MAX_RECORD)
        if process.wait():
            complaints.seek(0)
            said = complaints.read().decode("utf-8", "replace").strip().splitlines() or ["apt-helper failed"]
            raise BrokenFile(file, said[-1])
