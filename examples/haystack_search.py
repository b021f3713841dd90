"""SearchR3 in Haystack: one component embeds documents, another reasons about queries and embeds them.

pip install 'search-r3[haystack]'
python examples/haystack_search.py "how do I delete a folder"
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore

from search_r3.integrations.haystack import SearchR3DocumentEmbedder, SearchR3TextEmbedder

DOCUMENTS = [
    Document(content="delete an entire directory tree.", meta={"title": "shutil.rmtree"}),
    Document(content="create a directory.", meta={"title": "os.mkdir"}),
    Document(content="suspend the calling thread for some seconds.", meta={"title": "time.sleep"}),
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", default="", help="by default the default adapter")
    options = parser.parse_args(arguments)

    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    indexing = SearchR3DocumentEmbedder(options.model, meta_fields_to_embed=["title"])
    store.write_documents(indexing.run(DOCUMENTS)["documents"])

    searching = Pipeline()
    searching.add_component("embedder", SearchR3TextEmbedder(options.model, max_reasoning_tokens=16))
    searching.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=2))
    searching.connect("embedder.embedding", "retriever.query_embedding")
    for found in searching.run({"embedder": {"text": options.question}})["retriever"]["documents"]:
        print(f"{found.score:.3f}  {found.meta['title']}: {found.content}")


if __name__ == "__main__":
    main()
