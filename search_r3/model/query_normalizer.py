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
from search_r3.model.truecasing import Truecaser, list_of_strings

QUERY_NORMALIZER_FILE = "query_normalizer.json"
"""The file of a checkpoint that holds its query normalizer."""
FORMAT = 1
LONGEST = 10_000
"""Maximum number of characters of a query that is changed: nobody typed a longer one, of which the first tokens alone
are read, and every other query of a server would wait for it."""


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
        """`query` as it is embedded; one of over `LONGEST` characters as it is."""
        if len(query) > LONGEST:
            return query
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
            text = file.read_text(encoding="utf-8")
            record: dict[str, Any] = json.loads(text)
            version = record["format"]
            if isinstance(version, int) and version > FORMAT:
                raise InputError(f"{file} has format {version}, and this version reads {FORMAT}; upgrade it")
            if version != FORMAT or isinstance(version, bool):
                raise ValueError(f"format is {version!r}")
            made = cls(
                Truecaser.from_record(record["truecaser"]),
                SpellingCorrector.from_record(record["spelling"]),
                list_of_strings(record, "sources"),
            )
            if "\\u" in text:
                made._to_json().encode()  # raises ValueError if an escape is half of a surrogate pair
        except InputError:
            raise
        except KeyError as error:
            raise _unreadable(file, f"it has no {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _unreadable(file, error) from error
        return made


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
        f"Its queries go through its query normalizer ({QUERY_NORMALIZER_FILE}) before they are tokenized, which "
        "corrects typos and restores the usual case of queries in one case: "
        '`search_r3.model.query_normalizer.QueryNormalizer.load("FOLDER")(query)`, which needs nothing but Python. '
        "Other libraries do not do this, so without it their embeddings of such queries will differ.",
        "",
    ]


def _unreadable(file: Path, why: object) -> InputError:
    return InputError(f"{file} is not a query normalizer that can be read ({why}); make or download it again")


def _file(path: str | Path) -> Path:
    return Path(path) / QUERY_NORMALIZER_FILE if Path(path).is_dir() else Path(path)
