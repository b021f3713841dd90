"""What every benchmark shares: peers timed side by side in one run, and a JSON of figures that can be had again.

Speeds on a shared machine drift by the minute, so A and B take turns and only their ratio, pair by pair, is trusted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search_r3.evaluation.provenance import provenance
from search_r3.files import atomic_write_text

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"


@dataclass(frozen=True)
class Comparison:
    """Two ways of doing one thing, timed in turns.

    Attributes:
        ours_seconds, peer_seconds: medians over the rounds.
        ratio: median over the rounds of peer / ours: how many times as fast ours is.
        ratio_min, ratio_max: the extremes over the rounds.
        rounds: how many pairs of runs.
    """

    ours_seconds: float
    peer_seconds: float
    ratio: float
    ratio_min: float
    ratio_max: float
    rounds: int

    def figures(self) -> dict[str, float | int]:
        """For the JSON: four significant digits."""
        return {k: v if isinstance(v, int) else float(f"{v:.4g}") for k, v in asdict(self).items()}


def side_by_side(
    ours: Callable[[], Any], peer: Callable[[], Any], rounds: int, *, device: str = "cpu", warmup: int = 1
) -> Comparison:
    """Time `ours` and `peer` in turns, the one that begins changing each round, after `warmup` untimed runs of each."""
    for _ in range(warmup):
        ours()
        peer()
    pairs = []
    for turn in range(rounds):
        if turn % 2 == 0:
            a = _seconds(ours, device)
            b = _seconds(peer, device)
        else:
            b = _seconds(peer, device)
            a = _seconds(ours, device)
        pairs.append((a, b))
    ratios = [b / a for a, b in pairs]
    return Comparison(
        ours_seconds=statistics.median(a for a, _ in pairs),
        peer_seconds=statistics.median(b for _, b in pairs),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        rounds=rounds,
    )


def _seconds(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - start


def write_report(name: str, figures: dict[str, Any], *, device: str, seed: int, output: Path | None = None) -> Path:
    """Write `results/benchmarks/NAME.json` (or `output`): figures, command, commit, machine, seed, versions."""
    record = provenance(seed, device)
    record["command"] = f"python benchmarks/{record['command']}"
    target = output or RESULTS / f"{name}.json"
    atomic_write_text(target, json.dumps({"benchmark": name, **record, "figures": figures}, indent=2) + "\n")
    return target


class Table:
    """A plain table on standard output, a row as soon as it is measured."""

    def __init__(self, title: str, *header: str) -> None:
        self.widths = [max(len(cell), 9) for cell in header]
        print(f"\n{title}")
        self.row(*header)
        self.row(*("-" * width for width in self.widths))

    def row(self, *cells: str) -> None:
        """Print one row."""
        print("  ".join(c.ljust(w) for c, w in zip(cells, self.widths, strict=True)).rstrip(), flush=True)
