"""`transduce bench` as a person calls it."""

from __future__ import annotations

import argparse
import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import __version__, cli
from service.bench.arguments import add_arguments
from service.bench.progress import Progress
from service.bench.report import Reply, Run
from service.bench.workload import Clients, Workload
from tests.service.fake_server import serving
from tests.service.fake_target import FakeTarget
from tests.service.real_model import running


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "sentences.txt"
    path.write_text("Where is the station?\n\nThe cat sees my house.\nA dog.\n", encoding="utf-8")
    return str(path)


def test_a_sweep_is_a_table_and_json_and_a_picture(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each number of clients; the JSON has what is needed to repeat it; no bar where nobody looks."""
    output, picture = tmp_path / "result.json", tmp_path / "result.png"
    asked = ["--clients", "1,4", "--requests", "20", "--parameters", '{"num_beams": 4}', "--seed", "5"]
    with FakeTarget(lambda number: 0.01).in_thread() as url:
        status = cli.main(
            ["bench", f"{url}/", "--data", data, *asked, "--output", str(output), "--picture", str(picture)]
        )
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    assert [line.split()[:2] for line in printed.out.splitlines()[2:4]] == [["1", "20"], ["4", "20"]]
    run = Run.model_validate_json(output.read_bytes())
    assert [(point.clients, point.requests) for point in run.points] == [(1, 20), (4, 20)]
    assert (run.version, run.url, run.model) == (__version__, url, {"id": "fake", "version": "7"})
    assert run.settings["parameters"] == {"num_beams": 4}
    assert (run.settings["texts"], run.settings["seed"], run.settings["requests"]) == (3, 5, 20)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_texts_come_from_standard_input_and_rates_are_points(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    fake = FakeTarget()
    with fake.in_thread() as url:
        assert cli.main(["bench", url, "--data", "-", "--rate", "50,100.5", "--duration", "0.3", "--stream"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["50", "100.5"]
    assert {body["inputs"] for body in fake.bodies} == {"one", "two"}
    assert all(body["stream"] for body in fake.bodies)


def test_a_key_is_sent_and_told_to_nobody(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, output = tmp_path / "key", tmp_path / "result.json"
    key.write_text("s3cret\n")
    fake = FakeTarget()
    with fake.in_thread() as url:
        arguments = ["--clients", "1", "--requests", "2", "--api-key-file", str(key), "--output", str(output)]
        assert cli.main(["bench", url, "--data", data, *arguments]) == 0
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer s3cret"}
    assert "s3cret" not in capsys.readouterr().out + output.read_text()


def test_a_terminal_sees_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves with the requests that count, says how many failed, and is gone at the end."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    with Progress(Clients(2), Workload(texts=["a"], requests=4)) as progress:
        assert "2 clients, warm-up:   0%" in terminal.getvalue()
        for counted, failure in ((False, None), (True, None), (True, "timeout")):
            progress.on_reply(Reply(0.0, 0.0, None, 1.0, 1, failure=failure), counted)
            time.sleep(0.11)
    assert "2 clients:  50%" in terminal.getvalue()
    assert "2/4 [00:00, 2 answers, 1 failures]" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


@pytest.mark.parametrize(("word", "message"), [(422, "as the test wants"), (404, "without /v1/generate")])
def test_a_server_that_refuses_the_first_request_is_status_1(
    word: int, message: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what it said, and before any load."""
    fake = FakeTarget(script=lambda number: word)
    with fake.in_thread() as url:
        assert cli.main(["bench", url, "--data", data]) == 1
    assert message in capsys.readouterr().err
    assert len(fake.arrivals) == 1


def test_a_server_that_is_not_there_is_status_1(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTarget().in_thread() as url:
        pass
    assert cli.main(["bench", url, "--data", data]) == 1
    error = capsys.readouterr().err
    assert error == (f"transduce: error: cannot reach {url}: connection refused; `transduce serve` starts a server\n")


def test_a_server_that_answers_nothing_more_is_status_1(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its table is printed all the same."""
    with FakeTarget(script=lambda number: "ok" if number == 0 else 500).in_thread() as url:
        assert cli.main(["bench", url, "--data", data, "--clients", "1", "--requests", "2", "--warm-up", "0"]) == 1
    assert "2 of 2 requests failed: 2 x 500 made_up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "1", "--rate", "1"], "not allowed with"),
        (["--requests", "1", "--duration", "1"], "not allowed with"),
        (["--clients", "0"], "not above 0"),
        (["--clients", "1,x"], "no whole number"),
        (["--rate", "nan"], "no number above 0"),
        (["--rate", "5,"], "no number above 0"),
        (["--duration", "inf"], "no number above 0"),
        (["--parameters", "num_beams=4"], '{"num_beams": 4}'),
        (["--parameters", "[1]"], "no JSON object"),
        (["--bogus"], "--bogus"),
    ],
)
def test_a_wrong_option_is_status_2(
    arguments: list[str], message: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named, with what would be right."""
    with pytest.raises(SystemExit) as status:
        cli.main(["bench", "http://127.0.0.1:1", "--data", data, *arguments])
    assert status.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://a", "http://", "http://a:b", "http://a:99999", "http://a?b", "http://u:p@a", "http://[a"],
)
def test_a_wrong_address_is_status_2(url: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One with a password too: it would stand in the result."""
    with pytest.raises(SystemExit) as status:
        cli.main(["bench", url, "--data", data])
    assert status.value.code == 2
    assert "address" in capsys.readouterr().err


def test_what_cannot_be_read_or_written_is_status_2(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any load: nobody waits for a minute to learn that the result has no place."""
    empty = tmp_path / "empty"
    empty.write_text("\n \n")
    for arguments, message in (
        (["--data", "/nowhere"], "cannot open /nowhere"),
        (["--data", str(empty)], "no text in it"),
        (["--data", data, "--output", "/nowhere/a.json"], "--output /nowhere/a.json: cannot be written"),
        (["--data", data, "--picture", str(tmp_path)], "--picture"),
        (["--data", data, "--picture", str(tmp_path / "a.gif")], ".png"),
        (["--data", data, "--api-key-file", "/nowhere"], "--api-key-file /nowhere"),
        (["--data", data, "--api-key-file", str(empty)], "one line"),
    ):
        assert cli.main(["bench", "http://127.0.0.1:1", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("absent", ["aiohttp", "matplotlib"])
def test_without_its_extra_it_says_which_one_it_needs(
    absent: str, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any load; matplotlib is needed for a picture only."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == absent else object())
    assert cli.main(["bench", "http://127.0.0.1:1", "--data", data, "--picture", "a.png"]) == 2
    assert f"{absent} is not installed; pip install 'transduce[bench]'" in capsys.readouterr().err


def test_ctrl_c_prints_what_there_is(data: str, tmp_path: Path) -> None:
    """Status 130, and the JSON has the points up to there."""
    output = tmp_path / "result.json"
    arguments = ["--clients", "2,4", "--requests", "40", "--warm-up", "0", "--output", str(output)]
    fake = FakeTarget(lambda number: 0.01 if number < 60 else 60.0)
    with fake.in_thread() as url:
        command = [sys.executable, "-m", "service.cli", "bench", url, "--data", data, *arguments]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        give_up = time.monotonic() + 30
        while len(fake.arrivals) < 64 and time.monotonic() < give_up:
            time.sleep(0.02)
        program.send_signal(signal.SIGINT)
        printed, complained = program.communicate(timeout=30)
    assert (program.returncode, complained) == (130, "")
    assert "4 clients: interrupted after " in printed
    points = Run.model_validate_json(output.read_bytes()).points
    assert [(point.clients, point.interrupted) for point in points] == [(2, False), (4, True)]
    assert points[0].requests == 40
    assert 0 < points[1].requests < 40


@pytest.fixture(scope="module")
def served(tiny_artifact: Path) -> Iterator[str]:
    """The real service with the tiny model."""
    with running(tiny_artifact, max_rows=8) as model, serving(model) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("load_flags", [["--clients", "1,16"], ["--rate", "40"], ["--clients", "4", "--stream"]])
def test_the_real_service_is_measured(load_flags: list[str], served: str, data: str, tmp_path: Path) -> None:
    """Both loops and streams, with the figures of its metrics."""
    output = tmp_path / "result.json"
    assert cli.main(["bench", served, "--data", data, *load_flags, "--requests", "60", "--output", str(output)]) == 0
    run = Run.model_validate_json(output.read_bytes())
    assert run.model is not None
    assert run.model["id"] == "tiny"
    for point in run.points:
        assert (point.requests, point.failures) == (60, {})
        assert point.tokens_per_second > point.requests_per_second
        assert point.source_tokens_per_second > point.requests_per_second
        assert (point.first_token is None) == ("--stream" not in load_flags)
        assert point.server is not None
        assert point.server.rows_per_step is not None
        assert 1 <= point.server.rows_per_step <= 8
        assert point.server.padding_share is not None
        assert point.server.first_token_seconds is not None
        assert point.server.resident_bytes is not None
    if "1,16" in load_flags:
        alone, together = run.points
        assert alone.server is not None
        assert together.server is not None
        assert alone.server.rows_per_step == 1.0
        assert (together.server.rows_per_step or 0) > 2, "16 clients, divided between the workers"


def test_the_manual_has_every_flag_and_module() -> None:
    """The README's section names each flag, its tree each module."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Load a server\n")[1].split("\n## ")[0]
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for action in parser._actions:
        for flag in action.option_strings:
            assert f"{flag} " in section.replace("`", " "), flag
    modules = {path.stem for path in (Path(__file__).parents[2] / "service" / "bench").glob("*.py")} - {"__init__"}
    assert (
        set(re.findall(r"^    ([a-z]+) {2,}", readme.split("\n  bench/ ")[1].split("\n  a")[0], re.MULTILINE))
        == modules
    )
