"""What outsiders rely on: one version, types for users, and files of the repository that name only what there is."""

from __future__ import annotations

import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from processes import run

import search_r3

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAPER = "2510.07048"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "search_r3.__version__"}
    assert re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', read("search_r3/__init__.py"), re.M) == [
        search_r3.__version__
    ]
    assert "version" not in yaml.safe_load(read("CITATION.cff"))


def test_a_checkout_that_is_not_installed_knows_its_version() -> None:
    """Without site-packages there is no metadata of an installed package, and nothing that we require."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import search_r3; print(search_r3.__version__)"
    assert run([sys.executable, "-S", "-c", code]).stdout.strip() == search_r3.__version__


def test_users_get_our_types() -> None:
    assert (ROOT / "search_r3" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_the_default_adapter_is_package_data() -> None:
    (pattern,) = PROJECT["tool"]["setuptools"]["package-data"]["search_r3"]
    files = {path.name for path in (ROOT / "search_r3").glob(pattern)}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "search_r3.json", "golden.safetensors"}


def test_every_python_that_is_allowed_is_named_and_tested() -> None:
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    minors = [f"3.{minor}" for minor in range(30) if allowed.contains(f"3.{minor}.0")]
    named = [one.rpartition(" ")[2] for one in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", one)]
    assert named == minors
    checks = yaml.safe_load(read(".github/workflows/checks.yml"))
    assert checks["jobs"]["tests"]["strategy"]["matrix"]["python-version"] == minors


def made_targets(text: str) -> set[str]:
    """The targets in what stands as code: `make NAME`, and lines of a block or workflow that begin so."""
    return set(re.findall(r"(?:`|^\s*(?:- run: )?)make ([a-z][a-z-]*)", text, re.M))


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".github/pull_request_template.md", ".ci/run"]
    + [path.relative_to(ROOT).as_posix() for path in WORKFLOWS],
)
def test_every_target_that_is_named_is_one_of_the_makefile(page: str) -> None:
    phony = re.search(r"^\.PHONY: (.+)$", read("Makefile"), re.M)
    assert phony
    named = made_targets(read(page))
    assert named
    assert sorted(named - set(phony[1].split())) == []


def test_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", read("Makefile"), re.M)
    assert phony
    listed = set(re.findall(r'^\t@echo "make ([a-z-]+)', read("Makefile"), re.M))
    assert listed == set(phony[1].split()) - {"help"}


@pytest.mark.parametrize("name", ["FAST_TESTS", "LOWEST_TESTS"])
def test_a_list_of_tests_names_only_what_there_is(name: str) -> None:
    listed = re.search(rf"^{name} *:= ((?:.*\\\n)*.*)$", read("Makefile"), re.M)
    assert listed
    names = listed[1].replace("\\\n", " ").split()
    assert names
    assert [one for one in names if not (ROOT / one).exists()] == []


def test_workflows_only_set_up_and_call_the_makefile() -> None:
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            ran = [step["run"] for step in job["steps"] if "run" in step]
            assert ran
            assert all(one.startswith("make ") for one in ran), (path.name, ran)


def test_the_paper_is_cited_the_same_everywhere() -> None:
    cited = yaml.safe_load(read("CITATION.cff"))
    (paper,) = cited["references"]
    assert cited["license"] == PROJECT["project"]["license"]
    assert paper["url"] == PROJECT["project"]["urls"]["Paper"]
    assert paper["url"].endswith(PAPER)
    assert f"title   = {{{paper['title']}}}" in read("README.md")
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in read("README.md")


def test_the_changelog_has_what_is_to_come_and_only_versions_with_a_date() -> None:
    first, *released = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.M)
    assert first == "[Unreleased]"
    assert [one for one in released if not re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", one)] == []


def test_hooks_are_programs_of_the_environment_or_pinned() -> None:
    for repository in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]:
        if repository["repo"] != "local":
            assert re.fullmatch(r"v?\d+(\.\d+)+", repository["rev"]), repository["repo"]
            continue
        for hook in repository["hooks"]:
            assert hook["language"] == "system", hook["id"]
            assert hook["entry"].startswith(".venv/bin/"), hook["id"]


def test_files_that_contributing_names_are_there() -> None:
    text = read("CONTRIBUTING.md")
    named = set(re.findall(r"\]\(([\w./-]+)\)", text)) | set(re.findall(r"`((?:search_r3|tests|docs)/[\w./-]+)`", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_pytest_enters_every_folder_with_tests() -> None:
    left_out = PROJECT["tool"]["pytest"]["ini_options"]["norecursedirs"]  # without it, "build" is among them
    folders = {folder.name for path in (ROOT / "tests").rglob("test_*.py") for folder in path.relative_to(ROOT).parents}
    assert [name for name in folders if any(fnmatch(name, pattern) for pattern in left_out)] == []
