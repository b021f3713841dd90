"""What happens to queries, and to nothing else, before they are tokenized: typos corrected, usual case restored.

It is a file of a checkpoint, which its contract names by hash. Documents, passages and reasoning do not go through it,
so a checkpoint with another one searches the same indexes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.model.spelling import SpellingCorrector
from search_r3.model.truecasing import Truecaser

QUERY_NORMALIZER_FILE = "query_normalizer.json"
"""The file of a checkpoint that holds its query normalizer."""
FORMAT = 1


@dataclass(frozen=True)
class QueryNormalizer:
    """Spelling correction, then truecasing.

    Attributes:
        truecaser: gives queries in one case the usual case of their words.
        spelling: corrects typos.
        sources: what both were learned from, for people.
    """

    truecaser: Truecaser
    spelling: SpellingCorrector
    sources: Sequence[str] = ()

    def __call__(self, query: str) -> str:
        """`query` as it is embedded."""
        return self.truecaser(self.spelling(query))

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the file that `save` writes."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a file, atomically; into a folder, `QUERY_NORMALIZER_FILE`."""
        atomic_write_text(_file(path), self._to_json())

    def _to_json(self) -> str:
        record = {
            "format": FORMAT,
            "sources": list(self.sources),
            "truecaser": self.truecaser.to_record(),
            "spelling": self.spelling.to_record(),
        }
        return json.dumps(record, ensure_ascii=False, indent=0) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> QueryNormalizer:
        """Read the file that `save` wrote, or that of a folder.

        Raises:
            InputError: it does not exist, is damaged or was written by a newer version.
        """
        file = _file(path)
        try:
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise InputError(f"{file} has format {record['format']}, and this version reads {FORMAT}; upgrade it")
            return cls(
                Truecaser.from_record(record["truecaser"]),
                SpellingCorrector.from_record(record["spelling"]),
                record["sources"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} is not a query normalizer that can be read ({error}); make or download it again"
            ) from error


def before_folding(
    fold: Callable[[str], str] | None, normalizer: QueryNormalizer | None
) -> Callable[[str], str] | None:
    """What a query goes through before it is tokenized: the normalizer, then what documents go through."""
    if normalizer is None or fold is None:
        return normalizer or fold
    return lambda query: fold(normalizer(query))


def query_normalizer_note(model: Any) -> list[str]:
    """What an export's README says to those who tokenize queries by themselves (lines of Markdown), as
    `capitals.capitals_note`."""
    if model.checkpoint.query_normalizer is None:
        return []
    return [
        "Its queries go through `search_r3.model.query_normalizer.QueryNormalizer` with the checkpoint's "
        f"{QUERY_NORMALIZER_FILE} before they are tokenized, which corrects typos and restores the usual case of "
        "queries in one case. Other libraries do not do this, so their embeddings of such queries will differ.",
        "",
    ]


def _file(path: str | Path) -> Path:
    return Path(path) / QUERY_NORMALIZER_FILE if Path(path).is_dir() else Path(path)
