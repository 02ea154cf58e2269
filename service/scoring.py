"""Scoring: how likely given targets are for their sources, and which source tokens each target token attends to.

Sources are encoded and targets are read whole, in one pass each. What the encoder gives goes to the scorer where it
lies, on the host or on a device. Knows sessions by their methods alone, and neither tokens nor requests.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from service.artifact import StateTensor
from service.batch import Ints
from service.sequence import Floats

MOST_LOGITS = 2**23
"""Numbers of a distribution over the vocabulary for each target token, held at once (twice, 4 bytes each)."""


class Scorer:
    """The encoder and the scorer of one variant of an artifact. Holds nothing between two calls."""

    def __init__(
        self,
        encoder: Any,
        scorer: Any,
        tensors: list[tuple[StateTensor, np.dtype[Any]]],
        *,
        vocab_size: int,
        device: str,
        device_id: int,
    ) -> None:
        """`tensors` is the whole state; those of kind source are what the encoder gives and the scorer takes."""
        self._encoder = encoder
        self._scorer = scorer
        self._sources = [(tensor.name, dtype) for tensor, dtype in tensors if tensor.kind == "source"]
        self._vocab_size = vocab_size
        self._place = (device, device_id)

    def score(
        self, source_ids: Ints, source_lengths: Ints, target_ids: Ints, *, alignment: bool
    ) -> tuple[Floats, Floats | None]:
        """As Runner.score."""
        source_lengths, target_ids = np.ascontiguousarray(source_lengths), np.ascontiguousarray(target_ids)
        (rows, target), source = target_ids.shape, source_ids.shape[1]
        log_probabilities: Floats = np.empty((rows, target), np.float32)
        weights: Floats | None = np.empty((rows, target, source), np.float32) if alignment else None
        encoded = self._encode(source_ids, source_lengths)
        # A row's numbers do not depend on the others, so a large call is several small ones and memory stays bounded.
        at_once = max(1, MOST_LOGITS // (target * self._vocab_size))
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            binding = self._scorer.io_binding()
            binding.bind_cpu_input("target_ids", target_ids[part])
            binding.bind_cpu_input("source_lengths", source_lengths[part])
            for name, dtype, value in encoded:
                _, *row_shape = value.shape()
                pointer = value.data_ptr() + first * math.prod(row_shape) * dtype.itemsize
                shape = (len(target_ids[part]), *row_shape)
                binding.bind_input(name, *self._place, dtype.type, shape, pointer)
            _bind_output(binding, "log_probabilities", log_probabilities[part])
            if weights is not None:
                _bind_output(binding, "alignment", weights[part])
            self._scorer.run_with_iobinding(binding)
        return log_probabilities, weights

    def _encode(self, source_ids: Ints, source_lengths: Ints) -> list[tuple[str, np.dtype[Any], Any]]:
        """The source's tensors, each with its name and element type, in memory of ONNX Runtime's."""
        binding = self._encoder.io_binding()
        binding.bind_cpu_input("source_ids", np.ascontiguousarray(source_ids))
        binding.bind_cpu_input("source_lengths", source_lengths)
        binding.bind_cpu_input("source_capacity", np.array(source_ids.shape[1], np.int64))
        for name, _ in self._sources:
            binding.bind_output(name, *self._place)
        self._encoder.run_with_iobinding(binding)
        values = binding.get_outputs()
        return [(name, dtype, value) for (name, dtype), value in zip(self._sources, values, strict=True)]


def _bind_output(binding: Any, name: str, array: Floats) -> None:
    """To the array's own memory, on the host."""
    binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
