"""Stamps of a source's input files, which tell whether a file has changed, and their hashes for the manifest.

Names are relative to the source's own folder, so neither contains local paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search_r3.errors import InputError

Files = Mapping[str, Path]
"""Name in the manifest -> file."""


def below(folder: Path, files: list[Path], prefix: str = "") -> dict[str, Path]:
    """The files by their path relative to `folder`, prefixed with `prefix`."""
    return {prefix + file.relative_to(folder).as_posix(): file for file in files}


def stamps(files: Files) -> list[list[Any]]:
    """[name, path, bytes, modification time in ns] of each file, sorted by name; a missing file has no size."""
    found: list[list[Any]] = []
    for name in sorted(files):
        try:
            status = files[name].stat()
            found.append([name, str(files[name].absolute()), status.st_size, status.st_mtime_ns])
        except OSError:
            found.append([name, str(files[name].absolute()), None, None])
    return found


def described(files: Files) -> dict[str, Any]:
    """Number of files, their bytes, and a SHA-256: of a single file itself, else of the lines that `sha256sum` prints
    for the files sorted by name.

    Raises:
        InputError: a file cannot be read.
    """
    digests: dict[str, str] = {}
    size = 0
    for name in sorted(files):
        try:
            with open(files[name], "rb") as handle:
                digests[name] = hashlib.file_digest(handle, "sha256").hexdigest()
                size += handle.tell()
        except PermissionError:
            digests[name] = "unreadable"  # the source's reader has refused or skipped it
        except OSError as error:
            raise InputError(f"{files[name]} cannot be read: {error.strerror or error}") from error
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    whole = next(iter(digests.values())) if len(digests) == 1 else hashlib.sha256(lines.encode()).hexdigest()
    return {"files": len(digests), "bytes": size, "sha256": whole}
