"""Reasoning traces for training, sampled from the model itself; per query, the sample that says most about its
document.

Several short traces are sampled for a query; the one with most of the positive's rare words that the query lacks is
kept, and none if no trace has any. This is a cheap substitute for O1-Embedder's committee of retrievers (arXiv
2502.07555): a sample is worth learning if it brings the query closer to its answer.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from search_r3.data.io.jsonl import read_jsonl
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.errors import InputError

BLOCK = 128
"""Queries whose traces are written to disk together; an interrupted run resumes after the last complete block."""
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]{2,}")


def add_self_reasoning(
    source: str | Path,
    output: str | Path,
    model: Any,
    *,
    limit: int | None = None,
    samples: int = 4,
    max_tokens: int = 24,
    temperature: float = 0.8,
    seed: int = 0,
    batch_size: int = 128,
    report: Any = None,
) -> dict[str, int]:
    """Write the pairs of `source` to `output`, the first `limit` of them with a reasoning trace if a useful one was
    found.

    Args:
        model: a SearchR3 model, usually the base.
        samples: traces sampled for each query.
        report: called with (done, total) after each block.

    Returns:
        counts: pairs, asked, kept.

    Raises:
        InputError: `source` cannot be read, or `output` cannot be written.
    """
    if samples < 1:
        raise InputError(f"samples must be 1 or more, got {samples}")
    pairs = read_pairs(source)
    asked = pairs[:limit]
    weight = rarity(pair.positive for pair in pairs)
    partial = Path(f"{output}.partial")
    found = _finished(partial, asked)
    with open(partial, "a", encoding="utf-8") as handle:
        for start in range(len(found), len(asked), BLOCK):
            block = asked[start : start + BLOCK]
            texts = [pair.query for pair in block for _ in range(samples)]
            reasoned = model.reason(
                texts,
                max_reasoning_tokens=max_tokens,
                temperature=temperature,
                seed=seed + start,
                batch_size=batch_size,
                show_progress_bar=False,
            )
            for i, pair in enumerate(block):
                drafts = [tidy(r.text, r.forced) for r in reasoned[i * samples : (i + 1) * samples]]
                chosen = best(pair, drafts, weight)
                found[pair.id] = chosen
                handle.write(json.dumps({"id": pair.id, "reasoning": chosen}) + "\n")
            handle.flush()
            if report:
                report(min(start + BLOCK, len(asked)), len(asked))
    write_pairs(output, [replace(pair, reasoning=found.get(pair.id) or pair.reasoning) for pair in pairs])
    partial.unlink()
    return {"pairs": len(pairs), "asked": len(asked), "kept": sum(1 for text in found.values() if text)}


def words(text: str) -> set[str]:
    """The lower-case words of a text, identifiers split at capitals and underscores, of three letters or more."""
    return {word.lower() for word in _WORD.findall(text) if len(word) >= 3}


def rarity(texts: Iterable[str]) -> dict[str, float]:
    """Inverse document frequency of each word, ln(N / df)."""
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        counts.update(words(text))
        total += 1
    return {word: math.log(total / count) for word, count in counts.items()}


def best(pair: TrainingPair, drafts: Sequence[str], weight: dict[str, float]) -> str | None:
    """The draft with most of the positive's rare words that the query lacks, relative to its length; else None."""
    wanted = words(pair.positive) - words(pair.query)

    def gain(draft: str) -> float:
        said = words(draft)
        return sum(weight.get(word, 0.0) for word in said & wanted) / math.sqrt(len(said) + 1)

    ranked = max(drafts, key=gain, default="")
    return ranked if ranked and gain(ranked) > 0 else None


def tidy(text: str, cut_off: bool) -> str:
    """The trace on one line; one that exceeded its budget is cut at its last complete sentence, if that keeps half of
    it."""
    line = " ".join(text.split())
    if cut_off:
        end = max(line.rfind(mark) for mark in (". ", "; ", ": "))
        if end >= len(line) / 2:
            line = line[: end + 1].rstrip(" ;:")
    return line


def _finished(partial: Path, asked: Sequence[TrainingPair]) -> dict[str, str | None]:
    """Traces of an interrupted run; a truncated last line and incomplete blocks are dropped."""
    if not partial.is_file():
        return {}
    whole = partial.read_bytes().rpartition(b"\n")[0]
    partial.write_bytes(whole + b"\n" if whole else b"")
    found = {value["id"]: value.get("reasoning", "") for _, value in read_jsonl(partial)} if whole else {}
    keep = len(found) // BLOCK * BLOCK if len(found) < len(asked) else len(asked)
    expected = [pair.id for pair in asked[:keep]]
    if list(found)[:keep] != expected or "" in found.values():  # a chosen trace is never empty
        raise InputError(f"{partial} belongs to other pairs or to an earlier version; remove it to start over")
    partial.write_text("".join(json.dumps({"id": i, "reasoning": found[i]}) + "\n" for i in expected), encoding="utf-8")
    return {i: found[i] for i in expected}
