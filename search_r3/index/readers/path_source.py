"""The documents at a path: a BEIR folder, a file of records, a folder of files, or a single file.

Each file is read by its reader (`document_reader`). In a folder, files that have no reader or cannot be read are
skipped, and every skip is recorded with its reason.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from search_r3.data.io.delimited import parse_delimiter
from search_r3.data.io.jsonl import read_jsonl
from search_r3.errors import InputError
from search_r3.files import why_missing
from search_r3.index.readers.csv_file import OWN, Misfits
from search_r3.index.readers.document_reader import MAX_FILE_BYTES, DocumentReader, SourceFile, UnreadableFile
from search_r3.index.readers.file_filter import FileFilter
from search_r3.index.readers.reader_registry import reader_of, readers
from search_r3.index.readers.record_readers import TABLE
from search_r3.index.readers.text_readers import PLAIN_TEXT
from search_r3.index.seen_ids import SeenIds
from search_r3.index.source_document import Skipped, SourceDocument

MAX_QUERIES = 10_000
SKIPPED_FOLDERS = {"node_modules", "__pycache__", "venv", "site-packages"}  # and hidden folders


@dataclass(frozen=True)
class Amount:
    """How much of a source: a number of files or records, and their size, in bytes for files, in lines for records."""

    count: int = 0
    size: int = 0

    def towards(self, end: Amount, share: float) -> Amount:
        """The amount at `share` (0 to 1) of the way to `end`."""
        return Amount(
            self.count + int(share * (end.count - self.count)), self.size + int(share * (end.size - self.size))
        )


class PathSource:
    """The documents at one path, read again on each iteration.

    Iterating raises InputError for a malformed record, for an id that is used twice, and at the end if there were no
    documents.

    Attributes:
        skipped: filled during iteration.
        text_columns: columns of a table to keep as text, by their names in the index.
        misfits: why other columns of a table are text; filled during iteration.
        may_be_empty: whether having no documents is allowed.
        if_empty: added to the error if there are no documents.
        position: how much was read so far; updated during iteration.
        include: patterns of the only files of a folder to read, as in `.gitignore`; none for all.
        exclude: patterns of files and folders of a folder to leave out.
        only: paths of a folder, relative to it, to read; of a folder among them, all that is in it. None reads all. A
            build then leaves the index's other documents alone.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        read: Callable[[PathSource], Iterator[SourceDocument]],
        lines: Callable[[Path], int] = lambda path: 0,
    ) -> None:
        self.path = path
        self.kind = kind
        self.skipped: list[Skipped] = []
        self.text_columns: set[str] = set()
        self.misfits: Misfits = {}
        self.may_be_empty = False
        self.if_empty = ""
        self.position = Amount()
        self.include: tuple[str, ...] = ()
        self.exclude: tuple[str, ...] = ()
        self.only: frozenset[str] | None = None
        self._read = read
        self._lines = lines

    def __iter__(self) -> Iterator[SourceDocument]:
        self.skipped.clear()
        self.position = Amount()
        seen = SeenIds()
        for document in self._read(self):
            line = document.record or document.line
            if document.record:
                self.position = Amount(self.position.count + 1, line)
            if (first := seen.add(document.id, str(line))) is not None:
                raise InputError(
                    f'{self.path}, line {line}: the id "{document.id}" was already used on line '
                    f"{first}; make ids unique"
                )
            yield document
        if not seen and not self.may_be_empty:
            nothing = "it has no files of a known format" if self.kind == "folder" else "it has no records"
            why = "; ".join(summarize_skipped(self.skipped)) or nothing
            raise InputError(f"{self.path}: nothing to index ({why}){self.if_empty}")

    def filter(self) -> FileFilter:
        """Which files of the folder are read, by the `.gitignore` files as they are now."""
        return FileFilter(self.path, self.include, self.exclude)

    def _files(self) -> list[Path]:
        """The files of the folder that are read."""
        return [path for path in _walk(self.path, [], self.filter()) if _is_read(path)]

    def listing(self) -> dict[str, tuple[int, int]]:
        """The files that are read, by their names in the folder: size, and time of the last change in nanoseconds.

        If two listings are equal, no file was added, removed or written in between.
        """
        found = {}
        for path in self._files() if self.kind == "folder" else [self.path]:
            with suppress(OSError):  # gone since it was listed
                state = path.stat()
                name = path.name if path == self.path else _relative(path, self.path)
                found[name] = (state.st_size, state.st_mtime_ns)
        return found

    def measure(self) -> Amount:
        """How much there is to read, in the units of `position`. Files are not read, only listed; of a file of records
        the lines are counted (`DocumentReader.lines`), and the number of records is not known (0).

        Raises:
            OSError: a file of records cannot be read.
        """
        if self.kind == "folder":
            sizes = [_size(path) for path in self._files()]
            return Amount(len(sizes), sum(sizes))
        if self.kind == "file":
            return Amount(1, _size(self.path))
        return Amount(0, self._lines(self.path))


