"""API keys: `Authorization: Bearer KEY`, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from search_r3.errors import InputError
from search_r3.files import decode_text
from search_r3.server.errors import ApiError


class Keys:
    """The accepted keys. Compares digests, so that timing reveals nothing about a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def allow(self, authorization: str | None) -> bool:
        """Whether `check` accepts a request with this header."""
        try:
            self.check(authorization)
        except ApiError:
            return False
        return True

    def check(self, authorization: str | None) -> None:
        """Raise ApiError 401 for a header without an accepted key; without keys, everything is accepted."""
        if not self._digests:
            return
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise ApiError(401, "no API key was given; send the header Authorization: Bearer KEY", "missing_api_key")
        digest = _digest(given.strip().encode("latin-1", "replace"))
        if not sum([hmac.compare_digest(digest, known) for known in self._digests]):
            raise ApiError(401, "unknown API key; check it with whoever runs the server", "invalid_api_key")


def read_keys(file: Path | None, variable: str | None) -> tuple[str, ...]:
    """The keys of a file (one per line, # begins a comment) and of an environment variable's value (comma-separated).

    Raises:
        InputError: the file cannot be read or has no keys.
    """
    keys = [key.strip() for key in (variable or "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = decode_text(file.read_bytes(), file).splitlines()
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read as a list of API keys ({error}); give one key per line"
            ) from error
        listed = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not listed:
            raise InputError(f"{file} has no API keys; give one key per line, or omit the option")
        keys += listed
    return tuple(dict.fromkeys(keys))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
