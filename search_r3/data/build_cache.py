"""The finished parts of a build, kept next to its output, so that an interrupted build can resume.

A part's key covers everything it was made from (settings, seed, sizes and modification times of the input files, this
package's source code), so a different recipe or a changed file never reuses a stale part. Each part ends with its own
hash.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from search_r3.errors import InputError
from search_r3.files import atomic_path, remove_leftovers

SUFFIX = ".part.jsonl"


class BuildCache:
    """The folder OUTPUT.partial, locked against a second build of the same output while it is open.

    Raises:
        InputError: another process builds this output, or the folder cannot be written.
    """

    def __init__(self, output: Path) -> None:
        self.folder = Path(f"{output}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(str(self.folder / "lock"))
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{output} is being built by another process; wait for it, or name another") from error
        except OSError as error:
            problem = error.strerror or str(error)
            raise InputError(f"cannot write {self.folder}: {problem}; choose a folder you may write to") from error
        for left in self.folder.glob(".*.tmp*"):  # left by a process that was killed while writing
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        remove_leftovers(output, f"{output}.manifest.json")

    def load(self, name: str, key: str) -> tuple[dict[str, Any], list[Any]] | None:
        """(head, rows) of a part, or None if there is no complete part with that key."""
        digest = hashlib.sha256()
        rows: list[Any] = []
        try:
            with open(self._file(name, key), "rb") as handle:
                for line in handle:
                    rows.append(json.loads(line))
                    if isinstance(rows[-1], dict) and "end" in rows[-1]:
                        break
                    digest.update(line)
            head, end = rows[0], rows.pop()
            if end != {"end": digest.hexdigest()} or head["key"] != key:
                return None
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return head, rows[1:]

    def save(self, name: str, key: str, head: dict[str, Any], rows: Iterable[Any]) -> None:
        """Write a part atomically; `head` and each of `rows` are JSON values, and rows must not be objects.

        Raises:
            InputError: the folder cannot be written.
        """
        digest = hashlib.sha256()
        with atomic_path(self._file(name, key)) as scratch, open(scratch, "wb") as handle:
            for value in ({"key": key, **head}, *rows):
                line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                handle.write(line)
            handle.write(json.dumps({"end": digest.hexdigest()}).encode() + b"\n")

    def remove(self) -> None:
        """Remove the parts of a finished build."""
        for file in self.folder.glob(f"*{SUFFIX}"):
            file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; remaining parts are kept for the next build, and files of others are left alone."""
        (self.folder / "lock").unlink(missing_ok=True)
        self._lock.release()
        with suppress(OSError):  # it is not empty
            self.folder.rmdir()

    def _file(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key[:16]}{SUFFIX}"


def key_of(*values: Any) -> str:
    """SHA-256 over JSON values, this package's source code and the Python version: 64 hex digits."""
    text = json.dumps([_program(), platform.python_version(), *values], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def added_code(*functions: Callable[..., Any]) -> list[str]:
    """SHA-256 of the source files of functions from other packages, for `key_of`, which always covers our own."""
    modules = {_module_of(function) for function in functions}
    return [_digest(module_files(module)) for module in sorted(modules) if module.partition(".")[0] != "search_r3"]


@cache
def _program() -> str:
    return _digest(source_files())


@cache
def source_files() -> list[Path]:
    """The modules of `search_r3.data` that build pairs: `recipe` and everything it imports. If one changes, cached
    parts are stale."""
    return module_files("search_r3.data.recipe", within="search_r3.data")


def module_files(module: str, within: str | None = None) -> list[Path]:
    """The source files of a module and of everything it imports, directly or indirectly, sorted.

    Args:
        module: a full name; the module need not be imported yet. A module without a source file contributes none.
        within: only imports inside this package are followed; None means the module's own top-level package.
    """
    within = within or module.partition(".")[0]
    found: set[Path] = set()
    waiting, seen = [module], {module}
    while waiting:
        name = waiting.pop()
        file, package = _source_of(name)
        if file is None:
            continue
        found.add(file)
        for imported in _imports(file, package):
            if f"{imported}.".startswith(f"{within}.") and imported not in seen:
                seen.add(imported)
                waiting.append(imported)
    return sorted(found)


def _imports(file: Path, package: str) -> set[str]:
    """The full names of everything a file imports; a name imported from a package may be a submodule."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _source_of(module: str) -> tuple[Path | None, str]:
    """A module's source file (None if it has none), and the package its relative imports are resolved against."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # an attribute of a module, not a module
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None, ""
    return Path(spec.origin), module if spec.submodule_search_locations is not None else module.rpartition(".")[0]


def _module_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__module__", None) or type(function).__module__


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
