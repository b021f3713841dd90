"""Chunks follow the structure of their document and lose none of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.index.chunking.chunker import chunk_document, size
from search_r3.index.results.query_words import composed
from search_r3.index.source_document import Heading, Page, SourceDocument

KINDS = ["record", "markdown", "rst", "python", "code", "text"]


def chunks(text, kind, target=20, limit=40):
    document = SourceDocument("doc", "doc.md", text, {"year": 1}, "doc.md", 1, kind)
    return chunk_document(document, target_words=target, max_words=limit)


def without_space(text):
    return "".join(text.split())


CODE_LINES = ["def f(x):", "    return x", "class C:", "    def m(self): pass", "@wrap", "async def g(): ...", "if x:"]
MARKS = ["# A", "## B ##", "===", "---", "```", "~~~", "# note", "Title", "=====", "| a | b |", "- item", "\t", "'''"]
WORDS = [
    "a line of words here.",
    "",
    "  ",
    "x = 1",
    "東京は大きい。人口も多い。",
    "word " * 50,
    "x" * 500,
    "\x0c",
    "a\u2028b",
]
FRAGMENTS = st.sampled_from(CODE_LINES + MARKS + WORDS)


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=30), max_size=40), st.sampled_from(KINDS), st.sampled_from(["\n", "\r\n"]))
def test_no_text_is_lost_whatever_the_document(fragments, kind, newline):
    text = newline.join(fragments)
    found = chunks(text, kind)
    assert without_space("".join(chunk.text for chunk in found)) == without_space(composed(text))
    assert len({chunk.id for chunk in found}) == len(found)
    assert [chunk.id for chunk in found] == [chunk.id for chunk in chunks(text, kind)]


@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS, max_size=40), st.sampled_from(["markdown", "rst", "python", "code", "text"]))
def test_lines_are_those_of_the_file_and_sizes_keep_the_limit(fragments, kind):
    text = "\n".join(fragments)
    lines = text.split("\n")
    for chunk in chunks(text, kind):
        assert size(chunk.text) <= 40 + 1
        if not chunk.text:
            continue
        first, *_, last = [*chunk.text.split("\n"), chunk.text.split("\n")[-1]]
        assert first.strip() in lines[chunk.start_line - 1]
        assert last.strip() in lines[chunk.end_line - 1]


def test_markdown_headings_become_the_title_path():
    words = "word " * 15
    text = f"intro {words}\n\n# Guide\n{words}\n## Install\n{words}\n```\n# not a heading\n```\n"
    text += f"## Use\n{words}\n\nTop\n===\n{words}"
    found = chunks(text, "markdown")
    assert [chunk.title for chunk in found] == ["doc.md", "Guide", "Guide > Install", "Guide > Use", "Top"]
    assert "# not a heading" in found[2].text
    assert (found[1].start_line, found[1].end_line) == (3, 4)
    assert [chunk.id for chunk in found] == [f"doc#{n}" for n in range(1, 6)]
    assert found[0].metadata == {"year": 1}


def test_rst_ranks_underlines_by_their_first_use():
    words = "word " * 15
    text = f"====\nBook\n====\n{words}\n\nPart\n----\n{words}\n\nDetail\n~~~~~~\n{words}\n\n"
    text += f"Other part\n----------\n{words}"
    assert [c.title for c in chunks(text, "rst")] == [
        "Book",
        "Book > Part",
        "Book > Part > Detail",
        "Book > Other part",
    ]


def test_python_is_cut_at_functions_and_methods():
    body = "\n".join(f"        value_{i} = compute(value_{i - 1})" for i in range(1, 8))
    text = f'"""Module words."""\nimport os\n\n# why\n@wrap\ndef f():\n{body}\n\n\nclass C:\n    x = 1\n\n'
    text += f"    def a(self):\n{body}\n\n    async def b(self):\n{body}\n\n\n"
    text += f"CONSTANT = {list(range(20))}\n"
    found = chunks(text, "python")
    titles = [chunk.title for chunk in found]
    assert titles[:5] == ["doc.md", "doc.md f", "doc.md C", "doc.md C.a", "doc.md C.b"]
    assert found[1].text.startswith("# why\n@wrap\ndef f")
    assert found[-1].title == "doc.md"
    assert found[-1].text.startswith("CONSTANT")


def test_python_that_does_not_parse_is_cut_like_other_code():
    text = "\n\n".join(f"def broken_{i}(: {'word ' * 12}" for i in range(4))
    assert [chunk.start_line for chunk in chunks(text, "python")] == [1, 3, 5, 7]


def test_small_documents_stay_whole_under_their_own_id():
    (chunk,) = chunks("# A\n\nb\n\n# C\n\nd\n", "markdown")
    assert (chunk.id, chunk.title, chunk.start_line, chunk.end_line) == ("doc", "A", 1, 7)


def test_a_long_paragraph_is_cut_between_sentences():
    sentence = "This sentence has exactly seven words here."
    for chunk in chunks(" ".join([sentence] * 30), "text"):
        assert chunk.text.strip().endswith("here.")
        assert chunk.text.strip().startswith("This")


@pytest.mark.parametrize("text", ["", "\n\n", "x"])
def test_nearly_empty_documents_give_one_chunk(text):
    assert len(chunks(text, "text")) == 1


@pytest.mark.parametrize("words", [100, 190, 310, 500])
def test_a_heading_with_a_short_sentence_stays_with_the_paragraph_that_follows(words):
    paragraph = " ".join(f"The treasurer writes name {i} in the ledger of the club." for i in range(words // 10))
    found = chunks(f"# Joining the rowing club\n\nHere is how.\n\n{paragraph}\n", "markdown", 160, 320)
    assert found[0].text.startswith("# Joining the rowing club\n\nHere is how.\n\nThe treasurer")
    assert all(40 <= len(chunk.text.split()) <= 320 for chunk in found)


def test_a_short_last_paragraph_stays_with_the_one_above():
    paragraph = " ".join(f"The treasurer writes name {i} in the ledger of the club." for i in range(15))
    found = chunks(f"# Joining\n\n{paragraph}\n\n{paragraph}\n\nSee you there.\n", "markdown", 160, 320)
    assert [len(chunk.text.split()) >= 40 for chunk in found] == [True] * len(found)
    assert found[-1].text.endswith("See you there.")


def test_front_matter_goes_with_the_text():
    paragraph = " ".join(f"The treasurer writes name {i} in the ledger of the club." for i in range(19))
    found = chunks(f"---\ntitle: Joining the rowing club\ndate: 2026-11-29\n---\n\n{paragraph}\n", "markdown", 160, 320)
    assert len(found) == 1


def test_given_headings_and_pages_reach_the_chunks():
    text = "One\n\n" + "first words " * 10 + "\n\nTwo\n\n" + "second words " * 10
    document = SourceDocument(
        "a.pdf", "a.pdf", text, {"author": "Ada"}, "a.pdf", 0, "text",
        headings=(Heading(0, 1, "One"), Heading(4, 2, "Two")), pages=(Page(0, 7), Page(6, 8)),
    )  # fmt: skip
    found = chunk_document(document, target_words=22, max_words=60)
    assert [(c.title, c.metadata, c.start_line, c.end_line) for c in found] == [
        ("One", {"author": "Ada", "page": 7}, 0, 0), ("One > Two", {"author": "Ada", "page": 7}, 0, 0)
    ]  # fmt: skip
    (whole,) = chunk_document(document)
    assert whole.metadata["page"] == 7


@pytest.mark.parametrize(
    ("title", "kind", "text", "expected"),
    [("html.md", "markdown", "\n# Escaping\n\nUse html.escape.", "Escaping"),
     ("html.md", "rst", "Escaping\n========\n\nUse html.escape.", "Escaping"),
     ("Guide", "markdown", "# Escaping\n\nUse html.escape.", "Guide"),
     ("html.md", "markdown", "Before.\n\n# Escaping\n\nUse html.escape.", "html.md"),
     ("html.md", "text", "# Escaping\n\nUse html.escape.", "html.md")],
)  # fmt: skip
def test_a_file_of_one_chunk_is_titled_by_the_heading_that_it_begins_with(title, kind, text, expected):
    document = SourceDocument("html.md", title, text, path="html.md", kind=kind, line=1)
    (chunk,) = chunk_document(document)
    assert (chunk.title, chunk.text) == (expected, text.strip("\n"))
