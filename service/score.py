"""POST /v1/score: pairs of texts in, the log-probability of each second one, given the first, out."""

import asyncio
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service import answer
from service.call import Call, Mailbox
from service.large_answers import DESCRIBED_TOKEN_BYTES, LargeAnswers
from service.request_id import make_request_id
from service.schemas import ScoreRequest
from service.sequence import Scored, Sequence
from service.served_model import ServedModel

_INLINE_TOKENS = 2000
"""Answers about fewer tokens are rendered on the event loop: sooner done than a thread is woken."""


async def score(
    model: ServedModel, mailbox: Mailbox, answers: LargeAnswers, asked: ScoreRequest, request: Request
) -> Response:
    """Answer one request. An empty text is its end token alone, on either side."""
    deadline = model.deadline(None)
    sources = await model.source_ids(dict(enumerate(asked.inputs)), truncate=asked.truncate)
    targets = await model.target_ids(dict(enumerate(asked.targets)))
    target_tokens = sum(map(len, targets.values()))
    if asked.return_tokens:
        answers.expect(request.state.trail, target_tokens * DESCRIBED_TOKEN_BYTES)
    with Call(model.engine, mailbox, request.state.trail) as call:
        sequences = {
            index: Sequence(ids, call.listener(index), kind="score", target_ids=targets[index], deadline=deadline)
            for index, ids in sources.items()
        }
        call.submit(sequences, request.receive)
        scored = await call.answers(Scored, lambda answer: answer.log_probabilities)
    outputs = partial(_outputs, model, asked, targets, scored)
    body = {
        "id": f"score-{make_request_id()}",
        "model": model.artifact.name,
        "outputs": outputs() if target_tokens < _INLINE_TOKENS else await asyncio.to_thread(outputs),
        "usage": {"source_tokens": sum(map(len, sources.values())), "target_tokens": target_tokens},
    }
    return Response(orjson.dumps(body), media_type="application/json")


def _outputs(
    model: ServedModel, asked: ScoreRequest, targets: dict[int, list[int]], scored: dict[int, list[float]]
) -> list[orjson.Fragment]:
    """The outputs in order, as JSON."""
    outputs = []
    for index, ids in targets.items():
        log_probabilities = scored[index]
        output: dict[str, Any] = {"score": answer.score(log_probabilities)}
        if asked.return_tokens:
            output["tokens"] = answer.tokens(model.tokenizer, ids, log_probabilities)
        outputs.append(orjson.Fragment(orjson.dumps(output)))
    return outputs
