"""Where a hit is, as people write it."""

from __future__ import annotations

import pytest

from search_r3.index.results.places import place_of


@pytest.mark.parametrize(
    ("path", "line", "metadata", "place"),
    [
        ("a.md", 12, {"page": 3}, "a.md:12"),
        ("report.pdf", 0, {"page": 12, "author": "x"}, "report.pdf, page 12"),
        ("talk.pptx", 0, {"slide": 3}, "talk.pptx, slide 3"),
        ("a.ipynb", 0, {"cell": 1}, "a.ipynb, cell 1"),
        ("a.docx", 0, {}, "a.docx"),
        ("corpus.jsonl", 0, {"page": 3}, "corpus.jsonl"),
        ("report.pdf", 0, {"page": "iv"}, "report.pdf"),
    ],
)
def test_the_page_stands_where_there_are_no_lines(path, line, metadata, place):
    assert place_of(path, line, metadata) == place
