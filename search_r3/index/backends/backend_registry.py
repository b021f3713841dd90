"""Which backend stores an index: the one named, else the one that made the existing index, else LanceDB.

A package adds a backend by an entry point of the group `search_r3.index_backends`, a program by `register_backend`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, get_args

from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.index.backends.index_backend import Capability, IndexBackend
from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.backends.lance.lance_table import TABLE, check_there, has_versions
from search_r3.index.backends.milvus.milvus_backend import MilvusBackend
from search_r3.index.backends.numpy_backend import NumpyBackend
from search_r3.index.index_info import IndexInfo
from search_r3.index.storage.location import CollectionUri, Location, open_remote
from search_r3.plugins import Registry, pick

DEFAULT = LanceBackend
BUILTIN: dict[str, type[IndexBackend]] = {
    backend.name: backend for backend in (LanceBackend, NumpyBackend, MilvusBackend)
}
MARKER = "backend.txt"
"""The file in an index's folder that names its backend; LanceDB's folders do not have one."""
PORTABLE = frozenset[Capability]({"text", "filter"})
"""Capabilities that any backend may have; the others are used through the LanceDB table."""
NOT_AN_INDEX = "{} is not a search-r3 index; give the folder that build_index wrote"
_registered: dict[str, type[IndexBackend]] = {}


def register_backend(backend: type[IndexBackend]) -> None:
    """Make this backend available in this process.

    Raises:
        InputError: it is not an `IndexBackend`, or its name or a capability is not allowed.
    """
    checked = _checked(None, backend)
    _registered[checked.name] = checked


def backend_named(name: str) -> type[IndexBackend]:
    """The backend of this name: built in, from an installed package, or registered. Raises InputError if unknown."""
    return pick("index backend", name, {**BUILTIN, **plugin_backends(), **_registered})


def choose_backend(location: Location, name: str | None = None) -> type[IndexBackend]:
    """The backend of the index at `location`, or for a new index there: the one called `name`, by default LanceDB.

    Raises:
        InputError: there is no such backend, `location` has an index of another backend, or it is on object storage,
            which only LanceDB supports.
    """
    chosen = None if name is None else backend_named(name)
    if isinstance(location, CollectionUri):
        if chosen not in (None, MilvusBackend):
            raise InputError(f"{location} is a collection of Milvus, not an index of the backend {name!r}")
        return MilvusBackend
    if chosen is MilvusBackend:
        raise InputError(f"{location} is not in Milvus; give its address, as in milvus://127.0.0.1:19530/notes")
    if not isinstance(location, Path):
        (chosen or DEFAULT).require("object_storage", "object storage")
        return chosen or DEFAULT
    existing = _backend_at(location)
    if existing is not None and chosen is not None and existing is not chosen:
        raise InputError(
            f"{location} holds an index of the backend {existing.name!r}, not {chosen.name!r}; give another folder"
        )
    return existing or chosen or DEFAULT


def _backend_at(location: Path) -> type[IndexBackend] | None:
    """The backend of the index in the folder; None if there is no index."""
    try:
        return backend_named((location / MARKER).read_text(encoding="utf-8").strip())
    except InputError as error:
        raise InputError(f"the index {location} cannot be opened: {error}; install its package") from error
    except (OSError, UnicodeDecodeError):  # LanceDB's folders have no such file
        with suppress(OSError):  # opening it will report what is wrong
            return DEFAULT if has_versions(location) else None
    return None


def is_index(location: Location) -> bool:
    """Whether there is an index at `location`, of whichever backend, readable or not. Raises StorageError."""
    if isinstance(location, Path):
        return (location / MARKER).is_file() or has_versions(location)
    if isinstance(location, CollectionUri):
        return MilvusBackend.open(location) is not None
    return open_remote(location, TABLE, None) is not None


def create_backend(
    backend: type[IndexBackend],
    location: Location,
    info: IndexInfo,
    create: Callable[[Any, IndexInfo], IndexBackend] | None = None,
) -> IndexBackend:
    """Create an empty index of any backend but LanceDB, by `create` if it is given, and record the backend's name if it
    is in a folder."""
    if isinstance(location, Path):
        atomic_write_text(location / MARKER, f"{backend.name}\n")
    made = (create or backend.create)(location, info)  # type: ignore[arg-type]  # of the kind that it stores
    return _placed(made, location)


def open_backend(location: Location, *, follow: bool = True, snapshot: bool = False) -> IndexBackend:
    """The index at `location`, opened.

    Args:
        follow: pick up other writers' commits, if the backend can; otherwise it stays at the version that was opened.
        snapshot: open it for only a few searches, faster if the backend can.

    Raises:
        InputError: there is no index, or it is damaged.
    """
    check_there(location, location)
    backend = choose_backend(location)
    opened: IndexBackend | None
    if backend is LanceBackend:
        opened = LanceBackend.open_snapshot(location) if snapshot else LanceBackend.open(location, follow=follow)
    else:
        opened = open_portable(backend, location)
    if opened is None and isinstance(location, CollectionUri):
        raise InputError(f"{location} does not exist; make it first (search-r3 index SOURCE --into {location})")
    if opened is None:
        raise InputError(NOT_AN_INDEX.format(location))
    return opened


def open_lance(location: Location) -> LanceBackend:
    """The LanceDB index at `location`, opened to be changed. Raises InputError if there is none, or it is damaged."""
    if (opened := LanceBackend.open(location)) is None:
        raise InputError(NOT_AN_INDEX.format(location))
    return opened


def open_portable(backend: type[IndexBackend], location: Location) -> IndexBackend | None:
    """Open the index of any backend but LanceDB at `location`; None if there is none yet."""
    version = time.monotonic_ns()
    opened = backend.open(location)  # type: ignore[arg-type]  # of the kind that it stores
    if opened is not None:
        _placed(opened, location).version = version
    return opened


def _placed(backend: IndexBackend, location: Location) -> IndexBackend:
    backend.location = backend.path = location  # type: ignore[assignment]  # of the kind that it stores
    return backend


@cache
def plugin_backends() -> dict[str, type[IndexBackend]]:
    """The backends of installed packages. Raises InputError if one is not usable."""
    return Registry("index backend", "index_backends", BUILTIN, _checked).added()


def _checked(name: str | None, backend: Any) -> type[IndexBackend]:
    what = "the index backend" if name is None else f"the index backend {name!r}"
    if not (isinstance(backend, type) and issubclass(backend, IndexBackend)):
        raise InputError(f"{what} is {backend!r}; expected a subclass of search_r3.index.IndexBackend")
    given = getattr(backend, "name", "")
    if not given or given in BUILTIN or name not in (None, given):
        raise InputError(f"{what} is named {given!r}; give it a unique name, the same as its entry point's")
    if strange := sorted(backend.capabilities - PORTABLE):
        known = ", ".join(sorted(PORTABLE))
        raise InputError(f"{what} has the capability {strange[0]!r}; it may have: {known} (of {get_args(Capability)})")
    return backend
