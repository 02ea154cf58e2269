"""The rehearsal before a service is ready: the self-test of the manifest, and a warm-up over shapes. And the
examination of a model whose calls fail.

The self-test compares token ids, so it tells whether this machine computes what the export's machine did.
"""

from __future__ import annotations

import numpy as np

from service.batch import Batch, pad
from service.core import Core
from service.errors import ArtifactError
from service.executes import Executes
from service.ladder import Ladder
from service.sequence import GenerateParameters, Sequence
from service.state import State


def self_test(runner: Executes, state: State, batch: Batch, ladder: Ladder) -> int:
    """Translate or classify the manifest's sentences, each alone, and compare: how many there were. Raises
    ArtifactError.
    """
    compared = 0
    for number, test in enumerate(runner.manifest.self_test):
        if (label := test.labels.get(runner.variant)) is not None:
            told = _classify(runner, ladder, test.source_ids)
            if told != label:
                raise ArtifactError(
                    f"self-test {number} of the artifact fails on this machine: it gives the label {told!r}, the "
                    f"manifest says {label!r}. {_REMEDY[runner.variant]}"
                )
            compared += 1
        if (wanted := test.target_ids.get(runner.variant)) is None:
            continue
        found = _translate(runner, state, batch, ladder, test.source_ids, len(wanted))
        if found != wanted:
            raise ArtifactError(
                f"self-test {number} of the artifact fails on this machine: it gives the token ids {found}, "
                f"the manifest says {wanted}. {_REMEDY[runner.variant]}"
            )
        compared += 1
    return compared


def warm_up(runner: Executes, state: State, batch: Batch, ladder: Ladder, *, encode_tokens: int) -> None:
    """Encode a whole budget and then one text of every rung, longest first; score; then steps of many and of few rows.

    Allocates what traffic will need, so that the first requests are no slower than the others.
    """
    pad_id, eos_id = runner.manifest.special_tokens.pad_id, runner.manifest.special_tokens.eos_id
    calls = [(length, 1) for length in ladder.rungs] + [(ladder.last, max(1, encode_tokens // ladder.last))]
    for length, rows in reversed(calls):
        runner.encode(*pad([[eos_id] * length] * rows, length, pad_id))
    if runner.scores:
        for length in (ladder.first, ladder.last):
            target_ids, _ = pad([[eos_id]], ladder.first, pad_id)
            runner.score(*pad([[eos_id]], length, pad_id), target_ids, alignment=runner.aligns)
    rows = state.max_rows if runner.generates else 0
    while rows:
        _begin(runner, state, batch, ladder, [[eos_id]] * rows, limit=1)
        runner.step(batch, state, k=1, logits=False)
        _end(state, batch)
        rows //= 2


def examine(core: Core) -> None:
    """Whether a model whose calls failed is sound: the self-test, and a call of each kind. No row may be in use.

    Raises whatever is wrong.
    """
    runner, state, batch, ladder = core.runner, core.state, core.batch, core.ladder
    self_test(runner, state, batch, ladder)
    special = runner.manifest.special_tokens
    source = pad([[special.eos_id]], ladder.first, special.pad_id)
    numbers = [runner.encode(*source)[0, 0]]
    if runner.scores:
        target_ids, _ = pad([[special.eos_id]], ladder.first, special.pad_id)
        numbers.append(runner.score(*source, target_ids, alignment=False)[0][0, :1])
    if runner.generates:
        _begin(runner, state, batch, ladder, [[special.eos_id]], limit=1)
        numbers.append(runner.step(batch, state, k=1, logits=False).log_probabilities[0])
        _end(state, batch)
    if any(np.isnan(some).any() for some in numbers):
        raise ArithmeticError("what the model gives is no number")


def _classify(runner: Executes, ladder: Ladder, source_ids: list[int]) -> str:
    size = len(source_ids)
    (logits,) = runner.classify(*pad([source_ids], ladder.rung(size), runner.manifest.special_tokens.pad_id))
    return runner.manifest.labels[int(logits[:size].mean(axis=0).argmax())]


def _translate(
    runner: Executes, state: State, batch: Batch, ladder: Ladder, source_ids: list[int], limit: int
) -> list[int]:
    _begin(runner, state, batch, ladder, [source_ids], limit)
    eos_id = runner.manifest.special_tokens.eos_id
    while batch.positions[0] < limit:
        state.reserve(target=int(batch.positions[0]) + 1)
        output = runner.step(batch, state, k=1, logits=False)
        batch.take(output.ids[:, 0], output.log_probabilities[:, 0])
        if output.ids[0, 0] == eos_id:
            break
    ids, _ = batch.result(0)
    _end(state, batch)
    return ids


def _begin(runner: Executes, state: State, batch: Batch, ladder: Ladder, sources: list[list[int]], limit: int) -> None:
    length = ladder.rung(max(map(len, sources)))
    state.reserve(source=length)
    runner.encode_into(state, *pad(sources, length, runner.manifest.special_tokens.pad_id))
    state.append(len(sources))
    parameters = GenerateParameters(max_new_tokens=limit)
    batch.append([Sequence(source, lambda event: None, parameters=parameters) for source in sources])


def _end(state: State, batch: Batch) -> None:
    batch.clear()
    state.clear()


_REMEDY = {
    "cpu": "Export the model again on a processor of this kind, with --precision fp32 if that does not help.",
    "cuda": "Export the model again for this GPU and this version of onnxruntime-gpu, or choose --provider cpu.",
}
