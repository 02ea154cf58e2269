"""Runs an artifact's graphs by ONNX Runtime, step by step with numpy arrays, for the parity check and for evaluation.

Simple on purpose: no binding of memory, no rows that join. The state is whatever the manifest describes. The service
has its own engine; what it generates must be what this generates.
Letters in the shape comments: B rows, S source tokens, T target tokens, C source capacity, V the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from export.errors import ExportError
from model.search import Hypothesis

Array = NDArray[Any]

ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
"""Of state tensors, by ONNX Runtime's names."""
_FIRST_CAPACITY = 16


def open_session(model: Path | bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session on the CPU, of a file or of what would be in it; threads 0 means as many as there are cores."""
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1" if products_saturate() else "0")
    # Threads that spin while they wait are quicker on an idle machine and many times slower on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def products_saturate() -> bool:
    """Whether ONNX Runtime, left alone, adds products of bytes in 16 bits: on an x86 processor without VNNI it does."""
    has = torch.cpu.get_capabilities()
    return has["architecture"] == "x86_64" and not (has["avx512_vnni"] or has["avx_vnni"])


@dataclass
class Rows:
    """Sources that were encoded, and how far each has been decoded: every array has a row for each on axis 0."""

    memory: Array  # (B, S, D) float32
    lengths: Array  # (B,)
    state: dict[str, Array]

    def take(self, rows: Sequence[int]) -> Rows:
        """These rows in this order; a row may be taken more than once."""
        at = np.asarray(rows, dtype=np.int64)
        return Rows(self.memory[at], self.lengths[at], {name: array[at] for name, array in self.state.items()})


@dataclass(frozen=True)
class Step:
    """What one step gives for each row."""

    candidates: Array  # (B, k) int64, best first
    scores: Array  # (B, k) float32, log-probabilities
    logits: Array  # (B, V) float32


@dataclass(frozen=True)
class Scores:
    """What the scorer gives for each row; behind a target's end it means nothing."""

    log_probabilities: Array  # (B, T) float32
    alignment: Array  # (B, T, C) float32, zero behind the source's end


class ArtifactDecoder:
    """The graphs of one variant."""

    def __init__(self, directory: Path, variant: str = "cpu", threads: int = 0) -> None:
        self.manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        self._directory, self._variant, self._threads = directory, variant, threads
        files = self.manifest["variants"][variant]
        self._encoder = open_session(directory / files["encoder"], threads)
        self._decoder = open_session(directory / files["decoder"], threads)
        self._types = {port.name: ELEMENT_TYPES.get(port.type) for port in self._decoder.get_inputs()}
        self._outputs = [port.name for port in self._decoder.get_outputs()]
        special = self.manifest["special_tokens"]
        self.pad_id, self.bos_id, self.eos_id = special["pad_id"], special["bos_id"], special["eos_id"]
        self.max_target_tokens: int = self.manifest["max_target_tokens"]

    def encode(self, sources: Sequence[Sequence[int]], padded_to: int = 0, capacity: int = 0) -> Rows:
        """Sources of token ids with their end token, padded to the longest of them or further."""
        size = max(padded_to, *(len(source) for source in sources))
        source_ids = np.full((len(sources), size), self.pad_id, dtype=np.int64)
        for place, source in zip(source_ids, sources, strict=True):
            place[: len(source)] = source
        return self.encode_padded(source_ids, np.array([len(source) for source in sources]), max(capacity, size))

    def encode_padded(self, source_ids: Array, lengths: Array, capacity: int) -> Rows:
        """source_ids (B, S), lengths (B,): what stands behind a row's length may be anything."""
        names = [port.name for port in self._encoder.get_outputs()]
        feeds = {"source_ids": source_ids, "source_lengths": lengths, "source_capacity": np.array(capacity)}
        outputs = dict(zip(names, self._encoder.run(names, feeds), strict=True))
        rows = Rows(outputs.pop("memory"), lengths, outputs)
        for tensor in self.manifest["state"]:
            if tensor["kind"] != "source":
                sizes = {"rows": len(lengths), "source_capacity": capacity, "target_capacity": _FIRST_CAPACITY}
                shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor["shape"]]
                rows.state[tensor["name"]] = np.zeros(shape, dtype=self._types[tensor["name"]])
        return rows

    def step(self, rows: Rows, last_ids: Array, positions: Array, k: int) -> Step:
        """Decode one position of every row; the rows' state is advanced."""
        self._grow(rows, int(positions.max()) + 1)
        feeds = {
            "last_ids": last_ids,
            "positions": positions,
            "source_lengths": rows.lengths,
            "k": np.array(k),
            **rows.state,
        }
        outputs = dict(zip(self._outputs, self._decoder.run(None, feeds), strict=True))
        for name in rows.state:
            rows.state[name] = outputs.get(f"next_{name}", rows.state[name])
        return Step(outputs["candidate_ids"], outputs["candidate_scores"], outputs["logits"])

    def _grow(self, rows: Rows, wanted: int) -> None:
        """Make room in the caches, twice as much each time."""
        for tensor in self.manifest["state"]:
            if "target_capacity" in tensor["shape"]:
                axis, array = tensor["shape"].index("target_capacity"), rows.state[tensor["name"]]
                if array.shape[axis] < wanted:
                    room = [(0, array.shape[axis] if n == axis else 0) for n in range(array.ndim)]
                    rows.state[tensor["name"]] = np.pad(array, room)

    def teacher_forced(self, rows: Rows, targets: Sequence[Sequence[int]]) -> Iterator[Array]:
        """The logits (B, V) of each position, when the decoder reads the start token and then these targets, padded."""
        steps = max(len(target) for target in targets)
        inputs = np.full((len(targets), steps), self.pad_id, dtype=np.int64)
        for place, target in zip(inputs, targets, strict=True):
            place[: len(target)] = [self.bos_id, *target[:-1]]
        for position in range(steps):
            yield self.step(rows, inputs[:, position], np.full(len(targets), position), 1).logits

    @cached_property
    def _scorer(self) -> onnxruntime.InferenceSession:
        file = self.manifest["variants"][self._variant].get("scorer")
        if file is None:
            raise ExportError(f"{self._directory}: variant {self._variant} has no scorer. Export the model again.")
        return open_session(self._directory / file, self._threads)

    def score(self, rows: Rows, targets: Sequence[Sequence[int]], padded_to: int = 0) -> Scores:
        """Targets with their end token, read in one pass, padded to the longest of them or further.

        Raises ExportError for an artifact without a scorer.
        """
        size = max(padded_to, *(len(target) for target in targets))
        target_ids = np.full((len(targets), size), self.pad_id, dtype=np.int64)
        for place, target in zip(target_ids, targets, strict=True):
            place[: len(target)] = target
        inputs = {"target_ids": target_ids, "source_lengths": rows.lengths, **rows.state}
        feeds = {port.name: inputs[port.name] for port in self._scorer.get_inputs()}
        return Scores(*self._scorer.run(["log_probabilities", "alignment"], feeds))

    def greedy(
        self, sources: Sequence[Sequence[int]], max_new_tokens: int | None = None, batch_rows: int = 64
    ) -> list[Hypothesis]:
        """The likeliest token at each step. Sources end with the end token; one hypothesis each, in order."""
        return [best[0] for best in self.beam(sources, 1, 0.0, max_new_tokens, batch_rows)]

    def beam(
        self,
        sources: Sequence[Sequence[int]],
        num_beams: int,
        length_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        batch_rows: int = 64,
    ) -> list[list[Hypothesis]]:
        """The num_beams best hypotheses of each source, best first, found as model.search.beam_search finds them."""
        limit = min(max_new_tokens or self.max_target_tokens, self.max_target_tokens)
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        each = max(1, batch_rows // num_beams)
        results: dict[int, list[Hypothesis]] = {}
        for start in range(0, len(order), each):
            indices = order[start : start + each]
            found = self._beam_batch([sources[i] for i in indices], num_beams, length_penalty, limit)
            results.update(zip(indices, found, strict=True))
        return [results[i] for i in range(len(sources))]

    def _beam_batch(
        self, sources: Sequence[Sequence[int]], num_beams: int, length_penalty: float, limit: int
    ) -> list[list[Hypothesis]]:
        rows = self.encode(sources)
        live = [(i, Hypothesis([], 0.0)) for i in range(len(sources))]  # one entry a row
        ended: list[list[Hypothesis]] = [[] for _ in sources]
        for position in range(limit):
            last = np.array([h.ids[-1] if h.ids else self.bos_id for _, h in live])
            step = self.step(rows, last, np.full(len(live), position), 2 * num_beams if num_beams > 1 else 1)
            continuations: dict[int, list[tuple[Hypothesis, int]]] = {}
            for row, (i, h) in enumerate(live):
                for token, score in zip(step.candidates[row].tolist(), step.scores[row].tolist(), strict=True):
                    following = Hypothesis([*h.ids, token], h.log_probability + score)
                    continuations.setdefault(i, []).append((following, row))
            live, taken = [], []
            for i, candidates in continuations.items():
                ranked = sorted(candidates, key=lambda pair: -pair[0].log_probability)[: 2 * num_beams]
                ended[i] += [h for h, _ in ranked[:num_beams] if h.ids[-1] == self.eos_id]
                ended[i] = sorted(ended[i], key=lambda h: -h.score(length_penalty))[:num_beams]
                alive = [(h, row) for h, row in ranked if h.ids[-1] != self.eos_id][:num_beams]
                full = len(ended[i]) == num_beams
                if full and (not alive or ended[i][-1].score(length_penalty) >= alive[0][0].score(length_penalty)):
                    continue
                if position + 1 == limit:
                    ended[i] += [h for h, _ in alive]
                    continue
                live += [(i, h) for h, _ in alive]
                taken += [row for _, row in alive]
            if not live:
                break
            rows = rows.take(taken)
        return [sorted(hypotheses, key=lambda h: -h.score(length_penalty))[:num_beams] for hypotheses in ended]
