"""Logs on standard error without users' texts, keys, or query strings: one JSON object per line, or lines for people.

An unexpected error is logged by its type and stack frames, not by its message, as messages quote values.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

LOGGER = "search_r3.server"


class JsonFormatter(logging.Formatter):
    """One line of JSON for a record: time (UTC), level, event, and the fields given as `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": now, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line |= error_fields(record.exc_info[1])
        return json.dumps(line, default=str)


class PlainFormatter(logging.Formatter):
    """One line for people: the local time, the level if it is a warning or worse, the event and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields |= error_fields(record.exc_info[1])
        what = record.getMessage()
        if what == "request":
            what = f"{fields.pop('method')} {fields.pop('route')} {fields.pop('status')}, {fields.pop('ms')} ms"
            for name in ("id", "trace_id", "parent_id", "span_id"):
                fields.pop(name, None)
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        parts = [what, *(f"{name} {value}" for name, value in fields.items())]
        return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{', '.join(parts)}"


def error_fields(error: BaseException) -> dict[str, Any]:
    """An error's type and its innermost stack frames, without its message."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    locations = [f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": type(error).__name__, "at": locations}


def log(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Write one line."""
    if error is not None:
        fields |= error_fields(error)
    logging.getLogger(LOGGER).log(level, event, extra={"fields": fields})


def log_to(stream: TextIO | None = None, *, json_lines: bool = True) -> None:
    """Send our log lines and uvicorn's to `stream`, by default standard error.

    Without `json_lines` the lines are for people: uvicorn's reports of its own start and stop are left out.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if json_lines else PlainFormatter())
    for name in (LOGGER, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler] if name != "uvicorn.error" else [], name == "uvicorn.error"
        logger.setLevel(logging.INFO if json_lines or name == LOGGER else logging.WARNING)
