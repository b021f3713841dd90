"""The names of the indexes that one server searches. The first is the default, which requests need not name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from search_r3.errors import InputError

NAME = re.compile(r"[^\x00-\x20=\x7f][^\x00-\x1f=\x7f]{0,99}")


def name_of(path: str) -> str:
    """The name of an index that was given none: the last part of its path."""
    return PurePosixPath(path).name or Path(path).resolve().name


def name_paths(paths: Iterable[str], named: Iterable[str] = ()) -> dict[str, str]:
    """Name -> path, in this order, the first being the default.

    Args:
        paths: indexes that are named after their folders.
        named: indexes with names, as in "notes=~/indexes/2026".

    Raises:
        InputError: a name is missing, has characters that names cannot have, or is used twice.
    """
    found: dict[str, str] = {}
    for name, path in [*((name_of(path), path) for path in paths), *map(_split, named)]:
        if name in found:
            raise InputError(
                f"{found[name]} and {path} would both be served as {name!r}; name one of them: --index NAME={path}"
            )
        found[name] = path
    return found


def _split(given: str) -> tuple[str, str]:
    name, _, path = given.partition("=")
    if not NAME.fullmatch(name) or not path:
        raise InputError(f"--index {given}: expected a name and a folder, as in --index notes=notes-index")
    return name, path
