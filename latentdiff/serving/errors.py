"""What is wrong with a request, and how each interface says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.errors import LatentDiffError
from latentdiff.serving.work import Failed

OPENAI, SDAPI = "/v1/", "/sdapi/"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error"}


class Refused(LatentDiffError):
    """A request that is not answered as asked.

    Args:
        status: of HTTP.
        param, code: what OpenAI's interface says besides.
        retry_after: seconds after which it is worth another try.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What belongs beside the body."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": 'Basic realm="latentdiff"'} if self.status == 401 else {})


def body(path: str, error: Refused) -> Mapping[str, Any]:
    """The error as the interface of that path gives it."""
    if path.startswith(OPENAI):
        kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
    if path.startswith(SDAPI):
        return {"error": "HTTPException", "detail": str(error), "body": "", "errors": str(error)}
    return {"detail": str(error)}


def of_failure(failure: Failed) -> Refused:
    """An image that was not made, as the answer to its request."""
    match failure.kind:
        case "request":
            return Refused(400, failure.message, code="invalid_value")
        case "cancelled":
            return Refused(409, "the request was cancelled", code="cancelled")
        case "worker":
            return Refused(503, failure.message, code="worker_unavailable", retry_after=5)
    return Refused(500, failure.message, code="internal_error")
