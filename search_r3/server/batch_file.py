"""A file of requests, answered by a server inside this process: OpenAI's batch format, without a network.

https://platform.openai.com/docs/guides/batch. A line is {"custom_id", "method": "POST", "url", "body"}; its answer
{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}, in the order of the requests.
Everything that `search-r3 serve` accepts is accepted and answered in the same way, since it is the same application.

Answers are appended to a file beside the output, which gets its name at the end: a run that was interrupted goes on
where it stopped.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from starlette.types import ASGIApp, Message

from search_r3.errors import InputError
from search_r3.files import decode_text
from search_r3.server.app import create_app
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded

URLS = ("/v1/embeddings", "/v1/rerank")
CONCURRENT = 64
"""Requests in flight; the batcher makes passes of the texts of several."""
ROW_GROUP = 4096
"""Embeddings that are written to Parquet at once."""


@dataclass(frozen=True)
class BatchRequest:
    """One line of the file."""

    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True)
class BatchReport:
    """How many requests were answered: in all, by an earlier run, and with an error."""

    requests: int
    resumed: int
    failed: int


def read_requests(file: Path) -> Iterator[BatchRequest]:
    """The requests of a JSONL file; blank lines are skipped.

    Raises:
        InputError: the file cannot be read, a line is no request, or two have the same custom_id; names the line.
    """
    seen: set[str] = set()
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    request = _parsed(line, f"{file}, line {number}")
                    if request.custom_id in seen:
                        raise InputError(f"{file}, line {number}: the custom_id {request.custom_id!a} occurs twice")
                    seen.add(request.custom_id)
                    yield request
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; give a JSONL file of requests") from error


def read_ids(file: Path) -> list[str]:
    """The custom_ids of a file's requests. Raises InputError as `read_requests`."""
    return [request.custom_id for request in read_requests(file)]


def _parsed(line: bytes, place: str) -> BatchRequest:
    try:
        record = json.loads(decode_text(line, place))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {str(error)[:200]}") from error
    expected = 'expected {"custom_id": TEXT, "method": "POST", "url": "/v1/embeddings", "body": {...}}'
    if not isinstance(record, dict) or not isinstance(record.get("custom_id"), str):
        raise InputError(f"{place} has no custom_id; {expected}")
    if record.get("method", "POST") != "POST" or record.get("url") not in URLS:
        raise InputError(f"{place}: method and url must be POST and one of {', '.join(URLS)}")
    if not isinstance(record.get("body"), dict):
        raise InputError(f"{place} has no body; {expected}")
    return BatchRequest(record["custom_id"], record["url"], json.dumps(record["body"]).encode())


def answer_batch(
    file: Path,
    out: Path,
    load: Callable[[], Loaded],
    config: ServerConfig,
    progress: Callable[[int], None] = lambda done: None,
    ids: Sequence[str] | None = None,
) -> BatchReport:
    """Answer the requests of `file` into `out`, which must not exist.

    Args:
        load: returns what is served.
        config: the limits; times and queues do not matter here.
        progress: called with 1 after each request.
        ids: the custom_ids of `file`, if `read_ids` has read them already.

    Raises:
        InputError: a line of `file` is no request, or its answer would not fit into Parquet (checked for all before the
            first is answered), `out` exists, or what is beside it is from another file.
    """
    if out.exists():
        raise InputError(f"{out} exists; remove it, or give another name")
    ids = read_ids(file) if ids is None else ids
    if out.suffix == ".parquet":
        _check_for_parquet(file, out)
    part = out.with_name(f"{out.name}.part")
    done, failed = _earlier(part)
    if done.difference(ids):
        raise InputError(f"{part} has answers to other requests; remove it to begin anew")
    app = create_app(config, load)
    with part.open("ab") as sink:
        for _ in done:
            progress(1)
        failed += asyncio.run(_answer_all(app, file, done, sink, progress))
        sink.flush()
        os.fsync(sink.fileno())
    if out.suffix == ".parquet":
        _write_parquet(part, out)
        part.unlink()
    else:
        os.replace(part, out)
    return BatchReport(len(ids), len(done), failed)


