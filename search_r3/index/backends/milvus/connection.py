"""Connections to Milvus, one for each server and process, and its errors in one line.

A token (`user:password`, or an API key) is read from the variable MILVUS_TOKEN and never printed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from search_r3.errors import InputError
from search_r3.files import check_temporary_folder
from search_r3.index.storage.deadline import DEADLINE_VARIABLE, given_deadline
from search_r3.index.storage.location import CollectionUri, IndexBusy, StorageError
from search_r3.optional import optional_imports

TOKEN_VARIABLE = "MILVUS_TOKEN"
SECONDS, LITE_SECONDS = 30.0, 300.0
"""For one request with its retries, to a server and to Milvus Lite, which works in this process and may lack a core. It
is given with each, as pymilvus has no deadline of its own (3.0.2: that of the client is only for connecting) and
repeats a request up to 75 times."""
LITE_MEMORY = 4 * 2**20
"""Bytes of rows that Milvus Lite keeps unsorted in memory. Every search turns each of their vectors into a list of
Python numbers (3.2.2, `MemTable.to_search_snapshot`): with its own 128 MB, a search among 6,000 new rows takes longer
than all others together."""
CONNECT_TIMEOUT = 10.0  # seconds
NOT_FOUND = 100
"""Milvus's code for a collection that is not there."""
TIMED_OUT = re.compile(r"DEADLINE_EXCEEDED|Deadline Exceeded|Retry timeout")
"""In pymilvus's messages for a passed deadline; it does not repeat such a request."""
_clients: dict[tuple[str, str], Any] = {}
"""By server and database."""
_connecting = threading.Lock()


def seconds_of(uri: CollectionUri) -> float:
    """Seconds that one request to the server may take: SEARCH_R3_STORAGE_DEADLINE, if it is set.

    Raises:
        InputError: that is not a number of seconds above 0.
    """
    return given_deadline() or (LITE_SECONDS if uri.is_lite else SECONDS)


class CollectionGone(RuntimeError):
    """The collection was dropped, as after an exchange; whoever has it open opens what is there now."""


class RequestTimeout(StorageError):
    """The server did not answer in time. It may have done, or still do, what was asked for."""


def connect(uri: CollectionUri) -> Any:
    """The `pymilvus.MilvusClient` of the server, shared by all threads of this process.

    Raises:
        StorageError: the server cannot be reached, or another process has the folder of Milvus Lite open.
        InputError: pymilvus is not installed.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # or it prints that Milvus Lite finds its pings too frequent
    os.environ.setdefault("MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES", str(LITE_MEMORY))  # read when it is imported
    with optional_imports("milvus", "an index in Milvus"):
        from pymilvus import MilvusClient

    for logger in ("pymilvus", "milvus_lite"):  # they log a traceback for every error that they raise
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    key = uri.server, uri.database
    with _connecting, milvus_errors(uri):
        if key not in _clients:
            options = {"token": os.environ.get(TOKEN_VARIABLE, ""), "db_name": uri.database}
            _clients[key] = MilvusClient(uri.server, timeout=CONNECT_TIMEOUT, **options)
        return _clients[key]


@contextmanager
def milvus_errors(uri: CollectionUri) -> Iterator[None]:
    """Turn Milvus's errors into StorageError with one line, or CollectionGone; others pass."""
    from grpc import RpcError
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except InputError:
        raise
    except (MilvusException, RpcError) as error:
        if getattr(error, "code", None) == NOT_FOUND:
            raise CollectionGone(f"{uri}: the collection is gone") from error
        reason = " ".join(str(getattr(error, "message", "") or error).split())[:200]
        kind = RequestTimeout if _timed_out(reason) else StorageError
        raise kind(f"{uri}: {_advice(uri, reason)}") from error


def _timed_out(reason: str) -> bool:
    return TIMED_OUT.search(reason) is not None and "unavailable" not in reason.lower()


def _advice(uri: CollectionUri, reason: str) -> str:
    if _timed_out(reason):
        return (
            f"{uri.server} did not answer within {seconds_of(uri):g} s; try again when it is less busy, or set "
            f"{DEADLINE_VARIABLE} to more seconds"
        )
    if "Open local milvus failed" in reason:
        return (
            f"Milvus Lite cannot open {uri.server}: one process at a time may; if another has it open, let that one "
            "serve it, or start `milvus-lite server` on it and use milvus://HOST:PORT/NAME"
        )
    if any(words in reason.lower() for words in ("unauthenticated", "auth check", "permission denied")):
        return f"{uri.server} refuses the token; set {TOKEN_VARIABLE}"
    if "Fail connecting" in reason or "illegal connection" in reason.lower() or "unavailable" in reason.lower():
        return f"{uri.server} cannot be reached; check the address and that Milvus is running"
    return f"Milvus failed ({reason})"


@contextmanager
def exclusive(uri: CollectionUri, wait: float = 0.0) -> Iterator[None]:
    """One writer of this user on this machine at a time; Milvus itself has no lock.

    Raises:
        IndexBusy: another one is writing, and was not done within `wait` seconds.
        InputError: there is no folder for temporary files.
    """
    check_temporary_folder("writing to Milvus")
    user = os.getuid() if hasattr(os, "getuid") else 0
    name = f"{user}-{hashlib.sha256(str(uri).encode()).hexdigest()[:16]}"
    lock = FileLock(os.path.join(tempfile.gettempdir(), f"search-r3-{name}.lock"), timeout=wait)
    try:
        lock.acquire()
    except Timeout as error:
        raise IndexBusy(f"another build is writing to {uri}; wait until it is done") from error
    try:
        yield
    finally:
        lock.release()
