"""PDF, HTML, office files, books, mail and notebooks: text in reading order, with pages, headings and metadata."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from search_r3.errors import InputError
from search_r3.index import open_source
from search_r3.index.chunking.chunker import Chunk, chunk_document
from search_r3.index.readers.document_reader import SourceFile
from search_r3.index.readers.pdf_layout import Character, page_text
from search_r3.index.source_document import SourceDocument

FILES = Path(__file__).parent / "files"


def read(name: str) -> SourceDocument:
    (document,) = open_source(FILES / name)
    return document


def chunks(name: str) -> list[Chunk]:
    return chunk_document(read(name), target_words=20, max_words=60)


def skipped(folder: Path) -> dict[str, str]:
    source = open_source(folder)
    list(source)
    return {one.path: one.reason for one in source.skipped}


# ----------------------------------------------------------------------------------------------------------------- PDF


def test_columns_drawn_across_the_page_are_read_one_after_the_other():
    text = read("columns.pdf").text
    assert "keeps the ledger of every ship that enters the bay" in text
    assert text.index("town council") < text.index("other side of the hill")


def test_a_divided_word_is_joined_and_ligatures_are_letters():
    text = read("columns.pdf").text
    assert "lighthouse is hyphenated in" in text
    assert "the first school was opened by the fishers" in text
    flowing = read("flowing.pdf").text
    assert "extraordinarily comprehensive documentation characterizes administrative" in flowing
    assert flowing.index("Efficient officers") < flowing.index("Second paragraph")


def test_a_word_that_the_page_has_with_a_hyphen_keeps_it():
    def line(text: str, y: float) -> list[Character]:
        return [*(Character(c, (5.0 * i, y, 5.0 * i + 5, y + 10)) for i, c in enumerate(text)), Character("\n", None)]

    lines = ["this is a well-known place", "and it is as I said well-", "known for its long re-", "ports of the sea"]
    page = page_text(one for i, text in enumerate(lines) for one in line(text, 100 - 12.0 * i))
    assert "said well-known for its long reports of the sea" in page


def test_values_of_a_form_are_read():
    assert "Name of the owner: Ada Lindqvist" in read("columns.pdf").text


def test_chunks_of_a_pdf_have_their_page_and_heading():
    found = [(chunk.title, chunk.metadata["page"], chunk.start_line) for chunk in chunks("columns.pdf")]
    assert found == [("Harbor and school", 1, 0), ("Harbor and school", 1, 0), ("Registration", 2, 0)]


def test_a_file_that_cannot_be_read_says_why_and_is_read_once_it_changes(tmp_path: Path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    for suffix in ("pdf", "docx", "pptx", "epub", "eml", "mbox", "ipynb"):
        (folder / f"broken.{suffix}").write_bytes(b"\x00\x01 nothing of the kind")
    (folder / "old.docx").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + b"old")
    reasons = skipped(folder)
    expected = {
        "broken.pdf": "a damaged PDF, or not a PDF at all", "broken.docx": "not a DOCX file at all",
        "broken.pptx": "not a PPTX file at all", "broken.epub": "not an EPUB at all", "broken.eml": "not a message",
        "broken.mbox": "not a mailbox", "broken.ipynb": "binary", "old.docx": "an old Office file",
    }  # fmt: skip
    assert set(reasons) == set(expected)
    assert all(expected[name] in reasons[name] for name in expected), reasons
    shutil.copy(FILES / "columns.pdf", folder / "broken.pdf")
    assert "broken.pdf" not in skipped(folder)


def test_a_missing_library_is_named_and_what_was_indexed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(FILES / "columns.pdf", tmp_path)
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    source = open_source(tmp_path)
    assert [document.id for document in source] == ["a.txt"]
    (missing,) = source.skipped
    assert "pip install 'search-r3[files]'" in missing.reason
    assert missing.unread


# ------------------------------------------------------------------------------------------------------ HTML and books


def test_html_is_read_in_blocks_without_menus_scripts_and_styles():
    page = read("page.html")
    assert page.text.split("\n") == [
        "Rules", "", "Ships anchor north.", "", "No fires.", "", "Fees", "", "Boats: free", "Ships: ten crowns", "",
        "Month Fee", "May 5", "", "def fee():", "    return 5",
    ]  # fmt: skip
    assert (page.title, page.metadata) == ("Harbor rules", {"author": "Town council"})
    assert [(heading.level, heading.title) for heading in page.headings] == [(1, "Rules"), (2, "Fees")]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"<p>one</p>", "one"),
        ("<p>caf\u00e9".encode(), "caf\u00e9"),
        (b'<meta charset="iso-8859-2"><p>\xb3', "\u0142"),
        (b"<p>caf\xe9", "caf\u00e9"),
        ("<p>caf\u00e9".encode("utf-16"), "caf\u00e9"),
        (b"<main></main><p>beside", "beside"),
        (b"<nav>x</nav><main><p>in</p></main><p>out</p>", "in"),
        (b"a<br>b <span>c</span>d", "a b cd"),
        (b"<div>a<div>b</div>c</div>", "a\n\nb\n\nc"),
    ],
)
def test_fragments_and_encodings_of_html(tmp_path: Path, data: bytes, text: str):
    (tmp_path / "a.html").write_bytes(data)
    (document,) = open_source(tmp_path / "a.html")
    assert document.text == text


def test_a_page_without_text_is_refused(tmp_path: Path):
    (tmp_path / "a.html").write_text("<script>render()</script><div id=app></div>")
    with pytest.raises(InputError, match="no text in it: a page that scripts fill"):
        list(open_source(tmp_path / "a.html"))


def test_a_book_has_its_chapters_in_order_with_headings():
    assert read("guide.epub").metadata["author"] == "Ada Lindqvist"
    titles = [chunk.title for chunk in chunks("guide.epub")]
    assert titles == ["Keeping bees", "Spring", "Autumn"]
    assert "May add a super\nJuly harvest" in read("guide.epub").text


def test_a_chapter_whose_sections_are_listed_one_by_one_is_read_once(tmp_path: Path):
    """As in the manual of Debian Live, whose list of chapters names "a.xhtml", "a.xhtml#o8", "a.xhtml#o12"."""
    listed = ["a.xhtml", "a.xhtml#o8", "b%20c.xhtml", "a.xhtml#o12"]
    items = "".join(
        f'<item id="{n}" href="{name}" media-type="application/xhtml+xml"/>' for n, name in enumerate(listed)
    )
    spine = "".join(f'<itemref idref="{n}"/>' for n in range(len(listed)))
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as book:
        book.writestr("META-INF/container.xml", '<container><rootfile full-path="in/book.opf"/></container>')
        book.writestr("in/book.opf", f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>")
        book.writestr("in/a.xhtml", "<h1>One</h1><p id=o8>first</p><p id=o12>second</p>")
        book.writestr("in/b c.xhtml", "<h1>Two</h1><p>third</p>")
    (document,) = open_source(tmp_path / "a.epub")
    assert document.text == "One\n\nfirst\n\nsecond\n\nTwo\n\nthird"


# -------------------------------------------------------------------------------------------------------- office files


def test_word_documents_have_headings_tables_and_an_author():
    document = read("guide.docx")
    assert (document.title, document.metadata) == ("Keeping bees", {"author": "Ada Lindqvist"})
    assert [(heading.level, heading.title) for heading in document.headings] == [
        (1, "Spring"), (2, "First inspection"), (1, "Autumn")
    ]  # fmt: skip
    assert document.text.endswith("Month  Task\nMay  add a super\nJuly  harvest")


def test_all_that_a_word_document_shows_is_read(tmp_path: Path):
    """Content controls, tracked insertions, text boxes and tables in tables; python-docx alone leaves them out."""
    import docx
    from lxml import etree

    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    mc = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'

    def p(text: str) -> str:
        return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"

    box = f"<w:pict><w:txbxContent>{p('boxed')}</w:txbxContent></w:pict>"
    inner = f"<w:tbl><w:tr><w:tc>{p('inner')}</w:tc></w:tr></w:tbl>"
    document = docx.Document()
    for xml in (
        f"<w:sdt {space}><w:sdtPr/><w:sdtContent>{p('controlled')}</w:sdtContent></w:sdt>",
        f"<w:p {space}><w:r><w:t>it </w:t></w:r><w:ins><w:r><w:t>stays</w:t></w:r></w:ins>"
        "<w:del><w:r><w:delText>goes</w:delText></w:r></w:del><w:r><w:tab/><w:t>here</w:t><w:br/><w:t>too</w:t></w:r></w:p>",
        f"<w:p {space} {mc}><w:r><w:t>beside</w:t><mc:AlternateContent><mc:Choice>{box}</mc:Choice>"
        f"<mc:Fallback>{box}</mc:Fallback></mc:AlternateContent></w:r></w:p>",
        f"<w:tbl {space}><w:tr><w:tc>{p('outer')}{inner}</w:tc><w:tc>{p('next')}</w:tc></w:tr>"
        f"<w:tr><w:tc>{p('')}</w:tc></w:tr></w:tbl>",
    ):
        document.element.body.insert_element_before(etree.fromstring(xml), "w:sectPr")
    document.save(str(tmp_path / "a.docx"))
    (found,) = open_source(tmp_path / "a.docx")
    assert found.text.split("\n\n") == ["controlled", "it stays\there\ntoo", "beside", "boxed", "outer inner  next"]


def test_an_empty_table_is_no_text(tmp_path: Path):
    from pptx import Presentation
    from pptx.util import Inches

    slides = Presentation()
    shapes = slides.slides.add_slide(slides.slide_layouts[6]).shapes
    table = shapes.add_table(2, 2, *map(Inches, (1, 1, 4, 2))).table
    slides.save(str(tmp_path / "a.pptx"))
    with pytest.raises(InputError, match="a PPTX file without text"):
        list(open_source(tmp_path / "a.pptx"))
    table.cell(1, 1).text = "one"
    slides.save(str(tmp_path / "a.pptx"))
    assert [document.text for document in open_source(tmp_path / "a.pptx")] == ["one"]


def test_chunks_of_slides_have_the_number_of_the_slide():
    assert [(chunk.title, chunk.metadata["slide"]) for chunk in chunks("talk.pptx")] == [
        ("Keeping bees", 1), ("First inspection", 2), ("Autumn", 4)
    ]  # fmt: skip
    assert "May  add a super" in read("talk.pptx").text


# ------------------------------------------------------------------------------------------------- mail and notebooks


def test_a_message_has_its_text_once_and_names_its_attachments():
    message = read("letter.eml")
    assert message.text == "Sju b\u00e5tar ligger i hamnen.\n\nAttachments: map.pdf"
    assert message.title == "B\u00e5tar i hamnen"
    assert message.metadata == {
        "from": "Ada Lindqvist <ada@example.org>",
        "to": "Council <council@example.org>",
        "date": "2026-05-05T09:30:00+02:00",
    }


def test_the_messages_of_a_box_keep_their_ids_when_one_goes(tmp_path: Path):
    first, second = open_source(FILES / "list.mbox")
    assert first.text == "The ledger is in the tower.\n\nFrom the window one sees the bay."
    assert (second.title, second.text) == ("Re: Ledger", "Which tower?\n\nThe north one.")
    box = (FILES / "list.mbox").read_bytes()
    (tmp_path / "list.mbox").write_bytes(box[box.index(b"From ben") :])
    assert [one.id for one in open_source(tmp_path / "list.mbox")] == [second.id]


def test_a_notebook_is_its_cells_without_outputs():
    notebook = read("analysis.ipynb")
    assert "print(bees)" in notebook.text
    assert "secret" not in notebook.text
    assert [heading.title for heading in notebook.headings] == ["Counting bees", "Result"]
    cut = chunk_document(notebook, target_words=10, max_words=60)
    assert [(chunk.title, chunk.metadata["cell"]) for chunk in cut] == [
        ("Counting bees", 1), ("Counting bees", 2), ("Counting bees > Result", 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "about", "places"),
    [
        ("pdflatex-outline.pdf", {}, [("", 1), ("Foo", 2), ("Bar", 2), ("Baz", 2), ("Foo", 2), ("Foo", 3), ("Bar", 3)]),
        ("par-known-styles.docx", {"author": "Steve Canny"}, [("", None)]),
        ("ph-inherit-props.pptx", {"author": "python-pptx"}, [("Presentation", 1)]),
        ("notebook1.ipynb", {}, [("A simple SymPy example", 1)]),
        (
            "removal.html",
            {},
            [
                ("Removal @11.19.1 > Table of contents", None),
                ("Removal @11.19.1 > Table of contents > Synopsis", None),
                ("Removal @11.19.1 > Table of contents > More Severe Uninstalling", None),
            ],
        ),
        (
            "debmake-doc.epub",
            {"author": "Osamu Aoki", "language": "en"},
            [("Guide for Debian Maintainers > Osamu Aoki", None)] * 6 + [("Preface", None)] * 6,
        ),
        ("removal.md", {"section": "7", "description": "Cleaning the slate"}, [("Synopsis", None)]),
        (
            "msg_01.eml",
            {"from": "bbb@ddd.com", "to": "bbb@zzz.org", "date": "2001-05-04T14:05:44-04:00"},
            [("This is a test message", None)],
        ),
    ],
)
def test_files_of_other_projects(name: str, about: dict[str, str], places: list[tuple[str, int | None]]):
    document = read(f"public/{name}")
    assert document.metadata == about
    cut = chunk_document(document, target_words=60, max_words=320)[: len(places)]
    numbers = [
        next((chunk.metadata[key] for key in ("page", "slide", "cell") if key in chunk.metadata), None) for chunk in cut
    ]
    titles = [chunk.title if chunk.title != name else "" for chunk in cut]
    assert list(zip(titles, numbers, strict=True)) == places


def test_chapters_of_a_book_of_another_project():
    document = read("public/debmake-doc.epub")
    assert document.title == "Guide for Debian Maintainers"
    chapters = [heading.title for heading in document.headings if heading.title.startswith(("Chapter", "Appendix"))]
    assert chapters == [
        "Chapter 1. Overview", "Chapter 2. Prerequisites", "Chapter 3. Tool Setups", "Chapter 6. debmake options",
        "Appendix A. debmake(1) manpage",
    ]  # fmt: skip
    cut = chunk_document(document, target_words=60, max_words=320)
    found = next(one for one in cut if "Debian Developer (DD)" in one.text)
    assert found.title == "2.1. People around Debian"
    assert "4.1. Packaging tarball" not in document.text, "a page of links to the chapters is no chapter"


def test_a_contents_page_is_left_out_unless_it_has_an_introduction(tmp_path: Path):
    def book(page: str) -> Path:
        items = '<item id="0" href="i.xhtml" media-type="application/xhtml+xml"/>'
        guide = '<guide><reference type="toc" href="i.xhtml#contents"/></guide>'
        with zipfile.ZipFile(tmp_path / "a.epub", "w") as file:
            file.writestr("META-INF/container.xml", '<container><rootfile full-path="book.opf"/></container>')
            spine = f'<manifest>{items}</manifest><spine><itemref idref="0"/></spine>'
            file.writestr("book.opf", f"<package>{spine}{guide}</package>")
            file.writestr("i.xhtml", page)
        return tmp_path / "a.epub"

    links = "<ul><li><a href=a.xhtml>Harbor dues</a><li><a href=b.xhtml>Moorings</a></ul>"
    (document,) = open_source(book("<h1>Welcome</h1><p>This book is about the harbor.</p>" + links))
    assert document.text == "Welcome\n\nThis book is about the harbor.\n\nHarbor dues\nMoorings"
    with pytest.raises(InputError, match="an EPUB without text"):
        list(open_source(book(links)))


def test_what_a_mail_wrongly_calls_text_is_not_read(tmp_path: Path):
    """As in a message of HyperKitty's tests; one accent without its encoding is no reason to leave a text out."""
    head = b"From: a@example.org\r\nSubject: Wrong encoding\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
    for name, body in (("a", bytes(range(256)) * 9), ("b", b"caf\xe9 at nine, the ferry leaves at ten")):
        (tmp_path / f"{name}.eml").write_bytes(head + body)
    found = {document.id: document.text for document in open_source(tmp_path)}
    assert found == {"a.eml": "Wrong encoding", "b.eml": "caf\ufffd at nine, the ferry leaves at ten"}


