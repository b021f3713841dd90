"""A document of an index, put together from its chunks: whole, by lines, by a passage's id, cut to a length."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_r3 import InputError, SearchR3
from search_r3.index import SourceDocument, build_index, open_source
from search_r3.index.search_index import SearchIndex

SECTION = "The train number {n} leaves at nine from platform {n}, and it arrives after noon.\n" * 12


@pytest.fixture(scope="module")
def text() -> str:
    return "".join(f"# Part {n}\n\n{SECTION.format(n=n)}\n" for n in range(12))


@pytest.fixture(scope="module")
def opened(tiny: SearchR3, text: str, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "notes").mkdir()
    (folder / "notes/long.md").write_text(text, encoding="utf-8")
    (folder / "notes/short.md").write_text("Only this.\n", encoding="utf-8")
    build_index(folder / "index", open_source(folder / "notes"), tiny, progress=False)
    return SearchIndex.open(folder / "index")


def squeezed(text: str) -> list[str]:
    """The lines that are not empty, without marks of headings, which become titles."""
    return [line.strip("# ") for line in text.split("\n") if line.strip("# ")]


def test_a_document_is_put_together_in_its_order(opened: SearchIndex, text: str) -> None:
    document = opened.document("long.md")
    assert document.passages > 12
    assert squeezed(document.text) == squeezed(text)
    lines = text.split("\n")
    for offset, line in enumerate(document.text.split("\n")):
        if line.strip("# "):
            assert lines[document.start_line + offset - 1].strip("# ") == line.strip("# ")
    assert (document.path, document.truncated, document.next_line) == ("long.md", False, 0)
    assert opened.document("short.md").text == "Only this."


def test_lines_are_those_of_the_file(opened: SearchIndex, text: str) -> None:
    some = opened.document("long.md", 20, 30)
    assert (some.start_line, some.end_line) == (20, 30)
    assert some.text.split("\n") == text.split("\n")[19:30]
    assert opened.document("long.md", 20).end_line == opened.document("long.md").end_line
    with pytest.raises(InputError, match="lines 5 to 4 are no range"):
        opened.document("long.md", 5, 4)
    with pytest.raises(InputError, match="the document has the lines 1 to"):
        opened.document("long.md", 5000)


def test_a_passages_id_gives_the_passage_or_its_documents_lines(opened: SearchIndex) -> None:
    passage = opened.document("long.md#3")
    assert passage.passages == 1
    assert passage.id == "long.md"
    assert passage.text in opened.document("long.md").text
    assert opened.document("long.md#3", 1, 4).text == opened.document("long.md", 1, 4).text
    for unknown in ("nothing", "long.md#999", "long.md#0"):
        with pytest.raises(InputError, match="take an id from a search"):
            opened.document(unknown)


def test_what_is_left_out_can_be_asked_for(opened: SearchIndex) -> None:
    whole = opened.document("long.md").text
    parts, line = [], 1
    while line:
        part = opened.document("long.md", line, max_characters=2000)
        assert len(part.text) <= 2000
        parts.append(part.text)
        assert part.truncated == bool(part.next_line)
        line = part.next_line
    assert squeezed("\n".join(parts)) == squeezed(whole)
    cut = opened.document("short.md", max_characters=4)
    assert (cut.text, cut.truncated, cut.next_line) == ("Only", True, 0)


def test_records_have_no_lines(tiny: SearchR3, tmp_path: Path) -> None:
    sentences = [f"Sentence {n} is about trains and when they leave." for n in range(150)]
    build_index(tmp_path / "index", [SourceDocument("a#1", "T", " ".join(sentences), {"n": 1}, line=0)], tiny)
    opened = SearchIndex.open(tmp_path / "index")
    document = opened.document("a#1")
    assert document.passages > 2
    assert document.text.split() == " ".join(sentences).split()
    assert (document.start_line, document.end_line, document.metadata) == (0, 0, {"n": 1})
    with pytest.raises(InputError, match="lines are not those of a file"):
        opened.document("a#1", 1, 2)
