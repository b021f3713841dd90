"""Licenses and the bill of materials: what `make lint` refuses, and what `make sbom` accepts."""

from __future__ import annotations

import importlib.util
import json
from email.message import Message
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


LICENSES, SBOM = loaded("licenses"), loaded("sbom")
FREE = {"MIT", "Apache-2.0", "BSD-3-Clause"}


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("GPL-3.0-only AND MIT OR Apache-2.0", True),  # AND binds more tightly
        ("GPL-3.0-only AND (MIT OR Apache-2.0)", False),
        ("(MIT OR GPL-3.0-only) AND BSD-3-Clause", True),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("mit", False),
    ],
)
def test_an_expression_is_allowed_if_allowed_licenses_meet_it(expression: str, allowed: bool) -> None:
    assert LICENSES.is_allowed(expression, FREE) is allowed


@pytest.mark.parametrize("expression", ["", "MIT OR", "(MIT", "MIT GPL-3.0-only", "MIT)"])
def test_what_is_no_expression_is_not_taken_for_one(expression: str) -> None:
    with pytest.raises(ValueError, match="'"):
        LICENSES.is_allowed(expression, FREE)


@pytest.mark.parametrize(
    ("fields", "stated"),
    [
        ([("License-Expression", "MIT"), ("License", "Proprietary")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: MIT License"), ("License", "x")], "MIT"),
        ([("Classifier", "License :: OSI Approved"), ("License", "Apache 2.0")], "Apache-2.0"),
        (
            [("Classifier", f"License :: OSI Approved :: {one}") for one in ("MIT License", "BSD License")],
            "MIT AND BSD-3-Clause",
        ),
        ([("Classifier", "License :: Other/Proprietary License"), ("License", "MIT License\n\nCopyright")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: GNU General Public License v3 (GPLv3)")], None),
        ([], None),
    ],
)
def test_a_package_states_its_license_in_one_of_three_ways(fields: list[tuple[str, str]], stated: str | None) -> None:
    metadata = Message()
    for name, value in fields:
        metadata[name] = value.replace("\n", "\n ")
    assert LICENSES.stated_by(metadata) == stated


def test_what_is_not_allowed_is_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"free": "MIT", "left": "GPL-3.0-only", "sold": "Ask our lawyers", "mute": None, "tool": "GPL-2.0-only"}
    known |= {"chips-one": None, "chips-two": "Chip Maker's own"}
    monkeypatch.setattr(LICENSES, "licenses", lambda names, stated: {name: known[name] for name in names})
    monkeypatch.setattr(LICENSES, "needed_by_users", lambda: {"free", "tool"})
    tool = {"states": "GPL-2.0-only", "only": "development", "why": ""}
    rules: dict[str, Any] = {
        "allowed": ["MIT"],
        "stated": {"mute": "MIT", "gone": "MIT"},
        "exceptions": {"tool": tool, "chips-* old-*": {"states": "Chip", "why": ""}},
    }
    lines = LICENSES.problems(list(known), rules)
    assert [line.split()[0].rstrip(":") for line in lines] == ["left", "sold", "mute", "tool", "gone", "old-*"]
    assert "GPL-3.0-only is not among the allowed" in lines[0]
    assert "is needed by an extra other than dev" in lines[3]


def test_the_lock_is_read_and_the_rules_are_complete() -> None:
    names = LICENSES.locked((ROOT / "constraints.txt").read_text())
    rules = LICENSES.settings()
    assert {"torch", "fastapi", "nvidia-nccl-cu13"} <= set(names)
    assert set(rules["stated"]) <= set(names)
    assert all({"states", "why"} <= set(rule) for rule in rules["exceptions"].values())
    assert "pytest" not in LICENSES.needed_by_users()
    assert {"torch", "lancedb", "fastapi"} <= LICENSES.needed_by_users()


def test_a_bill_of_materials_is_checked(tmp_path: Path) -> None:
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "metadata": {"component": {"name": "search-r3", "version": "0.1"}},
        "components": [{"name": "torch", "version": "2.13.0", "licenses": [{}]}, {"name": "pip", "version": "26"}],
    }
    assert SBOM.summary(json.loads(json.dumps(bill))) == "CycloneDX 1.6: 2 components, 1 of them state no license"
    with pytest.raises(ValueError, match="without a version: torch"):
        SBOM.summary(bill | {"components": [{"name": "torch"}]})
    with pytest.raises(ValueError, match="not a CycloneDX bill"):
        SBOM.summary({"spdxVersion": "SPDX-2.3"})
