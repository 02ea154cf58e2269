"""Decoding, slowly and obviously: the whole target is read again at every step and no state is kept.

What the service does fast must give what this gives; training and evaluation use it as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.data import pad_rows
from model.transformer import Transformer


@dataclass(frozen=True)
class Hypothesis:
    """Generated ids, the end token included if it was generated, and the sum of their log-probabilities."""

    ids: list[int]
    log_probability: float

    def score(self, length_penalty: float) -> float:
        """Log-probability / length ** length_penalty; 0 gives the sum."""
        return self.log_probability / max(len(self.ids), 1) ** length_penalty


class Ensemble:
    """Several models that translate as one: each token by the mean of their probabilities, which is also what they say
    together as teachers. They have one tokenizer; what else they are made of may differ.
    """

    def __init__(self, models: Sequence[Transformer]) -> None:
        self._models = tuple(models)
        configs = [model.config for model in models]
        self._widths = [config.d_model for config in configs]
        self.config = replace(
            configs[0],
            max_source_tokens=min(config.max_source_tokens for config in configs),
            max_target_tokens=min(config.max_target_tokens for config in configs),
        )
        """Token ids, which are those of all, and the limits of the one that takes least."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of all models."""
        return itertools.chain.from_iterable(model.parameters() for model in self._models)

    def encode(self, source_ids: Tensor, source_lengths: Tensor) -> Tensor:
        """source_ids (B, S), source_lengths (B,) -> the memories side by side, (B, S, sum of all D)."""
        return torch.cat([model.encode(source_ids, source_lengths) for model in self._models], dim=2)

    def next_token(self, target_ids: Tensor, memory: Tensor, source_lengths: Tensor) -> Tensor:
        """target_ids (B, T), memory (B, S, sum of all D) -> log-probabilities (B, V) of the token after the last."""
        memories = torch.split(memory, self._widths, dim=2)
        told = [
            model.next_token(target_ids, own, source_lengths) for model, own in zip(self._models, memories, strict=True)
        ]
        return torch.stack(told).logsumexp(dim=0) - math.log(len(told))


def _step(model: Transformer | Ensemble, target_ids: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
    """Log-probabilities (B, V) of the token after target_ids (B, T). Padding and start count in the sum, never win."""
    scores = model.next_token(target_ids, memory, lengths)
    scores[:, [model.config.pad_id, model.config.bos_id]] = -torch.inf
    return scores


def batches_by_length(sources: list[list[int]], rows: int) -> list[list[int]]:
    """Indices of the sources in batches of similar length."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


@torch.no_grad()
def greedy_search(
    model: Transformer | Ensemble,
    sources: list[list[int]],
    max_new_tokens: int | None = None,
    batch_rows: int = 64,
    max_ratio: float = math.inf,
) -> list[Hypothesis]:
    """The likeliest token at each step. Sources end with the end token; one hypothesis each, in order.

    max_ratio bounds the tokens by so many times the longest source of a batch: an untrained model does not end.
    """
    config, device = model.config, next(model.parameters()).device
    limit = min(max_new_tokens or config.max_target_tokens, config.max_target_tokens)
    results: dict[int, Hypothesis] = {}
    for indices in batches_by_length(sources, batch_rows):
        source_ids = pad_rows([sources[i] for i in indices], config.pad_id).to(device)
        lengths = torch.tensor([len(sources[i]) for i in indices], device=device)
        memory = model.encode(source_ids, lengths)  # (B, S, D)
        target_ids = torch.full((len(indices), 1), config.bos_id, device=device)
        batch_limit = int(min(limit, max_ratio * source_ids.size(1)))
        running = list(indices)
        sums = dict.fromkeys(indices, 0.0)
        for _ in range(batch_limit):
            best, tokens = _step(model, target_ids, memory, lengths).max(dim=-1)  # (B,), (B,)
            target_ids = torch.cat([target_ids, tokens[:, None]], dim=1)
            keep = []
            for row, (i, score, token) in enumerate(zip(running, best.tolist(), tokens.tolist(), strict=True)):
                sums[i] += score
                if token == config.eos_id or target_ids.size(1) - 1 == batch_limit:
                    results[i] = Hypothesis(target_ids[row, 1:].tolist(), sums[i])
                else:
                    keep.append(row)
            running = [running[row] for row in keep]
            if not running:
                break
            target_ids, memory, lengths = target_ids[keep], memory[keep], lengths[keep]
    return [results[i] for i in range(len(sources))]


@torch.no_grad()
def beam_search(
    model: Transformer | Ensemble,
    sources: list[list[int]],
    num_beams: int,
    length_penalty: float = 1.0,
    max_new_tokens: int | None = None,
    batch_rows: int = 64,
) -> list[list[Hypothesis]]:
    """The num_beams best hypotheses of each source, best first.

    Each step ranks 2 * num_beams continuations, so that num_beams stay alive even if that many of them end. A source
    is done when num_beams hypotheses have ended and no live one, at its present length, beats the worst of them.
    """
    config, device = model.config, next(model.parameters()).device
    limit = min(max_new_tokens or config.max_target_tokens, config.max_target_tokens)
    width = min(2 * num_beams, config.vocab_size)
    results: dict[int, list[Hypothesis]] = {}
    for indices in batches_by_length(sources, max(1, batch_rows // num_beams)):
        source_ids = pad_rows([sources[i] for i in indices], config.pad_id).to(device)
        lengths = torch.tensor([len(sources[i]) for i in indices], device=device)
        memory = model.encode(source_ids, lengths)  # (B, S, D)
        alive = {i: [Hypothesis([], 0.0)] for i in indices}
        ended: dict[int, list[Hypothesis]] = {i: [] for i in indices}
        place = {i: row for row, i in enumerate(indices)}
        for step in range(1, limit + 1):
            rows = [(i, hypothesis) for i, beams in alive.items() for hypothesis in beams]
            if not rows:
                break
            target_ids = torch.tensor([[config.bos_id, *h.ids] for _, h in rows], device=device)  # (R, step)
            at = torch.tensor([place[i] for i, _ in rows], device=device)
            scores, tokens = _step(model, target_ids, memory[at], lengths[at]).topk(width)  # (R, width)
            candidates: dict[int, list[Hypothesis]] = {i: [] for i in alive}
            for (i, h), row_scores, row_tokens in zip(rows, scores.tolist(), tokens.tolist(), strict=True):
                candidates[i] += [
                    Hypothesis([*h.ids, t], h.log_probability + s) for s, t in zip(row_scores, row_tokens, strict=True)
                ]
            for i in list(alive):
                ranked = sorted(candidates[i], key=lambda h: -h.log_probability)[: 2 * num_beams]
                # An ending that is not among the num_beams best would not have been kept as a beam either.
                ended[i] += [h for h in ranked[:num_beams] if h.ids[-1] == config.eos_id]
                ended[i] = sorted(ended[i], key=lambda h: -h.score(length_penalty))[:num_beams]
                alive[i] = [h for h in ranked if h.ids[-1] != config.eos_id][:num_beams]
                full = len(ended[i]) == num_beams
                worst = ended[i][-1].score(length_penalty) if full else -math.inf
                done = not alive[i] or (full and worst >= alive[i][0].score(length_penalty))
                if done or step == limit:
                    if not done:
                        ended[i] += alive[i]
                    results[i] = sorted(ended[i], key=lambda h: -h.score(length_penalty))[:num_beams]
                    del alive[i]
    return [results[i] for i in range(len(sources))]
