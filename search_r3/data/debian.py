"""Debian's package descriptions: synopsis -> description, from apt's list of English descriptions (Translation-en).

Each record names a package, a one-line synopsis and paragraphs of text (Debian Policy, section 5.6.13). To get the
file: `apt-get -o Acquire::Languages=en update`; it then lies in apt's lists.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from search_r3.data.pairs import TrainingPair
from search_r3.data.sources import Built, MissingSource, Records, clip, fingerprint, read_bytes, without_generic
from search_r3.errors import InputError

LISTS = Path("/var/lib/apt/lists")
APT_HELPER = Path("/usr/lib/apt/apt-helper")
"""apt's own reader of its lists, which containers keep as .lz4."""
LICENCE = "each description under its package's own licence (Debian main: free by the DFSG)"
MIN_SYNOPSIS_WORDS, MIN_TEXT_WORDS = 2, 12
_EMPTY_SHELL = re.compile(r"\b(transitional|dummy|debug(ging)? symbols|metapackage|meta-package)\b", re.IGNORECASE)


def debian_pairs(path: str | None = None, *, damaged: str = "refuse", max_chars: int = 1200) -> Built:
    """The descriptions of a Translation-en file, in its order; a text that comes twice counts once.

    Args:
        path: the file, plain or compressed (.gz, .bz2, .xz; .lz4 where apt is); None: the one in apt's lists.
        damaged: "refuse" or "skip" records that are no text.
        max_chars: where descriptions are cut.

    Raises:
        MissingSource: there is no such file.
        InputError: it is no list of descriptions, or a record is damaged and not to be skipped.
    """
    file = Path(path) if path else _find(LISTS)
    content = _by_apt(file) if file.suffix == ".lz4" and APT_HELPER.is_file() else read_bytes(file)
    if not content.startswith(b"Package:"):
        raise InputError(f'{file} is no Translation-en file: it must begin with "Package:", found {content[:40]!r}')
    records = Records(damaged)
    dropped = records.dropped
    pairs: list[TrainingPair] = []
    seen_ids: set[str] = set()
    seen_texts: set[str] = set()
    line = 1
    for raw in content.split(b"\n\n"):
        where, line = f"{file}, line {line}", line + raw.count(b"\n") + 2
        if not raw.strip():
            continue
        record = records.text(raw, where)
        if record is None:
            continue
        package, synopsis, text = parse_record(record)
        if not package or not synopsis:
            records.fault(where, "no description", 'a record without "Package" or "Description-en"')
        elif len(synopsis.split()) < MIN_SYNOPSIS_WORDS or len(text.split()) < MIN_TEXT_WORDS:
            dropped["short"] += 1
        elif _EMPTY_SHELL.search(synopsis):
            dropped["transitional, meta or debug package"] += 1
        elif package in seen_ids or text in seen_texts:
            dropped["duplicate"] += 1
        else:
            seen_ids.add(package)
            seen_texts.add(text)
            pairs.append(TrainingPair(f"debian:{package}", synopsis, clip(text, max_chars), source="debian:packages"))
    origin = {"sha256": fingerprint({"Translation-en": content}), "licence": LICENCE}
    return Built(without_generic(pairs, dropped), dropped, origin)


def parse_record(record: str) -> tuple[str, str, str]:
    """(package, synopsis, description) of one record; paragraphs stay apart, their lines are joined."""
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
        elif line.startswith("  "):  # two spaces: shown as it stands, such as an item of a list
            paragraphs[-1].append("\n" + " ".join(line.split()))
        else:
            paragraphs[-1].append(" ".join(line.split()))
    joined = (" ".join(paragraph).replace(" \n", "\n").strip() for paragraph in paragraphs)
    return package, synopsis, "\n".join(text for text in joined if text)


def _find(lists: Path) -> Path:
    found = sorted(path for path in lists.glob("*Translation-en*") if path.suffix in ("", ".gz", ".bz2", ".xz", ".lz4"))
    if not found:
        raise MissingSource(
            f"no Translation-en in {lists}; run apt-get -o Acquire::Languages=en update, or give a file with path"
        )
    return max(found, key=lambda path: (path.stat().st_size, path.name))  # main, not its updates


def _by_apt(file: Path) -> bytes:
    if not file.is_file():
        raise MissingSource(f"{file} does not exist; check the path")
    done = subprocess.run([str(APT_HELPER), "cat-file", str(file)], capture_output=True, check=False)
    if done.returncode:
        problem = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["apt-helper failed"]
        raise InputError(f"{file} cannot be read ({problem[-1]}); fetch it again")
    return done.stdout
