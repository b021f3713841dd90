"""Manual pages and Sphinx pages in miniature: headings ask for their sections, and markup leaves no trace."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from search_r3.data.io.line_reader import MissingSource
from search_r3.data.pairs import read_pairs
from search_r3.data.recipe import build_pairs
from search_r3.data.sources.manuals import man_pairs, pydoc_pairs
from search_r3.data.sources.roff import plain_sections, unescape
from search_r3.errors import InputError

MORE = "and so it goes on, one word after the other, until the section is long enough to be kept here"
PAGE = rf""".\" SPDX-License-Identifier: Linux-man-pages-copyleft
.de XX
A macro nobody sees.
..
.TH qsort 3 2023-01-07 "Linux man-pages 6.03"
.SH NAME
qsort, qsort_r \- sort an array
.SH SYNOPSIS
.B #include <stdlib.h>
.SH DESCRIPTION
The
.BR qsort ()
function sorts an array with \fInmemb\fP elements
\(emquickly\(em of
.IR "any kind" ,
{MORE}.
.\" a comment
.PP
Not \-1 but \(aqx\(aq, \\n and caf\[u00E9].
.TP
.B EINVAL
Bad \fBargument\fR.
.IP \(bu 3
An item.
.TS
l l.
a	table
.TE
.SS I/O on pipes
.EX
int main(void)
{{
    return 0;
}}
.EE
After the example, {MORE}.
.SH "SEE ALSO"
.BR sort (1),
{MORE}
.SH NOTES
Short.
"""
HTML = f"""<!DOCTYPE html><html><head><title>no</title><style>p {{}}</style></head><body>
<div class="sidebar"><h3>Navigation</h3><p>Not this.</p></div>
<section id="module-heapq"><span id="x"></span>
<h1><a href="#"><code><span class="pre">heapq</span></code></a> — Heap queue
algorithm<a class="headerlink" href="#x">¶</a></h1>
<p>Heaps are <em>binary</em>
trees &amp; more, {MORE}.</p>
<div><pre><span>&gt;&gt;&gt; </span>heap = []
  indented</pre></div>
<script>alert("no")</script>
<section id="theory"><h2>8.10. Theory<a class="headerlink" href="#theory">¶</a></h2>
<p>Why it works: {MORE}.</p><ul><li>first</li><li>second</li></ul><h3>Aside</h3></section>
<section id="short"><h2>Short</h2><p>Too few words.</p></section>
<p>Behind the subsections.</p>
</section></body></html>"""


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    (tmp_path / "man/man3").mkdir(parents=True)
    (tmp_path / "man/man3/qsort.3.gz").write_bytes(gzip.compress(PAGE.encode()))
    (tmp_path / "man/man3/qsort_r.3").write_text(".so man3/qsort.3\n")
    (tmp_path / "man/man3/other.3").write_text(PAGE.split("\n", 1)[1])
    (tmp_path / "man/man3/alias.3.gz").symlink_to("qsort.3.gz")
    (tmp_path / "man/man3/bsd.3").write_text(".Dd today\n.Sh NAME\n.Nm bsd\n")
    (tmp_path / "man/de/man3").mkdir(parents=True)
    (tmp_path / "man/de/man3/qsort.3").write_text(PAGE)
    return tmp_path / "man"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "html/library").mkdir(parents=True)
    (tmp_path / "html/_static").mkdir()
    (tmp_path / "html/library/heapq.html").write_text(HTML, encoding="utf-8")
    for name in ("search.html", "genindex-A.html", "_static/x.html", "whatsnew-changelog.html"):
        (tmp_path / "html" / name).write_text(HTML, encoding="utf-8")
    return tmp_path / "html"


def test_a_manual_page_s_line_asks_for_its_description_and_headings_for_the_rest(pages: Path) -> None:
    built = man_pairs(str(pages))
    assert {pair.id: pair.query for pair in built.pairs} == {
        "man:man3/qsort.3:2": "sort an array",
        "man:man3/qsort.3:3": "qsort: I/O on pipes",
    }
    assert {pair.source for pair in built.pairs} == {"man:man3"}
    assert built.origin["license"] == "Linux-man-pages-copyleft"
    assert built.origin["pages"] == 1
    assert built.dropped == {
        "another name of a page": 1,
        "page that names no license": 1,
        "mdoc page": 1,
        "short section": 1,
    }
    every = man_pairs(str(pages), any_license=True)
    assert len(every.pairs) == 4
    assert "not named in the page" in every.origin["license"]


def test_roff_becomes_plain_text() -> None:
    sections = dict(plain_sections(PAGE))
    assert list(sections) == ["NAME", "SYNOPSIS", "DESCRIPTION", "I/O on pipes", "SEE ALSO", "NOTES"]
    assert sections["NAME"] == "qsort, qsort_r - sort an array"
    assert sections["SYNOPSIS"] == "#include <stdlib.h>"
    assert sections["DESCRIPTION"].split("\n") == [
        f"The qsort() function sorts an array with nmemb elements —quickly— of any kind, {MORE}.",
        "Not -1 but 'x', \\n and café.",
        "EINVAL Bad argument.",
        "• An item.",
    ]
    assert sections["I/O on pipes"].split("\n") == [
        "int main(void)",
        "{",
        "    return 0;",
        "}",
        f"After the example, {MORE}.",
    ]


@pytest.mark.parametrize(
    ("roff", "plain"),
    [
        (r"\fBbold\fP\f[CR]code\f(CWmore\fR", "boldcodemore"),
        (r"\s-1SMALL\s+1 \s0x", "SMALL x"),
        (r"\(lqquoted\(rq\&.", "“quoted”."),
        (r"a\ b\~c\|d\ce", "a b cde"),
        (r"\h'1i'x\v'2'y\w'abc'z", "xyz"),
        (r"\*(lqq\*(rq\*R", "“q”®"),
        (r"end \" a comment", "end "),
        (r"\eC \\t", r"\C \t"),
    ],
)
def test_escapes_leave_no_trace(roff: str, plain: str) -> None:
    assert unescape(roff) == plain


def test_a_heading_on_the_next_line_and_a_continued_line_are_understood() -> None:
    assert plain_sections(".SH\nLATE NAME\nOne \\\nline.\n") == [("LATE NAME", "One line.")]
    assert plain_sections("before\n.SH A\n.nf\nx\n.SH B\ny\nz\n") == [("A", "x"), ("B", "y z")]


def test_a_page_that_is_no_text_is_refused_or_skipped(pages: Path) -> None:
    (pages / "man3/bad.3").write_bytes(b".SH NAME\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"bad\.3: not UTF-8"):
        man_pairs(str(pages))
    assert man_pairs(str(pages), damaged="skip").dropped["damaged: not UTF-8"] == 1


def test_sections_of_a_sphinx_page_have_their_own_text_only(docs: Path) -> None:
    built = pydoc_pairs(str(docs))
    pairs = {pair.query: pair.positive for pair in built.pairs if "library" in pair.id}
    assert list(pairs) == ["heapq — Heap queue algorithm", "heapq: Theory"]
    assert pairs["heapq — Heap queue algorithm"].split("\n") == [
        f"Heaps are binary trees & more, {MORE}.",
        ">>> heap = []",
        "  indented",
        "Behind the subsections.",
    ]
    assert pairs["heapq: Theory"].split("\n") == [f"Why it works: {MORE}.", "first", "second", "Aside"]
    assert built.dropped["short section"] == 2
    assert built.origin["pages"] == 2  # neither the search page, nor an index, nor what Sphinx keeps for itself
    assert built.origin["license"].startswith("PSF-2.0")


def test_sections_are_cut(docs: Path, pages: Path) -> None:
    assert all(0 < len(pair.positive) <= 50 for pair in pydoc_pairs(str(docs), max_chars=50).pairs)
    assert all(0 < len(pair.positive) <= 50 for pair in man_pairs(str(pages), max_chars=50).pairs)


def test_no_page_at_all_is_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(MissingSource, match="install manpages-dev"):
        man_pairs(str(tmp_path))
    with pytest.raises(MissingSource, match=r"install python3\.11-doc"):
        pydoc_pairs(str(tmp_path / "none"))


def test_a_recipe_reads_them_the_same_way_twice(pages: Path, docs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sources:\n  - {{kind: man, path: {pages}, any_license: true}}\n  - {{kind: pydoc, path: {docs}, limit: 1}}\n"
    )
    manifest = build_pairs(recipe, tmp_path / "a.jsonl")
    assert [source["count"] for source in manifest["sources"]] == [2, 1]  # the other page says the same
    assert len(read_pairs(tmp_path / "a.jsonl")) == 3
    build_pairs(recipe, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
