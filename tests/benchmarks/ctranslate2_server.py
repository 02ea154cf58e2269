"""CTranslate2 behind a small FastAPI server with micro-batching: what a user of it would write, at its best.

    python -m tests.benchmarks.ctranslate2_server MODEL TOKENIZER --port 8001 --window-ms 0 --batch 64

Answers the same POST /v1/generate as Transduce does, as far as the comparison asks: `inputs`, and of the parameters
`num_beams`, `length_penalty`, `max_new_tokens` and `min_new_tokens`. A request waits until `batch` inputs are there or
until the window has passed since the first of them came, then they are translated together by one of `replicas`
threads; with a window of 0 a thread that is free takes whatever waits. CTranslate2 sorts a batch by length itself.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ctranslate2
import orjson
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer

from tests.benchmarks.ctranslate2_model import Vocabulary


class Parameters(BaseModel):
    """How to decode. Inputs are batched with those of equal parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_beams: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int = 256
    min_new_tokens: int = 1


class Request(BaseModel):
    """The body of POST /v1/generate."""

    model_config = ConfigDict(extra="forbid")

    inputs: str | list[str]
    parameters: Parameters = Parameters()


@dataclass
class Job:
    """One input that waits; the answer is its text, its source tokens and its generated tokens."""

    text: str
    parameters: Parameters
    answer: asyncio.Future[tuple[str, int, int]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class MicroBatcher:
    """Collects jobs into batches for a translator with `replicas` parallel workers."""

    def __init__(
        self,
        translator: ctranslate2.Translator,
        tokenizer: Tokenizer,
        *,
        replicas: int,
        batch: int,
        window: float,
        limit: int,
    ) -> None:
        self._translator = translator
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer, tokenizer.get_vocab_size())
        self._batch = batch
        self._window = window
        self._limit = limit
        self._waiting: deque[Job] = deque()
        self._came = asyncio.Condition()
        self._threads = ThreadPoolExecutor(replicas)
        self._workers = [asyncio.create_task(self._work()) for _ in range(replicas)]

    async def translate(self, texts: list[str], parameters: Parameters) -> list[tuple[str, int, int]]:
        """Answers in order."""
        jobs = [Job(text, parameters) for text in texts]
        async with self._came:
            self._waiting.extend(jobs)
            self._came.notify_all()
        return [await job.answer for job in jobs]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            jobs = await self._collect()
            try:
                answers = await loop.run_in_executor(self._threads, self._run, jobs)
                for job, answer in zip(jobs, answers, strict=True):
                    job.answer.set_result(answer)
            except Exception as error:
                for job in jobs:
                    job.answer.set_exception(error)

    async def _collect(self) -> list[Job]:
        async with self._came:
            await self._came.wait_for(lambda: self._waiting)
            if self._window:
                try:
                    async with asyncio.timeout(self._window):
                        await self._came.wait_for(lambda: len(self._waiting) >= self._batch)
                except TimeoutError:
                    await self._came.wait_for(lambda: self._waiting)  # the other worker may have taken them
            parameters = self._waiting[0].parameters
            taken = [job for job in self._waiting if job.parameters == parameters][: self._batch]
            chosen = set(map(id, taken))
            self._waiting = deque(job for job in self._waiting if id(job) not in chosen)
            return taken

    def _run(self, jobs: list[Job]) -> list[tuple[str, int, int]]:
        """In a thread: tokenizer and translator leave the interpreter to the others while they work."""
        parameters = jobs[0].parameters
        encodings = self._tokenizer.encode_batch_fast([job.text for job in jobs], add_special_tokens=False)
        results = self._translator.translate_batch(
            [self._vocabulary.names(encoding.ids) for encoding in encodings],
            beam_size=parameters.num_beams,
            length_penalty=parameters.length_penalty,
            max_decoding_length=min(parameters.max_new_tokens, self._limit),
            min_decoding_length=parameters.min_new_tokens,
            disable_unk=True,
            return_end_token=True,
        )
        ids = [self._vocabulary.ids(result.hypotheses[0]) for result in results]
        texts = self._tokenizer.decode_batch(ids, skip_special_tokens=True)
        sources = [len(encoding.ids) + 1 for encoding in encodings]
        return list(zip(texts, sources, map(len, ids), strict=True))


def make_app(
    translator: ctranslate2.Translator, tokenizer: Tokenizer, *, replicas: int, batch: int, window: float, limit: int
) -> FastAPI:
    """The application; `window` in seconds, `limit` the tokens of an answer at most."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = MicroBatcher(
            translator, tokenizer, replicas=replicas, batch=batch, window=window, limit=limit
        )
        yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    async def ready() -> Response:
        return Response()

    @app.post("/v1/generate")
    async def generate(request: Request) -> Response:
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        answers = await app.state.batcher.translate(texts, request.parameters)
        body = {
            "id": f"gen-{uuid.uuid4().hex}",
            "model": "ctranslate2",
            "outputs": [{"sequences": [{"text": text, "finish_reason": "stop"}]} for text, _, _ in answers],
            "usage": {
                "source_tokens": sum(source for _, source, _ in answers),
                "generated_tokens": sum(generated for _, _, generated in answers),
            },
        }
        return Response(orjson.dumps(body), media_type="application/json")

    return app


def main() -> None:
    """The command in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of a CTranslate2 model")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--replicas", type=int, default=2, help="batches translated at a time")
    parser.add_argument("--intra-threads", type=int, default=1, help="threads of each")
    parser.add_argument("--batch", type=int, default=64, help="inputs of a batch at most")
    parser.add_argument("--window-ms", type=float, default=0.0, help="how long a batch waits to become full")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer: a CTranslate2 model knows no limit")
    arguments = parser.parse_args()
    translator = ctranslate2.Translator(
        str(arguments.model),
        compute_type="int8",
        inter_threads=arguments.replicas,
        intra_threads=arguments.intra_threads,
    )
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    tokenizer.encode_special_tokens = True
    app = make_app(
        translator,
        tokenizer,
        replicas=arguments.replicas,
        batch=arguments.batch,
        window=arguments.window_ms / 1e3,
        limit=arguments.max_tokens,
    )
    uvicorn.run(app, port=arguments.port, log_level="warning", access_log=False, loop="uvloop", http="httptools")


if __name__ == "__main__":
    main()
