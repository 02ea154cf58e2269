"""/openapi.json: what the routes take and answer, with examples and every error. Bodies are read by `service.body`, not
by FastAPI, so the request schemas are put into the document here."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.schemas import ClassifyRequest, EncodeRequest, ErrorResponse, GenerateRequest, ScoreRequest, StreamEvent

DESCRIPTION = """Encoder-decoder transformers on ONNX Runtime, with continuous batching.

Every answer has `X-Request-ID`: the one that was sent, or a new one. Every error has one shape, `ErrorResponse`.
A body is JSON whatever its content type says. Source: the README of the repository.
"""

_REFERENCE = "#/components/schemas/{model}"

_ERRORS: dict[int, tuple[str, str, str]] = {
    400: (
        "Not JSON, not UTF-8, or nested too deep.",
        "invalid_request",
        "the body is not JSON: Expecting value at character 0",
    ),
    401: (
        "No key, or a wrong one, where the server wants one.",
        "unauthorized",
        "this service wants a key: send it in the header Authorization: Bearer KEY",
    ),
    404: ("No model of this name.", "not_found", "no such model here; this server has 'tatoeba-en-de'"),
    413: (
        "A text has too many tokens, the call too many inputs, or the body too many bytes.",
        "too_large",
        "inputs[3] has 700 tokens, the limit is 512; split it, or ask to truncate",
    ),
    422: (
        "A field is unknown, missing, of the wrong type, out of range, or does not go with another.",
        "validation_failed",
        "parameters.max_new_tokens: must be between 1 and 256",
    ),
    429: (
        "The line is full; Retry-After says when to come back.",
        "queue_full",
        "the line is full; try again in a moment",
    ),
    500: ("The model failed on this request.", "engine_failure", "the model failed on this request"),
    503: (
        "Not ready yet, or shutting down; Retry-After says when to come back.",
        "unavailable",
        "the model is being loaded",
    ),
    504: ("The request's time ran out while it waited in line.", "deadline_exceeded", "the time ran out in line"),
}

_EXAMPLES: dict[str, dict[str, Any]] = {
    "generate": {
        "one text": {"inputs": "Where is the train station?"},
        "several texts": {"inputs": ["Good morning!", "It is raining."], "parameters": {"return_scores": True}},
        "a stream": {"inputs": "Where is the train station?", "stream": True},
        "the three best of five beams": {
            "inputs": "He is out of his mind.",
            "parameters": {"num_beams": 5, "num_return_sequences": 3, "return_scores": True},
        },
        "sampling with a seed": {
            "inputs": "He is out of his mind.",
            "parameters": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 3, "seed": 7},
        },
        "up to a text, and without another": {
            "inputs": "I came, I saw, I won.",
            "parameters": {"stop": [","], "suppress": ["gekommen"]},
        },
        "alternatives after a prefix": {
            "inputs": "He is out of his mind.",
            "parameters": {"prefix": "Er ist", "return_alternatives": True, "num_return_sequences": 3, "num_beams": 2},
        },
        "which word from which": {
            "inputs": "Good morning!",
            "parameters": {"return_tokens": True, "return_alignments": True},
        },
    },
    "encode": {
        "one text": {"inputs": "Where is the train station?"},
        "a vector per token": {"inputs": "Good morning!", "pooling": "none", "encoding_format": "base64"},
    },
    "classify": {
        "one text": {"inputs": "Where is the train station?"},
        "several texts": {"inputs": ["Where is the train station?", "What a beautiful house!"]},
    },
    "score": {
        "one pair": {"inputs": "Good evening!", "targets": "Guten Abend!"},
        "several pairs": {
            "inputs": ["Good evening!", "Good evening!"],
            "targets": ["Guten Abend!", "Gute Nacht!"],
            "return_tokens": True,
        },
    },
}

_ANSWER_EXAMPLES: dict[str, dict[str, Any]] = {
    "generate": {
        "id": "gen-5411723be0af4a9980c800afbcb572e0",
        "model": "tatoeba-en-de",
        "outputs": [{"sequences": [{"text": "Wo ist der Bahnhof?", "finish_reason": "stop"}]}],
        "usage": {"source_tokens": 7, "generated_tokens": 6},
    },
    "encode": {
        "id": "enc-6a2f826567db42e2a77619159adaca37",
        "model": "tatoeba-en-de",
        "embeddings": [[0.4082483, 0.8164966, -0.4082483, 0.0]],
        "usage": {"source_tokens": 7},
    },
    "classify": {
        "id": "class-1b0d9b7f6c4e4bd5b0f0a3f1f7f6f1c2",
        "model": "questions",
        "outputs": [[{"label": "question", "score": 0.9375}, {"label": "statement", "score": 0.0625}]],
        "usage": {"source_tokens": 7},
    },
    "score": {
        "id": "score-0b0d9b7f6c4e4bd5b0f0a3f1f7f6f1c2",
        "model": "tatoeba-en-de",
        "outputs": [{"score": -1.4516825}],
        "usage": {"source_tokens": 5, "target_tokens": 5},
    },
}


def operation(name: str, summary: str, request: type[BaseModel], response: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI is told of a POST route: its name, the body it takes, the answers it gives."""
    return {
        "operation_id": name,
        "summary": summary,
        "tags": ["models"],
        "response_model": response,
        "responses": {status: _error(status) for status in _ERRORS} | _answers(name),
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": _REFERENCE.format(model=request.__name__)},
                        "examples": {title: {"value": value} for title, value in _EXAMPLES[name].items()},
                    }
                },
            }
        },
    }


def _error(status: int) -> dict[str, Any]:
    description, kind, message = _ERRORS[status]
    example = {"error": {"type": kind, "message": message}, "request_id": "7f2c6a50b1f14b0c9d5de2f1c3a8e901"}
    answer: dict[str, Any] = {
        "model": ErrorResponse,
        "description": description,
        "content": {"application/json": {"example": example}},
    }
    if status in (429, 503):
        answer["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return answer


def _answers(name: str) -> dict[int | str, dict[str, Any]]:
    whole = {"application/json": {"example": _ANSWER_EXAMPLES[name]}}
    if name != "generate":
        return {200: {"content": whole}}
    # Each event as an object of its fields, of which there is one; what is in it is JSON, but for the last.
    told = [
        {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": _REFERENCE.format(model=m)},
        }
        for m in (StreamEvent.__name__, ErrorResponse.__name__)
    ]
    event = {
        "type": "object",
        "properties": {"data": {"anyOf": [*told, {"const": "[DONE]"}]}},
        "required": ["data"],
    }
    description = "The whole answer, or, with `stream`, one `data:` line per event and `data: [DONE]` at the end."
    return {200: {"description": description, "content": {**whole, "text/event-stream": {"schema": event}}}}


def describe(app: FastAPI) -> None:
    """Complete the document that FastAPI makes with the schemas it does not see."""
    made = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            unseen = [
                (model, "validation") for model in (GenerateRequest, EncodeRequest, ClassifyRequest, ScoreRequest)
            ]
            _, request_schemas = models_json_schema(unseen, ref_template=_REFERENCE)  # type: ignore[arg-type]  # list is invariant
            _, event_schemas = models_json_schema([(StreamEvent, "serialization")], ref_template=_REFERENCE)
            components = document.setdefault("components", {})
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}, {}]  # with a key, or, where the server wants none, without
            schemas = components.setdefault("schemas", {})
            for more in (event_schemas, request_schemas):
                schemas.update({name: schema for name, schema in more.get("$defs", {}).items() if name not in schemas})
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]  # the way FastAPI documents
