"""A search result on a terminal: labeled scores, wrapped and indented lines, and links to the files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from search_r3.index import SearchIndex, build_index
from search_r3.index.index_sources import SourceRecord, find_file
from search_r3.index.readers.path_source import open_source
from search_r3.index.results.explanation import EqualPassage, Explanation, HitExplanation
from search_r3.index.results.terminal_page import print_result
from search_r3.index.run_search import Hit, SearchResult, Timings

TEXT = "Bread needs flour, water and yeast, and time enough for the dough to rise in a warm place overnight."


def hit(**changed) -> Hit:
    fields = {
        "id": "bread.md#1", "document": "bread.md", "title": "Baking", "text": TEXT, "snippet": TEXT,
        "highlights": [(0, 5)], "snippet_line": 3, "score": 0.5, "metadata": {}, "path": "bread.md", "start_line": 1,
        "end_line": 4, "ranks": {"vector": 1, "text": 2}, "scores": {"vector": 0.742, "text": 5.83},
    }  # fmt: skip
    return Hit(**(fields | changed))


def printed(
    *hits: Hit, terminal: bool = False, width: int = 60, explanation: Explanation | None = None,
    normalized: str | None = None, **options,
) -> str:  # fmt: skip
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=width, color_system="standard" if terminal else None)
    timings = Timings(12.3, 4.5)
    result = SearchResult("bread", "hybrid", list(hits), None, timings, [], explanation, normalized)
    print_result(result, console, **options)
    return output.getvalue()


def test_scores_are_labeled_and_a_hit_that_one_list_lacks_has_only_the_other():
    assert "1. Baking  bread.md:3  cosine 0.74, words 5.8\n" in printed(hit(), width=100)
    assert "1. Baking  bread.md:3  words 5.8\n" in printed(hit(scores={"text": 5.83}), width=100)
    assert printed(hit()).endswith("model 12 ms, search 4 ms\n")


def test_a_corrected_query_is_shown_but_not_one_of_another_case():
    assert printed(hit(), normalized="breads").startswith("searched by meaning as: breads\n\n1. Baking")
    assert "\x1b[31m" not in printed(hit(), normalized="brea\x1b[31mds")
    assert printed(hit(), normalized="Bread").startswith("1. Baking")


def test_a_title_that_is_the_path_is_printed_once():
    page = printed(hit(title="bread.md"), width=100)
    assert "1. bread.md:3  cosine" in page
    assert page.count("bread.md") == 1


def test_a_terminal_gets_wrapped_and_indented_lines_and_a_pipe_whole_ones():
    assert f"   {TEXT}\n" in printed(hit())
    lines = printed(hit(highlights=[]), terminal=True).splitlines()
    wrapped = [line for line in lines if "dough" in line or "Bread" in line]
    assert len(wrapped) == 2
    assert all(line.startswith("   ") and not line.startswith("    ") for line in wrapped)
    assert max(map(len, wrapped)) <= 60


def test_a_file_is_a_link_on_a_terminal_only(tmp_path: Path):
    file = tmp_path / "bread and butter.md"
    page = printed(hit(), terminal=True, find_file=lambda path: file)
    assert f";{file.as_uri()}\x1b\\" in page
    assert "\x1b" not in printed(hit(), find_file=lambda path: file)


def test_control_characters_of_a_document_do_not_reach_the_terminal():
    page = printed(hit(title="a\x1b[31mb", snippet="c\x07d", highlights=[]), width=100)
    assert "\x1b" not in page
    assert "\x07" not in page


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_file_of_a_path_is_found_where_its_source_was_read(tmp_path: Path, kind: str):
    (tmp_path / "notes").mkdir()
    file = tmp_path / "notes" / "bread.md"
    file.write_text(TEXT)
    root = file.parent if kind == "folder" else file
    source = SourceRecord("any", kind, str(root), prefix="old/")
    assert find_file("old/bread.md", [source]) == file
    assert find_file("old/gone.md", [source]) is None
    assert find_file("bread.md", [source]) is None
    assert find_file("old/bread.md", [SourceRecord("any", "jsonl", str(file))]) is None


def test_an_index_finds_the_files_of_all_its_folders(tmp_path: Path, model):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "bread.md").write_text(TEXT)
        build_index(tmp_path / "an.index", open_source(tmp_path / folder), model, progress=False)
    index = SearchIndex.open(tmp_path / "an.index")
    assert index.find_file("bread.md") == tmp_path / "one" / "bread.md"
    assert index.find_file("two/bread.md") == tmp_path / "two" / "bread.md"


def test_weak_hits_missing_words_and_equal_passages_are_said():
    same = [EqualPassage(f"{name}#1", name, f"{name}.md", 1) for name in "vwxyz"]
    about = [HitExplanation([], [], (0, 5), True, same), HitExplanation([], [], (0, 5), True, same[:1])]
    explanation = Explanation(about, 0.6, ["zxqv"])
    page = printed(hit(), hit(), width=100, explanation=explanation)
    assert page.startswith("nothing here matches well\nin no document: zxqv\n\n1. Baking")
    assert "words 5.8  weak\n" in page
    assert "   +5 documents with the same text: v.md, w.md, x.md, y.md, ...\n" in page
    assert "   +1 document with the same text: v.md\n" in page


def test_a_hit_of_a_file_with_pages_has_its_page():
    found = hit(path="report.pdf", title="Baking", snippet_line=0, metadata={"page": 12})
    assert "Baking  report.pdf, page 12  cosine" in printed(found)