def open_source(
    path: str | Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    delimiter: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    fields: Mapping[str, str] | None = None,
) -> PathSource:
    """Determine what is at `path` and how to read it: the kind is "folder", "file", "jsonl", "csv", "beir", or that of
    another package's reader of records.

    Args:
        path: a folder with `corpus.jsonl` (BEIR); a `.jsonl` file whose objects have `id` (or `_id`), `text` and
            perhaps `title`, everything else being metadata; a `.csv` or `.tsv` file with the same names in its header;
            a folder of text files; or one text file.
        max_file_bytes: larger text files of a folder are skipped; other formats may be larger (`size_factor`). Files of
            records may have any size.
        delimiter: for a table, a character or "comma", "semicolon", "tab" or "pipe"; None detects it. If given, a file
            of any name is read as a table.
        include: patterns of the only files of a folder to read, as in `.gitignore` ("*.pdf", "docs/"); none for all.
        exclude: patterns of files and folders of a folder to leave out.
        fields: for records, {"id", "text" or "title": the field or column that is it}, where it has another name.

    Raises:
        InputError: there is no such path, it is not readable, or it is neither a file nor a folder; a delimiter is
            given for something that is not a table, fields for something that has no records, or patterns for
            something that is not a folder; a pattern is not valid; or another package's reader cannot be loaded.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        why = why_missing(path) if path.is_symlink() else (error.strerror or str(error))
        raise InputError(f"{path}: {why}; give a folder, or a .jsonl, .csv or text file") from error
    if stat.S_ISDIR(mode):
        _refuse_delimiter(path, delimiter)
        if not os.access(path, os.R_OK | os.X_OK):
            raise InputError(f"{path}: you may not read this folder; change its permissions")
        for reader in readers():
            if reader.folder_file and (path / reader.folder_file).is_file():
                return _records(path / reader.folder_file, reader, fields)
        _refuse_fields(path, fields)
        folder = PathSource(path, "folder", lambda source: _folder(source, max_file_bytes))
        folder.include, folder.exclude = tuple(include), tuple(exclude)
        folder.filter()  # says now what is wrong with a pattern
        return folder
    if patterns := [*include, *exclude]:
        raise InputError(f"{path}: {patterns[0]!r} chooses files of a folder, and this is a file; give none")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is neither a file nor a folder; give a file or a folder")
    reader = reader_of(path) or PLAIN_TEXT
    if delimiter is not None and (reader.kind == "file" or reader.kind == TABLE.kind):
        return _records(path, TABLE, fields, parse_delimiter(delimiter))
    _refuse_delimiter(path, delimiter)
    if reader.kind != "file":
        return _records(path, reader, fields)
    _refuse_fields(path, fields)
    return PathSource(path, "file", lambda source: _one_file(source, reader, max_file_bytes))


def _refuse_delimiter(path: Path, delimiter: str | None) -> None:
    if delimiter is not None:
        raise InputError(f"{path}: a delimiter is given ({delimiter!r}), but only a table such as a .csv file has one")


def sample_queries(source: PathSource, most: int = MAX_QUERIES) -> list[str]:
    """The first `most` queries next to a BEIR corpus; none for other sources, or if they are malformed.

    They are only used to measure an index, so problems with them are not errors.
    """
    path = source.path.parent / "queries.jsonl"
    if source.kind != "beir" or not path.is_file():
        return []
    try:
        texts = (value.get("text") for _, value in itertools.islice(read_jsonl(path), most))
        return [text for text in texts if isinstance(text, str) and text.strip()]
    except InputError:
        return []


def summarize_skipped(skipped: list[Skipped], examples: int = 3) -> list[str]:
    """One line per reason, most frequent first: "12 skipped: larger than 10 MB (a.txt, b.txt, c.txt, ...)"."""
    lines = []
    for reason, count in Counter(item.reason for item in skipped).most_common():
        paths = [item.path for item in skipped if item.reason == reason]
        more = ", ..." if count > examples else ""
        lines.append(f"{count:,} skipped: {reason} ({', '.join(paths[:examples])}{more})")
    return lines


def _refuse_fields(path: Path, fields: Mapping[str, str] | None) -> None:
    if fields:
        raise InputError(f"{path}: fields are named ({', '.join(fields)}), but only a file of records has fields")


def _records(
    path: Path, reader: DocumentReader, fields: Mapping[str, str] | None, delimiter: str | None = None
) -> PathSource:
    """A file of records, one in memory at a time."""
    own = dict(fields or {})
    if unknown := own.keys() - set(OWN):
        raise InputError(f'"{min(unknown)}" is no field of a document; name its {", ".join(OWN)}')
    if len(set(own.values())) < len(own):
        raise InputError(f"one field is named for two of {', '.join(own)}; give each its own")

    def read(source: PathSource) -> Iterator[SourceDocument]:
        file = SourceFile(path, path.name, delimiter=delimiter, fields=own, may_be_empty=source.may_be_empty)
        file.text_columns, file.misfits, file.skipped = source.text_columns, source.misfits, source.skipped
        yield from reader.read(file)

    return PathSource(path, reader.kind, read, reader.lines)


# ------------------------------------------------------------------------------------------------------------- folders


def _folder(source: PathSource, max_file_bytes: int) -> Iterator[SourceDocument]:
    root = source.path
    chosen = source.filter()
    paths = _walk(root, source.skipped, chosen) if source.only is None else _walk_only(source, chosen)
    for path in paths:
        name = printable(path.relative_to(root).as_posix())
        reader = reader_of(path)
        if reader is None or reader.kind != "file":
            source.skipped.append(Skipped(name, _why_not(path, reader)))
            continue
        documents = _documents_of(SourceFile(path, name, max_file_bytes * reader.size_factor), reader)
        source.position = Amount(source.position.count + 1, source.position.size + _size(path))
        if isinstance(documents, Skipped):
            source.skipped.append(documents)
        else:
            yield from documents


def _one_file(source: PathSource, reader: DocumentReader, max_file_bytes: int) -> Iterator[SourceDocument]:
    most = max_file_bytes * reader.size_factor
    documents = _documents_of(SourceFile(source.path, printable(source.path.name), most), reader)
    if isinstance(documents, Skipped):
        raise InputError(f"{source.path} cannot be indexed: {documents.reason}")
    source.position = Amount(1, _size(source.path))
    yield from documents


def _documents_of(file: SourceFile, reader: DocumentReader) -> list[SourceDocument] | Skipped:
    """The documents of one file, or why there are none.

    Raises:
        InputError: the reader finds the file malformed; or the reader's ids do not begin with the file's name, so
            documents of two files could share an id.
    """
    try:
        documents = list(reader.read(file))
    except UnreadableFile as error:
        return Skipped(file.name, str(error), error.unread)
    except OSError as error:
        return _unread(file.name, error)
    for document in documents:
        if document.id != file.name and not document.id.startswith(f"{file.name}/"):
            raise InputError(
                f'{file.path}: {type(reader).__name__} gave the id "{document.id}"; ids of a file\'s documents are its '
                f'name, "{file.name}", or begin with it and "/": use SourceFile.document'
            )
    return documents or Skipped(file.name, "it has no documents")


def _walk_only(source: PathSource, chosen: FileFilter) -> Iterator[Path]:
    """The files of the folder that are in `source.only`, or below a path in it. Raises InputError if the folder itself
    is not there: then all of its files would seem to be gone."""
    root = source.path
    _check_there(root)
    for name in outermost(source.only or ()):
        path = root / name
        try:
            mode = path.lstat().st_mode
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                source.skipped.append(_unread(printable(name), error))
            continue
        if name == "." or (stat.S_ISDIR(mode) and would_read(root, path, True, chosen)):
            yield from _walk(root, source.skipped, chosen, path)
        elif stat.S_ISREG(mode) and would_read(root, path, False, chosen):
            yield path
    _check_there(root)


def _check_there(root: Path) -> None:
    if not root.is_dir():
        raise InputError(f"{root} is not there any more; what was indexed of it is kept")


def outermost(names: Iterable[str]) -> list[str]:
    """Relative paths without those that lie in another one of them."""
    kept: list[str] = []
    for name in sorted(set(names), key=lambda name: PurePosixPath(name).parts):
        if not kept or not PurePosixPath(name).is_relative_to(kept[-1]):
            kept.append(name)
    return kept


def _walk(root: Path, skipped: list[Skipped], chosen: FileFilter, start: Path | None = None) -> Iterator[Path]:
    """The files of a folder that are read, or of the folder `start` in it."""

    def unreadable(error: OSError) -> None:
        skipped.append(_unread(_relative(Path(error.filename), root), error))

    for folder, folders, files in os.walk(start or root, onerror=unreadable):
        keep = []
        for name in sorted(folders):
            if is_ignored_folder(name) or _is_left_out(Path(folder, name), root, True, chosen, skipped):
                continue
            if os.path.islink(os.path.join(folder, name)):
                skipped.append(Skipped(_relative(Path(folder, name), root), "a link to a folder"))
                continue
            keep.append(name)
        folders[:] = keep
        for name in sorted(files):
            file = Path(folder, name)
            if name.startswith(".") or _is_left_out(file, root, False, chosen, skipped):
                continue
            if file.is_symlink():
                skipped.append(Skipped(_relative(file, root), _about_link(file, root)))
                continue
            yield file


def _is_left_out(path: Path, root: Path, folder: bool, chosen: FileFilter, skipped: list[Skipped]) -> bool:
    """Whether patterns leave out a file or folder. What `.gitignore` leaves out is recorded: it may be a surprise."""
    name = path.relative_to(root).as_posix()
    if chosen.leaves_out(name, folder):
        return True
    if not chosen.ignores(name, folder):
        return False
    skipped.append(Skipped(_relative(path, root), "left out by .gitignore"))
    return True


def _size(path: Path) -> int:
    """The size of a file in bytes; 0 if it is not there anymore."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _about_link(file: Path, root: Path) -> str:
    """Why a symbolic link in a folder is not followed."""
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        return "a broken link"
    if not target.is_relative_to(root.resolve()):
        return "a link that leads out of the folder"
    *folders, name = target.relative_to(root.resolve()).parts
    if name.startswith(".") or any(is_ignored_folder(folder) for folder in folders) or not _is_read(target):
        return "a link to a file that is not read"
    return "a link to a file read under its own name"


