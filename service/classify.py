"""POST /v1/classify: texts in, labels with their probabilities out."""

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.call import Call, EngineRefusal, Mailbox
from service.errors import ValidationFailed
from service.request_id import make_request_id
from service.schemas import ClassifyRequest
from service.sequence import Encoded, Failed, Floats, Sequence
from service.served_model import ServedModel
from service.vectors import probabilities


async def classify(model: ServedModel, mailbox: Mailbox, asked: ClassifyRequest, request: Request) -> Response:
    """Answer one request. An empty text is its end token alone. ValidationFailed (422) if the model has no labels."""
    model.require_name(asked.model)
    labels = model.artifact.manifest.labels
    if not labels:
        raise ValidationFailed(
            "this model has no labels: it is no classifier, and /v1/models lists what is served here"
        )
    deadline = model.deadline(None)
    sources = await model.source_ids(dict(enumerate(asked.inputs)), truncate=asked.truncate)
    with Call(model.engine, mailbox) as call:
        sequences = {
            index: Sequence(ids, call.listener(index), kind="classify", deadline=deadline)
            for index, ids in sources.items()
        }
        call.submit(sequences, request.receive)
        told = await _all_classified(call)
    body = {
        "id": f"class-{make_request_id()}",
        "model": model.artifact.name,
        "outputs": [_ranked(labels, told[index]) for index in range(len(told))],
        "usage": {"source_tokens": sum(map(len, sources.values()))},
    }
    return Response(orjson.dumps(body), media_type="application/json")


async def _all_classified(call: Call) -> dict[int, Floats]:
    """The probabilities (labels,) of each text."""
    told: dict[int, Floats] = {}
    while call.open:
        for index, event in await call.events():
            if isinstance(event, Failed):
                raise EngineRefusal(event.error)
            if isinstance(event, Encoded):
                told[index] = probabilities(event.memory)
    return told


def _ranked(labels: list[str], scores: Floats) -> list[dict[str, object]]:
    """The likeliest first; of equals, the first label."""
    order = np.argsort(-scores, kind="stable")
    return [{"label": labels[number], "score": float(scores[number])} for number in order.tolist()]
