"""How a failure looks on the wire: one shape for every status from 400 up, the framework's own included."""

import http
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.body import without_lone_surrogates
from service.call import EngineRefusal
from service.errors import MethodNotAllowed, NotFound, TransduceError, ValidationFailed
from service.metrics import Metrics

_MAX_NAMED = 3
_MAX_NAME = 80


def problem(error: TransduceError, request_id: str) -> dict[str, Any]:
    """The body of an error response, and of an error event in a stream."""
    return {"error": {"type": error.type, "message": without_lone_surrogates(str(error))}, "request_id": request_id}


def problem_response(error: TransduceError, request_id: str, headers: dict[str, str] | None = None) -> Response:
    """The response that says `error`, with Retry-After where the error knows when to come back."""
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    body = orjson.dumps(problem(error, request_id))
    return Response(body, error.status, headers=headers, media_type="application/json")


def add_problem_handlers(app: FastAPI, metrics: Callable[[str | None], Metrics]) -> None:
    """Make `app` answer its own refusals (unknown route, wrong method) and this service's errors in the one shape."""

    def refused(request: Request, error: TransduceError) -> Response:
        # A metric's request is one input of a call; a body that could not be read counts as one.
        trail = request.state.trail
        metrics(trail.model).count_failure(error.type, trail.inputs or 1)
        return problem_response(error, request.state.trail.request_id)

    async def on_transduce_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, TransduceError)
        return refused(request, error)

    async def on_engine_refusal(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, EngineRefusal)
        return refused(request, refusal.error)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = problem_response(_error_of(error), request.state.trail.request_id, dict(error.headers or {}))
        response.status_code = error.status_code
        return response

    app.add_exception_handler(TransduceError, on_transduce_error)
    app.add_exception_handler(EngineRefusal, on_engine_refusal)
    app.add_exception_handler(HTTPException, on_http_exception)


def _error_of(error: HTTPException) -> TransduceError:
    if error.status_code == http.HTTPStatus.NOT_FOUND:
        return NotFound("no such route; GET /docs lists them")
    if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowed(f"this route takes {(error.headers or {}).get('Allow', 'another method')}")
    return TransduceError(str(error.detail))


def validation_failed(error: ValidationError) -> ValidationFailed:
    """pydantic's findings as one sentence: each field by its path, what is wrong with it, and never its value."""
    findings = error.errors(include_url=False, include_context=False, include_input=False)
    sentences = [f"{_path(finding['loc'])}: {_finding(finding['type'], finding['msg'])}" for finding in findings]
    if len(sentences) > _MAX_NAMED:
        sentences[_MAX_NAMED:] = [f"and {len(sentences) - _MAX_NAMED} more"]
    return ValidationFailed("; ".join(sentences))


def _path(place: tuple[int | str, ...]) -> str:
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
    return (path if len(path) <= _MAX_NAME else path[:_MAX_NAME] + "...") or "body"


def _finding(kind: str, message: str) -> str:
    known = {
        "extra_forbidden": "unknown field",
        "missing": "is required",
        "model_type": "must be a JSON object",
        "finite_number": "must be a finite number",
    }
    return known.get(kind) or message.replace("Input should be", "must be")
