"""SearchR3 as the embedding model of LlamaIndex.

pip install 'search-r3[llama-index]'
python examples/llama_index_search.py "how do I delete a folder"
"""

from __future__ import annotations

import argparse

from llama_index.core import Document, VectorStoreIndex

from search_r3.integrations.llama_index import SearchR3Embedding

TEXTS = [
    "shutil.rmtree: delete an entire directory tree.",
    "os.mkdir: create a directory.",
    "time.sleep: suspend the calling thread for some seconds.",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", help="by default the default adapter")
    options = parser.parse_args(arguments)

    embedding = SearchR3Embedding(options.model, max_reasoning_tokens=16)
    index = VectorStoreIndex.from_documents([Document(text=text) for text in TEXTS], embed_model=embedding)
    for found in index.as_retriever(similarity_top_k=2).retrieve(options.question):
        print(f"{found.score:.3f}  {found.text}")


if __name__ == "__main__":
    main()
