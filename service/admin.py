"""POST /admin/models/{name}: another version of a model takes the place of the one that serves. Has keys of its own."""

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.body import Bodies, read_json
from service.models import Models
from service.problem import validation_failed
from service.schemas import ErrorResponse, ModelCard

ADMIN_PREFIX = "/admin/"

_MAX_BODY_BYTES = 64 * 1024

_ERRORS = {
    401: "No key of the admin routes.",
    404: "No model of this name.",
    409: "Another version is being loaded.",
    422: "The version cannot be served; the one before it goes on.",
    503: "The server is loading or shutting down.",
}


class VersionRequest(BaseModel):
    """The body of POST /admin/models/{name}."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        pattern=r"^[^\x00]*$",
        description="Directory of the artifact, relative to the one in which the first version lies, out of which it "
        "may not lead. Without it the same directory is read anew.",
        examples=["2026-11-27"],
    )


def add_admin(app: FastAPI, models: Models, bodies: Bodies) -> None:
    """Add the route."""

    @app.post(
        ADMIN_PREFIX + "models/{name}",
        tags=["operations"],
        operation_id="replace",
        summary="Serve another version of a model",
        response_model=ModelCard,
        responses={status: {"model": ErrorResponse, "description": text} for status, text in _ERRORS.items()},
        openapi_extra={
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
            "requestBody": {"content": {"application/json": {"schema": VersionRequest.model_json_schema()}}},
        },
    )
    async def post_version(request: Request) -> Response:
        """Read, verify and warm another version beside the one that serves; then it takes its place, and no request is
        lost. Answers when it serves. One that cannot be served is refused, and nothing changes.
        """
        try:
            asked = VersionRequest.model_validate(await read_json(request, _MAX_BODY_BYTES, bodies))
        except ValidationError as error:
            raise validation_failed(error) from None
        served = await models.replace(request.path_params["name"], asked.path)
        return JSONResponse(served.card().model_dump(mode="json"))
