"""The one tree of errors. Each class carries the `type` and the HTTP status with which it is answered.

    TransduceError
    ├── RequestError               answered to a client
    │   ├── InvalidRequest     400
    │   ├── Unauthorized       401
    │   ├── NotFound           404
    │   ├── MethodNotAllowed   405
    │   ├── Conflict           409
    │   ├── TooLarge           413
    │   ├── ValidationFailed   422
    │   ├── QueueFull          429 + Retry-After
    │   ├── EngineFailure      500
    │   ├── Unavailable        503 + Retry-After
    │   └── DeadlineExceeded   504
    └── StartupError               the process refuses to start
        ├── ArtifactError
        └── SettingsError

A message is one sentence for the person who can act on it; it never holds a request's text.
"""

from __future__ import annotations

from typing import ClassVar


class TransduceError(Exception):
    """Whatever this program raises on purpose."""

    type: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        """Seconds after which trying again makes sense (the header Retry-After), where it does."""


class RequestError(TransduceError):
    """A request that is answered with an error."""


class InvalidRequest(RequestError):
    """What came is not a request: not JSON, too deep, not UTF-8."""

    type = "invalid_request"
    status = 400


class Unauthorized(RequestError):
    """No key, or a wrong one."""

    type = "unauthorized"
    status = 401


class NotFound(RequestError):
    """No such route, or no such model."""

    type = "not_found"
    status = 404


class MethodNotAllowed(RequestError):
    """The route exists, not with this method."""

    type = "method_not_allowed"
    status = 405


class Conflict(RequestError):
    """What is asked for is under way already, or at odds with what is."""

    type = "conflict"
    status = 409


class TooLarge(RequestError):
    """A text, a list or a body above a limit: trying again does not help."""

    type = "too_large"
    status = 413


class ValidationFailed(RequestError):
    """A field that is unknown, of a wrong type, or out of its range. The message names it."""

    type = "validation_failed"
    status = 422


class QueueFull(RequestError):
    """The line is full now."""

    type = "queue_full"
    status = 429

    def __init__(self, message: str, *, retry_after: int | None = 1) -> None:
        super().__init__(message, retry_after=retry_after)


class EngineFailure(RequestError):
    """The model failed while it worked on this request."""

    type = "engine_failure"
    status = 500


class Unavailable(RequestError):
    """Not ready yet, draining, or stopped."""

    type = "unavailable"
    status = 503

    def __init__(self, message: str, *, retry_after: int | None = 5) -> None:
        super().__init__(message, retry_after=retry_after)


class DeadlineExceeded(RequestError):
    """The request's time ran out while it waited."""

    type = "deadline_exceeded"
    status = 504


class StartupError(TransduceError):
    """The process cannot start; the message names the remedy. The command line exits with status 2."""


class ArtifactError(StartupError):
    """The artifact cannot be served: broken, unknown, or not fit for this machine."""

    type = "artifact_error"


class SettingsError(StartupError):
    """A setting that does not exist or whose value is wrong. The message names it."""

    type = "settings_error"
