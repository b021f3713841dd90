"""Which document reader reads a file, by suffix or name: registered readers first, then other packages', then ours.

A package adds a reader by an entry point of the group `search_r3.document_readers`, a program by `register_reader`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.index.readers import record_readers, text_readers
from search_r3.index.readers.document_reader import DocumentReader
from search_r3.index.readers.epub_reader import EpubReader
from search_r3.index.readers.html_reader import HtmlReader
from search_r3.index.readers.mail_reader import MailboxReader, MailReader
from search_r3.index.readers.notebook_reader import NotebookReader
from search_r3.index.readers.office_readers import DocxReader, PptxReader
from search_r3.index.readers.pdf_reader import PdfReader
from search_r3.plugins import Registry

OURS: tuple[DocumentReader, ...] = (
    *record_readers.READERS,
    *text_readers.READERS,
    PdfReader(),
    HtmlReader(),
    DocxReader(),
    PptxReader(),
    EpubReader(),
    MailReader(),
    MailboxReader(),
    NotebookReader(),
)
_registered: list[DocumentReader] = []


def register_reader(reader: DocumentReader) -> None:
    """Register a reader in this process. It takes precedence over all others for its suffixes and names.

    Raises:
        InputError: it is not a `DocumentReader`, or it has no valid suffixes or names.
    """
    _registered.insert(0, _checked(None, reader))


def readers() -> list[DocumentReader]:
    """All readers in order of precedence: registered ones, other packages', ours."""
    return [*_registered, *plugin_readers(), *OURS]


def reader_of(path: Path) -> DocumentReader | None:
    """The reader for files of this name, or None. The file is not opened."""
    suffix, name = path.suffix.lower(), path.name.lower()
    return next((reader for reader in readers() if suffix in reader.suffixes or name in reader.names), None)


@cache
def plugin_readers() -> tuple[DocumentReader, ...]:
    """The readers of installed packages. Raises InputError if one is not usable, or two read the same files."""
    added = Registry("document reader", "document_readers", {}, _checked).added()
    name_of: dict[str, str] = {}
    for name, reader in added.items():
        for suffix in (*reader.suffixes, *reader.names, *filter(None, [reader.folder_file])):
            if suffix in name_of:
                raise InputError(
                    f"the document readers {name_of[suffix]!r} and {name!r} both read {suffix}; uninstall one"
                )
            name_of[suffix] = name
    return tuple(added.values())


def _checked(name: str | None, offered: Any) -> DocumentReader:
    what = "the reader" if name is None else f"the document reader {name!r}"
    reader = offered() if name is not None and isinstance(offered, type) else offered
    if not isinstance(reader, DocumentReader):
        raise InputError(f"{what} is a {type(reader).__name__}; expected a search_r3.index.DocumentReader")
    wrong = [suffix for suffix in reader.suffixes if not suffix.startswith(".") or suffix != suffix.lower()]
    if wrong or not (reader.suffixes or reader.names or reader.folder_file):
        raise InputError(
            f"{what} reads the suffixes {list(reader.suffixes)}; give at least one, in lower case, with the dot"
        )
    return reader
