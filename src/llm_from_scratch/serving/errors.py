"""Errors in the format of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from ..errors import ApiError

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
    message = " ".join(error.message.split())
    return json.dumps({"error": {"message": message, "type": kind, "param": error.param, "code": error.code}})


def error_response(error: ApiError) -> Response:
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(error), error.status, headers)


def json_response(body: str | bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def overloaded(seconds: int) -> ApiError:
    message = "the server is busy and its queue is full; try again later"
    return ApiError(429, message, code="overloaded", retry_after=seconds)
