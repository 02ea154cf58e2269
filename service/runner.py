"""The runner executes the artifact's graphs. It alone imports onnxruntime.

Everything is bound by pointer (IO binding): state tensors are read and written in place, as prefixes of their buffers,
wherever they live; only ids, lengths and candidates cross between host and device. Knows neither requests nor search.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any, Literal

import numpy as np

from service.artifact import Artifact, StateTensor, VariantName
from service.batch import Batch, Ints, StepOutput
from service.errors import ArtifactError, SettingsError, ValidationFailed
from service.graphs import check_decoder, check_encoder, check_reorder, check_scorer, products_on
from service.ladder import Ladder
from service.processors import Division, has_vnni
from service.scoring import Scorer
from service.sequence import Floats
from service.settings import Settings
from service.state import Allocate, Array, HostBlock, State

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library is loaded: nothing is sent, from the first line on
import onnxruntime as ort

ort.disable_telemetry_events()
ort.set_default_logger_severity(3)

_PROVIDERS: dict[VariantName, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
"""Memory grows by what is needed, and products of floats keep all their bits."""
_HOST_INPUTS = ("last_ids", "positions", "source_lengths")

log = logging.getLogger(__name__)


def choose_variant(provider: Literal["auto", "cpu", "cuda"], artifact: Artifact) -> VariantName:
    """The variant for a provider setting. Never another provider than the one asked for.

    Raises SettingsError (this ONNX Runtime has no CUDA) or ArtifactError (the artifact has no graphs for it).
    """
    installed = _PROVIDERS["cuda"] in ort.get_available_providers()
    exported = "cuda" in artifact.manifest.variants
    if provider == "auto":
        variant: VariantName = "cuda" if installed and exported else "cpu"
        reason = "" if variant == "cuda" else f": {'the artifact has no cuda variant' if installed else 'no CUDA here'}"
        log.info("provider auto takes %s%s", variant, reason)
        return variant
    if provider == "cuda" and not installed:
        raise SettingsError(
            "provider: cuda was asked for, this ONNX Runtime has no CUDA provider. Install transduce[gpu] instead of "
            "transduce[cpu], or choose --provider cpu."
        )
    if provider not in artifact.manifest.variants:
        raise ArtifactError(
            f"{artifact.path} has no {provider} variant. Export the model again with one (transduce export --precision "
            "fp16), or choose --provider cpu."
        )
    return provider


class DeviceBlock:
    """A state tensor's memory on a device of ONNX Runtime's."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: str, device_id: int) -> None:
        self._value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, device_id)
        self.pointer: int = self._value.data_ptr()

    def read(self) -> Array:
        """A copy on the host."""
        return np.array(self._value.numpy())

    def write(self, contents: Array) -> None:
        """Copy to the device."""
        self._value.update_inplace(np.ascontiguousarray(contents))


