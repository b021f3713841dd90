"""Settings of `search-r3 data fresh`: packages, the earliest release date, and the filters.

A recipe is YAML with the fields below; `configs/data/fresh-2026.yaml` is one.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from search_r3.config import Config, at_least, from_mapping, read_mapping, require
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

KINDS = ("section", "module", "class", "function")
"""Kinds of document: a section of a README or of the documentation, or a module, class or function."""


@dataclass(frozen=True)
class Source:
    """One package."""

    path: str
    """A wheel, a source archive (.tar.gz, .zip, ...), a folder, or the name of an installed distribution."""
    sha256: str | None = None
    """Expected SHA-256 of the archive; any other is refused, so that a recipe is reproducible."""
    released: str | None = None
    """Release date, YYYY-MM-DD, for when no package index is available; otherwise the two must agree."""
    license: str | None = None
    """License, if the package's own metadata do not give one."""
    older: tuple[str, ...] = ()
    """Earlier releases, or packages it copied texts from: documents that also occur in these are dropped as old."""
    skip: tuple[str, ...] = ()
    """Folders or files to skip, such as copies of other packages in a folder not named "vendor"."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise InputError('"path" is empty; name a wheel, a source archive, a folder or an installed package')
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise InputError(f'{self.path}: "sha256" must be 64 hex digits, got {self.sha256!r}')
        if self.released is not None:
            parse_date(self.released, f'{self.path}: "released"')


@dataclass(frozen=True)
class FreshConfig:
    """A whole data set; every field except `packages` has a default."""

    packages: tuple[Source, ...]
    """Read in this order."""
    released_after: str = "2026-01-01"
    """YYYY-MM-DD: packages released before this day are refused."""
    allow_unknown_date: bool = False
    """Accept packages of unknown release date; the manifest and SOURCE.txt then say so."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of document to extract."""
    committee: tuple[str, ...] = ("bm25", "all-minilm-l6-v2")
    """Retrievers, named as in `evaluate --system`; a question is kept if any of them finds its document."""
    top: int = 50
    """... at this rank or better. Generous, since a strict filter favors the retriever that filters."""
    questions_per_package: int = 15
    """Maximum number of questions of each package; its other documents remain as distractors."""
    documents_per_package: int = 250
    """Maximum number of documents of each package, sampled by the seed, so that no package dominates the corpus."""
    named_share: float = 0.5
    """Share of the questions made from headings that name the package; short headings always do."""
    min_words: int = 25
    """Minimum number of words in a document."""
    max_chars: int = 2000
    """Maximum number of characters in a document, which is cut at a space or line end."""
    near: float = 0.8
    """Documents that share this fraction of their word triples are duplicates; the first is kept."""
    seed: int = 0
    """Seed of all random choices."""

    def __post_init__(self) -> None:
        if not self.packages:
            raise InputError("no package is named; give wheels, source archives, folders or installed packages")
        parse_date(self.released_after, "released_after")
        refuse_unknown(self.kinds, KINDS, "kinds", what="kind of document")
        if not self.kinds or not self.committee or len(set(self.committee)) < len(self.committee):
            raise InputError("kinds and committee must each name at least one, and no retriever twice")
        at_least(self, top=1, questions_per_package=1, documents_per_package=1, min_words=1, max_chars=200)
        require(0 <= self.named_share <= 1, "named_share", self.named_share, "from 0 to 1")
        require(0.5 <= self.near <= 1, "near", self.near, "from 0.5 to 1")


def parse_date(text: str, where: str) -> date:
    """A day written YYYY-MM-DD.

    Raises:
        InputError: it is not a date; the message starts with `where`.
    """
    try:
        return date.fromisoformat(text)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} must be a day such as 2026-01-31, got {text!r}") from error


def read_config(inputs: Sequence[str], changes: dict[str, Any] | None = None) -> FreshConfig:
    """The configuration from one YAML recipe, or from packages named individually.

    Args:
        inputs: one file ending in .yaml or .yml, or any values allowed for `Source.path`.
        changes: fields that override the recipe's; None values are ignored.

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
        raise InputError(f'{where}: "packages" must be a list, got {type(packages).__name__}')
    sources = []
    for number, one in enumerate(packages, start=1):
        given = {"path": one} if isinstance(one, str) else one
        if not isinstance(given, dict) or "path" not in given:
            raise InputError(f'{where}, package {number}: expected a path, or a mapping with "path", got {one!r}')
        sources.append(_built(Source, given, f"{where}, package {number}"))
    return _built(FreshConfig, values | {"packages": tuple(sources)}, where)


def _built(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """`cls` from `values`, where a single name is accepted for a list of one."""
    lists = {name for name, hint in typing.get_type_hints(cls).items() if hint == tuple[str, ...]}
    given = {key: [value] if key in lists and isinstance(value, str) else value for key, value in values.items()}
    if "licence" in given:
        raise InputError(f'{where}: the key "licence" is now called "license"; rename it')
    return from_mapping(cls, given, where)
