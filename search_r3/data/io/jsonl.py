"""JSON lines (one object per line), read with errors that name the line, and written atomically.

Reading is strict, since a silently skipped line would change every score after it; code that builds training data may
pass `on_fault`, which is called for each broken line and decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from search_r3.data.io.line_reader import MAX_LINE, TooLong, bounded_lines, defect
from search_r3.errors import InputError
from search_r3.files import BOM, atomic_path, text_problem, why_missing

OnFault = Callable[[InputError, str, str], None]
"""Called for a broken line with the error, its kind in a few words, and the line's location within the folder."""


def read_jsonl(path: str | Path, on_fault: OnFault | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line of a JSONL file, one line in memory at a time.

    Blank lines are skipped, and a byte order mark at the start is allowed. With `on_fault`, broken lines are passed to
    it and skipped, including those of more than `MAX_LINE` bytes, which are never read into memory.

    Raises:
        InputError: the file cannot be read, or a line is not UTF-8, not JSON, not an object, or holds NaN, Infinity or
            a number beyond 64-bit floats.
    """
    path = Path(path)
    for number, line in text_lines(path, on_fault):
        if not line.strip():
            continue
        try:
            value = parse_object(line, f"{path}, line {number}")
        except InputError as error:
            tell(on_fault, error, "not a JSON object", path, number)
            continue
        yield number, value


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        InputError: it is not JSON, not an object, or holds NaN, Infinity or a number beyond 64-bit floats; the message
            starts with `where`.
    """
    try:
        value = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
    except _TooLarge as error:
        raise InputError(
            f"{where}: {_field_of_infinity(line)} {error}, beyond 64-bit floats (about 1.8e308); correct it, or put "
            "it in quotes"
        ) from error
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg} at column {error.colno})"
        raise InputError(f"{where}: {problem}; each line must be one complete JSON object") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); fix or remove this line") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object in braces, got {_kind(value)}; fix or remove it")
    return value


def string_field(
    value: dict[str, Any], name: str, path: str | Path, number: int, default: str | None = None, empty: bool = True
) -> str:
    """The string under `name` in a line's object; `default` is used if the field is missing or null.

    Raises:
        InputError: the field is missing without a default, not a string, not encodable text, or empty while `empty` is
            false.
    """
    if value.get(name) is None and default is not None:
        return default
    if name not in value:
        found = ", ".join(sorted(value)) or "none at all"
        raise InputError(f'{path}, line {number}: the field "{name}" is missing (fields found: {found}); add it')
    text = value[name]
    if not isinstance(text, str):
        raise InputError(
            f'{path}, line {number}: the field "{name}" must be a string, got {_kind(text)}; put it in quotes'
        )
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f'{path}, line {number}: the field "{name}" holds half of a surrogate pair '
                f"(\\u{ord(text[error.start]):04x} at character {error.start + 1}), which is not valid text; fix it"
            ) from error
    if not empty and not text.strip():
        raise InputError(f'{path}, line {number}: the field "{name}" is empty; fill it or remove this line')
    return text


def id_field(
    value: dict[str, Any], path: str | Path, number: int, names: tuple[str, ...] = ("_id", "id")
) -> tuple[str, str]:
    """(name, id) of a line's object, for the first of `names` that it has. A whole number is converted to its digits,
    as the ids in qrels and run files are text.

    Raises:
        InputError: none of `names` is there, or the id is neither a string nor a whole number, or empty.
    """
    name = next((name for name in names if name in value), names[0])
    found = value.get(name)
    if isinstance(found, int) and not isinstance(found, bool):
        return name, str(found)
    if name in value and not isinstance(found, str):
        shown = json.dumps(found, ensure_ascii=False)[:40]
        raise InputError(
            f'{path}, line {number}: the field "{name}" must be a string or a whole number, got {shown}; '
            "put it in quotes"
        )
    return name, string_field(value, name, path, number, empty=False)


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line (UTF-8, not escaped), atomically."""
    with atomic_path(path) as scratch, open(scratch, "w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def text_lines(path: Path, on_fault: OnFault | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a UTF-8 file; `on_fault` as in `read_jsonl`.

    Raises:
        InputError: the file cannot be read, or a line is not UTF-8 and there is no `on_fault`.
    """
    with _open(path) as handle:
        raw: bytes | TooLong
        for number, raw in bounded_lines(handle, MAX_LINE) if on_fault else enumerate(handle, start=1):
            if number == 1 and isinstance(raw, bytes):
                raw = raw.removeprefix(BOM)
            if on_fault and (found := defect(raw)):
                broken = InputError(f"{path}, line {number}: {found[1]}; fix or remove it")
                on_fault(broken, found[0], _place(path, number))
                continue
            assert isinstance(raw, bytes)
            if (problem := text_problem(raw, "at column")) is not None:
                raise InputError(f"{path}, line {number}: {problem}; save the file as UTF-8")
            yield number, raw.decode("utf-8")


def tell(on_fault: OnFault | None, error: InputError, reason: str, path: Path, number: int | None = None) -> None:
    """Pass an error to `on_fault` with its location, or raise it if there is none."""
    if on_fault is None:
        raise error
    on_fault(error, reason, _place(path, number))


def _place(path: Path, number: int | None) -> str:
    name = f"qrels/{path.name}" if path.suffix == ".tsv" else path.name
    return name if number is None else f"{name}, line {number}"


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise InputError(f"{path} {why_missing(path)}; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; expected a file") from error
    except PermissionError as error:
        raise InputError(f"{path} cannot be read (no permission); change its permissions") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


class _TooLarge(ValueError):
    """A number beyond 64-bit floats; the message is the number as written."""


def _finite(written: str) -> float:
    value = float(written)
    if math.isinf(value):
        raise _TooLarge(written if len(written) <= 40 else written[:40] + "...")
    return value


def _field_of_infinity(line: str) -> str:
    value = json.loads(line)
    for name, item in value.items() if isinstance(value, dict) else ():
        try:
            json.dumps(item, allow_nan=False)
        except ValueError:
            return f'the field "{name}" ' + ("holds" if isinstance(item, dict | list) else "is")
    return "it holds"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
