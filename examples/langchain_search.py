"""SearchR3 in LangChain: its embeddings in any vector store, and its index as a retriever.

pip install 'search-r3[langchain,search]'
python examples/langchain_search.py --index notes-index "which license did we choose"
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("LANGSMITH_TRACING", "false")

from langchain_core.vectorstores import InMemoryVectorStore

from search_r3.integrations.langchain import SearchR3Embeddings, SearchR3Retriever

TEXTS = [
    "shutil.rmtree: delete an entire directory tree.",
    "os.mkdir: create a directory.",
    "time.sleep: suspend the calling thread for some seconds.",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", help="by default the default adapter")
    parser.add_argument("--index", type=Path, help="an index that `search-r3 index` made")
    options = parser.parse_args(arguments)

    store = InMemoryVectorStore(SearchR3Embeddings(options.model, max_reasoning_tokens=16))
    store.add_texts(TEXTS)
    for document, score in store.similarity_search_with_score(options.question, k=2):
        print(f"{score:.3f}  {document.page_content}")

    if options.index:
        retriever = SearchR3Retriever(index=options.index, model=options.model, k=3, reasoning=False)
        for document in retriever.invoke(options.question):
            print(f"{document.metadata['document']}: {document.page_content[:80]}")


if __name__ == "__main__":
    main()
