"""Registries of what a recipe can choose by name and with parameters, built in or from installed packages."""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from search_r3.errors import InputError
from search_r3.hints import did_you_mean
from search_r3.plugins import Registry


class RecipeRegistry(Registry[Callable[..., Any]]):
    """Classes and functions that a recipe can name. A class is instantiated with the recipe's parameters; a function
    has its parameters after the first bound to them.
    """

    def create(self, name: str, parameters: Mapping[str, Any]) -> Any:
        """The entry `name` with these parameters. Raises as `parameters_of`."""
        entry, values = self._resolve(name, parameters)
        if not isinstance(entry, type):
            return functools.partial(entry, **values) if values else entry
        try:
            return entry(**values)
        except ValueError as error:
            raise InputError(f"{self.kind} {name}: {error}") from error

    def parameters_of(self, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of the entry `name`: the given values, and the defaults of the others.

        Raises:
            InputError: the entry or a parameter is unknown (the message gives the nearest name), a parameter is
                missing, or a value does not match its annotation.
        """
        entry, values = self._resolve(name, parameters)
        defaults = {key: p.default for key, p in _signature(entry).items() if p.default is not p.empty}
        return defaults | values

    def _resolve(self, name: str, parameters: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
        entry = self.get(name)
        known = _signature(entry)
        hints = _type_hints(entry)
        values = {}
        for key, value in parameters.items():
            if key not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                near = did_you_mean(key, known).rstrip()
                raise InputError(f"{self.kind} {name} has no parameter {key!r}{near and f'; {near}'} ({has})")
            values[key] = self._converted(f"{self.kind} {name}: {key}", value, hints.get(key))
        for key, parameter in known.items():
            if parameter.default is parameter.empty and key not in values:
                raise InputError(f"{self.kind} {name} needs the parameter {key!r}")
        return entry, values

    @staticmethod
    def _converted(what: str, value: Any, hint: Any) -> Any:
        if hint is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        if hint in (float, int, bool, str):
            accepted = (int, float) if hint is float else (hint,)
            if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
                raise InputError(f"{what} must be {hint.__name__}, got {value!r}")
        return value


def _signature(entry: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a recipe can set: all of a class, or those after the first of a function."""
    named = [p for p in inspect.signature(entry).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p for p in (named if isinstance(entry, type) else named[1:])}


def _type_hints(entry: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(getattr(entry, "__init__") if isinstance(entry, type) else entry)  # noqa: B009
    except (NameError, TypeError):  # in another package: names that are not imported, or a callable object
        return {}
