"""What a request is called in the log: `X-Request-ID` and W3C `traceparent`, taken over from the caller.

Trace Context, level 1 (https://www.w3.org/TR/trace-context/). The log has the caller's trace and span, so that its
line is found from a trace; `tracing` adds spans of the server's own. A malformed header is ignored, as the standard
asks; none is written to the log as it came.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

USABLE = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
"""A request id that is taken over: what UUIDs, base64 and the ids of proxies and clouds consist of."""
TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?", re.DOTALL)


@dataclass(frozen=True)
class RequestIdentity:
    """The id of a request, the caller's or a new one, and the caller's trace and span with their header, or None."""

    id: str
    trace: str | None = None
    span: str | None = None
    traceparent: str | None = None

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> RequestIdentity:
        """The identity of a request with these headers, whose names are in lower case."""
        given: dict[bytes, list[bytes]] = {b"x-request-id": [], b"traceparent": []}
        for header, value in headers:
            if header in given:
                given[header].append(value)
        taken = USABLE.fullmatch(_only(given[b"x-request-id"]) or b"")
        name = taken[0].decode() if taken else uuid.uuid4().hex[:16]
        parent = _only(given[b"traceparent"])
        trace, span = _trace_and_span(parent)
        return cls(name, trace, span, None if parent is None or trace is None else parent.decode("latin-1"))

    def fields(self) -> dict[str, str]:
        """For a line of the log."""
        trace = {"trace_id": self.trace, "parent_id": self.span}
        return {"id": self.id} | {name: value for name, value in trace.items() if value is not None}


def _only(values: list[bytes]) -> bytes | None:
    return values[0] if len(values) == 1 else None


def _trace_and_span(header: bytes | None) -> tuple[str | None, str | None]:
    """Version 00 has exactly four parts; a later version may have more, of which the first four mean the same."""
    found = TRACEPARENT.fullmatch(header or b"")
    if found is None:
        return None, None
    version, trace, span, more = found.groups()
    if version == b"ff" or (version == b"00" and more is not None) or not trace.strip(b"0") or not span.strip(b"0"):
        return None, None
    return trace.decode(), span.decode()
