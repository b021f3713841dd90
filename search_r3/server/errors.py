"""Errors in the form that OpenAI's clients expect: a status and {"error": {"message", "type", "param", "code"}}.

https://platform.openai.com/docs/guides/error-codes. Messages may quote any text: what cannot be encoded is escaped.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from search_r3.errors import InputError
from search_r3.index.index_handle import IndexUnavailable
from search_r3.index.index_info import ModelMismatch
from search_r3.index.storage.location import IndexBusy, StorageError
from search_r3.model.text_limit import TextTooLong

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_STATUSES = (429, 503)
RETRY_STORAGE, RETRY_BUSY, RETRY_INDEX = 10, 5, 2
"""Seconds to wait before a retry."""


class ApiError(Exception):
    """An error response.

    Args:
        status: the HTTP status.
        message: one line that says what was wrong and what was expected.
        code: an identifier for programs.
        param: the invalid field of the request.
        retry_after: seconds to wait before a retry.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def record(self) -> dict[str, Any]:
        """The body as a dictionary."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        headers = {}
        if self.retry_after is not None or self.status in RETRY_STATUSES:
            headers["Retry-After"] = str(self.retry_after or 1)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(json.dumps(self.record()), self.status, headers, "application/json")


def from_input_error(
    error: InputError, status: int = 400, code: str = "invalid_value", param: str | None = None
) -> ApiError:
    """`error` as an error response: 503 if storage failed or the index was replaced by one of another model, 409 with
    Retry-After if another process is writing the index, 413 if a text has too many tokens; otherwise `status`, `code`
    and `param`.
    """
    if isinstance(error, TextTooLong):
        return ApiError(413, str(error), "context_length_exceeded", param=param)
    if isinstance(error, IndexUnavailable | ModelMismatch):
        return ApiError(503, str(error), "index_unavailable", retry_after=RETRY_INDEX)
    if isinstance(error, StorageError):
        return ApiError(503, str(error), "storage_unavailable", retry_after=RETRY_STORAGE)
    if isinstance(error, IndexBusy):
        return ApiError(409, str(error), "index_busy", retry_after=RETRY_BUSY)
    return ApiError(status, str(error), code, param=param)
