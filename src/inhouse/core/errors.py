"""The error tree: one base to catch; every class names its HTTP status and its exit code.

    InhouseError                    500  1   anything we raise on purpose
    |- UsageError                   400  2   a flag, field or value is wrong
    |  |- UnsupportedError          400  2   understood, and we cannot honour it
    |  '- ContextLengthError        400  2   prompt + max_tokens beyond the context
    |- NotFoundError                404  3   no such model, version, alias or file
    |- ConflictError                409  4   the name is taken, or the thing is in use
    |- FormatError                  422  5   a file is truncated, damaged, hostile or of an unknown form
    |- CapacityError                429  6   queue, memory or blocks are used up; try again
    |- CancelledError               499  7   the caller went away or asked to stop
    |- NetworkError                 502  8   a hub did not answer, or answered nonsense
    |- UnavailableError             503  9   starting, draining, or a needed part is not installed
    '- ExecutorError                500 10   a step failed (damaged mapping, NaN, out of memory)

Every message says the cause and the number that broke the limit; `remedy` says what to do about it.
"""

from typing import Any, ClassVar


class InhouseError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: the cause, one sentence, with the number that broke the limit.
        remedy: what the reader can do about it, one sentence.
        param: the field, flag or tensor that is at fault, if one is.
        details: further values for machine output; must be JSON-serialisable.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "", param: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.param = param
        self.details = details

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message

    def to_dict(self) -> dict[str, Any]:
        """The machine-readable form used by `--json` and by the server's error bodies."""
        out: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.remedy:
            out["remedy"] = self.remedy
        if self.param is not None:
            out["param"] = self.param
        return out | self.details


class UsageError(InhouseError):
    """A flag, field or value is wrong; nothing was done."""

    code = "invalid_request"
    http_status = 400
    exit_code = 2


class UnsupportedError(UsageError):
    """The request was understood and cannot be honoured; we say so rather than drop it."""

    code = "unsupported"


class ContextLengthError(UsageError):
    """Prompt plus requested tokens exceed the model's context."""

    code = "context_length_exceeded"


class NotFoundError(InhouseError):
    """No such model, version, alias, file or request."""

    code = "not_found"
    http_status = 404
    exit_code = 3


class ConflictError(InhouseError):
    """The name is taken, or the thing is in use."""

    code = "conflict"
    http_status = 409
    exit_code = 4


class FormatError(InhouseError):
    """A file is truncated, damaged, hostile, or of a form that we do not know."""

    code = "bad_format"
    http_status = 422
    exit_code = 5


class CapacityError(InhouseError):
    """A queue, memory or the block pool is used up; the same call may succeed later."""

    code = "over_capacity"
    http_status = 429
    exit_code = 6


class CancelledError(InhouseError):
    """The caller went away or asked to stop."""

    code = "cancelled"
    http_status = 499
    exit_code = 7


class NetworkError(InhouseError):
    """A hub did not answer, answered nonsense, or the machine is set offline."""

    code = "network"
    http_status = 502
    exit_code = 8


class UnavailableError(InhouseError):
    """Starting, draining, or an optional part is not installed."""

    code = "unavailable"
    http_status = 503
    exit_code = 9


class ExecutorError(InhouseError):
    """A step of the executor failed; the requests in it end with this, the process lives on."""

    code = "executor_failed"
    exit_code = 10
