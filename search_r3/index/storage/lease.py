"""One writer at a time on object storage: a lease, which is a small object that only conditional writes change.

The holder records its identity and the expiry time, and a thread renews the lease three times per `SECONDS`. A killed
writer stops renewing, and the next one takes the lease over. A paused writer notices before its next commit that it
lost the lease, and stops. Clocks of different machines need not agree: a lease that looks expired is watched first, and
a holder that still renews it keeps it. (This is the pattern of Kubernetes' leader election:
https://kubernetes.io/docs/concepts/architecture/leases/.)

A lease cannot stop a process that freezes in the middle of a commit for longer than the lease lasts and then continues.
Duplicate rows left that way are reported by `search-r3 index --info` and removed by the next run.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from search_r3.errors import InputError
from search_r3.index.storage.location import IndexBusy, Remote, storage_errors
from search_r3.index.storage.object_store import open_objects

SECONDS = 30.0
"""How long a lease lasts; a killed writer blocks the next for at most one and a half times that."""
RENEW = 1 / 3
"""Fraction of the lease duration after which it is renewed."""
WATCH = 1 / 2
"""Fraction of the lease duration for which a lease that looks expired is watched before it is taken over."""
FRESH_SECONDS = 1.0
"""A lease renewed within this time is not checked again."""
POLL_SECONDS = 0.2
COURTESY_SECONDS = 0.5
"""How long a process that wants to write again backs off if another process is waiting."""
NAME, WAITING = ".writer.json", ".writer-waiting"

Version = dict[str, str]
"""Identifies a version of an object (obstore's UpdateVersion): S3 and Azure compare the `e_tag`, Google Cloud the
`version`."""

_watched: dict[str, tuple[Version, float]] = {}
"""Location -> the last seen version of the lease, and when that version was first seen (monotonic seconds)."""
_back_off_until: dict[str, float] = {}
"""Location -> time (monotonic seconds) until which this process leaves the lease to others."""


@dataclass(frozen=True)
class Holder:
    """The content of a lease: who holds it, since when, and when it expires unless renewed (seconds since 1970).

    `seconds` is its duration, `token` is random.
    """

    host: str = "an unknown host"
    process: int = 0
    since: float = 0.0
    expires: float = 0.0
    seconds: float = SECONDS
    token: str = ""
    released: bool = False

    def __str__(self) -> str:
        since, expires = (_clock(moment) for moment in (self.since, self.expires))
        return f"process {self.process} on {self.host}, since {since}; unless renewed, its lease expires at {expires}"


class WriteLock:
    """The right to change an index. In a folder, the operating system keeps it as long as the process lives."""

    def check(self) -> None:
        """Verify before a commit that the lock is still held: a lease can be lost."""


class Lease(WriteLock):
    """The right to change the index at `location`, held from `acquire` to `release`.

    Args:
        location: the index.
        seconds: duration of the lease unless it is renewed; `SECONDS` by default.
    """

    def __init__(self, location: Remote, seconds: float = 0.0) -> None:
        self.location, self.seconds = location, seconds or SECONDS
        with storage_errors(location):
            self.store = open_objects(location)
        now = time.time()
        self.mine = Holder(socket.gethostname(), os.getpid(), now, now + self.seconds, self.seconds, uuid.uuid4().hex)
        self._version: Version = {}
        self._renewed = (0.0, 0.0)
        self._failed = False
        self._lost: Holder | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self, wait: float = 0.0) -> None:
        """Take the lease, and keep renewing it.

        Args:
            wait: seconds to wait for another writer that is alive. One that seems dead is watched for half the lease
                duration in any case.

        Raises:
            IndexBusy: another writer holds it; the message names that writer.
            StorageError: the storage cannot be reached, or refuses.
        """
        time.sleep(max(0.0, _back_off_until.pop(str(self.location), 0.0) - time.monotonic()))
        started = time.monotonic()
        announced = False
        while (holder := self._take()) is not None:
            patience = wait if self._is_alive(holder) else wait + 2 * WATCH * holder.seconds
            if time.monotonic() - started >= patience:
                raise IndexBusy(f"another writer is using {self.location} ({holder}); wait until it is done")
            if wait and not announced:
                announced = True
                with storage_errors(self.location):
                    self._obstore.put(self.store, WAITING, self.mine.token.encode())
            time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))
        self._thread.start()

    def check(self) -> None:
        """Verify that the lease is still held; call this before each commit.

        Raises:
            IndexBusy: another writer has taken it over.
            StorageError: the storage does not answer.
        """
        with self._lock:
            if self._lost is None and not self._fresh():
                self._renew()
            if self._lost is not None:
                raise IndexBusy(
                    f"this process did not renew its lease for over {self.seconds:g} seconds, and another "
                    f"writer has taken over {self.location} ({self._lost}); what was committed is kept: run the same "
                    "command again later"
                )

    def release(self) -> None:
        """Let the next writer in. Never fails: a lease that cannot be released expires."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(self.seconds)
        with suppress(InputError, *self._errors), self._lock:
            if self._failed:  # the storage is unavailable; trying again would only keep the user waiting
                return
            if self._lost is None:
                self._put(self._content(released=True), self._version)
            if self._obstore.get(self.store, WAITING).bytes():
                self._obstore.delete(self.store, WAITING)
                _back_off_until[str(self.location)] = time.monotonic() + COURTESY_SECONDS

    @property
    def _obstore(self) -> Any:
        import obstore

        return obstore

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        from obstore.exceptions import BaseError

        return BaseError, FileNotFoundError, OSError

    def _content(self, released: bool = False) -> bytes:
        """The lease as stored. The e_tag is often a hash of the content, so a nonce makes each one unique."""
        record = asdict(self.mine) | {"expires": time.time() + self.seconds, "released": released}
        return json.dumps(record | {"nonce": uuid.uuid4().hex}).encode()

    def _put(self, content: bytes, mode: Any) -> bool:
        """Write conditionally; False if the condition is not met."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        self._failed = True
        with storage_errors(self.location):
            try:
                self._version = _version(self._obstore.put(self.store, NAME, content, mode=mode))
            except (AlreadyExistsError, PreconditionError):
                # If the answer to a successful write was lost, its retry is refused.
                holder, version = self._read()
                if holder is None or holder.token != self.mine.token or holder.released:
                    self._failed = False
                    return False
                self._version = version
        self._failed = False
        self._renewed = (time.monotonic(), time.time())
        return True

    def _read(self) -> tuple[Holder | None, Version]:
        """The holder of the lease and the object's version; None and {} if there is no such object."""
        with storage_errors(self.location):
            try:
                lease = self._obstore.get(self.store, NAME)
                content, version = bytes(lease.bytes()), _version(lease.meta)
            except FileNotFoundError:
                return None, {}
        try:
            record = json.loads(content)
            return Holder(**{name: record[name] for name in Holder.__dataclass_fields__}), version
        except (ValueError, KeyError, TypeError):  # not written by this program; taken over if it does not change
            return Holder(), version

    def _take(self) -> Holder | None:
        """Try to take the lease; returns the holder if another writer has it."""
        holder, version = self._read()
        if holder is None:
            return None if self._put(self._content(), "create") else Holder()
        if _watched.get(str(self.location), ({}, 0.0))[0] != version:
            _watched[str(self.location)] = (version, time.monotonic())
        unchanged = time.monotonic() - _watched[str(self.location)][1]
        if holder.released or (not self._is_alive(holder) and unchanged >= WATCH * holder.seconds):
            return None if self._put(self._content(), version) else holder
        return holder

    def _is_alive(self, holder: Holder) -> bool:
        """Whether the lease is valid by this machine's clock. An expiry far ahead only means that clocks disagree."""
        return not holder.released and 0.0 < holder.expires - time.time() < 2 * holder.seconds

    def _fresh(self) -> bool:
        """Whether it was renewed just now by both clocks, as one of them stops while a machine is suspended."""
        monotonic, clock = self._renewed
        return max(time.monotonic() - monotonic, abs(time.time() - clock)) < FRESH_SECONDS

    def _renew(self) -> None:
        """Renew, or record who took the lease over. The caller holds the lock."""
        if not self._put(self._content(), self._version):
            self._lost = self._read()[0] or Holder()

    def _keep(self) -> None:
        while not self._ended.wait(RENEW * self.seconds):
            with suppress(InputError, *self._errors), self._lock:
                if self._lost is not None:
                    return
                self._renew()


def _version(meta: Any) -> Version:
    """The version in the result of a write or a read, without missing values, which obstore does not accept."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S")
