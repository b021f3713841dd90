"""/v1/documents: what is in the index, and adding, replacing and deleting there while it is searched.

A document whose id the index has already is replaced, with all of its chunks, in the commit that adds the others.
"""

from __future__ import annotations

import asyncio
import bisect
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from search_r3.errors import InputError
from search_r3.index.live_handle import FAILURES, IndexHandle
from search_r3.index.maintenance import UnknownDocument
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage import explained
from search_r3.index.table import SearchIndex
from search_r3.index.table_columns import ColumnTypeError
from search_r3.server.batching.batcher import Closed
from search_r3.server.errors import ApiError, from_input_error
from search_r3.server.index_writer import Change
from search_r3.server.request_body import in_thread, read, until_done
from search_r3.server.routes.embeddings import to_json
from search_r3.server.schemas import MAX_ID_CHARACTERS, DocumentsRequest
from search_r3.server.service import Service

PAGE, MAX_PAGE = 100, 1000
CHARACTERS_PER_TOKEN = 4
"""A coarse rate, only to turn the limit on tokens into one on characters before anything is cut into chunks."""


async def list_documents(request: Request, service: Service) -> Response:
    """Answer GET /v1/documents: ids in order, a page at a time."""
    with service.inside():
        index = service.index
        limit, after = _page(request)
        return to_json(await in_thread(request, service, service.threads, lambda _: _listed(index, limit, after)))


async def add_documents(request: Request, service: Service) -> Response:
    """Answer POST /v1/documents."""
    with service.inside():
        index = service.writable_index
        body = await read(request, service, DocumentsRequest)
        _check_size(body, service)
        _check_ids(body)
        request.state.items = len(body.documents)
        documents = [SourceDocument(d.id, d.title.strip(), d.text, d.metadata) for d in body.documents]
        chunks = await _committed(request, service, index, Change(documents, service.encoder()))
        data = [{"object": "document", "id": document.id} for document in documents]
        return to_json({"object": "list", "data": data, "chunks": chunks}, 201)


async def delete_document(request: Request, service: Service, identifier: str) -> Response:
    """Answer DELETE /v1/documents/{document}."""
    with service.inside():
        chunks = await _committed(request, service, service.writable_index, Change(deleted=identifier))
        return to_json({"object": "document", "id": identifier, "deleted": True, "chunks": chunks})


async def _committed(request: Request, service: Service, index: IndexHandle, change: Change) -> int:
    """The chunks of `change`, once it is committed. If nobody waits for it any more before that begins, it is not."""
    cancel = change.encoder.cancel if change.encoder is not None else lambda: None
    return await until_done(
        request, service, asyncio.ensure_future(_commit(service, index, change)), lambda: change.begun, cancel
    )


async def _commit(service: Service, index: IndexHandle, change: Change) -> int:
    try:
        return await service.writing.commit(index, change)
    except UnknownDocument as error:
        message = f"there is no document {change.deleted[:100]!a}; see GET /v1/documents"
        raise ApiError(404, message, "document_not_found", param="document") from error
    except ColumnTypeError as error:
        message = (
            f"{error.problem} make the column text on the server: search-r3 index SOURCE --into INDEX {error.remedy}"
        )
        raise ApiError(409, message, "conflict", param="documents") from error
    except InputError as error:
        raise from_input_error(error, 409, "conflict", "documents" if change.documents else None) from error
    except Closed as error:
        raise ApiError(503, "the server is shutting down; try again later", "not_ready_stopping") from error
    except FAILURES as error:
        if (unavailable := await asyncio.to_thread(index.unavailable, error)) is None:
            raise
        raise from_input_error(unavailable) from error


def _listed(index: IndexHandle, limit: int, after: str) -> dict[str, Any]:
    columns = ["document", "title", "path"]

    def read_columns(now: SearchIndex) -> Any:
        with explained(now.path):
            return now.following(lambda one: one.table.search().select(columns).to_arrow())

    rows = index.run(read_columns)
    first: dict[str, tuple[str, str]] = {}
    for identifier, title, path in zip(*(rows[name].to_pylist() for name in columns), strict=True):
        first.setdefault(identifier, (title, path))
    ids = sorted(first)
    start = bisect.bisect_right(ids, after) if after else 0
    shown = ids[start : start + limit]
    data = [{"object": "document", "id": i, "title": first[i][0], "path": first[i][1]} for i in shown]
    return {"object": "list", "data": data, "total": len(ids), "has_more": start + limit < len(ids)}


def _page(request: Request) -> tuple[int, str]:
    known = {"limit", "after"}
    given = request.query_params
    if strange := sorted(set(given) - known):
        raise ApiError(
            400, f"there is no parameter {strange[0][:100]!a}; there are limit and after", "unknown_parameter"
        )
    if twice := [name for name in known if len(given.getlist(name)) > 1]:
        raise ApiError(400, f"the parameter {twice[0]} is given more than once", "invalid_value", param=twice[0])
    limit, after = given.get("limit", str(PAGE)), given.get("after")
    if not re.fullmatch("[1-9][0-9]{0,3}", limit, re.ASCII) or int(limit) > MAX_PAGE:
        raise ApiError(400, f"limit is {limit[:20]!a}; expected 1 to {MAX_PAGE}", "invalid_value", param="limit")
    if after is not None and not 1 <= len(after) <= MAX_ID_CHARACTERS:
        message = f"after must be a document's id, of 1 to {MAX_ID_CHARACTERS:,} characters"
        raise ApiError(400, message, "invalid_value", param="after")
    return int(limit), after or ""


def _check_size(body: DocumentsRequest, service: Service) -> None:
    config = service.config
    if len(body.documents) > config.max_items:
        message = f"{len(body.documents):,} documents, the limit is {config.max_items:,}; send several requests"
        raise ApiError(400, message, "too_many_items", param="documents")
    characters = sum(len(document.text) for document in body.documents)
    if characters > (most := config.max_tokens * CHARACTERS_PER_TOKEN):
        message = f"the documents have {characters:,} characters, the limit is {most:,}; send several requests"
        raise ApiError(413, message, "too_many_tokens", param="documents")


def _check_ids(body: DocumentsRequest) -> None:
    seen: set[str] = set()
    for document in body.documents:
        if document.id in seen:
            message = f'the id "{document.id}" comes twice; give each document its own'
            raise ApiError(409, message, "conflict", param="documents")
        seen.add(document.id)
