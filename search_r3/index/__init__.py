"""What a search engineer uses: read documents, build an index, search it.

from search_r3.index import SearchIndex, build_index, open_source
report = build_index("my-index", open_source("docs/"), model)
result = SearchIndex.open("my-index").search("how do I resume a run?", model, k=5)
"""

from search_r3.index.approximate import Approximate
from search_r3.index.build import IndexReport, build_index
from search_r3.index.chunking import Chunk, chunk_document
from search_r3.index.maintenance import UnknownDocument, compact_index, delete_documents, update_documents
from search_r3.index.readers import Skipped, SourceDocument, open_source, summarise_skipped
from search_r3.index.search import Hit, ReasoningTrace, SearchResult, Timings
from search_r3.index.table import Encoder, IndexInfo, SearchIndex

__all__ = [
    "Approximate",
    "Chunk",
    "Encoder",
    "Hit",
    "IndexInfo",
    "IndexReport",
    "ReasoningTrace",
    "SearchIndex",
    "SearchResult",
    "Skipped",
    "SourceDocument",
    "Timings",
    "UnknownDocument",
    "build_index",
    "chunk_document",
    "compact_index",
    "delete_documents",
    "open_source",
    "summarise_skipped",
    "update_documents",
]
