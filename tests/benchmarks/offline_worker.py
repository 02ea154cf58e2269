"""One engine in a process of its own, which translates files' worth of texts when it is told to: text in, text out.

    python -m tests.benchmarks.offline_worker transduce ARTIFACT
    python -m tests.benchmarks.offline_worker ctranslate2 MODEL TOKENIZER
    python -m tests.benchmarks.offline_worker transformers CHECKPOINT

Tasks come as lines of JSON on standard input, {"texts", "num_beams", "options"}, and each is answered by one,
{"seconds", "texts"}. The time includes tokenising and detokenising, and not the loading of the model.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """Translates texts, in order."""

    def translate(self, texts: list[str], num_beams: int, **options: Any) -> list[str]: ...


class Transduce:
    """What `transduce translate` runs: lines of a stream through the engine that serves."""

    def __init__(self, artifact: str) -> None:
        from service.commands.translate import DEFAULTS
        from service.served_model import load_only
        from service.settings import read_settings

        self._model = load_only(read_settings(environ={}, defaults={**DEFAULTS, "model": artifact})[0])
        self._model.engine.start()
        self._model.engine.wait_ready()

    def translate(self, texts: list[str], num_beams: int) -> list[str]:
        """With the command's defaults of every setting."""
        from service.parameters import Parameters
        from service.translation import Translation

        lines = io.BytesIO("".join(f"{text}\n" for text in texts).encode())
        return [str(answer) for answer in Translation(self._model, Parameters(num_beams=num_beams)).run(lines)]


class CTranslate2:
    """`translate_batch` over everything, with the tokenizer's batch functions around it."""

    def __init__(self, model: str, tokenizer: str) -> None:
        from tokenizers import Tokenizer

        from tests.benchmarks.ctranslate2_model import Vocabulary

        self._path = model
        self._tokenizer = Tokenizer.from_file(tokenizer)
        self._tokenizer.encode_special_tokens = True
        self._vocabulary = Vocabulary(self._tokenizer, self._tokenizer.get_vocab_size())
        self._translators: dict[tuple[int, int], Any] = {}

    def translate(
        self,
        texts: list[str],
        num_beams: int,
        inter_threads: int = 1,
        intra_threads: int = 1,
        max_batch_size: int = 64,
        batch_type: str = "examples",
        max_decoding_length: int = 256,
    ) -> list[str]:
        """One call for all texts; CTranslate2 sorts them by length and makes the batches."""
        import ctranslate2

        threads = (inter_threads, intra_threads)
        if threads not in self._translators:
            self._translators[threads] = ctranslate2.Translator(
                self._path, compute_type="int8", inter_threads=inter_threads, intra_threads=intra_threads
            )
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        results = self._translators[threads].translate_batch(
            [self._vocabulary.names(encoding.ids) for encoding in encodings],
            beam_size=num_beams,
            max_batch_size=max_batch_size,
            batch_type=batch_type,
            max_decoding_length=max_decoding_length,
            disable_unk=True,
        )
        return self._tokenizer.decode_batch([self._vocabulary.ids(result.hypotheses[0]) for result in results])


class Transformers:
    """`generate` on batches of texts of similar length, float32, all processors."""

    def __init__(self, checkpoint: str) -> None:
        import torch

        from model.checkpoint import Checkpoint
        from tests.benchmarks.transformers_model import transformers_model

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        loaded = Checkpoint.load(Path(checkpoint))
        self._tokenizer = loaded.tokenizer
        self._eos_id = loaded.recipe.model.eos_id
        self._model = transformers_model(loaded)

    def translate(self, texts: list[str], num_beams: int, batch_rows: int = 64) -> list[str]:
        """The best text of each."""
        from model.tokenizer import encode_texts
        from tests.benchmarks.transformers_model import generate

        sources = [[*ids, self._eos_id] for ids in encode_texts(self._tokenizer, texts)]
        found = generate(self._model, sources, batch_rows=batch_rows, num_beams=num_beams)
        return self._tokenizer.decode_batch([best[0].ids for best in found], skip_special_tokens=True)


ENGINES = {"transduce": Transduce, "ctranslate2": CTranslate2, "transformers": Transformers}


def main() -> None:
    """The command in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("files", nargs="+", help="what the engine loads")
    arguments = parser.parse_args()
    # The answers have the standard output for themselves, whatever a library prints.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Engine = ENGINES[arguments.engine](*arguments.files)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        began = time.perf_counter()
        texts = engine.translate(task["texts"], task["num_beams"], **task["options"])
        print(json.dumps({"seconds": time.perf_counter() - began, "texts": texts}), file=answers, flush=True)


if __name__ == "__main__":
    main()
