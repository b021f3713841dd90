"""A coverage-guided fuzz target over the readers of files; `test_readers_any_bytes.py` holds the same by properties.

    pip install atheris                              # Linux; not among the tests' requirements
    python tests/fuzz_readers.py -runs=100000        # libFuzzer's options; a crash leaves the file that made it

The first byte chooses the reader, the others are the file. Anything but a result or InputError is a find.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["search_r3"]):
    from search_r3.data.beir import load_beir
    from search_r3.data.pairs import read_pairs
    from search_r3.data.recipe import read_recipe
    from search_r3.data.sources.registry import SOURCES
    from search_r3.errors import InputError
    from search_r3.evaluation.runs import read_run
    from search_r3.evaluation.suite_config import SuitePlan
    from search_r3.index.chunking.chunker import chunk_document
    from search_r3.index.readers.csv_file import read_csv
    from search_r3.index.readers.path_source import open_source
    from search_r3.model.checkpoint import CONTRACT_FILE, read_record
    from search_r3.model.contract import Contract
    from search_r3.training.config import load_config
    from search_r3.training.sft.sft_config import SFTConfig

PLACE = Path(tempfile.mkdtemp(prefix="fuzz-"))
CORPUS = b'{"_id": "d1", "title": "T", "text": "words"}\n'
QUERIES = b'{"_id": "q1", "text": "a question"}\n'
QRELS = b"query-id\tcorpus-id\tscore\nq1\td1\t1\n"


def written(name: str, data: bytes) -> Path:
    """`data` as the file `name` in a folder of its own."""
    file = PLACE / name.replace(".", "-") / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    return file


def beir(data: bytes, name: str) -> Any:
    """A data set of which one file is `data`."""
    files = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.tsv": QRELS, name: data}
    for path, content in files.items():
        (PLACE / "beir" / path).parent.mkdir(parents=True, exist_ok=True)
        (PLACE / "beir" / path).write_bytes(content)
    return load_beir(PLACE / "beir", "test")


def contract(data: bytes) -> Any:
    """A model folder's contract."""
    record = read_record(written(CONTRACT_FILE, data).parent)
    return record and Contract.from_dict(record["contract"], "here")


def chunks(data: bytes, name: str) -> Any:
    """What would be indexed of a folder with one file."""
    return [list(chunk_document(document)) for document in open_source(written(name, data).parent)]


READERS: list[Callable[[bytes], Any]] = [
    lambda data: read_pairs(written("pairs.jsonl", data)),
    lambda data: read_recipe(written("recipe.yaml", data), SOURCES),
    lambda data: load_config(written("sft.yaml", data), SFTConfig, []),
    lambda data: load_config(written("suite.yaml", data), SuitePlan, []),
    lambda data: read_run(written("a.run.gz", data)),
    lambda data: list(read_csv(written("a.csv", data))),
    lambda data: beir(data, "corpus.jsonl"),
    lambda data: beir(data, "qrels/test.tsv"),
    lambda data: chunks(data, "page.md"),
    lambda data: chunks(data, "page.rst"),
    lambda data: chunks(data, "module.py"),
    contract,
]


def one(data: bytes) -> None:
    """libFuzzer's entry."""
    if data:
        with contextlib.suppress(InputError):
            READERS[data[0] % len(READERS)](data[1:])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
