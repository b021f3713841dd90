"""Additions from other packages: what is installed beside Search-R3 and names itself in an entry-point group of ours.

A package adds, say, a reward without touching ours, by three lines in its own pyproject.toml (see docs/write-your-own):

    [project.entry-points."search_r3.rewards"]
    reciprocal_rank = "my_package.rewards:reciprocal_rank"
"""

from __future__ import annotations

from typing import Any

from search_r3.errors import InputError, first_line

GROUPS = ("rewards", "refresh_policies", "engines", "data_sources", "index_backends", "document_readers")
"""The registries that other packages can add to."""


def load_plugins(group: str) -> dict[str, Any]:
    """What the installed packages offer in the entry-point group `search_r3.GROUP`, by name, in the order of the names.

    Only the packages that name something in this group are imported. Nothing is cached: a registry that is asked often
    keeps the answer.

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
