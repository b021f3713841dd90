"""The page's section of rollouts' rewards: what sampled reasoning traces earn, before and after stage 2.

`evaluation.rollouts` writes the files: `results/rollouts/DATASET.SPLIT/NAME.json` for one model and
`BEFORE--AFTER.json` for two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search_r3.evaluation.report.comparison import LEVEL
from search_r3.evaluation.report.load_results import Results
from search_r3.evaluation.report.page_elements import (
    COMPARISON_HEAD,
    Details,
    Figures,
    Heading,
    Placeholder,
    Section,
    Table,
    Text,
    comparison_cells,
    percent,
    score,
)
from search_r3.evaluation.report.plot_parts import WIDTH, Plot
from search_r3.evaluation.report.svg import histogram
from search_r3.evaluation.report.system_names import short_models

ROLLOUTS = "search-r3 rollouts --dataset scifact --before models/SFT --after runs/grpo/best"
SHOWN = {
    "penalized.dcg_scaled": "Reward of sampled rollouts (DCG scaled)",
    "penalized.dcg": "The same rollouts by nDCG, which depends on ranks alone",
}
"""Metrics with a histogram: the default reward of stage 2, which cosines can inflate, and nDCG. An adapter may have
been trained on another reward."""


def rewards(loaded: Results) -> Section:
    """All comparisons of two models, and the models that are in no comparison."""
    section = Section("rewards", "Rewards of rollouts")
    records = [(name, record) for name, record in loaded.rollouts if _is_rollouts(record)]
    pairs = [(name, record) for name, record in records if "comparisons" in record]
    compared = {(r["dataset"], r[role]["system"]) for _, r in pairs for role in ("before", "after")}
    alone = [(name, r) for name, r in records if "comparisons" not in r and (r["dataset"], r["system"]) not in compared]
    if not records:
        section.blocks.append(Placeholder("No rewards of rollouts have been measured.", ROLLOUTS))
        return section
    section.blocks.append(
        Text(
            "Each model samples several reasoning traces for a query and is rewarded for the ranking of its own "
            "freshly encoded corpus with them; a trace that never emits the embed token is penalized. DCG scaled "
            "weights by cosines, so it is inflated when all cosines are high; nDCG is shown alongside for that reason."
        )
    )
    section.summary = "what sampled reasoning earns, before and after stage 2"
    for name, record in [*pairs, *alone]:
        section.blocks += _one(name, record)
    return section


def reward_plots(name: str, record: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """Histograms of a record's models, as shares of the rollouts."""
    plots = []
    short = short_models(model["system"] for model in _models(record))
    for metric, title in SHOWN.items():
        groups, summary = [], []
        for model in _models(record):
            counts = model["histograms"]["counts"].get(metric)
            if counts and sum(counts):
                groups.append((short[model["system"]], [count / sum(counts) for count in counts]))
                above = model["figures"][metric]["share_above_half"]
                summary.append(
                    f"{model['system']}: mean {score(model['figures'][metric]['mean'])}, {percent(above)} above 0.5"
                )
        if groups:
            edges = _models(record)[0]["histograms"]["edges"]
            plot = Plot(f"rewards-{name}-{metric}", title, "; ".join(summary), "reward", "share of rollouts", width)
            plots.append(histogram(plot, edges, groups))
    return plots


def _one(name: str, record: Mapping[str, Any]) -> list[Any]:
    models = _models(record)
    title = f"{record['dataset']}: {' and '.join(model['system'] for model in models)}"
    summary = f"{record['num_queries']:,} queries, {record['num_documents']:,} documents. " + " ".join(
        f"{model['system']}: {percent(model['emission_rate']['sampled'])} of the samples emit the token, "
        f"{model['mean_tokens']['sampled']:.1f} tokens on average."
        for model in models
    )
    blocks: list[Any] = [Heading(title, f"rollouts-{name}"), Text(summary, "note"), Figures(reward_plots(name, record))]
    names = short_models(model["system"] for model in models).values()
    head = ["reward", *(f"{name}: mean" for name in names), *(f"{name}: above 0.5" for name in names)]
    rows = []
    for metric in models[0]["figures"]:
        row: list[Any] = [metric, *(score(model["figures"][metric]["mean"]) for model in models)]
        row += [percent(model["figures"][metric]["share_above_half"]) for model in models]
        if len(models) > 1:
            row += comparison_cells(record["comparisons"][metric], LEVEL)
        rows.append(row)
    if len(models) > 1:
        head += COMPARISON_HEAD
    caption = "Metrics are named KIND.REWARD: sampled, penalized (where the token was forced), greedy, direct"
    blocks.append(Details("All rewards", [Table(f"rollouts-{name}-all", caption, head, rows)]))
    return blocks


def _models(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [record["before"], record["after"]] if "comparisons" in record else [record]


def _is_rollouts(record: Any) -> bool:
    """Whether a file below `rollouts/` has the form that this section shows; others are left out."""
    if not isinstance(record, dict):
        return False
    models = [record.get("before"), record.get("after")] if "comparisons" in record else [record]
    needed = {"system", "figures", "histograms", "emission_rate", "mean_tokens"}
    return {"dataset", "num_queries", "num_documents"} <= record.keys() and all(
        isinstance(model, dict) and needed <= model.keys() for model in models
    )
