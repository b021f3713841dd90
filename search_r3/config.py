"""Load a YAML file into a dataclass; every key and type is checked, and errors are one line.

One configuration is one YAML file; `--set loop.steps=10` overrides a key of it. A wrong key or value is reported before
anything is loaded, with the file, the key, what was expected and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from search_r3.errors import InputError
from search_r3.hints import nearest
from search_r3.yaml_file import parse_yaml, read_yaml, where_recipes_are

Config = TypeVar("Config")
Replaced = Callable[[str, str, str, Any], str | None]
"""(dataclass name, prefix of the key, key, value) -> advice for a key of an earlier version, or None."""


def require(holds: bool, key: str, value: object, expected: str, why: str = "") -> None:
    """Check one setting: the InputError "KEY must be EXPECTED, got VALUE" unless `holds`; `why` is appended to it."""
    if not holds:
        raise InputError(f"{key} must be {expected}, got {value!r}{why}")


def at_least(settings: object, **smallest: float) -> None:
    """Check numeric settings: `at_least(self, k=1, weight=0)` requires `self.k >= 1` and `self.weight >= 0`.

    None is accepted, as the value of a setting without a limit.

    Raises:
        InputError: a value is too small, infinite or NaN.
    """
    for key, least in smallest.items():
        value = getattr(settings, key)
        require(value is None or least <= value < math.inf, key, value, f"{least} or more")


def load_config(
    path: str | Path, cls: type[Config], overrides: Iterable[str] = (), replaced: Replaced | None = None
) -> Config:
    """Read a YAML file into the dataclass `cls`, checking every key and type.

    Args:
        path: a YAML file with a mapping on top (an empty file is all defaults).
        cls: a dataclass; its fields may be dataclasses, str, int, float, bool, Path, Literal, list, tuple, dict, and
            unions of these. An int is accepted for a float and so is "3e-4" (which YAML 1.1 reads as a string); a
            bool is never a number.
        overrides: "section.key=value" strings, values read as YAML, applied over the file in their order.
        replaced: gives advice for keys of an earlier version.

    Raises:
        InputError: the file is missing, unreadable, not YAML (with the line) or not a mapping; a key is unknown,
            missing or repeated; a value has the wrong type or fails the dataclass's own checks.
    """
    path = Path(path)
    raw = read_mapping(path)
    overridden: dict[str, str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not all(key.split(".")):
            raise InputError(f"--set {override}: expected section.key=value, such as loop.steps=10")
        try:
            value = parse_yaml(text, _UniqueKeys)
        except yaml.YAMLError as error:
            raise InputError(f"--set {override}: the value is not valid YAML: {_yaml_problem(error)}") from error
        section = raw
        *parents, last = key.split(".")
        for parent in parents:
            below = section.get(parent)
            section[parent] = below = {} if below is None else below
            if not isinstance(below, dict):
                raise InputError(f"--set {override}: {parent} is {below!r}, not a section with keys")
            section = below
        section[last] = value
        overridden[key] = f"--set {override}"
    return _Builder(str(path), overridden, replaced).build(cls, raw, "")


def from_mapping(cls: type[Config], values: Any, where: str) -> Config:
    """The dataclass `cls` from a mapping, with the checks of `load_config`.

    Raises:
        InputError: as `load_config`; the message starts with `where`.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must be a mapping (key: value), got {values!r}")
    return _Builder(where, {}).build(cls, dict(values), "")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain dicts, lists and scalars, ready for JSON or YAML (a Path becomes its string)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def default_values(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass's fields, as `to_dict` writes them; fields that must be given are left out."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            values[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error instead of a silent last-one-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key_node.value} is given twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        InputError: the file is missing, unreadable, not YAML (with the line) or not a mapping; a key is repeated.
    """
    try:
        raw = read_yaml(path, _UniqueKeys)
    except FileNotFoundError:
        raise InputError(f"no configuration file at {path}; {where_recipes_are(path)}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{path} must contain a mapping (key: value), but contains a {type(raw).__name__}")
    return raw


class _Mismatch(Exception):
    """A value does not match its field's type; the message says what was expected."""


@dataclass
class _Builder:
    file: str
    overridden: dict[str, str]
    replaced: Replaced | None = None

    def where(self, key: str) -> str:
        return self.overridden.get(key, self.file)

    def build(self, cls: type[Config], raw: dict[str, Any], prefix: str, default: Config | None = None) -> Config:
        """An instance of `cls` with the values of `raw`. Keys that `raw` lacks get their value from `default`, the
        section's default in the recipe, if there is one, so that setting one key changes only that key.
        """
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        types_of = typing.get_type_hints(cls)
        values = {} if default is None else {name: getattr(default, name) for name in fields}
        for name, value in raw.items():
            key = f"{prefix}{name}"
            if name not in fields:
                if self.replaced and (present := self.replaced(cls.__name__, prefix, name, value)):
                    raise InputError(f"{self.where(key)}: {present}")
                near = nearest(name, fields)
                hint = f"did you mean {prefix}{near}?" if near else f"valid keys are {', '.join(fields)}"
                raise InputError(f"{self.where(key)}: unknown key {key}; {hint}")
            try:
                section = _default_section(fields[name]) if default is None else values[name]
                values[name] = self.convert(types_of[name], value, key, section)
            except _Mismatch as mismatch:
                raise InputError(f"{self.where(key)}: {key} must be {mismatch}, got {value!r}") from None
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise InputError(f"{self.file}: {prefix}{name} is missing; it has no default")
        try:
            return cls(**values)
        except InputError as error:
            sources = [f"{source}: " for key, source in self.overridden.items() if key.startswith(prefix)]
            place = f"in {prefix[:-1]}, " if prefix else ""
            raise InputError(
                f"{self.file}: {place}{error}{' (after ' + sources[-1][:-2] + ')' if sources else ''}"
            ) from error

    def convert(self, kind: Any, value: Any, key: str, default: Any = None) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            if isinstance(value, typing.cast(type, kind)):  # built by the caller
                return value
            if value is None:  # an empty section: all defaults
                value = {}
            if not isinstance(value, dict):
                raise _Mismatch("a section with keys")
            section = typing.cast(type, kind)
            return self.build(section, value, f"{key}.", default if isinstance(default, section) else None)
        if origin in (typing.Union, types.UnionType):
            return self._convert_union(arguments, value, key, default)
        if origin is Literal:
            return _convert_literal(arguments, value)
        if origin in (list, tuple) or kind in (list, tuple):
            return self._convert_sequence(origin or kind, arguments, value, key)
        if origin is dict or kind is dict:
            if not isinstance(value, dict):
                raise _Mismatch("a mapping")
            item = arguments[1] if arguments else Any
            return {name: self.convert(item, below, f"{key}.{name}") for name, below in value.items()}
        return _convert_scalar(kind, value)

    def _convert_union(self, members: tuple[Any, ...], value: Any, key: str, default: Any = None) -> Any:
        if value is None and type(None) in members:
            return None
        members = tuple(member for member in members if member is not type(None))
        for member in members:  # an exact match first, so that 3 stays an int in int | float
            if isinstance(member, type) and type(value) is member:
                return value
        expected = []
        for member in members:
            try:
                return self.convert(member, value, key, default)
            except _Mismatch as mismatch:
                expected.append(str(mismatch))
        raise _Mismatch(" or ".join(expected))

    def _convert_sequence(self, kind: Any, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _Mismatch("a list")
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise _Mismatch(f"a list of {len(arguments)} values")
            return tuple(self.convert(item, below, key) for item, below in zip(arguments, value, strict=True))
        item = arguments[0] if arguments else Any
        return kind(self.convert(item, below, key) for below in value)


def _default_section(field: dataclasses.Field[Any]) -> Any:
    """A nested section's default in its recipe; None for other fields."""
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return value if dataclasses.is_dataclass(value) and not isinstance(value, type) else None


def _convert_literal(choices: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, bool):  # YAML 1.1 reads an unquoted no, off, yes, on as a bool
        words = ("yes", "on", "true") if value else ("no", "off", "false")
        value = next((word for word in words if word in choices), value)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    near = nearest(value, [str(choice) for choice in choices])
    hint = f" (did you mean {near}?)" if near else ""
    raise _Mismatch(f"one of {', '.join(str(choice) for choice in choices)}{hint}")


def _convert_number(kind: type, value: Any) -> int | float:
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise _Mismatch("a whole number")
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _Mismatch("a number") from None
        if math.isfinite(number):
            return number
    raise _Mismatch("a finite number" if isinstance(value, float) else "a number")


def _convert_scalar(kind: Any, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _Mismatch("true or false")
    if kind in (int, float):
        return _convert_number(kind, value)
    if kind is str:
        if isinstance(value, str):
            return value
        if isinstance(value, date):  # YAML reads an unquoted 2026-01-31 as a date
            return value.isoformat()
        raise _Mismatch("text (quote it if it looks like a number or yes/no)")
    if kind is Path:
        if isinstance(value, str) and value:
            return Path(value)
        raise _Mismatch("a path")
    raise TypeError(f"load_config cannot fill a field of type {kind}")
