"""Which files of a folder are read: not those that `.gitignore` names, and what the user includes and excludes.

Patterns are those of gitignore(5), in which the last one that fits decides. pathspec turns each into a regular
expression, which fits all that is below a folder, too; git decides about a folder first and about what it holds only
where the folder is read, so here a pattern fits only what it names itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from search_r3.errors import InputError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

IGNORE_FILE = ".gitignore"
DIRECTORY_MARK = "ps_d"
"""The group in pathspec's expressions that has the "/" after a folder that the pattern names."""
NO_MARK = -1
"""Where that group starts if the pattern fitted a file."""


class FileFilter:
    """Decides about the files of one folder.

    Args:
        root: the folder.
        include: patterns of the only files to read; none for all.
        exclude: patterns of files and folders to leave out.

    Raises:
        InputError: a pattern is not valid.
    """

    def __init__(self, root: Path, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        self.root = root
        self._include, self._exclude = _spec(include, "--include"), _spec(exclude, "--exclude")
        self._above = _ignore_files_above(root)
        self._in: dict[str, GitIgnoreSpec | None] = {}

    def leaves_out(self, name: str, folder: bool) -> bool:
        """Whether the user's patterns leave out a file or folder whose own folder they do not leave out.

        Args:
            name: its path relative to the root, with "/".
        """
        if self._exclude is not None and _decides(self._exclude, name, folder):
            return True
        return not folder and self._include is not None and not self._include.match_file(name)

    def ignores(self, name: str, folder: bool) -> bool:
        """Whether the nearest `.gitignore` file with a pattern that fits ignores a file or folder whose own folder is
        not ignored."""
        path = PurePosixPath(name)
        for parent in path.parents:
            spec = self._ignore_file(parent.as_posix())
            relative = path.relative_to(parent).as_posix()
            if spec is not None and (found := _decides(spec, relative, folder)) is not None:
                return found
        decisions = (_decides(spec, (PurePosixPath(base) / name).as_posix(), folder) for base, spec in self._above)
        return next((found for found in decisions if found is not None), False)

    def _ignore_file(self, folder: str) -> GitIgnoreSpec | None:
        if folder not in self._in:
            self._in[folder] = _read(self.root / folder / IGNORE_FILE)
        return self._in[folder]


def _decides(spec: GitIgnoreSpec, name: str, folder: bool) -> bool | None:
    """True if the patterns ignore the name, False if the last one that fits begins with "!", None if none fits."""
    path = f"{name}/" if folder else name
    fitting = (one.include for one in reversed(spec.patterns) if one.include is not None and _fits(one, path))
    return next(fitting, None)


def _fits(pattern: GitIgnoreSpecPattern, path: str) -> bool:
    """Whether a pattern fits the path itself (a folder's ends with "/"), not only a folder above it."""
    assert pattern.regex is not None
    if DIRECTORY_MARK not in pattern.regex.groupindex:  # such as "a/**", which fits what is in the folder "a", not "a"
        return pattern.regex.search(path.removesuffix("/")) is not None
    marks = (found.start(DIRECTORY_MARK) for found in pattern.regex.finditer(path))
    return any(mark in {NO_MARK, len(path) - 1} for mark in marks)


def _ignore_files_above(root: Path) -> list[tuple[str, GitIgnoreSpec]]:
    """(path of the root below it, patterns) of the `.gitignore` files above the root, nearest first, and of
    `.git/info/exclude`; none outside a git repository."""
    root = Path(os.path.abspath(root))
    found: list[tuple[str, GitIgnoreSpec]] = []
    for folder in (root, *root.parents):
        below = root.relative_to(folder).as_posix()
        if folder != root and (spec := _read(folder / IGNORE_FILE)) is not None:
            found.append((below, spec))
        if os.path.lexists(folder / ".git"):
            if (spec := _read(folder / ".git" / "info" / "exclude")) is not None:
                found.append((below, spec))
            return found
    return []


def _read(file: Path) -> GitIgnoreSpec | None:
    try:
        status = file.stat()
        return _parsed(str(file), status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):  # git, too, goes on without a file that it cannot read, and without wrong patterns
        return None


@lru_cache(maxsize=1024)
def _parsed(file: str, changed: int, size: int) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines(Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"))


def _spec(patterns: Iterable[str], option: str) -> GitIgnoreSpec | None:
    given = list(patterns)
    if not given:
        return None
    from pathspec import GitIgnoreSpec

    for pattern in given:
        try:
            GitIgnoreSpec.from_lines([pattern])
        except ValueError as error:
            raise InputError(
                f"{option} {pattern}: {error}; give a pattern as in .gitignore, such as '*.log'"
            ) from error
    return GitIgnoreSpec.from_lines(given)
