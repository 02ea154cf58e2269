"""The routes for machines that look after this one: alive, ready, metrics. And the front door, `/`."""

from fastapi import FastAPI
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from service.errors import Unavailable
from service.models import Models
from service.problem import problem_response
from service.schemas import ErrorResponse, Health

HEALTH_PATHS = frozenset({"/healthz", "/readyz"})
"""Open to everyone: what asks them has no key."""

METRICS_PATH = "/metrics"


def add_probes(app: FastAPI, models: Models) -> None:
    """Add /healthz, /readyz, /metrics and /."""

    @app.get(
        "/healthz",
        tags=["operations"],
        operation_id="healthz",
        summary="Alive",
        response_model=Health,
        responses={503: {"model": ErrorResponse, "description": "The model fails at whatever it is given."}},
    )
    async def healthz(request: Request) -> Response | Health:
        """200 while the process answers and its model computes; 503 when calls of the model fail again and again and
        it fails its self-test too, so that a new process is called for.
        """
        try:
            models.require_alive()
        except Unavailable as error:
            return problem_response(error, request.state.trail.request_id)
        return Health(status="alive")

    @app.get(
        "/readyz",
        tags=["operations"],
        operation_id="readyz",
        summary="Ready to answer",
        response_model=Health,
        responses={503: {"model": ErrorResponse, "description": "Still loading, or shutting down."}},
    )
    async def readyz(request: Request) -> Response | Health:
        """200 when every model is loaded and warm; 503 before that, and from the moment the server is told to stop."""
        try:
            models.require_ready()
        except Unavailable as error:
            return problem_response(error, request.state.trail.request_id)
        return Health(status="ready")

    @app.get(
        METRICS_PATH,
        tags=["operations"],
        operation_id="metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics(request: Request) -> Response:
        """Prometheus metrics, in the text format, or OpenMetrics for a client that accepts it."""
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(models.registry), headers={"content-type": content_type})

    @app.get("/", include_in_schema=False)
    async def front_door() -> Response:
        # Relative, so that it holds behind a proxy that adds a prefix.
        return RedirectResponse("docs", status_code=307)
