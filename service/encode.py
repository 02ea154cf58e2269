"""POST /v1/encode: texts in, vectors out."""

import asyncio
from collections.abc import Mapping

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.call import Call, Mailbox
from service.errors import TooLarge
from service.request_id import make_request_id
from service.schemas import EncodeRequest
from service.sequence import Encoded, Floats, Sequence
from service.served_model import ServedModel
from service.vectors import as_base64, normalized, pool

MAX_NUMBERS = 1 << 23
"""Numbers in one answer (32 MiB as float32): `pooling: none` can ask for a gigabyte in a small request."""

_INLINE_NUMBERS = 10_000
"""Answers of fewer numbers are rendered on the event loop: sooner done than a thread is woken."""


async def encode(model: ServedModel, mailbox: Mailbox, asked: EncodeRequest, request: Request) -> Response:
    """Answer one request. An empty text is its end token alone."""
    deadline = model.deadline(None)
    sources = await model.source_ids(dict(enumerate(asked.inputs)), truncate=asked.truncate)
    source_tokens = sum(map(len, sources.values()))
    size = model.artifact.manifest.embedding_size
    if (source_tokens if asked.pooling == "none" else len(sources)) * size > MAX_NUMBERS:
        raise TooLarge(f"{source_tokens:,} vectors in one answer, the limit is {MAX_NUMBERS // size:,}; split the call")
    with Call(model.engine, mailbox, request.state.trail) as call:
        sequences = {
            index: Sequence(ids, call.listener(index), kind="encode", deadline=deadline)
            for index, ids in sources.items()
        }
        call.submit(sequences, request.receive)
        vectors = await call.answers(Encoded, lambda answer: _vectors(answer.memory, asked))
    body = {
        "id": f"enc-{make_request_id()}",
        "model": model.artifact.name,
        "usage": {"source_tokens": source_tokens},
    }
    ordered = [vectors[index] for index in range(len(vectors))]
    if sum(one.size for one in ordered) < _INLINE_NUMBERS:
        content = _rendered(body, ordered, asked)
    else:
        content = await asyncio.to_thread(_rendered, body, ordered, asked)
    return Response(content, media_type="application/json")


def _vectors(memory: Floats, asked: EncodeRequest) -> Floats:
    pooled = pool(memory, asked.pooling)
    return normalized(pooled) if asked.normalize else pooled


def _rendered(body: Mapping[str, object], vectors: list[Floats], asked: EncodeRequest) -> bytes:
    """JSON; a float32 is written with the fewest digits that give the same float32 again.

    Text by text, so that a large answer, rendered in a thread, does not hold the interpreter from beginning to end.
    """
    if asked.encoding_format == "base64":
        pieces = [orjson.dumps(as_base64(one)) for one in vectors]
    else:
        pieces = [orjson.dumps(one, option=orjson.OPT_SERIALIZE_NUMPY) for one in vectors]
    return orjson.dumps(body).removesuffix(b"}") + b',"embeddings":[' + b",".join(pieces) + b"]}"
