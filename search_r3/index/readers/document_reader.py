"""Extension point for file formats: a document reader turns one file into documents.

`search_r3.index.readers.reader_registry` finds them; docs/write-your-own/document-reader.md shows how to add one.
"""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from search_r3.errors import InputError
from search_r3.files import wide_encoding
from search_r3.index.readers.csv_file import Misfits
from search_r3.index.source_document import Heading, Kind, Page, Scalar, Skipped, SourceDocument

MAX_FILE_BYTES = 10_000_000
BLOCK = 1 << 20  # bytes read at a time to count lines


class UnreadableFile(InputError):
    """A file without documents; the message is just the reason. When a folder is indexed, the file is skipped and
    reported.

    `unread`: it may be readable later, so what was indexed of it before is kept.
    """

    def __init__(self, reason: str, unread: bool = False) -> None:
        super().__init__(reason)
        self.unread = unread


class DocumentReader(ABC):
    """Turns one file into documents: text, title, metadata. A single, stateless object reads all files.

    A complete reader, for subtitles::

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

    If a file has several documents, each gets a unique `part`: `file.document(text, part="2", title="Act two")`.

    Class attributes:
        suffixes: suffixes of the files that it reads, in lower case, with the dot.
        names: names of files that it reads, in lower case: "readme".
        kind: "file" for files whose documents are named after the file. A reader of files of records, whose documents
            have their own ids, sets the format's name instead, such as "csv"; such a file is read only when it is
            indexed by its own path, not inside a folder. (How documents are cut into chunks is the `kind` of
            `SourceFile.document`.)
        size_factor: how many times larger its files may be than text files: most of a PDF is pictures.
        folder_file: a folder that has a file of this name is read as just that file (BEIR's "corpus.jsonl").
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "file"
    folder_file: ClassVar[str] = ""
    size_factor: ClassVar[int] = 1

    @abstractmethod
    def read(self, file: SourceFile) -> Iterable[SourceDocument]:
        """The file's documents, in order; the same file must always give the same ids.

        Raises:
            UnreadableFile: it has no documents; the message is the reason ("an encrypted PDF").
            OSError: it cannot be read now.
            InputError: it is malformed and indexing must stop; the message names file and line.
        """

    def lines(self, path: Path) -> int:
        """How many lines a file of records has, or what else `SourceDocument.record` counts; for progress.

        Raises:
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK), b""))


@dataclass
class SourceFile:
    """A file to read.

    Attributes:
        path: its path.
        name: its path relative to the indexed folder, made printable; ids of its documents begin with it.
        max_bytes: `data` and `text` refuse larger files.
        delimiter: for a table, the delimiter that the user gave, if any.
        fields: for a file of records, which of its fields are the `id`, the `text` and the `title`, where they have
            other names: {"text": "comment"}.
        text_columns: for a table, columns whose cells stay text, by their names in the index.
        misfits: for a table, filled with the cells that rule out a type for a column.
        may_be_empty: whether a file of records may have none.
        skipped: filled with the parts that were skipped.
    """

    path: Path
    name: str
    max_bytes: int = MAX_FILE_BYTES
    delimiter: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
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
        headings: Iterable[Heading] = (),
        pages: Iterable[Page] = (),
    ) -> SourceDocument:
        """A document of this file.

        Args:
            part: distinguishes it from the file's other documents; the id is the file's name, "/" and this.
            title: the file's name by default.
            line: line of the file where the text begins, from 1; 0 where lines of `text` are not lines of the file.
            kind: how the document is cut into chunks.
            headings: which lines of `text` are headings, for files whose markup says so but is not in the text.
            pages: at which lines of `text` pages begin; each chunk gets the number of its page as metadata.
        """
        identifier = f"{self.name}/{part}" if part else self.name
        return SourceDocument(
            identifier,
            title or self.name,
            text,
            dict(metadata or {}),
            self.name,
            line,
            kind,
            headings=tuple(headings),
            pages=tuple(pages),
        )

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
        """The file's UTF-8 text, without a byte order mark.

        Raises:
            UnreadableFile: as for `data`, or the file is empty or not UTF-8 text.
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
