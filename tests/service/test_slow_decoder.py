"""The fast path against the slow, obvious decoder of model/: same weights, same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint
from model.search import greedy_search
from model.tokenizer import encode_texts
from service.artifact import Artifact
from service.core import Core
from service.runner import Runner
from service.settings import Settings
from tests import tiny
from tests.service.fakes import Client, Clock, make_metrics


def test_the_service_gives_what_the_slow_decoder_gives(tiny_fp32_artifact: Path, tiny_checkpoint: Checkpoint) -> None:
    """200 sources by continuous batching on ONNX Runtime, and one by one in PyTorch without a cache: the same tokens,
    and scores and vectors within 1e-4. PyTorch's are doubles: floats are off by more than that where 48 are summed."""
    model = tiny_checkpoint.transformer().double()
    sources = [[*ids, 2] for ids in encode_texts(tiny_checkpoint.tokenizer, tiny.sentences(200, seed=9))]
    core = Core(
        Runner(Artifact.load(tiny_fp32_artifact), Settings(threads=1, provider="cpu")),
        make_metrics(), max_rows=12, encode_tokens=200, clock=Clock(),
    )  # fmt: skip
    client = Client()
    generations = [client.generate(source, 48) for source in sources]
    encodings = [client.encode(source) for source in sources]
    core.add([*generations, *encodings])
    while not core.idle:
        core.iterate()
    for sequence, expected in zip(generations, greedy_search(model, sources, batch_rows=1), strict=True):
        finished = client.result(sequence)
        assert finished.ids == expected.ids
        assert sum(finished.log_probabilities) == pytest.approx(expected.log_probability, abs=1e-4)
    for sequence, source in zip(encodings, sources, strict=True):
        with torch.no_grad():
            memory = model.encode(torch.tensor([source]), torch.tensor([len(source)]))[0].numpy()
        np.testing.assert_allclose(client.vectors(sequence), memory, atol=1e-4)
