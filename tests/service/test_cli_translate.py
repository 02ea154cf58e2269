"""`transduce translate`: lines in, as many lines out. The stream of lines with the echoing engine, the program with the
real one."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service import lines
from service.lines import as_one_line, read_lines
from service.translation import LineFailed, Translation
from tests.service.fake_engine import FakeEngine, fake_model


def translated(content: bytes, *, engine: FakeEngine | None = None, truncate: bool = False) -> list[str]:
    translation = Translation(fake_model(engine), truncate=truncate)
    return list(translation.run(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"\n", [""]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"a\n\n", ["a", ""]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"  \n\tb\n", ["", "\tb"]),
        ("é\u2028x\x0cy\x85\n漢".encode(), ["é\u2028x\x0cy\x85", "漢"]),
        (b"a\xffb\n", ["a\ufffdb"]),
        (b"a\x00b\n", ["a\x00b"]),
    ],
)
def test_as_many_lines_out_as_in_and_in_order(content: bytes, expected: list[str]) -> None:
    """Only a line feed ends a line; blank lines stay empty; bytes that are not UTF-8 become U+FFFD."""
    assert translated(content) == expected


def test_many_lines_keep_their_order() -> None:
    """More than the window holds, of lengths that finish in another order."""
    expected = [f"line {'x' * (number % 37)}{number}" for number in range(1500)]
    assert translated("\n".join(expected).encode()) == expected


def test_memory_is_bounded_by_the_window() -> None:
    """The reader waits for the writer: of an endless input only so many lines are taken."""

    class Endless(io.RawIOBase):
        read_lines = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.read_lines += 1
            return b"a\n"

    stream = Endless()
    results = Translation(fake_model(), truncate=False).run(stream)  # type: ignore[arg-type]
    assert [next(results) for _ in range(10)] == ["a"] * 10
    time.sleep(0.3)
    assert stream.read_lines < 400


def test_a_line_that_is_too_long_is_named() -> None:
    """And what came before it has been written; with truncate it is cut."""
    content = b"a\nb\n" + b"x" * 100 + b"\nc\n"
    with pytest.raises(LineFailed, match=r"line 3 has .* limit is 64"):
        translated(content)
    assert translated(content, truncate=True) == ["a", "b", "x" * 48, "c"]


def test_a_line_without_end_is_not_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes the bound is skipped up to the next line feed."""
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    found = [(line.text, line.cut) for line in read_lines(io.BytesIO(b"x" * 35 + b"\nab\n" + b"y" * 10 + b"\nz"))]
    assert found == [("x" * 10, True), ("ab", False), ("y" * 10, False), ("z", False)]


def test_a_generated_line_feed_does_not_make_a_line() -> None:
    """It becomes a space."""
    assert as_one_line("a\nb\r\nc\rd") == "a b c d"


def test_a_failure_names_the_line() -> None:
    """With the engine's own words."""
    with pytest.raises(LineFailed, match="line 2: the model failed"):
        translated(b"a\npoison\nb\n")


# ---- the program, with the tiny model ----


def command(artifact: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", "translate", "--model", str(artifact), "--threads", "1", *flags]


def test_the_program_translates_files_and_pipes_alike(tiny_artifact: Path, tmp_path: Path) -> None:
    """Same lines by either way; nothing but a clean exit on standard error when it is no terminal."""
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes(b"The cat sees.\r\n\nWhere is the dog?\n  \nMy house \xff")
    piped = subprocess.run(command(tiny_artifact), input=source.read_bytes(), capture_output=True, check=True)
    assert piped.stdout.count(b"\n") == 5
    assert piped.stdout.split(b"\n")[1] == b""
    assert piped.stderr == b""
    subprocess.run(command(tiny_artifact, "--input", str(source), "--output", str(target)), check=True)
    assert target.read_bytes() == piped.stdout


def test_the_program_answers_a_line_before_the_next_one_comes(tiny_artifact: Path) -> None:
    """As a pipe or a person writes them; Ctrl-C then ends it without a traceback."""
    with subprocess.Popen(
        command(tiny_artifact), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"The cat sees.\n")
        process.stdin.flush()
        assert process.stdout.readline().endswith(b"\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == b""


def test_the_program_ends_quietly_when_its_reader_leaves(tiny_artifact: Path) -> None:
    """`| head -1` is no error to report."""
    read, write = os.pipe()
    with subprocess.Popen(
        command(tiny_artifact), stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE
    ) as process:
        os.close(write)
        os.close(read)
        _, errors = process.communicate(b"The cat sees.\n" * 50)
    assert errors == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_the_program_does_not_overwrite_its_input(tiny_artifact: Path, tmp_path: Path) -> None:
    """The same file twice is refused before it is emptied."""
    path = tmp_path / "text.txt"
    path.write_text("The cat sees.\n")
    found = subprocess.run(
        command(tiny_artifact, "--input", str(path), "--output", str(path)), capture_output=True, check=False
    )
    assert found.returncode == 2
    assert path.read_text() == "The cat sees.\n"
