"""A small model that has learnt a made-up language in seconds: unlike random weights, it prefers some words to others,
is unsure where the language is (every word has several translations), and ends.

Engines are compared on it: their answers vary in length, their beams compete, and hardly two candidates are equal.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from model.checkpoint import Checkpoint
from model.config import TransformerConfig
from model.data import pad_rows
from model.recipe import Recipe
from model.tokenizer import encode_texts, train_tokenizer
from model.transformer import Transformer
from tests.tiny import sentences

CONFIG = TransformerConfig(
    vocab_size=320,
    d_model=48,
    num_heads=2,
    encoder_layers=2,
    decoder_layers=2,
    dropout=0.0,
    max_source_tokens=64,
    max_target_tokens=64,
)

_SYLLABLES = ("ba", "do", "ke", "li", "mu", "na", "po", "ri", "sta", "tu", "ve", "zi")


_ROOT = Path(__file__).parents[2]


def translated(text: str, rng: random.Random) -> str:
    """The text word by word from the last to the first, each word by one of its three translations."""
    words = []
    for word in reversed(text[:-1].lower().split()):
        stem = random.Random(word)  # a word's translations are always the same three
        choices = ["".join(stem.choices(_SYLLABLES, k=stem.randint(1, 3))) for _ in range(3)]
        words.append(rng.choices(choices, [5, 3, 1])[0])
    return " ".join(words).capitalize() + text[-1]


def taught_checkpoint(pre_norm: bool, steps: int = 250, seed: int = 1) -> Checkpoint:
    """A checkpoint after so many steps. Its weights depend on torch's arithmetic: other bits on another machine."""
    config = replace(CONFIG, pre_norm=pre_norm)
    rng = random.Random(seed)
    texts = sentences(4000, seed=seed)
    tokenizer = train_tokenizer([*texts[:500], *(translated(text, rng) for text in texts[:500])], config.vocab_size)
    sources = [[*ids, config.eos_id] for ids in encode_texts(tokenizer, texts)]
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = Transformer(config)
    torch.random.set_rng_state(random_state)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 3e-3 * min(1.0, (step + 1) / 100))
    for _ in range(steps):
        chosen = rng.sample(range(len(texts)), 48)
        targets = list(encode_texts(tokenizer, [translated(texts[i], rng) for i in chosen]))
        logits = model(
            pad_rows([sources[i] for i in chosen], config.pad_id),
            torch.tensor([len(sources[i]) for i in chosen]),
            pad_rows([[config.bos_id, *ids] for ids in targets], config.pad_id),
        )
        wanted = pad_rows([[*ids, config.eos_id] for ids in targets], config.pad_id)
        loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=config.pad_id)
        # Padding and start become so improbable that it makes no difference whether an engine counts them in the sum.
        best = logits.detach().amax(dim=-1, keepdim=True)
        loss = loss + (logits[..., [config.pad_id, config.bos_id]] - best + 18.0).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    metadata = {
        "name": "taught",
        "source_language": "en",
        "target_language": "x-made-up",
        "license": "none",
        "training_data": "made-up sentences",
        "description": "learnt a made-up language, for tests",
    }
    return Checkpoint(Recipe(model=config), tokenizer, {n: t.detach() for n, t in model.state_dict().items()}, metadata)


def kept(directory: Path, pre_norm: bool) -> tuple[Checkpoint, Path]:
    """The checkpoint and its fp32 artifact for the CPU, from `directory` if they were made there before.

    Teaching and exporting take a minute, so both are kept until the code that makes them changes.
    """
    place = directory / f"{'pre' if pre_norm else 'post'}-norm-{_fingerprint()}"
    if not (place / "artifact" / "manifest.json").exists():
        from export.exporter import ExportRequest, export_artifact

        fresh = Path(tempfile.mkdtemp(dir=directory))
        taught_checkpoint(pre_norm).save(fresh / "taught.pt")
        texts = sentences(520, seed=5)
        (fresh / "sentences.tsv").write_text("".join(f"{text}\t{text}\n" for text in texts), encoding="utf-8")
        request = ExportRequest(fresh / "taught.pt", fresh / "artifact", "fp32", fresh / "sentences.tsv", cuda=False)
        export_artifact(request)
        try:
            os.rename(fresh, place)
        except OSError:  # another test process was quicker
            place = fresh
    return Checkpoint.load(place / "taught.pt"), place / "artifact"


def _fingerprint() -> str:
    """Changes with the code that decides what is kept."""
    digest = hashlib.sha256()
    for name in ("torch", "onnx", "onnxruntime", "onnxscript", "tokenizers"):
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    sources = [path for path in (_ROOT / "export").glob("*.py") if path.name not in ("cli.py", "benchmark.py")]
    sources += [_ROOT / "model" / f"{name}.py" for name in ("config", "transformer", "tokenizer")]
    for path in sorted([*sources, _ROOT / "tests" / "tiny.py", Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
