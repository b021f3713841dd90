"""What a source reads: stamps that tell whether a file has changed, and hashes for the manifest.

Names are below the source's own folder, so neither says where on a machine the files lie.
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
    """The files by their names below `folder`, behind `prefix`."""
    return {prefix + file.relative_to(folder).as_posix(): file for file in files}


def stamps(files: Files) -> list[list[Any]]:
    """[name, place, bytes, time of change in ns] of each file, in the names' order; a file that is gone has no size."""
    found: list[list[Any]] = []
    for name in sorted(files):
        try:
            status = files[name].stat()
            found.append([name, str(files[name].absolute()), status.st_size, status.st_mtime_ns])
        except OSError:
            found.append([name, str(files[name].absolute()), None, None])
    return found


def described(files: Files) -> dict[str, Any]:
    """How many files, their bytes, and a SHA-256: of the one file, else of the lines that `sha256sum` prints for them
    in the order of their names.

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
            digests[name] = "unreadable"  # whoever reads the source has refused or skipped it
        except OSError as error:
            raise InputError(f"{files[name]} cannot be read: {error.strerror or error}") from error
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    whole = next(iter(digests.values())) if len(digests) == 1 else hashlib.sha256(lines.encode()).hexdigest()
    return {"files": len(digests), "bytes": size, "sha256": whole}
