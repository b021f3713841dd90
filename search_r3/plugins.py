"""Plugins: extensions from other installed packages, registered in Search-R3's entry-point groups.

A package adds, for example, a reward by two lines in its own pyproject.toml (see docs/write-your-own):

    [project.entry-points."search_r3.rewards"]
    reciprocal_rank = "my_package.rewards:reciprocal_rank"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from search_r3.errors import InputError, first_line
from search_r3.hints import did_you_mean

Entry = TypeVar("Entry")

GROUPS = ("rewards", "refresh_policies", "engines", "data_sources", "index_backends", "document_readers")
"""The registries that other packages can add to."""


def load_plugins(group: str) -> dict[str, Any]:
    """The plugins of installed packages in the entry-point group `search_r3.GROUP`, by name, sorted.

    Only packages registered in this group are imported. Nothing is cached; registries that are used often should cache
    the result.

    Args:
        group: one of `GROUPS`.

    Raises:
        InputError: a plugin cannot be imported, or two packages offer the same name.
    """
    from importlib.metadata import entry_points  # here, so that `search-r3 --help` need not wait for it

    if group not in GROUPS:
        raise ValueError(f"no group of plugins {group!r}: it is one of {', '.join(GROUPS)}")
    found: dict[str, Any] = {}
    package_of: dict[str, str] = {}
    for point in sorted(entry_points(group=f"search_r3.{group}"), key=lambda point: (point.name, point.value)):
        package = point.dist.name if point.dist is not None else point.value
        if point.name in found:
            raise InputError(
                f"{package_of[point.name]} and {package} both add {point.name!r} to search_r3.{group}; uninstall one"
            )
        try:
            found[point.name] = point.load()
        except Exception as error:  # a plugin may fail in any way while it is imported
            raise InputError(
                f"the plugin {point.name!r} of {package} (entry point search_r3.{group}, {point.value}) cannot be "
                f"loaded: {first_line(error)}; fix or uninstall {package}"
            ) from error
        package_of[point.name] = package
    return found


class Registry(Generic[Entry]):
    """Entries of one kind by name: built in, or added by installed packages, which cannot take a built-in name.

    Args:
        kind: the word for an entry in messages, such as "reward".
        group: the group of `GROUPS` that adds to it.
        builtin: the entries of Search-R3 itself.
        check: given a name and what a package offers by it, returns the entry, or raises InputError.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        builtin: Mapping[str, Entry],
        check: Callable[[str, Any], Entry] = lambda name, offered: offered,
    ) -> None:
        self.kind, self.group, self.builtin, self.check = kind, group, builtin, check

    def added(self) -> dict[str, Entry]:
        """What installed packages add.

        Raises:
            InputError: a plugin cannot be loaded, fails the check, or has the name of a built-in entry.
        """
        offered = load_plugins(self.group)
        for name in offered:
            if name in self.builtin:
                raise InputError(
                    f"the plugin {name!r} in search_r3.{self.group} has the name of a built-in {self.kind}; rename it"
                )
        return {name: self.check(name, value) for name, value in offered.items()}

    def entries(self) -> dict[str, Entry]:
        """All entries, the built-in ones first. Raises InputError as `added` does."""
        return {**self.builtin, **self.added()}

    def get(self, name: str) -> Entry:
        """The entry called `name`; for a built-in one no plugin is loaded.

        Raises:
            InputError: there is none, with the nearest name; or see `added`.
        """
        if name in self.builtin:
            return self.builtin[name]
        return pick(self.kind, name, self.entries())


def pick(kind: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    """`entries[name]`. Raises InputError if there is none, with the nearest name and all."""
    if name not in entries:
        near = did_you_mean(name, entries)
        raise InputError(f"there is no {kind} {name!r}; {near}choose one of: {', '.join(entries)}")
    return entries[name]
