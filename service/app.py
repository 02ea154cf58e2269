"""The FastAPI application: which route answers with what. A factory; nothing happens at import."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response

from service import __version__
from service.admin import ADMIN_PREFIX, add_admin
from service.body import Bodies, read_json
from service.call import Mailbox
from service.classify import classify
from service.documentation import add_documentation
from service.door import Door, Doorkeeper, Refusals
from service.encode import encode
from service.generate import generate
from service.keys import Gate, Keys
from service.large_answers import LargeAnswers
from service.middleware import Envelope, Linger
from service.models import Models
from service.openapi import DESCRIPTION, describe, operation
from service.probes import HEALTH_PATHS, METRICS_PATH, add_probes
from service.problem import add_problem_handlers, validation_failed
from service.ration import Ration
from service.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    EncodeRequest,
    EncodeResponse,
    GenerateRequest,
    GenerateResponse,
    ModelList,
    ScoreRequest,
    ScoreResponse,
)
from service.score import score
from service.trail import Trail

if TYPE_CHECKING:
    from service.tracing import Tracing

Asked = TypeVar("Asked", GenerateRequest, EncodeRequest, ClassifyRequest, ScoreRequest)

_KEEP_ALIVE_BODY = 64 * 1024
"""An unread body up to this long (bytes) is left to the server, which skips it and keeps the connection."""

_MAX_VALUES = 64 * 1024
"""Texts, numbers, lists and objects in a body; where calls may have very many inputs, four for each."""


def create_app(models: Models, tracing: "Tracing | None" = None) -> FastAPI:
    """An application that serves `models`; it answers 503 until their engines are ready. Raises SettingsError."""
    app = FastAPI(
        title="Transduce",
        version=__version__,
        description=DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # none is set up, and it would be looked for
    )
    app.router.route_class = _Route
    settings = models.settings
    bodies = Bodies(settings.max_bodies_bytes, max_values=max(_MAX_VALUES, 4 * settings.max_inputs))
    answers = LargeAnswers(settings.max_answers_bytes)
    models.families.large_answer_bytes.set_function(lambda: float(answers.held))
    app.state.keys = Keys(settings.api_keys, settings.api_key_file)
    admin_keys = Keys(settings.admin_keys, settings.admin_key_file, flag="--admin-key")
    without_key = HEALTH_PATHS | ({METRICS_PATH} if settings.metrics_without_key else frozenset())
    paths: set[str] = set()  # of the routes, when they are there: the layers see them with the first request
    model_paths: set[str] = set()
    refusals, ration = Refusals(), Ration()
    models.families.connections_held.set_function(lambda: float(ration.waiting))
    keeper = Doorkeeper(models, app.state.keys, model_paths, refusals, ration, _KEEP_ALIVE_BODY)
    # A trace has every request for a model, those that are refused at once too.
    app.state.door = keeper if tracing is None else None
    app.add_middleware(Door, keeper=keeper, models=models)
    app.add_middleware(
        Gate,
        keys=app.state.keys,
        metrics=models.metrics(None),
        open_paths=without_key,
        other_keys={ADMIN_PREFIX: admin_keys} if admin_keys.required else {},
    )
    app.add_middleware(Linger, keep_alive_bytes=_KEEP_ALIVE_BODY)
    app.add_middleware(
        Envelope,
        metrics=models.metrics,
        bodies=bodies,
        answers=answers,
        paths=paths,
        leaving=lambda: models.status in ("draining", "stopped"),
        refusals=refusals,
        ration=ration,
        tracing=tracing,
    )
    add_problem_handlers(app, models.metrics)
    _add_model_routes(app, models, bodies, answers)
    model_paths.update(
        route.path for route in app.routes if isinstance(route, Route) and "POST" in (route.methods or ())
    )
    add_probes(app, models)
    if admin_keys.required:
        add_admin(app, models, bodies)
    add_documentation(app)
    describe(app)
    paths.update(route.path for route in app.routes if isinstance(route, Route))
    return app


class _Route(APIRoute):
    """Documented by FastAPI; if it takes a body, run by Starlette.

    Such routes read their bodies themselves and return responses. What FastAPI would do besides, looking for
    dependencies of which there are none, is a fifth of the time that the event loop has for a short request.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        if "POST" in (self.methods or ()):
            self.app = request_response(endpoint)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.mailbox = Mailbox(asyncio.get_running_loop())
    yield


def _add_model_routes(app: FastAPI, models: Models, bodies: Bodies, answers: LargeAnswers) -> None:
    @app.post("/v1/generate", **operation("generate", "Text to text", GenerateRequest, GenerateResponse))
    async def post_generate(request: Request) -> Response:
        """Translate, correct, transcribe: whatever the model turns one text into.

        One output per input, in order. Greedy decoding by default; `parameters` asks for beams, sampling, several
        sequences and more. With `stream` the answer comes as server-sent events.
        """
        asked = await _asked(request, models, bodies, GenerateRequest)
        with models.borrow(asked.model) as model:
            return await generate(model, app.state.mailbox, answers, asked, request)

    @app.post("/v1/encode", **operation("encode", "Text to vectors", EncodeRequest, EncodeResponse))
    async def post_encode(request: Request) -> Response:
        """The encoder's vectors of each text, pooled to one or token by token."""
        asked = await _asked(request, models, bodies, EncodeRequest)
        with models.borrow(asked.model) as model:
            return await encode(model, app.state.mailbox, answers, asked, request)

    @app.post("/v1/score", **operation("score", "How probable a text is", ScoreRequest, ScoreResponse))
    async def post_score(request: Request) -> Response:
        """The log-probability of each target, given its input: what a beam search would have added up for it."""
        asked = await _asked(request, models, bodies, ScoreRequest)
        with models.borrow(asked.model) as model:
            return await score(model, app.state.mailbox, answers, asked, request)

    @app.post("/v1/classify", **operation("classify", "Text to labels", ClassifyRequest, ClassifyResponse))
    async def post_classify(request: Request) -> Response:
        """The labels of each text with their probabilities, from a model that was trained to classify."""
        asked = await _asked(request, models, bodies, ClassifyRequest)
        with models.borrow(asked.model) as model:
            return await classify(model, app.state.mailbox, answers, asked, request)

    @app.get(
        "/v1/models", response_model=ModelList, tags=["models"], operation_id="models", summary="The models served here"
    )
    async def get_models() -> Any:
        """The models that this server has, with their limits, data, licence and figures."""
        return ModelList(data=[model.card() for model in models])


async def _asked(request: Request, models: Models, bodies: Bodies, schema: type[Asked]) -> Asked:
    """The body of a request, checked."""
    trail: Trail = request.state.trail
    body = await read_json(request, models.settings.max_body_bytes, bodies)
    trail.read = time.monotonic()
    if isinstance(body, dict) and isinstance(inputs := body.get("inputs"), list):
        models.require_input_count(len(inputs))  # before a million of them are looked at
    try:
        asked = schema.model_validate(body)
    except ValidationError as error:
        raise validation_failed(error) from None
    trail.inputs = len(asked.inputs)
    trail.model = models.named(asked.model).name
    return asked
