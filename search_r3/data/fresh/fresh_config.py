"""What `search-r3 data fresh` is asked for: packages, the date after which they must have appeared, and the filters.

A recipe is YAML with the fields below; `configs/data/fresh-2026.yaml` is one.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from search_r3.config import Config, from_mapping, read_mapping
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

KINDS = ("section", "module", "class", "function")
"""What a document may be: a section of a README or of the documentation, or a module, class or function."""


@dataclass(frozen=True)
class Source:
    """One package."""

    path: str
    """A wheel, a source archive (.tar.gz, .zip, ...), a folder, or the name of an installed distribution."""
    sha256: str | None = None
    """Of the archive; another is refused, so that a recipe means the same everywhere."""
    released: str | None = None
    """YYYY-MM-DD, where no package index can be asked; where one can, the two must agree."""
    license: str | None = None
    """Where the package's own metadata say nothing."""
    older: tuple[str, ...] = ()
    """Earlier releases of it, or packages that it took texts from: what stands in them too is left out as old."""
    skip: tuple[str, ...] = ()
    """Folders or files in it that are left out, such as copies of other packages under another name than "vendor"."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise InputError('"path" is empty; name a wheel, a source archive, a folder or an installed package')
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise InputError(f'{self.path}: "sha256" must be 64 hex digits, found {self.sha256!r}')
        if self.released is not None:
            parse_date(self.released, f'{self.path}: "released"')


@dataclass(frozen=True)
class FreshConfig:
    """A whole data set; every field but `packages` has a default."""

    packages: tuple[Source, ...]
    """In this order they are read."""
    released_after: str = "2026-01-01"
    """YYYY-MM-DD: a package released before this day is refused."""
    allow_unknown_date: bool = False
    """Take packages whose release date is not known; the manifest and SOURCE.txt then say so."""
    kinds: tuple[str, ...] = KINDS
    """What becomes a document."""
    committee: tuple[str, ...] = ("bm25", "all-minilm-l6-v2")
    """Retrievers, named as in `evaluate --system`; a question is kept if any of them finds its document."""
    top: int = 50
    """... among so many. Generous, since a strict filter flatters the retriever that did the filtering."""
    questions_per_package: int = 15
    """At most; the rest of a package's documents stay as distractors."""
    documents_per_package: int = 250
    """At most, drawn by the seed, so that one package does not make up the corpus."""
    named_share: float = 0.5
    """Share of the headings' questions that name the package; short headings always do."""
    min_words: int = 25
    """Words of a document, at least."""
    max_chars: int = 2000
    """Characters of a document, at most; it is cut at a space or a line end."""
    near: float = 0.8
    """Documents with this share of their word triples in common are one; the first stays."""
    seed: int = 0
    """Decides everything that is drawn."""

    def __post_init__(self) -> None:
        if not self.packages:
            raise InputError("no package is named; give wheels, source archives, folders or installed packages")
        parse_date(self.released_after, "released_after")
        refuse_unknown(self.kinds, KINDS, "kinds", what="kind of document")
        if not self.kinds or not self.committee or len(set(self.committee)) < len(self.committee):
            raise InputError("kinds and committee must each name at least one, and no retriever twice")
        for name in ("top", "questions_per_package", "documents_per_package", "min_words"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.max_chars < 200:
            raise InputError(f"max_chars must be 200 or more, not {self.max_chars}")
        if not 0 <= self.named_share <= 1 or not 0.5 <= self.near <= 1:
            found = f"{self.named_share} and {self.near}"
            raise InputError(f"named_share must be between 0 and 1 and near between 0.5 and 1, not {found}")


def parse_date(text: str, where: str) -> date:
    """A day written YYYY-MM-DD.

    Raises:
        InputError: it is none; `where` begins the message.
    """
    try:
        return date.fromisoformat(text)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} must be a day such as 2026-01-31, found {text!r}") from error


def read_config(inputs: Sequence[str], changes: dict[str, Any] | None = None) -> FreshConfig:
    """The configuration out of one YAML recipe, or out of packages named one by one.

    Args:
        inputs: one file that ends in .yaml or .yml, or what `Source.path` may be.
        changes: fields to put in the place of the recipe's; None values change nothing.

    Raises:
        InputError: the recipe cannot be read, a key is unknown, or a value is wrong.
    """
    recipes = [one for one in inputs if one.lower().endswith((".yaml", ".yml"))]
    if recipes and len(inputs) > 1:
        raise InputError(
            f"{recipes[0]} is a recipe and {len(inputs) - 1} other inputs are given; give one or the other"
        )
    values: dict[str, Any] = read_mapping(recipes[0]) if recipes else {"packages": list(inputs)}
    values |= {key: value for key, value in (changes or {}).items() if value is not None}
    where = recipes[0] if recipes else "data fresh"
    packages = values.pop("packages", [])
    if not isinstance(packages, list):
        raise InputError(f'{where}: "packages" must be a list, found {type(packages).__name__}')
    sources = []
    for number, one in enumerate(packages, start=1):
        given = {"path": one} if isinstance(one, str) else one
        if not isinstance(given, dict) or "path" not in given:
            raise InputError(f'{where}, package {number}: expected a path, or a mapping with "path", found {one!r}')
        sources.append(_built(Source, given, f"{where}, package {number}"))
    return _built(FreshConfig, values | {"packages": tuple(sources)}, where)


def _built(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """`cls` out of `values`, where one name may stand for a list of one."""
    lists = {name for name, hint in typing.get_type_hints(cls).items() if hint == tuple[str, ...]}
    given = {key: [value] if key in lists and isinstance(value, str) else value for key, value in values.items()}
    if "licence" in given:
        raise InputError(f'{where}: the key "licence" is called license now; rename it')
    return from_mapping(cls, given, where)
