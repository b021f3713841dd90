"""Extension point for file formats: a document reader turns one file into documents.

`search_r3.index.readers.reader_registry` finds them; docs/write-your-own/document-reader.md shows how to add one.
"""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from search_r3.errors import InputError
from search_r3.files import wide_encoding
from search_r3.index.readers.csv_file import Misfits
from search_r3.index.source_document import Kind, Scalar, Skipped, SourceDocument

MAX_FILE_BYTES = 10_000_000


class UnreadableFile(InputError):
    """A file that gives no documents; the message is the reason alone. A folder goes on without it and reports it.

    `unread`: it may be readable later, so what was indexed of it before is kept.
    """

    def __init__(self, reason: str, unread: bool = False) -> None:
        super().__init__(reason)
        self.unread = unread


class DocumentReader(ABC):
    """Turns one file into documents: text, title, metadata. One object reads all files, and has no state.

    A complete reader, of subtitles::

        from search_r3.index import DocumentReader, SourceFile, UnreadableFile

        class SubtitleReader(DocumentReader):
            suffixes = (".srt",)

            def read(self, file: SourceFile):
                blocks = [block.splitlines() for block in file.text().split("\\n\\n")]
                spoken = [" ".join(lines[2:]) for lines in blocks if len(lines) > 2]
                if not spoken:
                    raise UnreadableFile("no subtitles")
                yield file.document("\\n".join(spoken), kind="text", metadata={"lines": len(spoken)})

    Registered by an entry point of the group `search_r3.document_readers`, `subtitles = "my_package:SubtitleReader"`,
    or by `search_r3.index.register_reader`.

    A file of several documents gives each a `part` of its own: `file.document(text, part="2", title="Act two")`.

    Class attributes:
        suffixes: endings of the files that it reads, in lower case, with the dot.
        names: names of files that it reads, in lower case: "readme".
        kind: "file", unless it reads files of records, whose documents have ids of their own. Such a file is read if
            it is indexed by its own path, not inside a folder; `kind` is the format's name there.
        folder_file: a folder with a file of this name is read as that file alone (BEIR's "corpus.jsonl").
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "file"
    folder_file: ClassVar[str] = ""

    @abstractmethod
    def read(self, file: SourceFile) -> Iterable[SourceDocument]:
        """The file's documents, in order; the same ids whenever the file is the same.

        Raises:
            UnreadableFile: it gives no documents, with the reason: "an encrypted PDF".
            OSError: it cannot be read now.
            InputError: it is broken, and indexing must stop: the message names file and line.
        """


@dataclass
class SourceFile:
    """A file to be read.

    Attributes:
        path: where it is.
        name: its path below the folder that is indexed, printable; ids of its documents begin with it.
        max_bytes: `data` and `text` refuse a larger file.
        delimiter: of a table, if the user gave one.
        text_columns: of a table, columns whose cells stay text, by their names as the index writes them.
        misfits: of a table, filled with what keeps a column from being of a type.
        may_be_empty: a file of records without any is not an error.
        skipped: filled with the parts that were left out.
    """

    path: Path
    name: str
    max_bytes: int = MAX_FILE_BYTES
    delimiter: str | None = None
    text_columns: Collection[str] = ()
    misfits: Misfits = field(default_factory=dict)
    may_be_empty: bool = False
    skipped: list[Skipped] = field(default_factory=list)

    def document(
        self,
        text: str,
        *,
        part: str = "",
        title: str = "",
        metadata: dict[str, Scalar] | None = None,
        line: int = 1,
        kind: Kind = "text",
    ) -> SourceDocument:
        """A document of this file.

        Args:
            part: distinguishes it from the file's other documents; its id is the file's name, "/" and this.
            title: the file's name where there is none.
            line: of the file, from 1, where the text begins.
            kind: how it is cut into chunks.
        """
        identifier = f"{self.name}/{part}" if part else self.name
        return SourceDocument(identifier, title or self.name, text, dict(metadata or {}), self.name, line, kind)

    def data(self) -> bytes:
        """The file's bytes.

        Raises:
            UnreadableFile: it is larger than `max_bytes`, or not a regular file.
            OSError: it cannot be read.
        """
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile("not a regular file")
        if status.st_size > self.max_bytes:
            raise UnreadableFile(f"larger than {self.max_bytes / 1e6:g} MB")
        return self.path.read_bytes()

    def text(self) -> str:
        """The file's text, which is UTF-8, without a byte order mark.

        Raises:
            UnreadableFile: as `data`, and what is empty or not UTF-8 text.
            OSError: it cannot be read.
        """
        data = self.data()
        if (encoding := wide_encoding(data)) is not None:
            raise UnreadableFile(f"{encoding} text; save it as UTF-8")
        if b"\0" in data:
            raise UnreadableFile("a binary file")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UnreadableFile("not UTF-8 text") from None
        if not text.strip():
            raise UnreadableFile("empty")
        return text
