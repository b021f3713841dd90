"""API keys: `Authorization: Bearer KEY`, compared in constant time; what a key may do, and how often."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from search_r3.errors import InputError
from search_r3.files import decode_text
from search_r3.server.errors import ApiError

RATE = re.compile(r"([1-9][0-9]{0,8})/minute")


@dataclass(frozen=True)
class ApiKey:
    """A key, and what it allows.

    Raises:
        InputError: the key is empty, or has spaces or characters beyond ASCII.
    """

    key: str = field(repr=False)
    may_write: bool = True
    """Whether it may add and delete documents."""
    per_minute: int | None = None
    """Requests per minute, as many of them at once; None is no limit."""

    def __post_init__(self) -> None:
        key = self.key
        if not key or not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
            raise InputError("an API key is empty or has spaces or characters beyond ASCII; give printable ones")


class Keys:
    """The accepted keys; one given as a string may do everything. Compares digests, so that timing reveals nothing
    about a key. The rates are counted from when this is made. Use it from one thread.

    Args:
        clock: seconds that only increase.
    """

    def __init__(self, keys: Iterable[str | ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = [ApiKey(key) if isinstance(key, str) else key for key in keys]
        self._digests = [_digest(key.key.encode()) for key in self._keys]
        self._left = [(float(key.per_minute or 0), clock()) for key in self._keys]  # requests left, and since when
        self._clock = clock

    @property
    def limited(self) -> bool:
        """Whether a key has a rate."""
        return any(key.per_minute is not None for key in self._keys)

    @property
    def read_only(self) -> bool:
        """Whether a key may not write."""
        return any(not key.may_write for key in self._keys)

    def allow(self, authorization: str | None) -> bool:
        """Whether a request with this header has an accepted key; it is not counted."""
        try:
            self._find(authorization)
        except ApiError:
            return False
        return True

    def check(self, authorization: str | None, *, write: bool = False) -> None:
        """Count a request with this header; without keys, everything is accepted.

        Args:
            write: whether it changes the index.

        Raises:
            ApiError: 401 without an accepted key, 403 if the key may only read, 429 if it was used too often.
        """
        number = self._find(authorization)
        if number is None:
            return
        key = self._keys[number]
        if write and not key.may_write:
            raise ApiError(403, "this API key may only read; changes need one that may write", "read_only_key")
        if key.per_minute is not None:
            self._count(number, key.per_minute)

    def _find(self, authorization: str | None) -> int | None:
        """The number of the header's key; None without keys."""
        if not self._digests:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise ApiError(401, "no API key was given; send the header Authorization: Bearer KEY", "missing_api_key")
        digest = _digest(given.strip().encode("latin-1", "replace"))
        equal = [hmac.compare_digest(digest, known) for known in self._digests]
        if not sum(equal):
            raise ApiError(401, "unknown API key; check it with whoever runs the server", "invalid_api_key")
        return equal.index(True)

    def _count(self, number: int, per_minute: int) -> None:
        """Take one of the requests that are left, which come back evenly over a minute."""
        left, since = self._left[number]
        now = self._clock()
        left = min(float(per_minute), left + (now - since) * per_minute / 60)
        if left < 1:
            self._left[number] = left, now
            wait = math.ceil((1 - left) * 60 / per_minute)
            message = f"this API key allows {per_minute:,} requests a minute; try again in {wait} seconds"
            raise ApiError(429, message, "rate_limit_exceeded", retry_after=wait)
        self._left[number] = left - 1, now


def read_keys(file: Path | None, variable: str | None) -> tuple[ApiKey, ...]:
    """The keys of a file and of an environment variable's value (comma-separated, which may do everything).

    A line of the file is a key, perhaps followed by `read` (it may not change the index) and a rate such as
    `60/minute`; # begins a comment. The first of equal keys counts.

    Raises:
        InputError: the file cannot be read, has no keys, or has something else behind a key.
    """
    keys = [ApiKey(key.strip()) for key in (variable or "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = decode_text(file.read_bytes(), file).splitlines()
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read as a list of API keys ({error}); give one key per line"
            ) from error
        listed = [
            _parsed(line.split(), f"{file}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not listed:
            raise InputError(f"{file} has no API keys; give one key per line, or omit the option")
        keys += listed
    first = {key.key: key for key in reversed(keys)}
    return tuple(first[name] for name in dict.fromkeys(key.key for key in keys))


def _parsed(words: list[str], place: str) -> ApiKey:
    """The key of a line. Messages name no word of it, as it may be a key."""
    may_write, per_minute = True, None
    for word in words[1:]:
        if word.startswith("#"):
            break
        if word in ("read", "write"):
            may_write = word == "write"
        elif rate := RATE.fullmatch(word):
            per_minute = int(rate[1])
        else:
            raise InputError(
                f"{place}: expected one key, and behind it nothing, read or write, or a rate such as 60/minute"
            )
    try:
        return ApiKey(words[0], may_write, per_minute)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
