"""The state keeps every row's contents under any order of growing, moving and freeing: a plain model knows better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from onnx import helper

from service.artifact import StateTensor
from service.ladder import Ladder
from service.runner import DeviceBlock
from service.state import Block, State

TENSORS = [
    StateTensor(name="keys", kind="cache", shape=["rows", 2, "target_capacity", 3]),
    StateTensor(name="values", kind="cache", shape=["rows", "target_capacity"]),
    StateTensor(name="cross", kind="source", shape=["rows", 2, "source_capacity"]),
    StateTensor(name="summary", kind="source", shape=["rows", 4]),
    StateTensor(name="ring", kind="cache", shape=["rows", 3, 2]),
    StateTensor(name="memory", kind="recurrent", shape=["rows", 2, 2]),
]
MAX_ROWS = 5
SOURCE, TARGET = Ladder([2, 4, 8]), Ladder([2, 4, 6])
FLOAT = np.dtype(np.float32)


def new_state(**options: Any) -> State:
    return State([(t, FLOAT) for t in TENSORS], max_rows=MAX_ROWS, source=SOURCE, target=TARGET, **options)


def gather_graph() -> bytes:
    """The graph that moves rows on devices, as an export writes it, here for the CPU."""
    nodes, inputs, outputs = [], [helper.make_tensor_value_info("rows_from", onnx.TensorProto.INT64, ["n"])], []
    for tensor in TENSORS:
        nodes.append(helper.make_node("Gather", [tensor.name, "rows_from"], [f"next_{tensor.name}"], axis=0))
        inputs.append(helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, tensor.shape))
        after = ["n", *tensor.shape[1:]]
        outputs.append(helper.make_tensor_value_info(f"next_{tensor.name}", onnx.TensorProto.FLOAT, after))
    graph = helper.make_graph(nodes, "reorder", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def device_gather() -> Callable[[State, np.ndarray], None]:
    """Moves rows with IO binding by pointer, as the runner does on CUDA, on the CPU."""
    session = ort.InferenceSession(gather_graph(), providers=["CPUExecutionProvider"])

    def gather(state: State, rows_from: np.ndarray, names: list[str]) -> None:
        binding = session.io_binding()
        binding.bind_cpu_input("rows_from", np.ascontiguousarray(rows_from))
        for name in state.names:
            before, after = state.shape(name, state.rows), state.shape(name, len(rows_from))
            binding.bind_input(name, "cpu", 0, np.float32, before, state.pointer(name))
            if name in names:
                binding.bind_output(f"next_{name}", "cpu", 0, np.float32, after, state.spare_pointer(name))
        session.run_with_iobinding(binding)

    return gather


def device_block(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Block:
    return DeviceBlock(shape, dtype, "cpu", 0)


class StateMachine(RuleBasedStateMachine):
    """Rows are dictionaries of what was written where, and stay what they are whatever happens to the buffers."""

    state: State

    @initialize(device=st.booleans())
    def begin(self, device: bool) -> None:
        self.state = new_state(allocate=device_block, gather=device_gather()) if device else new_state()
        self.rows: list[dict[str, Any]] = []
        self.stamp = 0

    def _write(self, name: str, row: int, place: tuple[Any, ...], value: np.ndarray) -> None:
        """As a graph would: straight into the buffer."""
        block = self.state._buffers[name].block
        contents = block.read()
        contents[(row, *place)] = value
        block.write(contents)

    def _fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        self.stamp += 1
        return np.full(shape, self.stamp, np.float32) + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 64

    @rule(count=st.integers(1, 3), length=st.integers(1, 8))
    def append(self, count: int, length: int) -> None:
        """Newcomers' source tensors are written behind the rows in use, then they are in use."""
        if len(self.rows) + count > MAX_ROWS:
            with pytest.raises(ValueError, match="above 5"):
                self.state.append(count)
            return
        self.state.reserve(source=length)
        for row in range(len(self.rows), len(self.rows) + count):
            cross, summary = self._fresh((2, length)), self._fresh((4,))
            self._write("cross", row, (slice(None), slice(length)), cross)
            self._write("summary", row, (), summary)
            self.rows.append({"length": length, "cross": cross, "summary": summary, "keys": [], "values": []})
            self.rows[-1]["memory"] = np.zeros((2, 2), np.float32)
        self.state.append(count)

    @precondition(lambda self: self.rows and max(len(row["keys"]) for row in self.rows) < 6)
    @rule()
    def step(self) -> None:
        """Each row writes its own next position, and replaces what is recurrent."""
        self.state.reserve(target=max(len(row["keys"]) for row in self.rows) + 1)
        for index, row in enumerate(self.rows):
            keys, values, memory = self._fresh((2, 3)), self._fresh(()), self._fresh((2, 2))
            self._write("keys", index, (slice(None), len(row["keys"])), keys)
            self._write("values", index, (len(row["values"]),), values)
            self._write("memory", index, (), memory)
            row["keys"].append(keys)
            row["values"].append(values)
            row["memory"] = memory

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def rearrange(self, data: st.DataObject) -> None:
        """Rows leave, double and fill gaps; none is written that is read for another place."""
        count = len(self.rows)
        order = data.draw(st.lists(st.integers(0, count - 1), max_size=MAX_ROWS))
        read = {old for new, old in enumerate(order) if new != old}
        order = [new if new in read else old for new, old in enumerate(order)]
        moved = [self.rows[old] for new, old in enumerate(order) if new != old]
        source = max((row["length"] for row in moved), default=0)
        target = max((len(row["keys"]) for row in moved), default=0)
        places = {new for new, old in enumerate(order) if new != old}
        same = {new for new in places if new < count and self.rows[new]["cross"] is self.rows[order[new]]["cross"]}
        self.state.rearrange(np.array(order, np.int64), strangers=places - same, source=source, target=target)
        self.rows = [{**self.rows[old], **{k: list(self.rows[old][k]) for k in ("keys", "values")}} for old in order]

    @rule()
    def clear(self) -> None:
        self.state.clear()
        self.rows = []
        assert (self.state.source_capacity, self.state.target_capacity) == (2, 2)

    @invariant()
    def rows_hold_what_was_written(self) -> None:
        if not hasattr(self, "state"):
            return
        state = self.state
        assert state.rows == len(self.rows)
        assert state.nbytes <= state.max_nbytes
        for index, row in enumerate(self.rows):
            length, generated = row["length"], len(row["keys"])
            np.testing.assert_array_equal(state.read("cross")[index, :, :length], row["cross"])
            np.testing.assert_array_equal(state.read("summary")[index], row["summary"])
            np.testing.assert_array_equal(state.read("memory")[index], row["memory"])
            for position in range(generated):
                np.testing.assert_array_equal(state.read("keys")[index, :, position], row["keys"][position])
                assert state.read("values")[index, position] == row["values"][position]


StateMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestState = StateMachine.TestCase


def test_rows_are_a_prefix_bound_by_pointer() -> None:
    """Row r lies r strides behind the first, in the middle of nothing else."""
    state = new_state()
    array = state._buffers["keys"].block.read()
    for row in range(MAX_ROWS):
        assert state.pointer("keys", row) == array[row:].ctypes.data
    assert state.shape("keys", 3) == (3, 2, 2, 3)
    assert state.dtype("keys") == FLOAT
    assert repr(state) == "<State 0 of 5 rows, source 2, target 2>"


def test_the_layout_tells_when_a_binding_is_stale() -> None:
    """Growing, shrinking and renewing change it; taking and moving rows on the host do not."""
    state = new_state()
    layouts = [state.layout]
    state.append(3)
    state.rearrange(np.array([2, 1]), strangers={0}, source=2, target=2)
    assert state.layout == layouts[0]
    for change in (lambda: state.reserve(source=3), lambda: state.reserve(target=5), state.clear, state.renew):
        change()
        layouts.append(state.layout)
    assert len(set(layouts)) == len(layouts)
    state.clear()
    assert state.layout == layouts[-1], "nothing to give back, so nothing is moved"


def test_growing_is_counted_only_if_rows_are_copied() -> None:
    """An empty state climbs for nothing."""
    state = new_state()
    state.reserve(source=8)
    assert (state.growths, state.source_capacity) == (0, 8)
    state.append(1)
    state.reserve(source=8, target=2)
    assert state.growths == 0
    state.reserve(target=3)
    assert (state.growths, state.target_capacity) == (1, 4)


def test_the_memory_bound_is_the_sum_at_the_last_rungs_and_one_copy() -> None:
    """What is stated at start-up is what the buffers can take."""
    state = new_state()
    rows = {"keys": 2 * 6 * 3, "values": 6, "cross": 2 * 8, "summary": 4, "ring": 6, "memory": 4}
    assert state.max_nbytes == MAX_ROWS * 4 * (sum(rows.values()) + rows["keys"])
    state.reserve(source=8, target=6)
    assert state.nbytes == MAX_ROWS * 4 * sum(rows.values())


def test_too_long_is_refused() -> None:
    """Capacities end at the model's limits."""
    with pytest.raises(ValueError, match="above the last rung"):
        new_state().reserve(target=7)
