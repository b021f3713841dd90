"""What each option of stage 1 adds to a trained direct embedder: a hundred steps each, then six dev sets.

    python benchmarks/direct_ablation.py                       # 20 minutes a part on one core with AVX-512 BF16
    python benchmarks/direct_ablation.py --only latent frozen

Every part changes one thing of the baseline: `configs/sft/direct.yaml` (whose head says how its data are built) with
`BASELINE`. Runs are kept in RUNS/PART and resume after an interruption; `dev_sets.py` then measures all of them on
fixed parts of the dev sets, no test query among them. LOG.md (2026-11-29 and 30) has the outcome.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import dev_sets
from ablation import train

from search_r3.hints import refuse_unknown

RECIPE = "configs/sft/direct.yaml"
BASELINE = (
    "pairs=[build/direct.others.jsonl, build/direct.queries.jsonl]",
    "loop.steps=100",
    "loop.warmup_steps=10",
    "loop.min_lr_ratio=0.05",
    "fold_capitals=false",
    "topic_batches=1",
    "source_weights={queries: 1.5}",
    "reasoning_ratio=0.2",
    "max_document_tokens=104",
    "cross_batch_memory_size=0",
    "guide_margin=null",
    "document_variants={}",
)
PARTS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "memory": ("cross_batch_memory_size=4096",),
    "guide": ("cross_batch_memory_size=8192", "cross_batch_memory_prefill=true", "guide_margin=0.0"),
    "multi-positive": ("positives_per_pair=2", "ranking_loss=multi_positive"),
    "lambda": ("positives_per_pair=2", "ranking_loss=lambda"),
    "approx-ndcg": ("positives_per_pair=2", "ranking_loss=approx_ndcg"),
    "noisy-queries": (
        "query_variants={lower: 0.1, upper: 0.05, title: 0.03, typos: 0.15, keywords: 0.05, no_punctuation: 0.05}",
        "document_variants={upper: 0.02}",
        "fold_capitals=true",
        "weights.self_teaching=0.3",
    ),
    "view-distillation": ("weights.view_distillation=1.0", "reasoning_ratio=0.3"),
    "latent": ("weights.view_distillation=1.0", "reasoning_ratio=0.3", "latent_steps=3", "latent_ratio=0.3"),
    "in-batch-lm": ("weights.in_batch_lm=0.1",),
    "frozen": ("lora.frozen_layers=15",),
}
MEASURED = ("--queries", "120", "--documents", "400", "--max-length", "96", "--dtype", "bfloat16")
"""Options of `dev_sets.py`; those of the command line follow, and win."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--runs", type=Path, default=Path("runs/direct-ablation"))
    parser.add_argument("--set", dest="also", nargs="*", default=[], help="key=value for every run")
    options, others = parser.parse_known_args(argv)
    refuse_unknown(options.only, tuple(PARTS), "--only", what="part")
    for part in options.only:
        train(options.recipe, [*BASELINE, *PARTS[part], *options.also, f"output={options.runs / part}"])
    systems = [f"{part}={options.runs / part / 'adapter'}" for part in options.only]
    dev_sets.main([*systems, *MEASURED, *others])


if __name__ == "__main__":
    main()
