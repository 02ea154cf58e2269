"""The README against the code: every setting, parameter, metric and module stands in it, and nothing that is gone."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from prometheus_client import CollectorRegistry

from service.metrics import Families
from service.parameters import Parameters
from service.settings import Settings, variable

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_setting_has_its_row_with_flag_variable_and_sentence() -> None:
    rows = {
        (f"--{spec.name.replace('_', '-')}", variable(spec.name), spec.metadata["help"].replace("|", "\\|"))
        for spec in fields(Settings)
    }
    documented = re.findall(
        r"^\| `(--[a-z-]+)` \| `(TRANSDUCE_[A-Z_]+)` \| [^|]* \| (.*) \|$", section("Settings"), re.M
    )
    assert set(documented) == rows


def test_every_parameter_has_its_row_with_its_sentence() -> None:
    rows = {(name, str(field.description)) for name, field in Parameters.model_fields.items()}
    documented = re.findall(r"^\| `([a-z_]+)` \| [^|]* \| (.*) \|$", section("Use"), re.M)
    assert set(documented) == rows


def test_every_metric_has_its_row() -> None:
    registry = CollectorRegistry()
    Families(registry).of("any")
    families = {family.name.removeprefix("transduce_"): family.type for family in registry.collect()}
    names = {name + "_total" if kind == "counter" else name for name, kind in families.items() if "process" not in name}
    names = {name for name in names if not name.startswith("python_")}
    documented = set(re.findall(r"^\| `([a-z_0-9]+)(?:\{[a-z_,]*\})?` \|", section("Metrics"), re.M))
    assert documented == names


def test_every_module_of_the_service_has_its_line_in_the_tree() -> None:
    modules = {path.stem for path in (ROOT / "service").glob("*.py")} - {"__init__"}
    documented = set(re.findall(r"^  ([a-z_]+) {2,}", section("The tree"), re.M))
    assert documented == modules


def test_files_that_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_version_is_that_of_the_changelog() -> None:
    from service import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
