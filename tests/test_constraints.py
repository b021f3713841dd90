"""`constraints.txt` pins everything that `make` installs, and nothing else decides what that is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(one.name): one for one in map(Requirement, LINES)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = [{"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.5"} for minor in (11, 12, 13)]


def version(name: str) -> str:
    """What a package is pinned to."""
    (one,) = PINS[canonicalize_name(name)].specifier
    return one.version


def asked_for(extras: tuple[str, ...] = ("dev",)) -> Iterator[Requirement]:
    """Our own requirements: the core's, those of `extras` and of the extras that these name, and the build's."""
    project = PROJECT["project"]
    seen, waiting = set(), list(extras)
    yield from map(Requirement, [*project["dependencies"], *PROJECT["build-system"]["requires"]])
    while waiting:
        if (extra := waiting.pop()) in seen:
            continue
        seen.add(extra)
        for one in map(Requirement, project["optional-dependencies"][extra]):
            if one.name == "search-r3":
                waiting.extend(one.extras)
            else:
                yield one


def reached() -> Iterator[tuple[str, Requirement]]:
    """Who needs what, from our requirements on, as far as what is installed here has the pinned version.

    In the environments of `make test-latest` and `test-lowest` some have another, whose requirements are others.
    """
    waiting, seen = [("search-r3", one) for one in asked_for()], set()
    while waiting:
        by, one = waiting.pop()
        if (key := (by, str(one))) in seen:
            continue
        seen.add(key)
        yield by, one
        try:
            found = importlib.metadata.distribution(one.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if canonicalize_name(one.name) not in PINS or found.version.partition("+")[0] != version(one.name):
            continue
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in one.extras or {""}):
                waiting.append((one.name, needed))


def test_every_requirement_is_pinned_within_its_range() -> None:
    wrong = [
        f"{by} needs {one}"
        for by, one in reached()
        if canonicalize_name(one.name) not in PINS or not one.specifier.contains(version(one.name))
    ]
    assert wrong == []
    assert len({name for name, _ in reached()}) > 60


def test_a_line_is_one_exact_version_on_every_python() -> None:
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+(\[[a-z,]+\])?==[0-9][\w.]*( ; .+)?", line), line
    assert len(PINS) == len(LINES)  # no package twice, with one version here and another there
    assert list(PINS) == sorted(PINS)
    for one in asked_for():  # what we ask for ourselves is there on every Python
        for python in PYTHONS:
            marker = PINS[canonicalize_name(one.name)].marker
            wanted = one.marker is None or one.marker.evaluate({**python, "sys_platform": "linux"})
            assert not wanted or marker is None or marker.evaluate({**python, "sys_platform": "linux"}), (one, python)


def test_no_host_no_path_and_no_hash_is_named() -> None:
    text = (ROOT / "constraints.txt").read_text()
    for word in ("://", "--hash", "\n--", "\n-", "@", "file:", str(ROOT)):
        assert word not in text, word


def test_known_bad_versions_are_out_of_range() -> None:
    ranges = {one.name: one.specifier for one in asked_for(())}
    assert not ranges["transformers"].contains("5.24.0")  # asks for PEFT 0.22, and the newest is 0.21.2
    assert ranges["transformers"].contains("5.23.0")
    assert ranges["transformers"].contains("5.25.0")


@pytest.fixture
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("constraints", ROOT / ".ci" / "constraints.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_differences_are_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.read((ROOT / "constraints.txt").read_text()) == {name: version(name) for name in PINS}
    assert script.differences({"a": "1", "b": "2", "c": "3"}, {"b": "2", "c": "4", "d": "1"}) == [
        f"  {'a':32} {'1':16} -> -",
        f"  {'c':32} {'3':16} -> 4",
        f"  {'d':32} {'-':16} -> 1",
    ]
    monkeypatch.setattr(script, "installed", lambda: {name: version(name) for name in PINS if name != "pywin32"})
    script.compare()
    assert capsys.readouterr().out == "installed as in constraints.txt\n"
    monkeypatch.setattr(script, "installed", lambda: {"torch": "9.0", "numpy": version("numpy")})
    script.compare()
    assert capsys.readouterr().out.splitlines()[1:] == [f"  {'torch':32} {version('torch'):16} -> 9.0"]


def test_the_makefile_takes_them_for_what_it_installs_and_builds_with() -> None:
    text = (ROOT / "Makefile").read_text()
    recipe = text[text.index("$(STAMP): pyproject.toml") :]
    assert "PIP_CONSTRAINT='$(CONSTRAINTS)' PIP_BUILD_CONSTRAINT='$(CONSTRAINTS)'" in text
    assert "$(CONSTRAINTS)" in recipe.splitlines()[0]  # a new file is installed
    assert [line for line in recipe.splitlines() if "$(INSTALL)" in line and "$(LOCKED)" not in line] == []


def test_the_index_that_torch_args_names_serves_torch_alone_in_its_exact_version() -> None:
    """Such an index need not have the exact versions of what torch needs, so these come from the default one."""
    text = (ROOT / "Makefile").read_text()
    assert re.findall(r".*\$\(TORCH_ARGS\)", text) == ["TORCH         := $(INSTALL) --no-deps $(TORCH_ARGS)"]
    used = [line for line in text.splitlines() if "$(TORCH)" in line]
    assert len(used) == 5
    for line in used:
        assert "torch==$(TORCH_VERSION)" in line or "$(LATEST_TORCH)" in line
        assert "$(LOCKED)" not in line


def test_make_update_writes_the_header_that_stands_there(script: ModuleType) -> None:
    assert (ROOT / "constraints.txt").read_text().startswith(script.HEADER)
