"""Readers of text files, one document per file: plain text, Markdown, reStructuredText, Python, other source code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from search_r3.index.readers.document_reader import DocumentReader, SourceFile
from search_r3.index.source_document import Kind, SourceDocument

CODE_SUFFIXES = (
    ".c .cc .cfg .clj .cmake .conf .cpp .cs .css .cu .cuh .dart .el .erl .ex .exs .go .gradle .graphql .h .hh .hpp .hs "
    ".ini .java .jl .js .jsx .kt .kts .less .lisp .lua .m .ml .mli .mm .nim .php .pl .pm .proto .ps1 .pyx .r .rb "
    ".rs .sass .scala .scm .scss .sh .bash .zsh .sql .svelte .swift .tcl .tf .toml .ts .tsx .v .vhd .vim .vue .yaml "
    ".yml .zig"
)


class TextFileReader(DocumentReader):
    """Reads a text file as one document, titled with its name; `cut_as` says how it is cut into chunks."""

    cut_as: ClassVar[Kind]

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        yield file.document(file.text(), kind=self.cut_as)


class PlainTextReader(TextFileReader):
    """Plain text, cut at blank lines."""

    suffixes = (".txt", ".text", ".adoc", ".org", ".tex")
    names = ("readme", "license", "licence", "changelog", "changes", "authors", "contributing", "notice", "news")
    cut_as = "text"


class MarkdownReader(TextFileReader):
    """Markdown, cut at its headings."""

    suffixes = (".md", ".markdown", ".mdx")
    cut_as = "markdown"


class RstReader(TextFileReader):
    """reStructuredText, cut at its headings."""

    suffixes = (".rst",)
    cut_as = "rst"


class PythonReader(TextFileReader):
    """Python, cut at its classes and functions."""

    suffixes = (".py", ".pyi")
    cut_as = "python"


class CodeReader(TextFileReader):
    """Source code of other languages and configuration files, cut at blank lines."""

    suffixes = tuple(CODE_SUFFIXES.split())
    names = ("makefile", "dockerfile", "rakefile", "gemfile", "justfile")
    cut_as = "code"


PLAIN_TEXT = PlainTextReader()
"""Also reads files of any other name that are indexed by their own path."""
READERS: tuple[DocumentReader, ...] = (MarkdownReader(), RstReader(), PythonReader(), CodeReader(), PLAIN_TEXT)