def test_messages_of_an_mbox_of_another_project():
    messages = list(open_source(FILES / "public/test-4-message.mbox"))
    assert [(one.title, one.text) for one in messages] == [
        (f"mail {n}", f"The mail content of mail {n}{'.' * (n + 2)}") for n in range(1, 5)
    ]
    assert len({one.id for one in messages}) == 4
    assert messages[0].metadata["date"] == "2011-12-25T21:33:37+08:00"


def test_parquet_of_another_project_without_an_id_names_its_columns():
    with pytest.raises(InputError, match=r'no column "id" \(columns found: carat, cut, color, clarity, .*price'):
        list(open_source(FILES / "public/v0.7.1.parquet"))


def test_parquet_of_another_project_with_columns_of_other_names():
    """Impala writes strings as bytes that are not marked as text."""
    file, fields = FILES / "public/snappy-nation.impala.parquet", {"id": "n_nationkey", "title": "n_name"}
    source = open_source(file, fields=fields | {"text": "n_comment"})
    nations = list(source)
    assert source.measure().size == source.position.size == 25
    assert (nations[2].id, nations[2].title, nations[2].metadata) == ("2", "BRAZIL", {"n_regionkey": 1})
    assert nations[2].text.startswith("y alongside of the pending deposits.")
    with pytest.raises(InputError, match=r'no column "id" \(columns found: n_nationkey, n_name, .* --field id=COLUMN'):
        list(open_source(file))


def test_all_files_of_a_folder_are_read():
    source = open_source(FILES)
    assert len({document.path for document in source}) == sum(path.is_file() for path in FILES.rglob("*")) - 2
    assert [(one.path, one.reason) for one in source.skipped] == [
        (f"public/{name}.parquet", "a file of records inside a folder; index it by its own path")
        for name in ("snappy-nation.impala", "v0.7.1")
    ]


def test_files_may_be_larger_than_text_files(tmp_path: Path):
    shutil.copy(FILES / "columns.pdf", tmp_path)
    assert len(list(open_source(tmp_path, max_file_bytes=10_000))) == 1
    assert SourceFile(FILES / "columns.pdf", "columns.pdf").data()[:4] == b"%PDF"
