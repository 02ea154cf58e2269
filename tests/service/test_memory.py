"""The memory of the process: its limit, what is promised to models, and what does not fit."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.errors import SettingsError, ValidationFailed
from service.memory import MIB, Memory, memory_limit, resident_bytes
from service.metrics import Families
from service.models import Models, load_all
from service.served_model import load
from service.settings import Settings

MACHINE = 8 * 2**30


def root(tmp_path: Path, *, resident: int = 0, **cgroup: str) -> Path:
    """A file system as a container sees it; `cgroup` are files with a double underscore for the slash."""
    files = {"proc/meminfo": f"MemTotal: {MACHINE // 1024} kB\nMemFree: 1 kB\n"}
    files["proc/self/status"] = f"Name: python\nVmRSS:\t  {resident // 1024} kB\n"
    files |= {"sys/fs/cgroup/" + name.replace("__", "/").replace("_max", ".max"): text for name, text in cgroup.items()}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("cgroup", "limit"),
    [
        ({}, MACHINE),
        ({"memory_max": "max\n"}, MACHINE),
        ({"memory_max": f"{2**30}\n"}, 2**30),
        ({"memory_max": f"{2**40}\n"}, MACHINE),
        ({"memory__memory.limit_in_bytes": f"{2**29}\n"}, 2**29),
        ({"memory__memory.limit_in_bytes": "9223372036854771712\n"}, MACHINE),
    ],
)
def test_the_limit_is_the_containers_or_the_machines(tmp_path: Path, cgroup: dict[str, str], limit: int) -> None:
    """Whichever is less; cgroup v2 and v1, with and without a number."""
    assert memory_limit(root(tmp_path, **cgroup)) == limit


def test_where_nothing_is_known_nothing_is_refused(tmp_path: Path) -> None:
    """Other systems have no such files."""
    memory = Memory(tmp_path)
    memory.promise("a model", lambda: 2**60)
    assert (memory.limit, memory.resident) == (None, 0)


def test_this_process_has_some() -> None:
    """The real files can be read."""
    assert 10 * MIB < resident_bytes() < (memory_limit() or 0)


def test_promises_add_up_until_they_are_released(tmp_path: Path) -> None:
    """Of what there is, what the process has and what every model may still take."""
    memory = Memory(root(tmp_path, resident=100 * MIB, memory_max=str(400 * MIB)))
    memory.promise("one", lambda: 200 * MIB)
    assert memory.expected == 300 * MIB
    with pytest.raises(SettingsError, match=r"100 MiB .* has 450, more than the 400 MiB .* --max-rows"):
        memory.promise("two", lambda: 150 * MIB)
    memory.release("one")
    memory.require()


def test_a_model_that_cannot_fit_is_refused_when_it_is_loaded(tmp_path: Path, tiny_artifact: Path) -> None:
    """Not when its rows have grown and the kernel ends the process; with the remedy."""
    memory = Memory(root(tmp_path, resident=100 * MIB, memory_max=str(101 * MIB)))
    for max_rows, fits in ((1, True), (2048, False)):
        settings = Settings(max_rows=max_rows, provider="cpu", threads=1)
        model = load(settings, "tiny", tiny_artifact, Families(CollectorRegistry()), memory)
        model.engine.start()
        if fits:
            assert model.engine.wait_ready(60)
            facts = model.engine.describe()
            assert 0 < memory.expected - 100 * MIB <= facts["state_bytes_limit"]
            model.engine.stop()
            memory.release(model.engine)
        else:
            with pytest.raises(SettingsError, match="--max-rows"):
                model.engine.wait_ready(60)
            assert memory.expected == 100 * MIB


def test_a_version_that_does_not_fit_beside_the_one_that_serves_is_refused(tmp_path: Path, tiny_artifact: Path) -> None:
    """While one takes the other's place both are there."""
    (tmp_path / "root").mkdir()
    memory = Memory(root(tmp_path / "root", resident=100 * MIB, memory_max=str(110 * MIB)))
    settings, families = Settings(max_rows=8, provider="cpu", threads=1), Families(CollectorRegistry())
    first = load(settings, "tiny", tiny_artifact, families, memory)

    async def play() -> None:
        models = Models([first], lambda name, path: load(settings, name, path, families, memory), memory)
        models.start()
        await models.wait_ready()
        root(tmp_path / "root", resident=110 * MIB, memory_max=str(110 * MIB))
        with pytest.raises(ValidationFailed, match="give it more memory"):
            await models.replace("tiny", None)
        models.require_ready()
        root(tmp_path / "root", resident=100 * MIB)
        await models.replace("tiny", None)
        await models.stop()

    asyncio.run(play())


def test_versions_that_are_gone_leave_no_memory_behind(tiny_artifact: Path) -> None:
    """Sessions, buffers and threads go with them."""

    async def play() -> list[int]:
        models = load_all(Settings(model=f"tiny={tiny_artifact}", provider="cpu", threads=1, max_rows=512))
        models.start()
        await models.wait_ready()
        resident = []
        for _ in range(6):
            old = weakref.ref(models.named(None).engine)
            await models.replace("tiny", None)
            for _ in range(1000):
                if old() is None:
                    break
                await asyncio.sleep(0.01)
            assert old() is None
            resident.append(resident_bytes())
        await models.stop()
        return resident

    gc.collect()
    resident = asyncio.run(play())
    assert resident[-1] - resident[1] < 20 * MIB
