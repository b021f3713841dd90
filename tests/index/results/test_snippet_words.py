"""Snippets show text without markup, and words are found in any spelling and in scripts without spaces."""

from __future__ import annotations

import pytest

from search_r3.index.results.markup import kept_characters, markup_of, repeats_title
from search_r3.index.results.snippets import make_snippet
from search_r3.index.results.word_marks import comparable


def plain(text: str, markup: str = "markdown") -> str:
    return "".join(text[position] for position in kept_characters(text, markup))


@pytest.mark.parametrize(
    ("one", "other"),
    [("licence", "license"), ("licensing", "licences"), ("colour", "colors"), ("organisation", "organization"),
     ("centre", "centers"), ("labelled", "label"), ("calling", "call"), ("catalogue", "catalogs"),
     ("defence", "defense"), ("Indexing", "indexed")],
)  # fmt: skip
def test_spellings_of_a_word_are_the_same(one: str, other: str) -> None:
    assert comparable(one) == comparable(other)


@pytest.mark.parametrize(("one", "other"), [("rise", "rice"), ("four", "for"), ("hour", "hor"), ("use", "us")])
def test_other_words_stay_apart(one: str, other: str) -> None:
    assert comparable(one) != comparable(other)


def test_markup_of_a_snippet_is_left_out() -> None:
    text = "## Setup\n\nRun **the `make`** command ([docs](https://x.example/a_(b))).\n\n---\n> quoted"
    assert plain(text).startswith("Setup\nRun the make command (docs")
    assert plain("| a | b |\n|---|:--|\n| 1 | 2 |") == "a | b\n1 | 2"
    assert plain("</details>\n<b>bold</b> 3 < 4").strip() == "bold 3 < 4"
    assert plain("2 * 3 ** 4 and __init__ and *args") == "2 * 3 ** 4 and __init__ and args"
    assert plain("Title\n=====\n\n``code`` of :func:`name`", "rst") == "Title\ncode of name"
    assert plain("a\n-----\nb", "text") == "a\nb"
    assert plain("# a comment **kwargs", "none") == "# a comment **kwargs"


def test_only_files_of_a_kind_with_markup_are_changed() -> None:
    assert [markup_of(path) for path in ("a/b.md", "x.rst", "notes.txt", "README", "main.py", "")] == [
        "markdown", "rst", "text", "text", "none", "none",
    ]  # fmt: skip


def test_a_heading_that_the_title_has_already_does_not_begin_the_snippet() -> None:
    text = "## License\n\nIt is under **Apache** 2.0."
    assert repeats_title("## License\n", "README > License")
    snippet = make_snippet(text, "which licence", title="README > License", markup="markdown")
    assert snippet.text == "It is under Apache 2.0."
    assert text[snippet.offset : snippet.end] == "It is under **Apache** 2.0."
    assert make_snippet(text, "which licence", title="Other", markup="markdown").highlights == [(0, 7)]


def test_highlights_stand_where_the_words_are_without_markup() -> None:
    text = "Use **the `index`** of [indexing](https://x.example) here."
    snippet = make_snippet(text, "index", markup="markdown")
    assert snippet.text == "Use the index of indexing here."
    assert [snippet.text[start:end] for start, end in snippet.highlights] == ["index", "indexing"]


def test_words_without_spaces_are_marked_whole_and_particles_not_at_all() -> None:
    text = "検索エンジンの使い方を説明します。作成するには、フォルダを指定してください。"
    snippet = make_snippet(text, "検索エンジンを使うには")
    assert [snippet.text[start:end] for start, end in snippet.highlights] == ["検索エンジン"]
    snippet = make_snippet("データベース設計", "データとベース")  # the pair in the middle is missing
    assert [snippet.text[start:end] for start, end in snippet.highlights] == ["データベース"]
    assert make_snippet("するには", "するには").highlights == [(0, 4)]


@pytest.mark.parametrize("text", ["", "---", "## Only a heading", "</details>", "```", "\n\n"])
def test_a_text_of_markup_only_has_a_snippet(text: str) -> None:
    snippet = make_snippet(text, "anything", title="Only a heading", markup="markdown")
    assert snippet.text in text.replace("## ", "")
