"""Opening formats that are ZIP files (DOCX, PPTX, EPUB), with a limit on what they unpack to."""

from __future__ import annotations

import zipfile
from typing import BinaryIO

from search_r3.index.readers.document_reader import UnreadableFile

MAX_UNPACKED = 1_000_000_000
"""Bytes; a small file can be made that unpacks to any size."""
OLE = bytes.fromhex("d0cf11e0a1b11ae1")
"""How files of old Microsoft Office begin, and encrypted ones of the new."""


def open_zip(data: BinaryIO, what: str) -> zipfile.ZipFile:
    """Open a ZIP file.

    Args:
        what: the format, for messages: "an EPUB".

    Raises:
        UnreadableFile: it is none, or it would unpack to more than 1 GB.
    """
    if data.read(len(OLE)) == OLE:
        raise UnreadableFile(f"not {what} but an encrypted or an old Office file; save it anew, without a password")
    data.seek(0)
    try:
        opened = zipfile.ZipFile(data)
    except (zipfile.BadZipFile, OSError):
        raise UnreadableFile(f"a damaged file, or not {what} at all") from None
    if sum(item.file_size for item in opened.infolist()) > MAX_UNPACKED:
        raise UnreadableFile(f"{what} that unpacks to more than {MAX_UNPACKED / 1e9:g} GB")
    return opened
