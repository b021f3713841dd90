"""The documentation: what is written from the code has not drifted, links lead somewhere, and commands can be typed."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from search_r3.cli import commands

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
README_BYTES = 9000
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
WRITTEN_BY_HAND = [name for name in NAMES if name != "LOG.md"]
"""LOG.md tells of files and options as they were then."""


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / ".ci" / "reference.py")
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


REFERENCE = load_reference()


@dataclass
class Box:
    """A configuration without a word about its field."""

    size: int = 1


@dataclass
class Named(Box):
    """One that explains a field of its own."""

    name: str = "box"
    """What it is called."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", read(name))


def anchors(name: str) -> set[str]:
    """The anchors of a page's headings; GitHub numbers those that come again."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", prose(name), re.M):
        anchor = REFERENCE.slug(re.sub(r"\]\([^)]*\)", "", heading))
        found[anchor] = found.get(anchor, -1) + 1
    return {f"{anchor}-{again}" if again else anchor for anchor, most in found.items() for again in range(most + 1)}


@pytest.mark.parametrize("name", REFERENCE.PAGES)
def test_a_page_that_is_written_from_the_code_says_what_the_code_says(name: str) -> None:
    assert read(name) == REFERENCE.PAGES[name](), "run: make docs"


def test_a_field_without_a_docstring_stops_the_page() -> None:
    with pytest.raises(SystemExit, match=r"error: Box\.size has no docstring"):
        list(REFERENCE.field_rows(Box, {}))


def test_a_types_words_and_a_default_as_yaml_writes_it() -> None:
    assert REFERENCE.described(list[int] | None, {}) == "list of whole numbers or null"
    assert REFERENCE.described(list[Named], {Named: "A box"}) == "list of [A box](#a-box)"
    assert [REFERENCE.shown_in_yaml(value) for value in (None, True, ("a", 1), 2e-5)] == [
        "`null`", "`true`", "`[a, 1]`", "`2e-05`",
    ]  # fmt: skip
    assert REFERENCE.shown_in_yaml(Named(size=3)) == "`size: 3`"


def test_the_readme_is_short() -> None:
    assert len(read("README.md").encode()) <= README_BYTES


def test_every_page_is_in_the_index() -> None:
    linked = set(LINK.findall(read("docs/README.md")))
    docs = ROOT / "docs"
    assert {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} - {"README.md"} <= linked


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings_that_are_there(name: str) -> None:
    for link in LINK.findall(prose(name)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
def test_paths_that_are_named_are_there(name: str) -> None:
    named = re.findall(r"`((?:search_r3|tests|benchmarks|configs|docs|examples|\.ci)/[\w./-]+)`", prose(name))
    assert [path for path in named if not (ROOT / path.rstrip(".")).exists() and "..." not in path] == []


def test_every_variable_of_ours_is_explained() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "search_r3").rglob("*.py"))
    named = set(re.findall(r"SEARCH_R3_[A-Z_]+", text))
    assert named
    assert sorted(name for name in named if f"`{name}`" not in read("docs/install.md")) == []


def shown_commands() -> list[tuple[str, str]]:
    """(page, line) of every command of ours in a block of shell, continued lines put together."""
    return [
        (name, line.strip())
        for name in WRITTEN_BY_HAND
        for language, block in FENCE.findall(read(name))
        if language == "sh"
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip().startswith("search-r3 ")
    ]


@pytest.mark.parametrize(("name", "line"), shown_commands())
def test_only_commands_and_options_that_exist_are_shown(name: str, line: str) -> None:
    words = shlex.split(line.split("|")[0], comments=True)[1:]
    command: Any = typer.main.get_command(commands.app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    known = {"--help", *(option for one in command.params for option in (*one.opts, *one.secondary_opts))}
    known |= {"--no-reasoning"} & {option.replace("--", "--no-") for option in known}
    options = words[: words.index("--")] if "--" in words else words
    assert not hasattr(command, "commands"), "no such command"
    assert {word.partition("=")[0] for word in options if re.match(r"--?[a-z]", word)} <= known
