"""Errors in the format of OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from ..errors import ApiError, one_line

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def error_body(error: ApiError) -> str:
    kind = TYPES.get(error.status, "invalid_request_error")
    message = one_line(error.message, None)
    return json.dumps({"error": {"message": message, "type": kind, "param": error.param, "code": error.code}})


def error_response(error: ApiError) -> Response:
    response = json_response(error_body(error), error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def json_response(content: str | dict[str, Any], status: int = 200) -> Response:
    """content: JSON, or an object to write as JSON."""
    body = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
    return Response(body, status, {"Cache-Control": "no-store"}, "application/json")


def overloaded(seconds: int) -> ApiError:
    message = "the server is busy and its queue is full; try again later"
    return ApiError(429, message, code="overloaded", retry_after=seconds)
