"""Expected failures. Each is a class with an HTTP status and a stable code; one handler makes the envelope of it."""

from typing import ClassVar


class AppError(Exception):
    """A failure the caller can act on: the message says what, where and what to do.

    `status` is the HTTP status, `type`, `code` and `param` are the envelope's fields of the same name.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None
    param: str | None = None
    retry_after_seconds: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param if param is not None else type(self).param
        self.code = code if code is not None else type(self).code

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """The body that every failure leaves with, public or between our own processes."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str] | None:
        """What belongs beside the envelope."""
        return {"Retry-After": str(self.retry_after_seconds)} if self.retry_after_seconds else None

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments do not survive the default pickling
        return _rebuild, (type(self), str(self), self.param, self.code)


def _rebuild(cls: type[AppError], message: str, param: str | None, code: str | None) -> AppError:
    return cls(message, param=param, code=code)


class BadRequest(AppError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class Unauthenticated(AppError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class NotFound(AppError):
    status, type, code = 404, "invalid_request_error", "not_found"


class Conflict(AppError):
    """The thing is not in a state that allows this. 400 and not 409: the SDK would repeat a 409 three times."""

    status, type, code = 400, "invalid_request_error", "conflict"


class TooLarge(AppError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class RateLimited(AppError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"
    retry_after_seconds = 1


class Unavailable(AppError):
    """Something behind us does not answer just now; the same request may work in `retry_after_seconds`."""

    status, type, code = 503, "server_error", "service_unavailable"
    retry_after_seconds = 2
