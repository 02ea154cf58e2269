"""A real model behind a real engine, ready for requests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.served_model import ServedModel, load_only
from service.settings import Settings

TEXTS = [
    "Where is the station?",
    "a",
    "The little cat sees my old house.",
    "🦜 汉字",
    "",
    "to be or not to be, that is it",
]
"""What it is asked: sentences, a letter, what its tokenizer has never seen, nothing."""


@contextmanager
def running(artifact: Path | None = None, **settings: Any) -> Iterator[ServedModel]:
    """The model of an artifact, under the name `tiny`, or the default one; on the CPU, one thread to a worker."""
    logging.getLogger("service").setLevel(logging.INFO)
    if artifact is not None:
        settings["model"] = f"tiny={artifact}"
    model = load_only(Settings(provider="cpu", threads=1, **settings))
    model.engine.start()
    try:
        assert model.engine.wait_ready(60)
        yield model
    finally:
        model.engine.stop()