def would_read(root: Path, path: Path, folder: bool | None = None, chosen: FileFilter | None = None) -> bool:
    """Whether reading the folder `root` as a source reads `path` inside it, which is a folder or a file.

    Args:
        folder: whether `path` is a folder; None looks it up.
        chosen: which files of the root are read; by default those that `.gitignore` does not name.
    """
    folder = path.is_dir() if folder is None else folder
    parts = path.relative_to(root).parts
    folders, file = (parts, None) if folder else (parts[:-1], path)
    if not parts or any(is_ignored_folder(name) for name in folders):
        return False
    if any((root / Path(*parts[:length])).is_symlink() for length in range(1, len(parts) + 1)):
        return False
    chosen = FileFilter(root) if chosen is None else chosen
    for length in range(1, len(parts) + 1):
        name, is_folder = "/".join(parts[:length]), length < len(parts) or folder
        if chosen.leaves_out(name, is_folder) or chosen.ignores(name, is_folder):
            return False
    return file is None or (not file.name.startswith(".") and _is_read(file))


def is_ignored_folder(folder: str) -> bool:
    """Whether a folder of this name is never read: hidden ones, packages, tables of an index."""
    return folder.startswith(".") or folder in SKIPPED_FOLDERS or folder.endswith((".lance", ".egg-info"))


def _is_read(file: Path) -> bool:
    """Whether a file inside a folder is read, by its name."""
    reader = reader_of(file)
    return reader is not None and reader.kind == "file"


def _why_not(file: Path, reader: DocumentReader | None) -> str:
    if reader is not None:
        return "a file of records inside a folder; index it by its own path"
    return f"not a text or source file ({file.suffix.lower()})" if file.suffix else "a file with no extension"


def _unread(name: str, error: OSError) -> Skipped:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Skipped(name, "removed while the folder was read")
    return Skipped(name, f"cannot be read ({error.strerror or error}); what was indexed of it before is kept", True)


def _relative(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path))


def printable(name: str) -> str:
    """A file name that can be printed and written: file names are bytes, and need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
