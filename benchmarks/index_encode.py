"""Real rows for `benchmarks/index.py --vectors`: distinct short texts of what is at hand, encoded once.

    python benchmarks/index_encode.py build/rows --from debian=Translation-en --from wordnet=/usr/share/wordnet \\
        --from manuals=/usr/share/man --from data=DATA/scifact/corpus.jsonl --questions DATA

A part is written aside, then renamed, so a killed run goes on with the next one; the benchmark takes the parts that are
there. The texts are chosen on the first run and kept (texts.jsonl), in random order: any number of parts is a sample.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import say
from index_texts import READERS, cut, read_questions, read_texts

from search_r3.evaluation.provenance import git_commit
from search_r3.files import atomic_path, atomic_write_text

PART = 5000
QUESTIONS = 2000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("into", type=Path)
    parser.add_argument("--from", dest="sources", action="append", default=[], metavar="KIND=PATH")
    parser.add_argument("--questions", type=Path, default=None, help="BEIR folders, whose queries are encoded as such")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--longest", type=int, default=24, help="tokens, at which texts are cut")
    parser.add_argument("--model", default=None, help="by default the default adapter")
    parser.add_argument("--engine", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, default=PART, help="texts encoded between two files")
    parser.add_argument("--parts", type=int, default=None, help="stop after so many new ones")
    options = parser.parse_args()
    for text in options.sources:
        kind, _, path = text.partition("=")
        if kind not in READERS or not path:
            parser.error(f"--from {text}: expected KIND=PATH with a kind of {', '.join(READERS)}")
    return options


def main() -> None:
    """Choose the texts unless they were, then encode what is missing."""
    options = arguments()
    import torch

    from search_r3.model.resolve import default_model
    from search_r3.model.searchr3 import SearchR3

    torch.set_num_threads(options.threads)
    model = SearchR3.from_pretrained(options.model or default_model(), device="cpu", engine=options.engine)
    about = chosen(options, model)
    if about["contract"] != model.contract_hash or about["longest"] != options.longest or about["part"] != options.part:
        raise SystemExit(f"{options.into} was begun with another model, --longest or --part; give another folder")
    texts = read_lines(options.into / "texts.jsonl")
    if options.questions and not (options.into / "questions.npy").exists():
        questions = read_lines(options.into / "questions.jsonl")
        _save(options.into / "questions.npy", model.encode_query(questions, reasoning=False))
    new = 0
    for number in range(-(-len(texts) // options.part)):
        path = part_file(options.into, number)
        if path.exists():
            continue
        begun = time.perf_counter()
        some = texts[number * options.part : (number + 1) * options.part]
        _save(path, model.encode_document(some, max_length=options.longest, batch_size=64))
        say(f"{path.name}: {len(some):,} rows in {time.perf_counter() - begun:.0f} s")
        new += 1
        if new == options.parts:
            break


def chosen(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """about.json of the folder; on the first run the texts are read from the sources and kept beside it."""
    about = options.into / "about.json"
    if not about.exists():
        options.into.mkdir(parents=True, exist_ok=True)
        sources = [(kind, Path(path)) for kind, _, path in (text.partition("=") for text in options.sources)]
        if not sources:
            raise SystemExit("no texts yet: give --from KIND=PATH")
        found, counts = read_texts(sources, options.seed)
        texts, shortened = cut(model.tokenizer, found, options.longest, options.rows)
        if not texts:
            raise SystemExit("the sources have no sentence")
        questions: list[str] = []
        if options.questions:
            questions = read_questions(options.questions, options.longest, options.seed, QUESTIONS)
        for name, lines in (("texts.jsonl", texts), ("questions.jsonl", questions)):
            atomic_write_text(options.into / name, "".join(json.dumps(line) + "\n" for line in lines))
        record = {"texts": len(texts), "cut": shortened, "sources": counts, "questions": len(questions)}
        record |= {"model": model.name, "contract": model.contract_hash, "engine": options.engine}
        record |= {"longest": options.longest, "seed": options.seed, "part": options.part, "commit": git_commit()}
        atomic_write_text(about, json.dumps(record, indent=2) + "\n")
    return json.loads(about.read_text(encoding="utf-8"))


def part_file(folder: Path, number: int) -> Path:
    """Where the vectors of part `number` are."""
    return folder / f"rows-{number:04d}.npy"


def read_lines(path: Path) -> list[str]:
    """The texts of a file of JSON strings, one a line."""
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def _save(path: Path, vectors: np.ndarray) -> None:
    with atomic_path(path) as scratch:
        np.save(scratch, vectors.astype(np.float32))


if __name__ == "__main__":
    main()
