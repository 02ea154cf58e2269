"""The artifact: a directory that an export wrote, read and verified. The manifest's schema is declared here.

Verifies everything that can be known without running the graphs: the manifest, the files, their checksums. Whether the
graphs do what the manifest says is the runner's matter. Every failure is an ArtifactError that names the remedy.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import ArtifactError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

VariantName = Literal["cpu", "cuda"]
StateKind = Literal["cache", "source", "recurrent"]
Symbol = Literal["rows", "source_capacity", "target_capacity"]
Positive = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpecialTokens(_Part):
    """The ids that the service has to know."""

    pad_id: TokenId
    bos_id: TokenId
    eos_id: TokenId


class StateTensor(_Part):
    """A named tensor of the decoder's state, one row per running sequence on axis 0.

    cache: places that steps write, undefined at the start: one more per step along `target_capacity`, or without that
    axis a fixed number of them, used again and again.
    source: written by the encoder, whose output has the same name; `source_capacity` is its axis of source positions.
    recurrent: of fixed shape, zeros at the start, replaced at each step.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]
    kind: StateKind
    shape: list[Symbol | Positive]

    @model_validator(mode="after")
    def _symbols_in_place(self) -> StateTensor:
        if not self.shape or self.shape[0] != "rows" or "rows" in self.shape[1:]:
            raise ValueError("the shape has rows on axis 0, and only there")
        allowed = {
            "cache": "target_capacity",
            "source": "source_capacity",
            "recurrent": None,
        }[self.kind]
        symbols = [size for size in self.shape[1:] if isinstance(size, str)]
        if any(symbol != allowed for symbol in symbols) or len(symbols) > 1:
            raise ValueError(f"a tensor of kind {self.kind} has the symbolic axis {allowed} once at most, and no other")
        return self

    @cached_property
    def capacity_axis(self) -> int | None:
        """The axis whose length is a capacity, None if every row has a fixed size."""
        return next(
            (axis for axis, size in enumerate(self.shape) if axis and isinstance(size, str)),
            None,
        )


class Variant(_Part):
    """The graphs for one execution provider; paths relative to the manifest."""

    precision: str
    encoder: str
    decoder: str | None = None
    """None in the artifact of an encoder alone, which classifies or gives vectors."""
    scorer: str | None = None
    """Reads whole targets; None in artifacts of older exports, which cannot score. Its weights may lie in `decoder`."""
    reorder: str | None = None

    @property
    def graphs(self) -> list[str]:
        """Every graph file."""
        return [path for path in (self.encoder, self.decoder, self.scorer, self.reorder) if path is not None]


class SelfTest(_Part):
    """A sentence and the greedy answer of each variant, end tokens included, or a classifier's label."""

    source: str
    source_ids: Annotated[list[TokenId], Field(min_length=1)]
    target_ids: dict[VariantName, Annotated[list[TokenId], Field(min_length=1)]] = {}
    labels: dict[VariantName, str] = {}


class Manifest(_Part):
    """manifest.json. `architecture` and `parity` are information for people: the service reads neither."""

    format_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    version: str
    description: str = ""
    languages: dict[str, str] = {}
    license: str = ""
    training_data: str = ""
    created: str = ""
    producer: str = ""
    architecture: dict[str, Any] = {}
    embedding_size: Positive
    vocab_size: Positive
    max_source_tokens: Positive
    max_target_tokens: Positive
    special_tokens: SpecialTokens
    labels: list[str] = []
    """What a classifier tells apart, in the order of its numbers; empty where the model is none."""
    state: list[StateTensor]
    alignment_layer: Annotated[int, Field(ge=0)] | None = None
    """The decoder layer whose attention to the source the scorers give as the alignment; None if they give none."""
    variants: dict[VariantName, Variant]
    parity: dict[str, Any] = {}
    self_test: list[SelfTest] = []
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]

    @property
    def generates(self) -> bool:
        """Whether there is a decoder."""
        return self.variants["cpu"].decoder is not None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [tensor.name for tensor in self.state]
        if len(set(names)) != len(names):
            raise ValueError("two state tensors have the same name")
        if "cpu" not in self.variants:
            raise ValueError("variants: cpu is missing")
        if len({variant.decoder is None for variant in self.variants.values()}) > 1:
            raise ValueError("variants: one has a decoder and another has none")
        if self.variants["cpu"].decoder is None and self.state:
            raise ValueError("state: there is no decoder that would have one")
        if unknown := {label for test in self.self_test for label in test.labels.values()} - set(self.labels):
            raise ValueError(f"self_test: {min(unknown)!r} is not among the labels")
        needed = {
            TOKENIZER,
            *(path for variant in self.variants.values() for path in variant.graphs),
        }
        if unlisted := sorted(needed - set(self.files)):
            raise ValueError(f"files: no checksum for {', '.join(unlisted)}")
        for path in self.files:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
                raise ValueError(f"files: {path!r} leads out of the artifact")
        ids = [*self.special_tokens.model_dump().values()]
        for test in self.self_test:
            ids += [
                *test.source_ids,
                *(id for answer in test.target_ids.values() for id in answer),
            ]
        if max(ids) >= self.vocab_size:
            raise ValueError(f"token id {max(ids)} is not below vocab_size {self.vocab_size}")
        return self


class Artifact:
    """A verified artifact. `path` is its directory."""

    def __init__(self, path: Path, manifest: Manifest, name: str | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.name = name or manifest.name
        """What clients call the model."""

    @classmethod
    def load(cls, path: Path | str, *, name: str | None = None) -> Artifact:
        """Read and verify. `name` replaces the manifest's. Raises ArtifactError."""
        path = Path(path)
        manifest = _read_manifest(path)
        root = path.resolve()
        for file, checksum in manifest.files.items():
            _verify(path, root, file, checksum)
        return cls(path, manifest, name)

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.json."""
        return self.path / TOKENIZER

    def graph(self, file: str) -> Path:
        """The path of a graph that a variant names."""
        return self.path / file

    def __repr__(self) -> str:
        return f"<Artifact {self.name} version {self.manifest.version} at {self.path}>"


def _read_manifest(path: Path) -> Manifest:
    if not path.exists():
        raise ArtifactError(f"{path} does not exist. Give the directory of an artifact: --model PATH.")
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory. Give the directory that holds {MANIFEST}, not a file.")
    file = path / MANIFEST
    try:
        document = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} has no {MANIFEST}: it is no artifact. Make one with: transduce export CHECKPOINT {path}."
        ) from None
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not JSON ({error}). Copy the artifact again, or export it again.") from None
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {version!r}, this program reads {FORMAT_VERSION}. "
            "Export the model again with this version of transduce, or upgrade transduce."
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "manifest"
        raise ArtifactError(
            f"{file}: {place}: {first['msg']}. Export the model again with: transduce export."
        ) from None


def _verify(path: Path, root: Path, file: str, checksum: str) -> None:
    target = path / file
    if not target.resolve().is_relative_to(root):
        raise ArtifactError(f"{target} leads out of the artifact. Copy the file itself instead of a link.")
    try:
        with target.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise ArtifactError(f"{target} is missing, {MANIFEST} lists it. Copy the artifact again, whole.") from None
    except OSError as error:
        raise ArtifactError(f"{target} cannot be read ({error.strerror}). Check its permissions.") from None
    if found != checksum:
        raise ArtifactError(
            f"{target} has SHA-256 {found[:12]}..., {MANIFEST} says {checksum[:12]}...: damaged or replaced. "
            "Copy the artifact again (with git: check that the file is no Git LFS pointer), or export it again."
        )
