"""What a search engineer uses: read documents, build an index, search it.

from search_r3.index import SearchIndex, build_index, open_source
report = build_index("my-index", open_source("docs/"), model)
result = SearchIndex.open("my-index").search("how do I resume a run?", model, k=5)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.index.backends.backend_registry import register_backend
    from search_r3.index.backends.index_backend import IndexBackend
    from search_r3.index.backup import IndexCopy, backup_index, restore_index
    from search_r3.index.build.build_index import IndexReport, build_index
    from search_r3.index.chunking.chunker import Chunk, chunk_document
    from search_r3.index.encoder_protocol import Encoder
    from search_r3.index.index_info import ApproximateIndex, IndexInfo
    from search_r3.index.maintenance import (
        Deleted,
        UnknownDocument,
        compact_index,
        delete_documents,
        delete_source,
        maintain_index,
        update_documents,
    )
    from search_r3.index.readers.document_reader import DocumentReader, SourceFile, UnreadableFile
    from search_r3.index.readers.path_source import open_source, summarize_skipped
    from search_r3.index.readers.reader_registry import register_reader
    from search_r3.index.run_search import Hit, ReadPassage, ReasoningTrace, SearchResult, Timings
    from search_r3.index.search_index import DocumentPage, ListedDocument, SearchIndex
    from search_r3.index.source_document import Heading, Page, Skipped, SourceDocument

if missing := [name for name in ("lancedb", "lance", "pyarrow") if find_spec(name) is None]:
    raise InputError(
        f"the index needs LanceDB and pylance (no module named {missing[0]}): pip install 'search-r3[search]'"
    )

_MODULES = {
    "backup": "IndexCopy backup_index restore_index",
    "build.build_index": "build_index",
    "build.build_report": "IndexReport",
    "chunking.chunker": "Chunk chunk_document",
    "readers.document_reader": "DocumentReader SourceFile UnreadableFile",
    "encoder_protocol": "Encoder",
    "maintenance": "Deleted UnknownDocument compact_index delete_documents delete_source maintain_index "
    "update_documents",
    "readers.reader_registry": "register_reader",
    "readers.path_source": "open_source summarize_skipped",
    "run_search": "Hit ReadPassage ReasoningTrace SearchResult Timings",
    "source_document": "Heading Page Skipped SourceDocument",
    "backends.index_backend": "IndexBackend",
    "index_info": "ApproximateIndex IndexInfo",
    "search_index": "DocumentPage ListedDocument SearchIndex",
    "backends.backend_registry": "register_backend",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """The public names, from their modules when they are first used: LanceDB alone takes a second to import."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


__all__ = [
    "ApproximateIndex",
    "Chunk",
    "Deleted",
    "DocumentPage",
    "DocumentReader",
    "Encoder",
    "Heading",
    "Hit",
    "IndexBackend",
    "IndexCopy",
    "IndexInfo",
    "IndexReport",
    "ListedDocument",
    "Page",
    "ReadPassage",
    "ReasoningTrace",
    "SearchIndex",
    "SearchResult",
    "Skipped",
    "SourceDocument",
    "SourceFile",
    "Timings",
    "UnknownDocument",
    "UnreadableFile",
    "backup_index",
    "build_index",
    "chunk_document",
    "compact_index",
    "delete_documents",
    "delete_source",
    "maintain_index",
    "open_source",
    "register_backend",
    "register_reader",
    "restore_index",
    "summarize_skipped",
    "update_documents",
]
