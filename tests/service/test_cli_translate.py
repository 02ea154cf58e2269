"""`transduce translate`: lines in, as many lines out. The stream of lines with the echoing engine, the program with the
real one."""

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from service import lines
from service.commands import translate
from service.commands.parameter_flags import named_as_flags, read_parameters
from service.errors import SettingsError, ValidationFailed
from service.lines import as_one_line, read_lines
from service.parameters import Parameters
from service.translation import _UNSEEN, WINDOW, LineFailed, Translation
from tests.service.fake_engine import FakeEngine, fake_model


def translated(content: bytes, *, engine: FakeEngine | None = None, **parameters: Any) -> list[str]:
    translation = Translation(fake_model(engine), Parameters(**parameters))
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
    expected = [f"line {'x' * (number % 37)}{number}" for number in range(WINDOW + 500)]
    assert translated("\n".join(expected).encode()) == expected


def test_memory_is_bounded_by_the_window() -> None:
    """The reader waits for the writer: of an endless input only so many lines are taken."""

    class Endless(io.RawIOBase):
        read_lines = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.read_lines += 1
            return b"a\n"

    stream = Endless()
    results = Translation(fake_model(), Parameters()).run(stream)  # type: ignore[arg-type]
    assert [next(results) for _ in range(10)] == ["a"] * 10
    time.sleep(0.5)
    assert stream.read_lines <= WINDOW + 11


def test_few_lines_are_held_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the input, no more than a bounded number has been read and not tokenised: each may be long."""
    model, taken, most = fake_model(), 0, 0
    tokenised = model.tokenizer.encode

    class Counting(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            nonlocal taken, most
            taken += 1
            most = max(most, taken)
            return super().readline(size)

    def slowly(text: str) -> list[int]:
        nonlocal taken
        time.sleep(0.001)
        taken -= 1
        return tokenised(text)

    monkeypatch.setattr(model.tokenizer, "encode", slowly)
    assert len(list(Translation(model, Parameters()).run(Counting(b"a\n" * 1000)))) == 1000
    assert most <= _UNSEEN + 2


def test_a_line_that_is_too_long_is_named() -> None:
    """And what came before it has been written, all of it; with truncate it is cut."""
    content = b"a\nb\n" + b"x" * 100 + b"\nc\n"
    found = Translation(fake_model(FakeEngine(step_seconds=0.05)), Parameters()).run(io.BytesIO(content))
    assert [next(found), next(found)] == ["a", "b"]
    with pytest.raises(LineFailed, match=r"line 3 has .* limit is 64"):
        next(found)
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


def test_lines_are_generated_as_the_parameters_say() -> None:
    """With beams, a prefix and a stop string, as over HTTP; a blank line stays blank."""
    engine = FakeEngine()
    found = translated(b"abcd\n\nxy\n", engine=engine, num_beams=3, prefix="> ", stop=["c"], length_penalty=0.6)
    assert found == ["> ab", "", "> xy"]
    assert (engine.parameters.num_beams, engine.parameters.length_penalty) == (3, 0.6)


def test_parameters_that_do_not_fit_are_named_as_flags() -> None:
    """The sentence is that of HTTP."""
    with pytest.raises(ValidationFailed) as refusal:
        Translation(fake_model(max_rows=8), Parameters(num_beams=4, do_sample=True))
    sentence = "--num-beams: must be 1 with --do-sample: leave one of the two out"
    assert named_as_flags(str(refusal.value)) == sentence


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    translate.register(parser.add_subparsers())
    return parser.parse_args(["translate", *flags])


def test_flags_are_the_parameters_of_http() -> None:
    """With their types; texts may come several times, and what was not given is left to the default."""
    flags = [
        "--num-beams", "4", "--length-penalty", "0.6", "--early-stopping", "never", "--max-new-tokens", "9",
        "--suppress", "a", "--suppress", "b\udcff", "--prefix", "5", "--truncate",
    ]  # fmt: skip
    found = read_parameters(parse(*flags), Parameters.model_fields)
    expected = Parameters(
        num_beams=4, length_penalty=0.6, early_stopping="never", max_new_tokens=9, suppress=["a", "b\ufffd"],
        prefix="5", truncate=True,
    )  # fmt: skip
    assert found == expected
    sampling = parse("--do-sample", "--temperature", "2", "--top-k", "3", "--top-p", "0.5", "--seed", "7")
    expected = Parameters(do_sample=True, temperature=2, top_k=3, top_p=0.5, seed=7)
    assert read_parameters(sampling, Parameters.model_fields) == expected


@pytest.mark.parametrize(
    ("flag", "text", "words"),
    [
        ("--num-beams", "many", "valid integer"),
        ("--num-beams", "4.5", "valid integer"),
        ("--seed", "-1", "between 0 and"),
        ("--length-penalty", "11", "between -10 and 10"),
        ("--length-penalty", "nan", "between -10 and 10"),
        ("--early-stopping", "maybe", "true, false"),
        ("--stop", "", "empty"),
        ("--temperature", "0", "--do-sample"),
    ],
)
def test_a_flag_out_of_its_range_is_refused_by_its_name(
    flag: str, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded."""
    with pytest.raises((argparse.ArgumentError, SystemExit)) as refusal:
        parse(flag, text)
    said = f"{refusal.value} {capsys.readouterr().err}"
    assert flag in said
    assert words in said


def test_a_flag_that_comes_too_often_is_refused() -> None:
    """As a list that is too long is over HTTP."""
    with pytest.raises(SettingsError, match="--stop: holds 33 strings, the limit is 32"):
        read_parameters(parse(*["--stop", "x"] * 33), Parameters.model_fields)


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


def test_the_program_refuses_before_it_empties_a_file(tiny_artifact: Path, tmp_path: Path) -> None:
    """What does not go together, or does not fit the model: one line, status 2, and the output is as it was."""
    target = tmp_path / "out.txt"
    target.write_text("precious\n")
    for flags, words in (
        (("--num-beams", "4", "--do-sample"), "--num-beams: must be 1 with --do-sample"),
        (("--max-new-tokens", "49"), "--max-new-tokens: must be between 1 and 48"),
    ):
        found = subprocess.run(
            command(tiny_artifact, "--output", str(target), *flags), input=b"a\n", capture_output=True, check=False
        )
        assert found.returncode == 2
        assert words in found.stderr.decode()
        assert found.stderr.count(b"\n") == 1
    assert target.read_text() == "precious\n"


def test_the_program_does_not_overwrite_its_input(tiny_artifact: Path, tmp_path: Path) -> None:
    """The same file twice is refused before it is emptied."""
    path = tmp_path / "text.txt"
    path.write_text("The cat sees.\n")
    found = subprocess.run(
        command(tiny_artifact, "--input", str(path), "--output", str(path)), capture_output=True, check=False
    )
    assert found.returncode == 2
    assert path.read_text() == "The cat sees.\n"