class Runner:
    """Sessions of one variant of an artifact, on one device.

    Raises ArtifactError if a graph cannot be loaded or is not what the manifest says.
    """

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        self.variant = choose_variant(settings.provider, artifact)
        self.division = Division.of(settings, on_gpu=self.variant == "cuda")
        self.manifest = artifact.manifest
        self.precision = self.manifest.variants[self.variant].precision
        self._device_id = settings.device_id
        graphs = self.manifest.variants[self.variant]
        self._encoder = self._session(artifact, graphs.encoder, settings)
        self._decoder: ort.InferenceSession | None = None
        types: dict[str, np.dtype[Any]] = {}
        if graphs.decoder is not None:
            self._decoder = self._session(artifact, graphs.decoder, settings)
            types = check_decoder(self._decoder, self.manifest, artifact.graph(graphs.decoder))
        check_encoder(self._encoder, self.manifest, types, artifact.graph(graphs.encoder))
        self.tensors: list[tuple[StateTensor, np.dtype[Any]]] = [(t, types[t.name]) for t in self.manifest.state]
        self._scorer: Scorer | None = None
        if graphs.scorer is not None:
            scorer = self._session(artifact, graphs.scorer, settings)
            check_scorer(scorer, self.manifest, types, artifact.graph(graphs.scorer))
            self._scorer = Scorer(
                self._encoder, scorer, self.tensors,
                vocab_size=self.manifest.vocab_size, device=self.device, device_id=self._device_id,
            )  # fmt: skip
        self._reorder: ort.InferenceSession | None = None
        if self.variant == "cuda" and self._decoder is not None:
            if graphs.reorder is None:
                raise ArtifactError(f"{artifact.path}: variant cuda has no reorder graph. Export the model again.")
            self._reorder = self._session(artifact, graphs.reorder, settings)
            check_reorder(self._reorder, self.manifest, artifact.graph(graphs.reorder))
        outputs = [] if self._decoder is None else [output.name for output in self._decoder.get_outputs()]
        self._written = [name for name in outputs if name.startswith("next_")]
        self._begin()

    def twin(self) -> Runner:
        """Another one on the same sessions, for another thread: what is bound is its own."""
        twin = copy.copy(self)
        twin._begin()
        return twin

    def _begin(self) -> None:
        self._k = np.array(0, np.int64)
        self._candidate_ids: Ints = np.empty(0, np.int64)
        self._candidate_scores: Floats = np.empty(0, np.float32)
        self._logits: Floats = np.empty((0, self.manifest.vocab_size), np.float32)
        self._into_state = self._encoder.io_binding()  # outputs: state tensors
        self._to_memory = self._encoder.io_binding()  # output: memory
        self._to_labels = self._encoder.io_binding()  # output: label_logits
        self._bindings: dict[tuple[int, int, bool, tuple[bool, bool]], ort.IOBinding] = {}
        self._bound_to: tuple[object, ...] = ()
        self._only_fetches = ort.RunOptions()
        # An encoding needs no cross-attention state, a translation no memory.
        self._only_fetches.only_execute_path_to_fetches = True

    @property
    def device(self) -> str:
        """Where state lives, in ONNX Runtime's word."""
        return self.variant

    @property
    def generates(self) -> bool:
        """Whether there is a decoder."""
        return self._decoder is not None

    @property
    def scores(self) -> bool:
        """Whether the artifact has a scorer: those of older exports have none."""
        return self._scorer is not None

    @property
    def aligns(self) -> bool:
        """Whether the scorer gives alignments."""
        return self.scores and self.manifest.alignment_layer is not None

    def new_state(self, *, max_rows: int, source: Ladder, target: Ladder) -> State:
        """Buffers for this variant's state, where its sessions want them."""
        on_host = self.variant == "cpu"
        allocate: Allocate = HostBlock if on_host else self._allocate_on_device
        gather = None if on_host else self.gather
        return State(self.tensors, max_rows=max_rows, source=source, target=target, allocate=allocate, gather=gather)

    def encode_into(self, state: State, ids: Ints, lengths: Ints) -> None:
        """Encode sources (rows, source) of these lengths straight into the rows after those in use.

        The rows count as in use only when the caller appends them; if this raises, nothing that was in use has changed.
        """
        binding = self._into_state
        self._bind_sources(binding, ids, lengths, state.source_capacity)
        for tensor, dtype in self.tensors:
            if tensor.kind == "source":
                pointer, shape = state.pointer(tensor.name, state.rows), state.shape(tensor.name, len(ids))
                binding.bind_output(tensor.name, self.device, self._device_id, dtype.type, shape, pointer)
        self._encoder.run_with_iobinding(binding, self._only_fetches)

    def encode(self, ids: Ints, lengths: Ints) -> Floats:
        """The encoder's memory, (rows, source, embedding_size); padded positions hold nothing of meaning."""
        return self._encoded("memory", self._to_memory, ids, lengths, self.manifest.embedding_size)

    def classify(self, ids: Ints, lengths: Ints) -> Floats:
        """A classifier's logits of each token, (rows, source, labels), of which a text's are the mean."""
        return self._encoded("label_logits", self._to_labels, ids, lengths, len(self.manifest.labels))

    def _encoded(self, name: str, binding: ort.IOBinding, ids: Ints, lengths: Ints, width: int) -> Floats:
        found: Floats = np.empty((*ids.shape, width), np.float32)
        self._bind_sources(binding, ids, lengths, ids.shape[1])
        binding.bind_output(name, "cpu", 0, np.float32, found.shape, found.ctypes.data)
        self._encoder.run_with_iobinding(binding, self._only_fetches)
        return found

    def score(
        self, source_ids: Ints, source_lengths: Ints, target_ids: Ints, *, alignment: bool = False
    ) -> tuple[Floats, Floats | None]:
        """How likely the targets (rows, target), with their end tokens, are for the sources (rows, source).

        Gives log-probabilities (rows, target), and if asked for the alignment (rows, target, source): how much each
        target token attends to each source token, zero behind the source's length. What stands behind a target's end
        is padding of any ids below vocab_size, and its numbers mean nothing. No row's numbers depend on the others, nor
        on padding, from two target positions on. Raises ValidationFailed if the artifact cannot do it.
        """
        if self._scorer is None or (alignment and not self.aligns):
            raise ValidationFailed(
                f"the model cannot give {'alignments' if alignment else 'scores'}: its artifact was exported without "
                "them. Export it again with: transduce export."
            )
        return self._scorer.score(source_ids, source_lengths, target_ids, alignment=alignment)

    def step(self, batch: Batch, state: State, k: int, logits: bool) -> StepOutput:
        """One decoder step of all running rows: the k best candidates, and all logits if they are wanted.

        The results are views of buffers that the next step overwrites.
        """
        rows, most = batch.rows, len(batch.last_ids)
        generation, swapped = state.layout
        if self._bound_to != (batch, state, generation) or len(self._candidate_ids) < k * most:
            self._bindings.clear()
            self._bound_to = (batch, state, generation)
            self._candidate_ids = np.empty(k * most, np.int64)
            self._candidate_scores = np.empty(k * most, np.float32)
        if logits and len(self._logits) < most:
            self._logits = np.empty((most, self.manifest.vocab_size), np.float32)
        key = (rows, k, logits, swapped)
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bindings[key] = self._bind_step(batch, state, k, logits)
        elif self.variant != "cpu":
            self._bind_host_inputs(binding, batch)  # a device takes its copy when it is bound
        self._k[...] = k
        assert self._decoder is not None
        self._decoder.run_with_iobinding(binding)
        ids, scores = self._candidate_ids[: rows * k], self._candidate_scores[: rows * k]
        return StepOutput(ids.reshape(rows, k), scores.reshape(rows, k), self._logits[:rows] if logits else None)

    def gather(self, state: State, rows_from: Ints, names: list[str]) -> None:
        """Write row `rows_from[i]` of these tensors to row i of their spare blocks, on the device."""
        assert self._reorder is not None
        binding = self._reorder.io_binding()
        rows_from = np.ascontiguousarray(rows_from)
        binding.bind_input("rows_from", "cpu", 0, np.int64, rows_from.shape, rows_from.ctypes.data)
        for name in state.names:
            element, before, after = (
                state.dtype(name).type,
                state.shape(name, state.rows),
                state.shape(name, len(rows_from)),
            )
            binding.bind_input(name, self.device, self._device_id, element, before, state.pointer(name))
            if name in names:
                spare = state.spare_pointer(name)
                binding.bind_output(f"next_{name}", self.device, self._device_id, element, after, spare)
        self._reorder.run_with_iobinding(binding, self._only_fetches)

    def _bind_sources(self, binding: ort.IOBinding, ids: Ints, lengths: Ints, capacity: int) -> None:
        binding.bind_cpu_input("source_ids", ids)
        binding.bind_cpu_input("source_lengths", lengths)
        binding.bind_cpu_input("source_capacity", np.array(capacity, np.int64))

    def _bind_step(self, batch: Batch, state: State, k: int, logits: bool) -> ort.IOBinding:
        assert self._decoder is not None
        binding, rows = self._decoder.io_binding(), batch.rows
        self._k[...] = k
        binding.bind_input("k", "cpu", 0, np.int64, (), self._k.ctypes.data)
        self._bind_host_inputs(binding, batch)
        ids, scores = self._candidate_ids.ctypes.data, self._candidate_scores.ctypes.data
        binding.bind_output("candidate_ids", "cpu", 0, np.int64, (rows, k), ids)
        binding.bind_output("candidate_scores", "cpu", 0, np.float32, (rows, k), scores)
        if logits:
            shape = (rows, self.manifest.vocab_size)
            binding.bind_output("logits", "cpu", 0, np.float32, shape, self._logits.ctypes.data)
        for name in state.names:
            place = (self.device, self._device_id, state.dtype(name).type, state.shape(name, rows), state.pointer(name))
            binding.bind_input(name, *place)
            if f"next_{name}" in self._written:
                binding.bind_output(f"next_{name}", *place)
        return binding

    def _bind_host_inputs(self, binding: ort.IOBinding, batch: Batch) -> None:
        for name in _HOST_INPUTS:
            array: Ints = getattr(batch, name)
            binding.bind_input(name, "cpu", 0, np.int64, (batch.rows,), array.ctypes.data)

    def _allocate_on_device(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceBlock:
        return DeviceBlock(shape, dtype, self.device, self._device_id)

    def _session(self, artifact: Artifact, graph: str, settings: Settings) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.division.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spinning else "0")
        # By itself ONNX Runtime takes the fast instructions there are, and without VNNI they give wrong sums. With
        # VNNI this would cost time, and change nothing.
        options.add_session_config_entry("session.x64quantprecision", "0" if has_vnni() else "1")
        provider: tuple[str, dict[str, str]] = (_PROVIDERS[self.variant], {})
        if self.variant == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            ort.preload_dlls()
            provider = (_PROVIDERS["cuda"], {"device_id": str(self._device_id), **_CUDA_OPTIONS})
        path = artifact.graph(graph)
        try:
            session = ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # the library has no common class of its own
            raise ArtifactError(
                f"{path} cannot be loaded ({_first_line(error)}). Export the model again, with an ONNX Runtime of "
                f"version {ort.__version__} or older."
            ) from None
        session.disable_fallback()
        if session.get_providers()[0] != _PROVIDERS[self.variant]:
            raise SettingsError(
                f"provider: {self.variant} could not be started on device {self._device_id}, ONNX Runtime offers "
                f"{', '.join(session.get_providers())}. Check driver and CUDA libraries, or choose --provider cpu."
            )
        if self.variant == "cuda" and (strays := products_on(_PROVIDERS["cpu"], session)):
            raise ArtifactError(
                f"{path}: ONNX Runtime {ort.__version__} has no CUDA kernel for {strays[0]} and "
                f"{len(strays) - 1} more, and would run them on the CPU. Install a newer onnxruntime-gpu, export "
                "again, or choose --provider cpu."
            )
        return session


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
