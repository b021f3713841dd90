"""Which local server has which index: a small file in the cache folder, so that `search-r3 ask` finds a running server.

The file is named after the index's folder and holds the server's address, its process, and the index's name there; it
is removed when the server stops. One that a killed server left is recognized by its process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from search_r3.files import atomic_write_text
from search_r3.model.resolve import optional_cache_dir


@dataclass(frozen=True)
class RunningServer:
    """A server's address, and the name by which it serves an index."""

    url: str
    index: str


@contextmanager
def announced(index: str | Path, url: str, name: str) -> Iterator[None]:
    """A context in which `running_server(index)` finds the server at `url`, which serves it as `name`, if the cache
    folder can be written."""
    file = _file(index)
    server = RunningServer(url, name)
    written = False
    if file is not None:
        with suppress(OSError):
            atomic_write_text(file, json.dumps({**asdict(server), "process": os.getpid()}))
            written = True
    try:
        yield
    finally:
        if written and file is not None and _read(file) == (server, os.getpid()):  # else another server has it by now
            with suppress(OSError):
                file.unlink()


def running_server(index: str | Path) -> RunningServer | None:
    """The server of this machine that was started last for the index in this folder, if it runs."""
    file = _file(index)
    if file is None or (found := _read(file)) is None:
        return None
    server, process = found
    return server if _runs(process) else None


def _file(index: str | Path) -> Path | None:
    cache = optional_cache_dir()
    place = str(Path(index).resolve()).encode("utf-8", "surrogateescape")
    return None if cache is None else cache / "servers" / f"{hashlib.sha256(place).hexdigest()[:16]}.json"


def _read(file: Path) -> tuple[RunningServer, int] | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return RunningServer(str(record["url"]), str(record["index"])), int(record["process"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True  # another user's
    except (OSError, OverflowError):
        return False
    return True
