"""A folder in which a long run saves finished work, so that a killed process loses at most one block.

`run.json` identifies the run, `finished.jsonl` holds complete blocks of lines, `spent.json` the amounts spent so far.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from search_r3.data.io.jsonl import read_jsonl
from search_r3.errors import InputError
from search_r3.files import atomic_write_text

_LAST = "last of its block"


class ShardCheckpoints:
    """The finished blocks of one run, locked against other processes while this object is open.

    Args:
        folder: created if it does not exist; kept until `remove`.
        record: everything that determines the result, as JSON; a folder with a different record is refused.

    Raises:
        InputError: the folder belongs to another run, is in use by another process, or cannot be written.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self._lines = folder / "finished.jsonl"
        written = json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        before = read_json(folder / "run.json")
        if before is None:
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder} is a file, but a folder is needed there for unfinished work; move it away")
            atomic_write_text(folder / "run.json", written)
        else:
            other = differing(before, json.loads(written))
            if other:
                raise InputError(
                    f"{folder} belongs to another run ({', '.join(other)} differ); remove it to start over"
                )
        self._lock = FileLock(str(folder / "lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{folder} is in use by another process; wait for it, or stop it") from None

    def finished(self, ids: Sequence[str], of: str = "documents") -> list[dict[str, Any]]:
        """The lines of complete blocks; a truncated line and the rest of its block are dropped.

        Args:
            ids: the expected ids, in order; the lines must be a prefix of them.
            of: what the ids identify, for the message.

        Raises:
            InputError: the lines have other ids.
        """
        if not self._lines.is_file():
            return []
        whole = self._lines.read_bytes().rpartition(b"\n")[0]
        self._lines.write_bytes(whole + b"\n" if whole else b"")
        lines = [value for _, value in read_jsonl(self._lines)] if whole else []
        while lines and not lines[-1].get(_LAST):
            lines.pop()
        if [line["id"] for line in lines] != list(ids[: len(lines)]):
            raise InputError(f"{self.folder} belongs to other {of}; remove it to start over")
        self._lines.write_text("".join(map(_dump, lines)), encoding="utf-8")
        return lines

    def add_block(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write a block's lines, each with an "id", and sync them to disk."""
        with open(self._lines, "a", encoding="utf-8") as handle:
            handle.write("".join(_dump({**line, _LAST: line is lines[-1]}) for line in lines))
            handle.flush()
            os.fsync(handle.fileno())

    def spent(self) -> dict[str, int]:
        """The amounts last recorded by `spend`; {} at first."""
        return read_json(self.folder / "spent.json") or {}

    def spend(self, amounts: dict[str, int]) -> None:
        """Record the amounts spent so far, including work that a kill may lose."""
        atomic_write_text(self.folder / "spent.json", json.dumps(amounts) + "\n")

    def close(self) -> None:
        """Release the folder's lock."""
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder once the result is written elsewhere."""
        self.close()
        shutil.rmtree(self.folder)


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys of `now` that are missing or different in `before`; nested keys are given as "settings.seed"."""
    names = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            names += [f"{key}.{inner}" for inner in differing(old, value)]
        elif old != value:
            names.append(key)
    return names


def read_json(path: Path) -> Any:
    """The JSON in a file written by this module or a run; None if there is no such file.

    Raises:
        InputError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove it to start over") from error


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
