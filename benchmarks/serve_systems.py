"""What runs beside the servers in workers of its own: embedding documents, the quality's vectors, the demo's index, and
transformers' `generate` then encode as the peer on a GPU.

The servers themselves are real `search-r3 serve` processes (serve_client.py). Everything here goes through `SearchR3`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
"""Texts a pass, which is also the server's."""
WARM_UP = BATCH
"""Documents embedded before any is timed."""
TINY_PASSAGES = 60
"""Of the demo's corpus in a tiny run."""


@dataclass(frozen=True)
class Spec:
    """What a worker is to be.

    Attributes:
        job: "texts" (documents, quality, index) or "peer" (ours and generate-then-encode side by side).
        model, engine, dtype, device: as `SearchR3.from_pretrained` takes them.
        threads: torch's; None for its own choice.
        texts: JSON file of `Texts`.
        document_tokens: where documents are cut.
        budget: tokens of reasoning.
        tiny: the demo's index is of a few passages.
    """

    job: str
    model: str
    engine: str
    dtype: str
    device: str
    threads: int | None
    texts: str
    document_tokens: int
    budget: int
    tiny: bool = False


Answer = Callable[[str], dict[str, Any]]


def load(spec: Spec) -> tuple[dict[str, Any], Answer]:
    """What to say when loaded, and the function from a line to its answer: "COMMAND ARGUMENT"."""
    import torch
    from transformers.utils import logging

    from search_r3 import SearchR3

    logging.disable_progress_bar()
    if spec.threads:
        torch.set_num_threads(spec.threads)
    started = time.perf_counter()
    model = SearchR3.from_pretrained(spec.model, device=spec.device, engine=spec.engine, dtype=spec.dtype)
    about = {
        "model": model.name,
        "dtype": model.dtype,
        "dimension": model.dimension,
        "contract_hash": model.contract_hash,
        "threads": torch.get_num_threads(),
        "load_seconds": round(time.perf_counter() - started, 2),
    }
    texts = json.loads(Path(spec.texts).read_text(encoding="utf-8"))
    if spec.job == "peer":
        commands = _peer(spec, model, texts)
    else:
        commands = {
            "documents": lambda _: _documents(spec, model, texts["documents"]),
            "warm": lambda _: _documents(spec, model, texts["documents"][:WARM_UP]),
            "quality": lambda folder: _quality(spec, model, texts["pool"], Path(folder)),
            "index": lambda folder: _index(spec, model, Path(folder)),
        }

    def answer(line: str) -> dict[str, Any]:
        command, _, argument = line.partition(" ")
        return commands[command](argument)

    return about, answer


def _documents(spec: Spec, model: Any, texts: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    model.encode_document(texts, max_length=spec.document_tokens, batch_size=BATCH, show_progress_bar=False)
    return {"seconds": time.perf_counter() - started}


def _quality(spec: Spec, model: Any, pool: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    """Vectors of the pool's documents, and of its queries off and on, as `folder`/NAME.npy; and the analyses."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"batch_size": BATCH, "show_progress_bar": False}
    documents = model.encode_document(pool["documents"], max_length=spec.document_tokens, **options)
    off = model.encode_query(pool["queries"], reasoning=False, **options)
    on = model.reason(pool["queries"], max_reasoning_tokens=spec.budget, **options)
    for name, vectors in (("documents", documents), ("off", off), ("on", np.stack([one.embedding for one in on]))):
        np.save(folder / f"{name}.npy", vectors)
    return {"analyses": [[int(token) for token in one.reasoning_ids] for one in on]}


def _index(spec: Spec, model: Any, folder: Path) -> dict[str, Any]:
    """The index of `search-r3 demo`, in the demo's own folder unless this run is tiny; made only where it is not."""
    from search_r3.demo import COMMIT_EVERY, choose, standard_library
    from search_r3.index.build.build_index import build_index
    from search_r3.model.resolve import cache_dir

    def num_tokens(text: str) -> int:
        return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    passages = choose(standard_library(), num_tokens)
    name = f"{model.name}-{model.contract_hash[:12]}"
    place = folder / name if spec.tiny else cache_dir() / "demo" / name
    report = build_index(
        place,
        iter(passages[:TINY_PASSAGES] if spec.tiny else passages),
        model,
        progress=False,
        commit_every=COMMIT_EVERY,
    )
    return {"folder": str(place), "passages": len(passages), "embedded": report.embedded}


def _peer(spec: Spec, model: Any, texts: dict[str, Any]) -> dict[str, Answer]:
    """Reasoned queries by `model`, and by transformers: generate with left padding, then a pass over all of it."""
    from encode import TwoPass

    from search_r3 import SearchR3

    plain = model
    if spec.engine not in ("auto", "torch"):
        dtype = model.dtype if model.dtype in ("float32", "bfloat16") else "float32"
        plain = SearchR3.from_pretrained(spec.model, spec.device, "torch", dtype)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "merged"
        plain.save_pretrained(folder)
        two_pass = TwoPass(plain, folder, spec.device, spec.budget)
    given = texts["queries"]

    def ours(queries: list[str], size: int) -> list[Any]:
        return model.reason(queries, max_reasoning_tokens=spec.budget, batch_size=size, show_progress_bar=False)

    def agree(line: str) -> dict[str, Any]:
        """How many analyses are the same token for token, and how far apart those queries' vectors are."""
        size = int(line)
        queries = given[:size]
        own, other = ours(queries, size), two_pass(queries, size)
        same = [mine.token_ids == ids for mine, (ids, _) in zip(own, other, strict=True)]
        far = [1 - float(a.embedding @ b) for a, (_, b), one in zip(own, other, same, strict=True) if one]
        return {
            "queries": size,
            "same_analysis": sum(same),
            "largest_cosine_distance": max(far, default=None),
            "mean_reasoning_tokens": float(np.mean([one.num_tokens for one in own])),
        }

    def timed(run: Callable[[list[str], int], Any]) -> Answer:
        warm: set[int] = set()

        def answer(line: str) -> dict[str, Any]:
            size, first, count = map(int, line.split())
            queries = given[first : first + count]
            if size not in warm:
                run(queries, size)
                warm.add(size)
            started = time.perf_counter()
            run(queries, size)
            return {"seconds": time.perf_counter() - started}

        return answer

    return {"agree": agree, "ours": timed(ours), "peer": timed(two_pass)}
