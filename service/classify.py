"""POST /v1/classify: texts in, labels with their probabilities out."""

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.call import Call, Mailbox
from service.large_answers import LargeAnswers
from service.request_id import make_request_id
from service.schemas import ClassifyRequest
from service.sequence import Encoded, Floats, Sequence
from service.served_model import ServedModel
from service.vectors import probabilities


async def classify(
    model: ServedModel, mailbox: Mailbox, answers: LargeAnswers, asked: ClassifyRequest, request: Request
) -> Response:
    """Answer one request. An empty text is its end token alone. Without labels the engine refuses it."""
    deadline = model.deadline(None)
    sources = await model.source_ids(dict(enumerate(asked.inputs)), truncate=asked.truncate)
    labels = model.artifact.manifest.labels
    answers.expect(request.state.trail, len(sources) * sum(map(_bytes_of, labels)))
    with Call(model.engine, mailbox, request.state.trail) as call:
        sequences = {
            index: Sequence(ids, call.listener(index), kind="classify", deadline=deadline)
            for index, ids in sources.items()
        }
        call.submit(sequences, request.receive)
        told = await call.answers(Encoded, lambda answer: probabilities(answer.memory))
    body = {
        "id": f"class-{make_request_id()}",
        "model": model.artifact.name,
        "outputs": [_ranked(labels, told[index]) for index in range(len(told))],
        "usage": {"source_tokens": sum(map(len, sources.values()))},
    }
    return Response(orjson.dumps(body), media_type="application/json")


def _bytes_of(label: str) -> int:
    """What a label and its probability are in an answer, before and after it is put together."""
    return 4 * len(label) + 256


def _ranked(labels: list[str], scores: Floats) -> list[dict[str, object]]:
    """The likeliest first; of equals, the first label."""
    order = np.argsort(-scores, kind="stable")
    return [{"label": labels[number], "score": float(scores[number])} for number in order.tolist()]
