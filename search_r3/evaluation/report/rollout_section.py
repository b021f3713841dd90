"""The page's section of rollouts' rewards: what sampled reasoning traces earn, before and after reinforcement.

The files are those of `evaluation.rollouts`: `results/rollouts/DATASET.SPLIT/NAME.json` for a model and
`BEFORE--AFTER.json` for two, of which the histograms show the one that decided training and the stricter one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search_r3.evaluation.report.comparison import LEVEL
from search_r3.evaluation.report.load_results import Results
from search_r3.evaluation.report.page_elements import (
    COMPARISON_HEAD,
    Figures,
    Fold,
    Heading,
    Missing,
    Section,
    Table,
    Text,
    comparison_cells,
    percent,
    score,
)
from search_r3.evaluation.report.svg import WIDTH, Plot, histogram

ROLLOUTS = "search-r3 rollouts --dataset scifact --before models/SFT --after runs/grpo/best"
SHOWN = {
    "penalized.dcg_scaled": "Reward of sampled rollouts (DCG scaled), as trained on",
    "penalized.dcg": "The same rollouts by nDCG, which ranks alone decide",
}


def rewards(found: Results) -> Section:
    """All comparisons of two models, and the models that stand in none."""
    section = Section("rewards", "Rewards of rollouts")
    records = [(name, record) for name, record in found.rollouts if _is_rollouts(record)]
    pairs = [(name, record) for name, record in records if "comparisons" in record]
    compared = {(r["dataset"], r[side]["system"]) for _, r in pairs for side in ("before", "after")}
    alone = [(name, r) for name, r in records if "comparisons" not in r and (r["dataset"], r["system"]) not in compared]
    if not records:
        section.blocks.append(Missing("No rewards of rollouts have been measured.", ROLLOUTS))
        return section
    section.blocks.append(
        Text(
            "Each model samples several reasoning traces for a query and is rewarded for how its own freshly encoded "
            "corpus ranks with them; a trace that never emits the embed token is penalized. DCG scaled weighs by "
            "cosines and so flatters a space in which all are high, which is why nDCG stands beside it."
        )
    )
    for name, record in [*pairs, *alone]:
        section.blocks += _one(name, record)
    return section


def reward_plots(name: str, record: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """Histograms of a record's sides, as shares of the rollouts."""
    plots = []
    for metric, title in SHOWN.items():
        groups, summary = [], []
        for side in _sides(record):
            counts = side["histograms"]["counts"].get(metric)
            if counts and sum(counts):
                groups.append((side["system"], [count / sum(counts) for count in counts]))
                above = side["figures"][metric]["share_above_half"]
                summary.append(
                    f"{side['system']}: mean {score(side['figures'][metric]['mean'])}, {percent(above)} above 0.5"
                )
        if groups:
            edges = _sides(record)[0]["histograms"]["edges"]
            plot = Plot(f"rewards-{name}-{metric}", title, "; ".join(summary), "reward", "share of rollouts", width)
            plots.append(histogram(plot, edges, groups))
    return plots


def _one(name: str, record: Mapping[str, Any]) -> list[Any]:
    sides = _sides(record)
    title = f"{record['dataset']}: {' and then '.join(side['system'] for side in sides)}"
    summary = f"{record['num_queries']:,} queries, {record['num_documents']:,} documents. " + " ".join(
        f"{side['system']}: {percent(side['emission_rate']['sampled'])} of the samples emit the token, "
        f"{side['mean_tokens']['sampled']:.1f} tokens on average."
        for side in sides
    )
    blocks: list[Any] = [Heading(title, f"rollouts-{name}"), Text(summary, "note"), Figures(reward_plots(name, record))]
    head = ["reward", *(f"{s['system']}: mean" for s in sides), *(f"{s['system']}: above 0.5" for s in sides)]
    rows = []
    for metric in sides[0]["figures"]:
        row: list[Any] = [metric, *(score(side["figures"][metric]["mean"]) for side in sides)]
        row += [percent(side["figures"][metric]["share_above_half"]) for side in sides]
        if len(sides) > 1:
            row += comparison_cells(record["comparisons"][metric], LEVEL)
        rows.append(row)
    if len(sides) > 1:
        head += COMPARISON_HEAD
    caption = "Metrics are called KIND.REWARD: sampled, penalized where the token was forced, greedy, direct"
    blocks.append(Fold("All rewards", [Table(f"rollouts-{name}-all", caption, head, rows)]))
    return blocks


def _sides(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [record["before"], record["after"]] if "comparisons" in record else [record]


def _is_rollouts(record: Any) -> bool:
    """Whether a file below `rollouts/` is one that this section knows; others are left out."""
    if not isinstance(record, dict):
        return False
    sides = [record.get("before"), record.get("after")] if "comparisons" in record else [record]
    needed = {"system", "figures", "histograms", "emission_rate", "mean_tokens"}
    return {"dataset", "num_queries", "num_documents"} <= record.keys() and all(
        isinstance(side, dict) and needed <= side.keys() for side in sides
    )
