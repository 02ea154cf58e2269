"""POST /v1/generate: texts in, generated texts out, at once or as a stream."""

import asyncio

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service import answer
from service.call import Call, EngineRefusal, Mailbox
from service.errors import TooLarge
from service.generation import Generation
from service.large_answers import DESCRIBED_TOKEN_BYTES, NUMBER_BYTES, TOKEN_BYTES, LargeAnswers
from service.request_id import make_request_id
from service.schemas import GenerateRequest
from service.sequence import Failed, Finished, GenerateParameters
from service.served_model import ServedModel
from service.stream import EventStream

MAX_SEQUENCES = 4096
"""Sequences in one answer, unless the server takes more inputs than that in a call."""

MAX_WEIGHTS = 1 << 23
"""Numbers in the alignments of one answer: some 100 MB of JSON."""

_INLINE_TOKENS = 2000
"""Answers of fewer tokens are turned into text on the event loop: sooner done than a thread is woken."""

_WEIGHTS_PER_TOKEN = 50
"""Weights of an alignment that are rendered in the time of one token."""


async def generate(
    model: ServedModel, mailbox: Mailbox, answers: LargeAnswers, asked: GenerateRequest, request: Request
) -> Response:
    """Answer one request. Raises what the contract refuses, before the first byte of an answer."""
    if asked.parameters.suppress:  # every token is looked at for each of the texts
        parameters = await asyncio.to_thread(model.generate_parameters, asked.parameters)
    else:
        parameters = model.generate_parameters(asked.parameters)
    deadline = model.deadline(asked.parameters.timeout)
    written = {index: text for index, text in enumerate(asked.inputs) if text and not text.isspace()}
    sources = await model.source_ids(written, truncate=asked.parameters.truncate)
    size = _size_at_most(asked, parameters, sources, max(MAX_SEQUENCES, model.settings.max_inputs))
    answers.expect(request.state.trail, size)
    prefix = model.tokenizer.decode(parameters.prefix_ids)
    detokenizer = model.tokenizer.detokenizer(prefix, asked.parameters.stop)
    generation = Generation(f"gen-{make_request_id()}", model, asked, sources, parameters, detokenizer, deadline)
    if asked.stream:
        return await EventStream.begin(generation, Call(model.engine, mailbox, request.state.trail), request)
    with Call(model.engine, mailbox, request.state.trail) as call:
        generation.submit(call, request.receive, stream=False)
        finished = await _all_finished(call)
    if sum(map(_work, finished.values())) < _INLINE_TOKENS:
        content = _rendered(generation, finished)
    else:
        content = await asyncio.to_thread(_rendered, generation, finished)
    return Response(content, media_type="application/json")


def _size_at_most(
    asked: GenerateRequest, parameters: GenerateParameters, sources: dict[int, list[int]], max_sequences: int
) -> int:
    """Bytes that the answer can come to. TooLarge (413) if it could grow beyond all measure."""
    each = parameters.num_return_sequences
    if len(asked.inputs) * each > max_sequences:
        raise TooLarge(
            f"{len(asked.inputs):,} inputs with {each} sequences each, the limit of an answer is {max_sequences:,}; "
            "split the call"
        )
    weights = sum(map(len, sources.values())) * parameters.max_new_tokens * each
    if parameters.return_alignments and weights > MAX_WEIGHTS:
        raise TooLarge(
            f"the alignments could have {weights:,} numbers, the limit of an answer is {MAX_WEIGHTS:,}; "
            "split the call, or lower max_new_tokens"
        )
    tokens = len(sources) * each * parameters.max_new_tokens
    # Of a stream each token is an event by itself, until its client has taken what came before.
    size = tokens * (DESCRIBED_TOKEN_BYTES if asked.parameters.return_tokens or asked.stream else TOKEN_BYTES)
    return size + (weights * NUMBER_BYTES if parameters.return_alignments else 0)


async def _all_finished(call: Call) -> dict[int, Finished]:
    finished: dict[int, Finished] = {}
    while call.open:
        for index, event in await call.events():
            if isinstance(event, Failed):
                raise EngineRefusal(event.error)
            if isinstance(event, Finished):
                finished[index] = event
    return finished


def _generated_tokens(event: Finished) -> int:
    return sum(len(result.ids) for result in event.results)


def _work(event: Finished) -> int:
    """How long its text and numbers take to render, in tokens."""
    weights = sum(0 if result.alignment is None else result.alignment.size for result in event.results)
    return _generated_tokens(event) + weights // _WEIGHTS_PER_TOKEN


def _rendered(generation: Generation, finished: dict[int, Finished]) -> bytes:
    """The answer. Output by output, so that a large one, rendered in a thread, lets others run in between."""
    outputs = []
    for index in range(len(generation.asked.inputs)):
        results = finished[index].results if index in finished else []
        outputs.append(orjson.Fragment(answer.as_json(generation.output(index, results))))
    body = {
        "id": generation.id,
        "model": generation.model.artifact.name,
        "outputs": outputs,
        "usage": answer.usage(
            sum(map(len, generation.sources.values())), sum(map(_generated_tokens, finished.values()))
        ),
    }
    return orjson.dumps(body)
