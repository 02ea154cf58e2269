"""What teachers say is what a student learns: of each batch, of the corpus once, and in a run that continues."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from model.config import ConfigurationError
from model.data import Batch
from model.objectives import Objective, translation_loss
from model.recipe import TrainingConfig
from model.teachers import KeptTeaching, Teachers
from tests.model.short_runs import PAIRS, batch, model, train, translations


def test_distillation_reads_the_teacher_at_the_students_own_places() -> None:
    """Of each row the divergence at its target's tokens, and nothing of padding."""
    net, teacher = model().eval(), model(encoder_layers=2, d_model=32).eval()
    config = TrainingConfig(distillation_weight=1.0, distillation_temperature=2.0)
    expected = torch.tensor(0.0)
    for row in range(3):
        rows = PAIRS.source_ids[row : row + 1], PAIRS.source_lengths[row : row + 1], PAIRS.target_inputs[row : row + 1]
        length = int((PAIRS.target_outputs[row] != 0).sum())
        ours, theirs = ((each(*rows)[0, :length] / 2).log_softmax(-1) for each in (net, teacher))
        expected = expected + 4 * kl_div(ours, theirs, reduction="sum", log_target=True)
    torch.testing.assert_close(translation_loss(net, PAIRS, config, Teachers([teacher], config)), expected)


def test_a_student_of_its_own_weights_has_nothing_to_learn_from_its_teacher() -> None:
    """The divergence is zero, so what is left is the data's share; the teacher is not trained."""
    net = model()
    config = TrainingConfig(distillation_weight=0.75)
    objective = Objective(net, config, Teachers([model()], config))
    plain = translation_loss(net, PAIRS, TrainingConfig())
    torch.testing.assert_close(objective(PAIRS), 0.25 * plain)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in net.parameters()}


def test_what_teachers_said_of_a_corpus_is_what_they_say_of_each_batch(tmp_path: Path) -> None:
    """With all tokens but one kept, in batches of other rows in another order."""
    config = TrainingConfig(distillation_weight=0.5, distillation_temperature=2.0, distillation_top=49)
    net, teachers = model().eval(), Teachers([model(d_model=32), model(d_model=8)], config)
    rows = [
        (PAIRS.source_ids[n, : PAIRS.source_lengths[n]].tolist(), [i for i in PAIRS.target_outputs[n].tolist() if i])
        for n in range(3)
    ]
    alone = [replace(batch([rows[n][0]], [rows[n][1]]), pairs=[n]) for n in (2, 0, 1)]
    kept = KeptTeaching.write(tmp_path / "teachers.bin", teachers, alone, 5, config, "a")
    expected = translation_loss(net, PAIRS, config, teachers)
    torch.testing.assert_close(translation_loss(net, PAIRS, config, kept), expected)
    torch.testing.assert_close(translation_loss(net, PAIRS, replace(config, r_drop=1.0), kept), expected)


def test_what_teachers_said_stands_when_it_is_whole(tmp_path: Path) -> None:
    """A second pass that breaks off leaves neither its own half nor the first one's numbers to be taken for whole."""
    config = TrainingConfig(distillation_weight=0.5, distillation_top=3)
    path, teachers = tmp_path / "teachers.bin", Teachers([model()], config)

    def broken() -> Iterator[Batch]:
        yield PAIRS
        raise RuntimeError("stopped")

    assert not KeptTeaching.is_made_of(path, "a")
    KeptTeaching.write(path, teachers, [PAIRS], 3, config, "a")
    assert KeptTeaching.is_made_of(path, "a")
    assert not KeptTeaching.is_made_of(path, "b")
    with pytest.raises(RuntimeError, match="stopped"):
        KeptTeaching.write(path, teachers, broken(), 3, config, "a")
    assert not KeptTeaching.is_made_of(path, "a")


def test_other_weights_are_other_teachers() -> None:
    config = TrainingConfig(distillation_weight=0.5)
    first, second = model(), model()
    assert Teachers([first], config).fingerprint() == Teachers([second], config).fingerprint()
    second.state_dict()["encoder.0.self_attention.query.weight"][0, 0] += 1
    found = [Teachers(models, config).fingerprint() for models in ([first], [second], [second, first])]
    assert len(set(found)) == 3


def test_a_teacher_and_its_weight_go_together() -> None:
    with pytest.raises(ConfigurationError, match="distillation_weight"):
        Objective(model(), TrainingConfig(distillation_weight=0.5))
    with pytest.raises(ConfigurationError, match="distillation_weight"):
        Objective(model(), TrainingConfig(), Teachers([model()], TrainingConfig()))


def test_a_run_that_keeps_what_teachers_say_continues_with_the_same_losses(tmp_path: Path) -> None:
    """Stopped at step 4 and continued, for which teachers need not read again, but another teacher must. With all
    tokens but one kept, losses are nearly those of teachers that read along; with three they are others.
    """

    def losses(run: str, top: int, *options: str) -> list[float]:
        values = {"decoder_layers": 1, "distillation_weight": 0.5, "distillation_top": top}
        train(tmp_path, run, translations(), "--teacher", str(first), *options, **values)
        lines = map(json.loads, (tmp_path / run / "log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "step"]

    first = train(tmp_path, "first", translations(), decoder_layers=1, steps=20)
    whole = losses("whole", 3, "--set", "training.max_steps=8", "--set", "training.validate_every=4")
    losses("parts", 3, "--set", "training.max_steps=4", "--set", "training.validate_every=4")
    read = (tmp_path / "parts" / "teachers.bin").stat().st_mtime_ns
    parts = losses("parts", 3, "--resume", "--set", "training.max_steps=8", "--set", "training.validate_every=4")
    assert parts == whole
    assert read == (tmp_path / "parts" / "teachers.bin").stat().st_mtime_ns
    losses("parts", 3, "--teacher", str(tmp_path / "whole" / "model.pt"), "--resume")
    assert read < (tmp_path / "parts" / "teachers.bin").stat().st_mtime_ns
    along, most = (losses(f"top{top}", top, "--set", "training.max_steps=8") for top in (0, 289))
    assert most == pytest.approx(along, rel=1e-5)
    assert whole != pytest.approx(along, rel=1e-3)
