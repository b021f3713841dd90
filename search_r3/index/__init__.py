"""What a search engineer uses: read documents, build an index, search it.

from search_r3.index import SearchIndex, build_index, open_source
report = build_index("my-index", open_source("docs/"), model)
result = SearchIndex.open("my-index").search("how do I resume a run?", model, k=5)
"""

from importlib.util import find_spec

from search_r3.errors import InputError

try:
    import lancedb as lancedb
    import pyarrow as pyarrow

    if find_spec("lance") is None:  # loaded by who writes
        raise ImportError("no module named lance")
except ImportError as error:
    raise InputError("the index needs LanceDB and pylance: pip install 'search-r3[search]'") from error

from search_r3.index.approximate import Approximate
from search_r3.index.build import IndexReport, build_index
from search_r3.index.chunking import Chunk, chunk_document
from search_r3.index.encoder import Encoder
from search_r3.index.maintenance import (
    UnknownDocument,
    compact_index,
    delete_documents,
    maintain_index,
    update_documents,
)
from search_r3.index.readers import Skipped, SourceDocument, open_source, summarise_skipped
from search_r3.index.search import Hit, ReasoningTrace, SearchResult, Timings
from search_r3.index.table import IndexInfo, SearchIndex

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
    "maintain_index",
    "open_source",
    "summarise_skipped",
    "update_documents",
]
