"""Selecting the best training pairs: a number of each kind, and only those whose positive a scorer retrieves for the
query.

A query for which a good retriever does not rank its own document near the top is more often vague or wrong than hard:
round-trip consistency (Alberti et al. 2019, arXiv 1906.05416; Promptagator, Dai et al. 2022, arXiv 2209.11755).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.data.beir import stable_order
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.errors import InputError
from search_r3.files import atomic_write_text, sha256_of

BLOCK = 256


def select_pairs(
    source: str | Path,
    output: str | Path,
    counts: Mapping[str, int],
    *,
    scorer: Any = None,
    top: int = 3,
    seed: int = 0,
    report: Any = None,
) -> dict[str, Any]:
    """Write the first `counts[kind]` pairs of each kind (in an order hashed from the seed) that pass to `output`.

    Args:
        counts: how many of each source kind ("docstrings") or source ("queries:scifact/train"); the longer name wins.
            Kinds that are not named are left out; without any counts, all pairs are considered.
        scorer: keep a pair only if one of its positives is among the `top` candidates, where the candidates are all
            positives of its kind in the file; None keeps all.
        report: called with (what, done, total).

    The scorer's document representations are kept in OUTPUT.partial until the end.

    Returns:
        The manifest, also written to OUTPUT.manifest.json: counts by kind, and what was dropped.

    Raises:
        InputError: a kind does not occur in the file, a count is below 1, or no pair is left.
    """
    pairs = read_pairs(source)
    groups: dict[str, list[TrainingPair]] = defaultdict(list)
    for pair in pairs:
        groups[_group(pair, counts)].append(pair)
    for name, wanted in counts.items():
        if wanted < 1 or name not in groups:
            known = ", ".join(sorted({pair.source.partition(":")[0] for pair in pairs}))
            raise InputError(f"{name}={wanted}: expected a source of {source} ({known}) and a count from 1")
    if scorer is not None and top < 1:
        raise InputError(f"top must be 1 or more, got {top}")
    kept: list[TrainingPair] = []
    dropped: Counter[str] = Counter()
    for name in sorted(group for group in groups if group):
        group = groups[name]
        wanted = counts.get(name, len(group))
        found = group if scorer is None else _consistent(group, name, scorer, top, Path(f"{output}.partial"), report)
        dropped["not found again"] += len(group) - len(found)
        by_id = {pair.id: pair for pair in found}
        chosen = stable_order(by_id, seed)[:wanted]
        dropped["over the count"] += len(found) - len(chosen)
        kept += [by_id[identity] for identity in chosen]
    if not kept:
        raise InputError(f"{source}: no pair is left ({dict(dropped)}); raise --top or the counts")
    dropped["of a kind not asked for"] = len(groups.get("", []))
    by_id = {pair.id: pair for pair in kept}
    write_pairs(output, (by_id[identity] for identity in stable_order(by_id, seed)))
    manifest = {
        "output": Path(output).name,
        "sha256": sha256_of(output),
        "pairs_sha256": sha256_of(source),
        "count": len(kept),
        "by_kind": dict(sorted(Counter(pair.source.partition(":")[0] for pair in kept).items())),
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "counts": dict(counts),
        "top": top,
        "seed": seed,
        "scorer": {"name": scorer.name, **scorer.identity} if scorer is not None else None,
    }
    atomic_write_text(f"{output}.manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(f"{output}.partial", ignore_errors=True)
    return manifest


def _group(pair: TrainingPair, counts: Mapping[str, int]) -> str:
    """The name in `counts` that applies to a pair; "" if none does."""
    kind = pair.source.partition(":")[0]
    if not counts:
        return kind or "pairs"
    return next((name for name in (pair.source, kind) if name in counts), "")


def _consistent(
    group: Sequence[TrainingPair], name: str, scorer: Any, top: int, folder: Path, report: Any
) -> list[TrainingPair]:
    documents = list(dict.fromkeys(text for pair in group for text in pair.relevant))
    column = {text: i for i, text in enumerate(documents)}
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
    scratch = folder / digest
    scratch.mkdir(parents=True, exist_ok=True)
    scorer.prepare(documents, scratch, report)
    kept = []
    for start in range(0, len(group), BLOCK):
        block = group[start : start + BLOCK]
        scores_QN = scorer.score([pair.query for pair in block])
        own = [[column[text] for text in pair.relevant] for pair in block]
        own_Q = np.array([scores_N[places].max() for scores_N, places in zip(scores_QN, own, strict=True)])
        above_Q = (scores_QN > own_Q[:, None]).sum(1)
        floor = 0.0 if scorer.zero_is_no_match else -np.inf
        found = (above_Q < top) & (own_Q > floor)
        kept += [pair for pair, is_found in zip(block, found, strict=True) if is_found]
        if report:
            report(f"{name} pairs checked", min(start + BLOCK, len(group)), len(group))
    return kept
