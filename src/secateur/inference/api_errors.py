"""What a client of the server is told in place of vectors, in the shape of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """An error response in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.code = code
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        error = {"message": message, "type": kind if status < 500 else "server_error", "param": param, "code": code}
        self.response = JSONResponse({"error": error}, status, headers)
        super().__init__(message)


def busy(seconds: int) -> ApiError:
    """The response to a client that has to wait."""
    message = f"the server is busy; try again in {seconds} s"
    return ApiError(429, message, "server_busy", headers={"Retry-After": str(seconds)})
