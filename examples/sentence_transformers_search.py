"""An export in sentence-transformers: direct embedding with that library alone, without search_r3.

search-r3 export search-r3-smollm2-135m-sft exported --format sentence-transformers
python examples/sentence_transformers_search.py exported "how do I delete a folder"
"""

from __future__ import annotations

import argparse

from sentence_transformers import SentenceTransformer

TEXTS = [
    "shutil.rmtree: delete an entire directory tree.",
    "os.mkdir: create a directory.",
    "time.sleep: suspend the calling thread for some seconds.",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="a folder that `search-r3 export --format sentence-transformers` wrote")
    parser.add_argument("question")
    options = parser.parse_args(arguments)

    model = SentenceTransformer(options.export)
    scores = model.similarity(model.encode_query([options.question]), model.encode_document(TEXTS))[0]
    for score, text in sorted(zip(scores.tolist(), TEXTS, strict=True), reverse=True)[:2]:
        print(f"{score:.3f}  {text}")


if __name__ == "__main__":
    main()
