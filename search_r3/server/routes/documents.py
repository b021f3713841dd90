"""/v1/indexes and /v1/index: which indexes are served, and what one contains. /v1/documents: list, add, replace and
delete documents while an index is searched.

A document whose id is already in the index is replaced, with all of its chunks, in the commit that adds the others.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, Path, Query
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from search_r3.errors import InputError
from search_r3.index.backends.lance.table_columns import ColumnTypeError
from search_r3.index.index_handle import FAILURES, IndexHandle, IndexUnavailable
from search_r3.index.maintenance import UnknownDocument
from search_r3.index.source_document import SourceDocument
from search_r3.server.batching.batcher import BatcherClosed
from search_r3.server.errors import ApiError, from_input_error
from search_r3.server.index_writer import Change, IndexWriter
from search_r3.server.request_body import in_thread, read, until_done
from search_r3.server.response_schemas import Added, Deleted, Documents, Indexes, IndexOverview
from search_r3.server.routing import WITH_BODY, answers, get, keyed_router, service_of, takes, to_json, v1_router
from search_r3.server.schemas import DOCUMENTS, DocumentsPage, DocumentsRequest, IndexChoice
from search_r3.server.service import Service

CHARACTERS_PER_TOKEN = 4
"""A rough rate, only used to turn the token limit into a character limit before documents are chunked."""


class AnyText(StringConvertor):
    """The rest of a path, including line breaks, which ids may have and Starlette's `path` does not match."""

    regex = r"[\s\S]*"


register_url_convertor("any_text", AnyText())
router, changes_router = v1_router(), keyed_router("/v1", write=True)


async def _check_given_once(request: Request) -> None:
    given = request.query_params
    if twice := [name for name in given if len(given.getlist(name)) > 1]:
        name = twice[0][:100]
        raise ApiError(400, f"the parameter {name!a} is given more than once", "invalid_value", param=name)


@get(
    router,
    "/documents",
    operation_id="listDocuments",
    summary="Ids of the documents in the index, in order",
    responses=answers(Documents, "OK", 400, 404, 429, 500, 503, 504),
    dependencies=[Depends(_check_given_once)],
)
async def list_documents(request: Request, page: Annotated[DocumentsPage, Query()]) -> Response:
    service = service_of(request)
    with service.inside():
        index = service.index(page.index)
        return to_json(await in_thread(request, service, service.threads, lambda _: _listed(index, page)))


@get(
    router,
    "/index",
    operation_id="describeIndex",
    summary="What the index contains: sizes, folders, kinds of files, and headings to ask about",
    responses=answers(IndexOverview, "OK", 400, 404, 429, 500, 503, 504),
    dependencies=[Depends(_check_given_once)],
)
async def describe_index(request: Request, choice: Annotated[IndexChoice, Query()]) -> Response:
    service = service_of(request)
    with service.inside():
        index, named = service.index(choice.index), {"name": service.index_name(choice.index)}
        return to_json(await in_thread(request, service, service.threads, lambda _: index.overview().to_dict() | named))


@get(
    router,
    "/indexes",
    operation_id="listIndexes",
    summary="The indexes that are served; the first is the one that requests mean unless they name another",
    responses=answers(Indexes, "OK", 429, 500, 503, 504),
)
async def list_indexes(request: Request) -> Response:
    service = service_of(request)
    with service.inside():
        indexes = service.loaded.indexes
        data = await in_thread(
            request, service, service.threads, lambda _: [_in_brief(*one) for one in indexes.items()]
        )
        return to_json({"object": "list", "data": data})


@changes_router.post(
    "/documents",
    operation_id="addDocuments",
    summary="Add documents to the index, or replace them",
    description="Either all or none are written. A document whose id is already in the index is replaced.",
    status_code=201,
    responses=answers(Added, "Written; a search finds them", *WITH_BODY, 404, 409, status=201),
    openapi_extra=takes(
        DocumentsRequest,
        example={"documents": [{"id": "license", "title": "License", "text": "It is under Apache-2.0."}]},
    ),
)
async def add_documents(request: Request) -> Response:
    service = service_of(request)
    with service.inside():
        body = await read(request, service, DOCUMENTS)
        _check_size(body, service)
        _check_ids(body)
        request.state.items = len(body.documents)
        documents = [SourceDocument(d.id, d.title.strip(), d.text, d.metadata) for d in body.documents]
        chunks = await _committed(request, service, body.index, Change(documents, service.encoder()))
        data = [{"object": "document", "id": document.id} for document in documents]
        return to_json({"object": "list", "data": data, "chunks": chunks}, 201)


@changes_router.delete(
    "/documents/{document:any_text}",
    operation_id="deleteDocument",
    summary="Delete a document with all of its chunks",
    responses=answers(Deleted, "Deleted; no search finds it", 400, 404, 409, 429, 500, 503, 504),
    dependencies=[Depends(_check_given_once)],
)
async def delete_document(
    request: Request,
    document: Annotated[str, Path(json_schema_extra={"minLength": 1})],
    choice: Annotated[IndexChoice, Query()],
) -> Response:
    service = service_of(request)
    with service.inside():
        chunks = await _committed(request, service, choice.index, Change(deleted=document))
        return to_json({"object": "document", "id": document, "deleted": True, "chunks": chunks})


async def _committed(request: Request, service: Service, name: str | None, change: Change) -> int:
    """Commit `change` to an index and return its number of chunks. If the client leaves before the commit begins, it is
    dropped."""
    index, writer = service.writable_index(name), service.writer(name)
    cancel = change.encoder.cancel if change.encoder is not None else lambda: None
    committing = asyncio.ensure_future(_commit(writer, index, change))
    return await until_done(request, service, committing, lambda: change.begun, cancel)


async def _commit(writer: IndexWriter, index: IndexHandle, change: Change) -> int:
    try:
        return await writer.commit(index, change)
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
    except BatcherClosed as error:
        raise ApiError(503, "the server is shutting down; try again later", "not_ready_stopping") from error
    except FAILURES as error:
        if (unavailable := await asyncio.to_thread(index.unavailable, error)) is None:
            raise
        raise from_input_error(unavailable) from error


def _in_brief(name: str, index: IndexHandle) -> dict[str, Any]:
    try:
        chunks = index.run(len)
    except IndexUnavailable:
        chunks = None
    return {"object": "index", "name": name, "available": chunks is not None, "chunks": chunks}


def _listed(index: IndexHandle, page: DocumentsPage) -> dict[str, Any]:
    listed = index.list_documents(page.limit, page.after or "")
    data = [{"object": "document", "id": d.id, "title": d.title, "path": d.path} for d in listed.documents]
    return {"object": "list", "data": data, "total": listed.total, "has_more": listed.has_more}


def _check_size(body: DocumentsRequest, service: Service) -> None:
    config = service.config
    if len(body.documents) > config.max_items:
        message = f"{len(body.documents):,} documents, the limit is {config.max_items:,}; send several requests"
        raise ApiError(400, message, "too_many_items", param="documents")
    characters = sum(len(document.text) for document in body.documents)
    if characters > (most := config.max_request_tokens * CHARACTERS_PER_TOKEN):
        message = f"the documents have {characters:,} characters, the limit is {most:,}; send several requests"
        raise ApiError(413, message, "too_many_tokens", param="documents")


def _check_ids(body: DocumentsRequest) -> None:
    seen: set[str] = set()
    for document in body.documents:
        if document.id in seen:
            message = f'the id "{document.id}" is used twice; make ids unique'
            raise ApiError(409, message, "conflict", param="documents")
        seen.add(document.id)
