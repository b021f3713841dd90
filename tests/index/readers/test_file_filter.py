"""Which files of a folder are read: `.gitignore`, include, exclude."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes import run

from search_r3.errors import InputError
from search_r3.index import open_source
from search_r3.index.readers.path_source import would_read


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("some text")
    return root


def names(root: Path, **options: list[str]) -> list[str]:
    return sorted(document.id for document in open_source(root, **options))


def test_files_that_gitignore_names_are_left_out_and_reported(tmp_path: Path):
    root = made(tmp_path, "a.md", "b.log.md", "build/c.md", "sub/build.md", "sub/keep.log.md", "sub/d.tmp.md")
    (root / ".gitignore").write_text("# made\n*.log.md\n/build/\n")
    (root / "sub" / ".gitignore").write_text("!keep.log.md\n*.tmp.md\n")
    source = open_source(root)
    assert [document.id for document in source] == ["a.md", "sub/build.md", "sub/keep.log.md"]
    assert {one.path for one in source.skipped if one.reason == "left out by .gitignore"} == {
        "b.log.md", "build", "sub/d.tmp.md"
    }  # fmt: skip
    assert source.measure().count == 3
    assert not would_read(root, root / "build" / "c.md", folder=False)
    assert would_read(root, root / "sub" / "keep.log.md", folder=False)


def test_gitignore_files_above_count_within_a_repository(tmp_path: Path):
    root = made(tmp_path, "docs/a.md", "docs/b.md", "docs/c.md") / "docs"
    (tmp_path / ".gitignore").write_text("docs/b.md\n")
    assert names(root) == ["a.md", "b.md", "c.md"]
    (tmp_path / ".git" / "info").mkdir(parents=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("c.md\n")
    assert names(root) == ["a.md"]


def test_a_changed_gitignore_counts_from_the_next_run_on(tmp_path: Path):
    made(tmp_path, "a.md", "b.md")
    source = open_source(tmp_path)
    assert len(list(source)) == 2
    (tmp_path / ".gitignore").write_text("b.md\n")
    assert len(list(source)) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ["*.md"]}, ["a.md", "docs/b.md", "docs/old/c.md"]),
        ({"include": ["docs/"]}, ["docs/b.md", "docs/old/c.md", "docs/x.py"]),
        ({"exclude": ["docs/old/"]}, ["a.md", "docs/b.md", "docs/x.py"]),
        ({"include": ["*.md", "*.py"], "exclude": ["old", "a.*"]}, ["docs/b.md", "docs/x.py"]),
    ],
)
def test_include_and_exclude_take_patterns_as_gitignore(tmp_path: Path, options: dict, expected: list[str]):
    assert names(made(tmp_path, "a.md", "docs/b.md", "docs/old/c.md", "docs/x.py"), **options) == expected


def test_patterns_are_refused_for_a_file_and_where_they_are_wrong(tmp_path: Path):
    made(tmp_path, "a.md")
    with pytest.raises(InputError, match="chooses files of a folder"):
        open_source(tmp_path / "a.md", exclude=["*.md"])
    with pytest.raises(InputError, match=r"--include !: .*as in \.gitignore"):
        open_source(tmp_path, include=["!"])


TREE = (
    "a.md", "b.py", "deep/a/b/c.md", "docs/a.md", "docs/b.py", "docs/docs/c.py", "docs/old/b.py", "docs/old/docs/d.py",
    "src/a.md", "src/b.py", "src/docs/a.py", "data/x.txt", "data/keep.txt", "data/more/keep.txt", "build/build.txt",
)  # fmt: skip


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git")
@pytest.mark.parametrize(
    "patterns",
    [
        ["*", "!*.py", "!docs/"],
        ["*", "!*.py", "!docs/", "docs/old/"],
        ["*", "!*/", "!*.py"],
        ["*/", "!docs/"],
        ["**/", "!/docs/"],
        ["/*", "!/docs", "/docs/*", "!/docs/docs/"],
        ["data/**", "!data/keep.txt"],
        ["data/*", "!data/keep.txt"],
        ["data/", "!data/keep.txt"],
        ["**/docs/**", "!docs/docs/"],
        ["**/docs", "!docs"],
        ["docs/**/docs/"],
        ["deep/**/c.md", "!c.md", "/a.md"],
        ["old", "build", "!build/build.txt"],
        ["[ab].*", "!docs/[!a].py"],
        ["# a comment", "", r"\!a.md", "a.md "],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("given", ["option", "file"])
def test_patterns_mean_what_git_says(tmp_path: Path, patterns: list[str], given: str):
    root = made(tmp_path / "tree", *TREE)
    run(["git", "init", "-q", root])
    (root / ".gitignore").write_text("\n".join(patterns))
    asked = ["git", "-C", root, "-c", "core.excludesFile=", "check-ignore", "--no-index", *TREE]
    ignored = run(asked, check=False).stdout.splitlines()
    if given == "option":
        (root / ".gitignore").unlink()
    chosen = {"exclude": patterns} if given == "option" else {}
    assert sorted(set(TREE) - set(ignored)) == ([*names(root, **chosen)] if len(ignored) < len(TREE) else [])
