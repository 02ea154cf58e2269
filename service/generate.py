"""POST /v1/generate: texts in, generated texts out, at once or as a stream."""

import asyncio
import uuid

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service import answer
from service.call import Call, EngineRefusal, Mailbox
from service.generation import Generation
from service.schemas import GenerateRequest
from service.sequence import Failed, Finished, GenerateParameters
from service.served_model import ServedModel
from service.stream import EventStream

_INLINE_TOKENS = 2000
"""Answers of fewer tokens are turned into text on the event loop: sooner done than a thread is woken."""


async def generate(model: ServedModel, mailbox: Mailbox, asked: GenerateRequest, request: Request) -> Response:
    """Answer one request. Raises what the contract refuses, before the first byte of an answer."""
    model.require_name(asked.model)
    parameters = GenerateParameters(model.max_new_tokens(asked.parameters.max_new_tokens))
    deadline = model.deadline(asked.parameters.timeout)
    written = {index: text for index, text in enumerate(asked.inputs) if text and not text.isspace()}
    sources = await model.source_ids(written, truncate=asked.parameters.truncate)
    generation = Generation(f"gen-{uuid.uuid4().hex}", model, asked, sources, parameters, deadline)
    if asked.stream:
        return await EventStream.begin(generation, Call(model.engine, mailbox), request)
    with Call(model.engine, mailbox) as call:
        generation.submit(call, request.receive, stream=False)
        finished = await _all_finished(call)
    if sum(len(event.ids) for event in finished.values()) < _INLINE_TOKENS:
        content = _rendered(generation, finished)
    else:
        content = await asyncio.to_thread(_rendered, generation, finished)
    return Response(content, media_type="application/json")


async def _all_finished(call: Call) -> dict[int, Finished]:
    finished: dict[int, Finished] = {}
    while call.open:
        for index, event in await call.events():
            if isinstance(event, Failed):
                raise EngineRefusal(event.error)
            if isinstance(event, Finished):
                finished[index] = event
    return finished


def _rendered(generation: Generation, finished: dict[int, Finished]) -> bytes:
    outputs = []
    for index in range(len(generation.asked.inputs)):
        if (event := finished.get(index)) is None:
            sequence = answer.sequence("", "stop", generation.extras([], []))
        else:
            text = generation.model.tokenizer.decode(event.ids)
            sequence = answer.sequence(text, event.reason, generation.extras(event.ids, event.log_probabilities))
        outputs.append({"sequences": [sequence]})
    body = {
        "id": generation.id,
        "model": generation.model.artifact.name,
        "outputs": outputs,
        "usage": answer.usage(
            sum(map(len, generation.sources.values())), sum(len(event.ids) for event in finished.values())
        ),
    }
    return orjson.dumps(body)
