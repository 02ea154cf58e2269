"""POST /v1/encode: texts in, vectors out."""

import asyncio
from collections.abc import Iterable, Mapping

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service import answer
from service.call import Call, Mailbox
from service.errors import TooLarge
from service.large_answers import BASE64_NUMBER_BYTES, NUMBER_BYTES, LargeAnswers
from service.request_id import make_request_id
from service.schemas import EncodeRequest
from service.sequence import Encoded, Floats, Sequence
from service.served_model import ServedModel
from service.vectors import as_base64, normalized, pool

MAX_NUMBERS = 1 << 23
"""Numbers in one answer (32 MiB as float32): `pooling: none` can ask for a gigabyte in a small request."""

_INLINE_NUMBERS = 10_000
"""Answers of fewer numbers are rendered on the event loop: sooner done than a thread is woken."""


async def encode(
    model: ServedModel, mailbox: Mailbox, answers: LargeAnswers, asked: EncodeRequest, request: Request
) -> Response:
    """Answer one request. An empty text is its end token alone."""
    deadline = model.deadline(None)
    sources = await model.source_ids(dict(enumerate(asked.inputs)), truncate=asked.truncate)
    source_tokens = sum(map(len, sources.values()))
    size = model.artifact.manifest.embedding_size
    numbers = (source_tokens if asked.pooling == "none" else len(sources)) * size
    if numbers > MAX_NUMBERS:
        raise TooLarge(f"{source_tokens:,} vectors in one answer, the limit is {MAX_NUMBERS // size:,}; split the call")
    each = BASE64_NUMBER_BYTES if asked.encoding_format == "base64" else NUMBER_BYTES
    answers.expect(request.state.trail, numbers * each)
    with Call(model.engine, mailbox, request.state.trail) as call:
        sequences = {
            index: Sequence(ids, call.listener(index), kind="encode", deadline=deadline)
            for index, ids in sources.items()
        }
        call.submit(sequences, request.receive)
        vectors = await call.answers(Encoded, lambda encoded: _vectors(encoded.memory, asked))
    body = {
        "id": f"enc-{make_request_id()}",
        "model": model.artifact.name,
        "usage": {"source_tokens": source_tokens},
    }
    ordered = (vectors.pop(index) for index in range(len(vectors)))  # each can go when it is rendered
    if numbers < _INLINE_NUMBERS:
        content = _rendered(body, ordered, asked)
    else:
        content = await asyncio.to_thread(_rendered, body, ordered, asked)
    return Response(content, media_type="application/json")


def _vectors(memory: Floats, asked: EncodeRequest) -> Floats:
    pooled = pool(memory, asked.pooling)
    return normalized(pooled) if asked.normalize else pooled


def _rendered(body: Mapping[str, object], vectors: Iterable[Floats], asked: EncodeRequest) -> memoryview:
    """JSON; a float32 is written with the fewest digits that give the same float32 again.

    Text by text, so that a large answer, rendered in a thread, does not hold the interpreter from beginning to end.
    """
    content = bytearray(orjson.dumps(body).removesuffix(b"}") + b',"embeddings":[')
    for number, one in enumerate(vectors):
        if number:
            content += b","
        content += answer.as_json(as_base64(one) if asked.encoding_format == "base64" else one)
    content += b"]}"
    return memoryview(content)
