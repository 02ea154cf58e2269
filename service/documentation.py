"""/openapi.json, and /docs without the internet: Swagger UI, its files from the package `fastapi-swagger`."""

from importlib import resources

import orjson
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

_FILES = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon-32x32.png": "image/png",
}


def add_documentation(app: FastAPI) -> None:
    """Add /openapi.json, /docs and the files it loads. Addresses are relative, so that a proxy may add a prefix."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{app.title} API",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon-32x32.png",
        swagger_ui_parameters={
            "validatorUrl": None,  # a badge that another server draws, from a document sent to it
            "tryItOutEnabled": True,
            "displayRequestDuration": True,
            "defaultModelsExpandDepth": 0,
        },
    )

    # FastAPI's own route for the document has no template that the metrics could name.
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(orjson.dumps(app.openapi()), media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page

    def add_file(name: str, content_type: str) -> None:
        content = resources.files("fastapi_swagger").joinpath("resources", name).read_bytes()

        @app.get(f"/docs/{name}", include_in_schema=False)
        async def file() -> Response:
            headers = {"content-type": content_type, "cache-control": "public, max-age=3600"}
            return Response(content, headers=headers)

    for name, content_type in _FILES.items():
        add_file(name, content_type)
