"""User errors. Each maps to one HTTP status and names what was wrong and what to do; `assert` is for our own bugs."""

from __future__ import annotations


class SpecserveError(Exception):
    """Base of every error a user can cause or meet.

    Attributes: `status` HTTP status, `type` and `code` OpenAI's error fields, `param` the offending field or None.
    """

    status = 500
    type = "internal_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(SpecserveError):
    """A field of a request is missing, unknown or out of range."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """Prompt (plus the tokens asked for) does not fit the model's context."""

    code = "context_length_exceeded"


class NotFoundError(SpecserveError):
    """The named model or adapter does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class AdapterError(SpecserveError):
    """An adapter folder is broken, of the wrong shape, holds NaN or uses an unsupported setting."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_adapter"


class AdapterBusyError(SpecserveError):
    """The operation conflicts with the adapter's present state (say, unloading one that is pinned)."""

    status = 409
    type = "invalid_request_error"
    code = "adapter_busy"


class ForbiddenError(SpecserveError):
    """A load path outside every --adapter-root."""

    status = 403
    type = "permission_error"
    code = "path_not_allowed"


class AuthenticationError(SpecserveError):
    """Missing or wrong API key."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class OverloadedError(SpecserveError):
    """The waiting queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class EngineDeadError(SpecserveError):
    """The engine process died; it is being restarted. Greedy and seeded requests can be resumed."""

    status = 503
    type = "service_unavailable"
    code = "engine_dead"


class ModelLoadError(SpecserveError):
    """The model folder cannot be read or is not supported. The CLI prints one sentence and exits with 2."""

    code = "model_load_error"


BY_CODE: dict[str, type[SpecserveError]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError, ContextLengthError, NotFoundError, AdapterError, AdapterBusyError, ForbiddenError,
        AuthenticationError, OverloadedError, EngineDeadError, ModelLoadError,
    )
    if cls.code is not None
}  # fmt: skip
