"""Errors as OpenAI's clients know them: a status and {"error": {"message", "type", "param", "code"}}.

https://platform.openai.com/docs/guides/error-codes. Messages are written so that any text is safe in them: what cannot
be encoded is escaped.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_STATUSES = (429, 503)


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: the HTTP status.
        message: one line: what was wrong, what was expected.
        code: a word that programs can compare.
        param: the field of the request that is wrong.
        retry_after: seconds after which to try again.
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
        """The whole answer."""
        headers = {}
        if self.retry_after is not None or self.status in RETRY_STATUSES:
            headers["Retry-After"] = str(self.retry_after or 1)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(json.dumps(self.record()), self.status, headers, "application/json")
