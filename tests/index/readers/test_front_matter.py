"""The front matter of Markdown becomes metadata, and leaves the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_r3.index import open_source
from search_r3.index.readers.text_readers import front_matter
from search_r3.index.source_document import SourceDocument


def read(folder: Path, text: str) -> SourceDocument:
    (folder / "a.md").write_text(text, encoding="utf-8", newline="")
    (document,) = open_source(folder)
    return document


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_fields_are_text_as_written_and_lines_stay_those_of_the_file(tmp_path: Path, end: str):
    text = "---\ntitle: Bees\nyear: 007\ndraft: yes\ntags: [hive, sm\u00f6r]\nempty:\n---\n# Spring\n\ntext\n"
    document = read(tmp_path, text.replace("\n", end))
    assert document.metadata == {"year": "007", "draft": "yes", "tags": '["hive", "sm\u00f6r"]'}
    assert document.title == "Bees"
    assert (document.line, document.text.splitlines()[0]) == (8, "# Spring")


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n\n---\nnot: front\n---\n",
        "---\na rule, then text\n\n---\nmore",
        "---\nnever: ended\n",
        "---\na: [unclosed\n---\ntext",
        "---\na: &a [x, x]\nb: [*a, *a]\n---\ntext",
        "---\n- a\n- list\n---\ntext",
        "",
    ],
)
def test_what_is_no_front_matter_stays_text(text: str):
    assert front_matter(text) == ({}, 0)


def test_a_file_of_front_matter_alone_keeps_it_as_text(tmp_path: Path):
    document = read(tmp_path, "---\nkind: stub\n---\n")
    assert (document.metadata, document.line) == ({}, 1)
    assert "stub" in document.text


def test_fields_that_share_a_column_are_one(tmp_path: Path):
    assert front_matter("---\nTag: a\ntag: b\n---\n")[0] == {"Tag": "a"}
