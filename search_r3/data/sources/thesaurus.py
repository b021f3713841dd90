"""Synonyms and short definitions of single words, from WordNet's first (most frequent) sense of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from search_r3.data.sources.dictionaries import WORDNET, parse_synset

PARTS = ("noun", "verb", "adj")
"""Parts of speech in the order in which they are tried."""


@dataclass(frozen=True, slots=True)
class Sense:
    """A sense of a word in WordNet: its synonyms and definition."""

    synonyms: tuple[str, ...]
    definition: str


class Thesaurus:
    """Looks words up in WordNet's index and data files (wndb(5WN)).

    Args:
        folder: contains data.noun, index.noun and so on.
    """

    def __init__(self, folder: Path = WORDNET) -> None:
        self._lines: dict[str, bytes] = {}
        self._first: dict[str, tuple[str, int]] = {}
        for part in PARTS:
            self._lines[part] = (folder / f"data.{part}").read_bytes()
            for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
                if line.startswith(" "):  # the license
                    continue
                columns = line.split()
                self._first.setdefault(columns[0], (part, int(columns[6 + int(columns[3])])))

    @staticmethod
    def found(folder: Path = WORDNET) -> bool:
        """Whether WordNet's files exist (Debian: wordnet-base)."""
        return all((folder / f"{kind}.{part}").is_file() for part in PARTS for kind in ("data", "index"))

    def look_up(self, word: str) -> Sense | None:
        """The first sense of a lower-case word; None if WordNet does not know it."""
        place = self._first.get(word)
        if place is None:
            return None
        part, offset = place
        data = self._lines[part]
        synset = parse_synset(data[offset : data.index(b"\n", offset)].decode("utf-8"))
        if synset is None:
            return None
        _, words, definition, _ = synset
        return Sense(tuple(other for other in words if other.lower() != word), definition)