def _check_for_parquet(file: Path, out: Path) -> None:
    """Raises InputError unless every request asks for embeddings of one type."""
    for request in read_requests(file):
        problem = None
        if request.url != "/v1/embeddings":
            problem = f"asks for {request.url}"
        elif json.loads(request.body).get("embedding_types") is not None:
            problem = "has embedding_types; encoding_format names a single type"
        if problem:
            raise InputError(
                f"{out}: one embedding a row is written as Parquet, but {request.custom_id!a} {problem}; "
                "use a .jsonl file"
            )


def _earlier(part: Path) -> tuple[set[str], int]:
    """The custom_ids that an interrupted run has answered, and how many of them with an error. A last line without its
    end is cut off."""
    if not part.exists():
        return set(), 0
    done, failed, whole = set(), 0, 0
    with part.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            done.add(record["custom_id"])
            failed += record["response"]["status_code"] != 200
            whole += len(line)
        file.truncate(whole)
    return done, failed


async def _answer_all(app: Any, file: Path, done: set[str], sink: Any, progress: Callable[[int], None]) -> int:
    """Write the answers in the order of the requests; returns how many have an error."""
    failed, waiting = 0, deque[asyncio.Task[dict[str, Any]]]()

    async def write_first() -> int:
        record = await waiting.popleft()
        sink.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        progress(1)
        return int(record["response"]["status_code"] != 200)

    async with _started(app):
        for request in read_requests(file):
            if request.custom_id in done:
                continue
            waiting.append(asyncio.create_task(_answer(app, request)))
            if len(waiting) >= CONCURRENT:
                failed += await write_first()
        while waiting:
            failed += await write_first()
    return failed


@asynccontextmanager
async def _started(app: Any) -> AsyncIterator[None]:
    """The application, from the end of loading to its shutdown. Raises what loading raised."""
    service = app.state.service
    async with app.router.lifespan_context(app):
        while service.status == "loading":
            await asyncio.sleep(0.05)
        if service.status == "failed":
            raise service.failure
        yield


async def _answer(app: ASGIApp, request: BatchRequest) -> dict[str, Any]:
    status, headers, body = await _post(app, request.url, request.body)
    identity = headers.get("x-request-id", "")
    response = {"status_code": status, "request_id": identity, "body": json.loads(body)}
    return {"id": f"batch_req_{identity}", "custom_id": request.custom_id, "response": response, "error": None}


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request to an ASGI application: status, headers, body."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None,
        "server": None, "state": {},
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    sent: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    parts: list[bytes] = []
    start: dict[str, Any] = {}

    async def receive() -> Message:
        if sent:
            return sent.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}
    return start["status"], headers, b"".join(parts)


def _write_parquet(part: Path, out: Path) -> None:
    """The embeddings as columns custom_id, index, embedding (a list of float32) and error (null, or a message)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from search_r3.files import atomic_path

    columns = {"custom_id": pa.string(), "index": pa.int64(), "embedding": pa.list_(pa.float32()), "error": pa.string()}
    schema = pa.schema(columns)
    with atomic_path(out) as scratch, pq.ParquetWriter(scratch, schema) as writer, part.open("rb") as lines:
        rows: list[tuple[Any, ...]] = []
        for line in lines:
            rows += _rows(json.loads(line))
            if len(rows) >= ROW_GROUP:
                writer.write_table(_table(rows, schema))
                rows = []
        writer.write_table(_table(rows, schema))


def _rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    name, body = record["custom_id"], record["response"]["body"]
    if record["response"]["status_code"] != 200:
        return [(name, None, None, body["error"]["message"])]
    return [(name, one["index"], _vector(one["embedding"]), None) for one in body["data"]]


def _vector(written: Any) -> np.ndarray:
    if isinstance(written, str):
        return np.frombuffer(base64.b64decode(written), dtype="<f4")
    return np.asarray(written, dtype=np.float32)


def _table(rows: list[tuple[Any, ...]], schema: Any) -> Any:
    import pyarrow as pa

    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)], schema)
