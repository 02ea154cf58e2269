"""The program `transduce`: its help, its errors, its exit statuses."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from service import __version__, cli


def program(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_help_imports_nothing_heavy() -> None:
    """Neither the runtime nor the web framework is needed to print a page of text."""
    code = (
        "import sys; from service.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('onnxruntime', 'fastapi', 'pydantic', 'numpy', 'tokenizers', 'torch', 'tqdm') "
        "if name in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"
    for command in ("serve", "translate", "check"):
        assert f"    {command} " in found.stdout.replace("\n", " \n")


def test_version() -> None:
    """On standard output, with status 0."""
    found = program("--version")
    assert (found.returncode, found.stdout) == (0, f"transduce {__version__}\n")


@pytest.mark.parametrize("command", ["serve", "translate", "check"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With its flags."""
    with pytest.raises(SystemExit) as status:
        cli.main([command, "--help"])
    assert status.value.code == 0
    assert "--provider" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["serve", "--bogus"], ["serve", "--por", "1"], ["check"], ["translate", "--max-new-tokens", "x"]],
)
def test_a_wrong_call_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown commands and flags, abbreviations, missing arguments: usage on standard error."""
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    assert status.value.code == 2
    assert "usage: transduce" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--port", "99999"], ["--port", "65535"]),
        (["serve", "--model", "/nowhere"], ["/nowhere", "does not exist", "--model"]),
        (["translate", "--input", "/nowhere"], ["cannot open /nowhere"]),
        (["translate", "--max-rows", "0"], ["--max-rows"]),
    ],
)
def test_what_cannot_start_is_status_2_with_a_remedy(
    arguments: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """One line on standard error, no traceback."""
    assert cli.main(arguments) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("transduce: error: ")
    assert all(word in message for word in words)


def test_the_missing_default_artifact_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Train, export, or pass another."""
    missing = str(tmp_path / "absent")
    monkeypatch.setattr("service.served_model.DEFAULT_MODEL", missing)
    assert cli.main(["serve", "--model", missing]) == 2
    message = capfd.readouterr().err
    assert all(word in message for word in (missing, "transduce train", "transduce export", "--model"))


@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
def test_a_command_of_an_absent_package_says_which_extra_it_needs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether its package is absent or nothing names it, and whatever flags follow."""
    for found in ([], [EntryPoint(command, f"export_that_is_absent.cli:{command}", cli.GROUP)]):
        monkeypatch.setattr(cli, "entry_points", lambda found=found, **group: found)
        monkeypatch.setitem(cli._EXTRA_OF, "export_that_is_absent", "transduce[train]")
        assert cli.main([command, "--help", "--anything"]) == 2
        assert "pip install 'transduce[train]'" in capsys.readouterr().err


def test_a_command_whose_library_is_absent_says_which_extra_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when that shows only while it runs."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "service.runner", raising=False)

    def run(arguments: object) -> int:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr("service.commands.check.run", run)
    assert cli.main(["check", "/nowhere"]) == 2
    assert "transduce[cpu]" in capsys.readouterr().err


def test_the_packages_entry_points_are_the_programs_commands() -> None:
    """What the package declares is what an installation without metadata falls back to."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"][cli.GROUP]
    assert {name: declared[name] for name in cli._OWN} == {
        name: f"service.commands.{name}:register" for name in cli._OWN
    }
    assert set(declared) - set(cli._OWN) <= {*cli._OF_OTHER_PACKAGES, "bench"}
    assert project["scripts"]["transduce"] == "service.cli:main"
