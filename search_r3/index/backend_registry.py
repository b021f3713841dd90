"""Which backend an index is stored by: the one named, else the one that the folder holds, else LanceDB.

A package adds a backend by an entry point of the group `search_r3.index_backends`, a program by `register_backend`.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, get_args

from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.index.index_backend import Capability, IndexBackend
from search_r3.index.index_info import IndexInfo
from search_r3.index.numpy_backend import NumpyBackend
from search_r3.index.storage.location import Place
from search_r3.index.table.lance_backend import LanceBackend
from search_r3.index.table.lance_table import check_there, has_versions
from search_r3.plugins import Registry, pick

DEFAULT = LanceBackend
BUILTIN: dict[str, type[IndexBackend]] = {backend.name: backend for backend in (LanceBackend, NumpyBackend)}
MARKER = "backend.txt"
"""The file in an index's folder that names its backend; there is none in a folder of LanceDB's."""
PORTABLE = frozenset[Capability]({"text", "filter"})
"""Capabilities that any backend may have; the others are used through LanceDB's own table."""
NOT_AN_INDEX = "{} is not a search-r3 index; give the folder that build_index wrote"
_registered: dict[str, type[IndexBackend]] = {}


def register_backend(backend: type[IndexBackend]) -> None:
    """Have indexes of this backend opened and made in this process.

    Raises:
        InputError: it is not an `IndexBackend`, or its name or a capability cannot be used.
    """
    checked = _checked(None, backend)
    _registered[checked.name] = checked


def backend_named(name: str) -> type[IndexBackend]:
    """The backend of this name: ours, of an installed package, or registered. Raises InputError if there is none."""
    return pick("index backend", name, {**BUILTIN, **plugin_backends(), **_registered})


def choose_backend(place: Place, name: str | None = None) -> type[IndexBackend]:
    """The backend of the index at `place`, or for a new one there: the one called `name`, by default LanceDB.

    Raises:
        InputError: there is no such backend, or `place` holds an index of another, or is on object storage, where only
            LanceDB can write.
    """
    chosen = None if name is None else backend_named(name)
    if not isinstance(place, Path):
        (chosen or DEFAULT).require("object_storage", "object storage")
        return chosen or DEFAULT
    held = _backend_at(place)
    if held is not None and chosen is not None and held is not chosen:
        raise InputError(
            f"{place} holds an index of the backend {held.name!r}, not {chosen.name!r}; give another folder"
        )
    return held or chosen or DEFAULT


def _backend_at(place: Path) -> type[IndexBackend] | None:
    """The backend of the index in the folder; None if it holds none."""
    try:
        return backend_named((place / MARKER).read_text(encoding="utf-8").strip())
    except InputError as error:
        raise InputError(f"the index {place} cannot be opened: {error}; install the package that has it") from error
    except (OSError, UnicodeDecodeError):  # there is no such file in a folder of LanceDB's
        with suppress(OSError):  # opening it will say what is wrong
            return DEFAULT if has_versions(place) else None
    return None


def create_backend(backend: type[IndexBackend], place: Path, info: IndexInfo) -> IndexBackend:
    """A new, empty index of any backend but LanceDB in the folder, which says from then on which one it is of."""
    atomic_write_text(place / MARKER, f"{backend.name}\n")
    return _placed(backend.create(place, info), place)


def open_backend(place: Place, *, follow: bool = True, snapshot: bool = False) -> IndexBackend:
    """The index at `place`, opened.

    Args:
        follow: see what others commit, where the backend can; if not, it stays at the version that it was opened at.
        snapshot: open it for a few searches, sooner where the backend can.

    Raises:
        InputError: there is none, or it is damaged.
    """
    check_there(place, place)
    backend = choose_backend(place)
    opened: IndexBackend | None
    if backend is LanceBackend:
        opened = LanceBackend.open_snapshot(place) if snapshot else LanceBackend.open(place, follow=follow)
    else:
        assert isinstance(place, Path)  # `choose_backend` refuses others
        opened = open_portable(backend, place)
    if opened is None:
        raise InputError(NOT_AN_INDEX.format(place))
    return opened


def open_lance(place: Place) -> LanceBackend:
    """The LanceDB index at `place`, opened to be changed. Raises InputError if there is none, or it is damaged."""
    if (opened := LanceBackend.open(place)) is None:
        raise InputError(NOT_AN_INDEX.format(place))
    return opened


def open_portable(backend: type[IndexBackend], place: Path) -> IndexBackend | None:
    """The index of any backend but LanceDB in the folder, or None if it holds none yet."""
    version = time.monotonic_ns()
    found = backend.open(place)
    if found is not None:
        _placed(found, place).version = version
    return found


def _placed(backend: IndexBackend, place: Path) -> IndexBackend:
    backend.place = backend.path = place
    return backend


@cache
def plugin_backends() -> dict[str, type[IndexBackend]]:
    """The backends of installed packages. Raises InputError if one cannot be used."""
    return Registry("index backend", "index_backends", BUILTIN, _checked).added()


def _checked(name: str | None, backend: Any) -> type[IndexBackend]:
    what = "the index backend" if name is None else f"the index backend {name!r}"
    if not (isinstance(backend, type) and issubclass(backend, IndexBackend)):
        raise InputError(f"{what} is {backend!r}; expected a subclass of search_r3.index.IndexBackend")
    given = getattr(backend, "name", "")
    if not given or given in BUILTIN or name not in (None, given):
        raise InputError(f"{what} is named {given!r}; give it a name of its own, which its entry point has too")
    if strange := sorted(backend.capabilities - PORTABLE):
        known = ", ".join(sorted(PORTABLE))
        raise InputError(f"{what} has the capability {strange[0]!r}; it may have: {known} (of {get_args(Capability)})")
    return backend
