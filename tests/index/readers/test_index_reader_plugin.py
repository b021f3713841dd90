"""A document reader from another package reads its files in a folder, by their own path, and from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from plugin_package import code_of_docstring, code_of_page, install_plugin, without_docstrings

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import DocumentReader, SearchIndex, open_source
from search_r3.index.readers import reader_registry
from search_r3.index.readers.path_source import summarize_skipped

ENTRIES = "[search_r3.document_readers]\nsubtitles = MODULE:SubtitleReader\n"
FILM = "1\n00:01 --> 00:02\nThe train to Vienna\n\n2\n00:03 --> 00:04\nleaves at nine.\n"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install_plugin(tmp_path / "site", monkeypatch, "subtitles", ENTRIES, code_of_page("document-reader"))
    reader_registry.plugin_readers.cache_clear()
    yield
    reader_registry.plugin_readers.cache_clear()


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "night.srt").write_text(FILM)
    (folder / "empty.SRT").write_text("1\n")
    (folder / "notes.md").write_text("Notes about films.\n")
    return folder


def test_the_docstring_shows_the_reader_of_the_page():
    assert without_docstrings(code_of_docstring(DocumentReader)) == without_docstrings(code_of_page("document-reader"))


def test_a_folder_is_read_with_it(installed, films: Path):
    source = open_source(films)
    found = {document.id: document for document in source}
    assert sorted(found) == ["night.srt", "notes.md"]
    assert found["night.srt"].text == "The train to Vienna\nleaves at nine."
    assert found["night.srt"].metadata == {"lines": 2}
    assert summarize_skipped(source.skipped) == ["1 skipped: no subtitles (empty.SRT)"]
    (alone,) = open_source(films / "night.srt")
    assert (alone.id, alone.text) == ("night.srt", found["night.srt"].text)
    with pytest.raises(InputError, match=r"empty\.SRT cannot be indexed: no subtitles"):
        list(open_source(films / "empty.SRT"))


def test_without_it_such_files_are_skipped(films: Path):
    source = open_source(films)
    assert [document.id for document in source] == ["notes.md"]
    assert "not a text or source file (.srt)" in summarize_skipped(source.skipped)[0]


def test_the_command_line_indexes_with_it(installed, films: Path, tmp_path: Path, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["index", "films", "--into", "x", "--model", str(tiny_model)]) == 0
    assert main(["search", "x", "leaves at nine", "--mode", "text", "--where", "lines = 2"]) == 0
    assert "night.srt" in capsys.readouterr().out
    (films / "night.srt").unlink()
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["index", "films", "--into", "x", "--model", str(tiny_model), "--prune"]) == 0
    assert len(SearchIndex.open("x")) == 1


def test_a_file_may_hold_several_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Mailbox(DocumentReader):
        suffixes = (".mail",)

        def read(self, file):
            for number, mail in enumerate(file.text().split("From "), start=1):
                yield file.document(mail, part=str(number), title=f"mail {number}")

    monkeypatch.setattr(reader_registry, "_registered", [])
    reader_registry.register_reader(Mailbox())
    (tmp_path / "in.mail").write_text("one From two")
    assert [(d.id, d.title, d.path) for d in open_source(tmp_path)] == [
        ("in.mail/1", "mail 1", "in.mail"),
        ("in.mail/2", "mail 2", "in.mail"),
    ]


def test_what_is_wrong_with_a_reader_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Stray(DocumentReader):
        suffixes = (".stray",)

        def read(self, file):
            return [file.document("x").__class__("elsewhere", "", "x")]

    class Dotless(Stray):
        suffixes = ("stray",)

    monkeypatch.setattr(reader_registry, "_registered", [])
    with pytest.raises(InputError, match=r"reads the suffixes \['stray'\]; give at least one, in lower case, with the"):
        reader_registry.register_reader(Dotless())
    with pytest.raises(InputError, match=r"is a str; expected a search_r3\.index\.DocumentReader"):
        reader_registry.register_reader("reader")
    reader_registry.register_reader(Stray())
    (tmp_path / "a.stray").write_text("x")
    with pytest.raises(InputError, match=r'Stray gave the id "elsewhere".*use SourceFile\.document'):
        list(open_source(tmp_path))
