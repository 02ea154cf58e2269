"""A training run: from a recipe and parallel text to a checkpoint. Stopped, it continues with the same losses.

One process, or many started by torchrun: then each takes its share of every group of batches, and gradients are
averaged by PyTorch's DistributedDataParallel.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as distributed
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model.checkpoint import Checkpoint, average_weights, copied
from model.config import ConfigurationError
from model.curves import draw_curves
from model.data import BadRows, Batch, Corpus, epoch_batches
from model.devices import has_bf16
from model.evaluation import validate
from model.objectives import Objective
from model.optimizer import MovingAverage, build_optimizers, rate_factor, set_rate
from model.recipe import Recipe
from model.teachers import KeptTeaching, Teachers
from model.tokenizer import segmenter
from model.transformer import Transformer

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands. Everything that is not weights, optimizer or random state."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Groups of batches taken from this epoch."""
    best: float = -1.0
    """The highest score of a validation."""
    validations_without_gain: int = 0
    history: list[str] = field(default_factory=list)
    """The last checkpoints, oldest first, by file name."""


class Trainer:
    """Owns model, optimizers and the run's directory: last.pt, best.pt, model.pt, log.jsonl, curves.png."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        tokenizer: Tokenizer,
        validation: dict[str, list[str]],
        directory: Path,
        metadata: dict[str, Any],
        device: torch.device,
        *,
        start: Checkpoint | None = None,
        teachers: Sequence[Transformer] = (),
    ) -> None:
        """`start`: the weights to begin with. Raises ConfigurationError."""
        self.recipe, self.corpus, self.tokenizer, self.validation = recipe, corpus, tokenizer, validation
        self.directory, self.metadata, self.device = directory, metadata, device
        self.segment = segmenter(tokenizer, recipe.training.bpe_dropout, recipe.training.seed)
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        torch.manual_seed(recipe.training.seed)
        self.model = Transformer(recipe.model)
        if start is not None:
            take_weights(self.model, start.weights)
        self.model.to(device)
        self.mixed = recipe.training.precision == "bf16" and has_bf16(device)
        if recipe.training.precision == "bf16" and not self.mixed:
            logger.warning("training.precision: this %s has no instructions for bf16, so it is fp32", device.type)
        self.teachers = Teachers([model.to(device) for model in teachers], recipe.training) if teachers else None
        self.objective = Objective(self.model, recipe.training, self.teachers)
        self.parallel: nn.Module = DistributedDataParallel(self.objective) if self.world > 1 else self.objective
        # The same weights everywhere, but each process drops other units.
        torch.manual_seed(recipe.training.seed + 1000 * self.rank)
        self.average = MovingAverage(self.model, recipe.training.ema_decay) if recipe.training.ema_decay else None
        self.optimizers = build_optimizers(self.model, recipe.training, torch.bfloat16 if self.mixed else torch.float32)
        self.progress = Progress()
        self.bad_rows = BadRows()

    def _keep_what_teachers_say(self, teachers: Teachers) -> None:
        recipe, config = self.recipe, self.recipe.training
        path = self.directory / ("teachers.bin" if self.rank == 0 else f"teachers.{self.rank}.bin")
        made_of = (
            teachers.fingerprint(), self.corpus.fingerprint(), self.tokenizer.to_str(), recipe.model, self.mixed,
            config.seed, config.batch_tokens, config.pool_pairs, config.distillation_top,
            config.distillation_temperature,
        )  # fmt: skip
        digest = hashlib.blake2b(repr(made_of).encode(), digest_size=16).hexdigest()
        if KeptTeaching.is_made_of(path, digest):
            self.objective.teaching = KeptTeaching(path, teachers.vocab_size, config)
            return
        logger.info("teachers read the corpus")
        # Always the first epoch's batches: the same run has the very same numbers kept.
        batches = epoch_batches(self.corpus, self.segment, recipe.model, config, 0, BadRows())
        with (
            self._bar("pair", len(self.corpus)) as bar,
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed),
        ):

            def read() -> Iterator[Batch]:
                for batch in batches:
                    yield batch.to(self.device)
                    bar.update(len(batch.pairs))

            self.objective.teaching = KeptTeaching.write(path, teachers, read(), len(self.corpus), config, digest)

    def _bar(self, unit: str, total: int, done: int = 0) -> tqdm[NoReturn]:
        """Shown where the first process has a terminal."""
        return tqdm(total=total, initial=done, unit=unit, disable=None if self.rank == 0 else True)

    def run(self) -> Checkpoint:
        """Train to the end of the recipe (or to early stopping) and return the final checkpoint, also in model.pt."""
        config = self.recipe.training
        if self.teachers and config.distillation_top:
            self._keep_what_teachers_say(self.teachers)
        started, tokens_since, losses_since = time.perf_counter(), 0, []
        bar = self._bar("step", config.max_steps, self.progress.step)
        while not self._finished():
            for group in self._groups():
                loss, tokens = self._update(group)
                self.progress.step += 1
                self.progress.batch += 1
                losses_since.append(loss)
                tokens_since += tokens
                bar.update()
                bar.set_postfix(epoch=self.progress.epoch, loss=f"{loss:.3f}", refresh=False)
                if self.progress.step % config.validate_every == 0 or self.progress.step == config.max_steps:
                    seconds = time.perf_counter() - started
                    self._validate(sum(losses_since) / len(losses_since), tokens_since / seconds)
                    started, tokens_since, losses_since = time.perf_counter(), 0, []
                    if self._finished():
                        break
            else:
                self.progress.epoch += 1
                self.progress.batch = 0
        bar.close()
        if self.bad_rows.counts:
            logger.warning("left out: %s", self.bad_rows)
        return self._final()

    def _finished(self) -> bool:
        config = self.recipe.training
        return (
            self.progress.step >= config.max_steps
            or (0 < config.max_epochs <= self.progress.epoch)
            or (0 < config.patience <= self.progress.validations_without_gain)
        )

    def _groups(self) -> Iterator[Batch]:
        """This process's batch of each group of `world`, from where the epoch was left. An incomplete one is lost."""
        batches = epoch_batches(
            self.corpus, self.segment, self.recipe.model, self.recipe.training, self.progress.epoch, self.bad_rows
        )
        skip = self.progress.batch * self.world
        group: list[Batch] = []
        for number, batch in enumerate(batches):
            if number < skip:
                continue
            group.append(batch)
            if len(group) == self.world:
                yield group[self.rank]
                group = []

    def _update(self, batch: Batch) -> tuple[float, int]:
        """One optimizer step. Returns the loss per token and the number of target tokens, both over all processes."""
        config = self.recipe.training
        batch = batch.to(self.device)
        self.parallel.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            loss = self.parallel(batch)
        totals = torch.tensor([loss.item(), float(batch.target_tokens)], dtype=torch.float64, device=self.device)
        if self.world > 1:
            distributed.all_reduce(totals)
        total_loss, total_tokens = totals.tolist()
        # Gradients are averaged over the processes: weigh each by its share of the tokens, as if it were one batch.
        (loss * self.world / total_tokens).backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        set_rate(self.optimizers, config.learning_rate * rate_factor(self.progress.step, config))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.average:
            self.average.update(self.model, self.progress.step)
        self._log(kind="step", step=self.progress.step, loss=total_loss / total_tokens, tokens=int(total_tokens))
        return total_loss / total_tokens, int(total_tokens)

    def _weights(self) -> dict[str, Tensor]:
        """What is validated and kept: the moving average, or the weights themselves."""
        return copied(self.average.weights if self.average else self.model.state_dict())

    def _scores(self, weights: dict[str, Tensor]) -> dict[str, float]:
        model = Transformer(self.recipe.model)
        model.load_state_dict(weights)
        return validate(model.to(self.device).eval(), self.tokenizer, self.validation)

    def _validate(self, loss: float, tokens_per_second: float) -> None:
        """Score the weights, write the checkpoint and the picture, and note whether it has risen."""
        progress, config = self.progress, self.recipe.training
        outcome: list[dict[str, float]] = [{}]
        if self.rank == 0:
            weights = self._weights()
            outcome = [self._scores(weights)]
        if self.world > 1:
            distributed.broadcast_object_list(outcome)
        (scores,) = outcome
        score = next(iter(scores.values()))
        better = score > progress.best
        progress.best = max(score, progress.best)
        progress.validations_without_gain = 0 if better else progress.validations_without_gain + 1
        progress.history = [*progress.history, f"step-{progress.step:08d}.pt"]
        dropped = progress.history[: -config.average_checkpoints]
        progress.history = progress.history[-config.average_checkpoints :]
        states = self._gather_random_states()
        if self.rank != 0:
            return
        metadata = {
            **self.metadata,
            "step": progress.step,
            "epoch": progress.epoch,
            "validation": scores,
        }
        checkpoint = Checkpoint(self.recipe, self.tokenizer, weights, metadata)
        checkpoint.save(self.directory / progress.history[-1])
        if better:
            checkpoint.save(self.directory / "best.pt")
        for name in dropped:
            (self.directory / name).unlink(missing_ok=True)
        state = {
            "progress": vars(progress),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "weights": self.model.state_dict(),
            "random_states": states,
        }
        Checkpoint(self.recipe, self.tokenizer, weights, metadata, state).save(self.directory / "last.pt")
        rate = config.learning_rate * rate_factor(progress.step, config)
        self._log(
            kind="validation", step=progress.step, epoch=progress.epoch, loss=loss, scores=scores,
            learning_rate=rate, tokens_per_second=tokens_per_second,
        )  # fmt: skip
        logger.info(
            "step %d  epoch %d  loss %.3f  %s  rate %.2e  %.0f target tokens/s%s",
            progress.step, progress.epoch, loss, _spelt(scores), rate, tokens_per_second, "  best" if better else "",
        )  # fmt: skip
        draw_curves(self.directory / "log.jsonl", self.directory / "curves.png")

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue a run of which `checkpoint` is the last.pt. The log is cut back to that step. Raises
        ConfigurationError.
        """
        state = checkpoint.training_state
        if state is None:
            raise ConfigurationError("this checkpoint holds no training state: continue from the run's last.pt")
        if state["progress"].keys() != vars(self.progress).keys():
            raise ConfigurationError("the run was begun by another version of transduce: continue it with that one")
        if len(state["random_states"]) != self.world:
            raise ConfigurationError(
                f"the run had {len(state['random_states'])} processes: continue it with as many, not {self.world}"
            )
        self.model.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.average:
            self.average.weights = {name: tensor.to(self.device) for name, tensor in checkpoint.weights.items()}
        self.progress = Progress(**state["progress"])
        random_state = state["random_states"][self.rank]
        torch.set_rng_state(random_state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"], self.device)
        log = self.directory / "log.jsonl"
        if self.rank == 0 and log.exists():
            kept = [
                line
                for line in log.read_text().splitlines()
                if json.loads(line)["step"] < self.progress.step + (json.loads(line)["kind"] == "validation")
            ]
            log.write_text("".join(line + "\n" for line in kept))

    def _gather_random_states(self) -> list[dict[str, Tensor]]:
        """The random state of every process, for an exact continuation."""
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        states: list[Any] = [own]
        if self.world > 1:
            states = [None] * self.world
            distributed.all_gather_object(states, own)
        return states

    def _final(self) -> Checkpoint:
        """The average of the last checkpoints, or the best one if that scores higher on the validation set."""
        path = self.directory / "model.pt"
        if self.rank == 0:
            last = [Checkpoint.load(self.directory / name) for name in self.progress.history]
            weights = average_weights([checkpoint.weights for checkpoint in last])
            scores = self._scores(weights)
            best = Checkpoint.load(self.directory / "best.pt")
            if next(iter(scores.values())) >= next(iter(best.metadata["validation"].values())):
                metadata = {**last[-1].metadata, "validation": scores, "averaged": len(last)}
                best = Checkpoint(self.recipe, self.tokenizer, weights, metadata)
            best.save(path)
            logger.info("%s: %s on the validation set", path, _spelt(best.metadata["validation"]))
        if self.world > 1:
            distributed.barrier()
        return Checkpoint.load(path)

    def _log(self, **values: Any) -> None:
        if self.rank == 0:
            with (self.directory / "log.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")


def take_weights(model: Transformer, weights: dict[str, Tensor]) -> None:
    """Begin with another model's weights. A classifier and a decoder may be new; anything else that is missing, or of
    another shape, is a ConfigurationError.
    """
    own = model.state_dict()
    fitting = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    new = [name for name in own if name not in fitting and not name.startswith(("classifier", "decoder", "target_"))]
    if new:
        raise ConfigurationError(
            f"the checkpoint of --init has no {new[0]} of this model's shape, and {len(new) - 1} more: take its [model]"
        )
    model.load_state_dict(fitting, strict=False)


def _spelt(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {score:.2f}" for name, score in scores.items())
