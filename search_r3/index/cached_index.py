"""An index of a folder or file that is kept in the cache folder, and whether it is up to date, seen without a model.

The listing of the files (sizes and times, `PathSource.listing`) that an update began with is written beside the index
when the update is complete. As long as the files still have that listing, there is nothing to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from search_r3.files import atomic_write_text
from search_r3.index.readers.path_source import PathSource, open_source
from search_r3.model.resolve import cache_dir

Listing = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class CachedIndex:
    """The index of the documents at a path, made by one model.

    Attributes:
        source: the documents.
        folder: the index's folder, which need not exist yet.
        listing: the files as they are now.
    """

    source: PathSource
    folder: Path
    listing: Listing

    @classmethod
    def of(cls, path: str | Path, model: str) -> CachedIndex:
        """The index of `path` by the model of this name.

        Raises:
            InputError: there is nothing to index at `path`, or no cache folder.
        """
        source = open_source(path)
        place = source.path.resolve()
        key = hashlib.sha256(f"{place}\n{model}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
        name = re.sub(r"[^\w.-]+", "-", place.name).strip("-.") or "root"
        return cls(source, cache_dir() / "ask" / f"{name}-{key}", source.listing())

    @property
    def up_to_date(self) -> bool:
        """Whether the index was completed when the files were as they are now."""
        try:
            kept = json.loads(self._kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return self.folder.is_dir() and kept == {name: list(state) for name, state in self.listing.items()}

    def completed(self) -> None:
        """Keep the listing, after the index was brought up to date with it.

        Raises:
            OSError: it cannot be written.
        """
        atomic_write_text(self._kept, json.dumps(self.listing))

    def find_file(self, path: str) -> Path | None:
        """The file that a hit's path names, if it is still there."""
        root = self.source.path if self.source.path.is_dir() else self.source.path.parent
        file = root / path
        return file.resolve() if file.is_file() else None

    @property
    def _kept(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.files.json")
