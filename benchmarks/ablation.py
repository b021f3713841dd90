"""What each part of stage 1 is worth on dev: one short run a part and seed, the same data and steps, one change each.

    python benchmarks/ablation.py                         # on a CPU: 60 steps of 16 pairs, 4 to 6 minutes a run
    python benchmarks/ablation.py --full --seeds 0 1 2    # on a GPU: 600 steps of 256 pairs, and more parts

Runs are kept in RUNS/PART-SEED and resume after an interruption. Figures are of dev pools, never of a test set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import common  # type: ignore[import-not-found]

BASE = "configs/sft/ablation.yaml"
ROWS = "teacher=build/pre.rows.safetensors"
PARTS: dict[str, list[str]] = {
    "infonce + sft (the baseline)": [],
    "+ 1 hard negative": ["negatives_per_pair=1"],
    "+ teacher (distillation 0.5)": [ROWS, "weights.distillation=0.5"],
    "+ triplet 0.5": ["weights.triplet=0.5"],
    "+ kl 0.1": ["weights.kl=0.1"],
    "+ memory of 512": ["cross_batch_memory_size=512"],
    "learning rate 1e-3": ["loop.learning_rate=1.0e-3"],
}
MORE: dict[str, list[str]] = {
    "- sft": ["weights.sft=0"],
    "- reasoning": ["reasoning_ratio=0"],
    "+ self-generated reasoning": [
        "self_reasoning_ratio=0.6",
        "self_reasoning_start_step=60",
        "self_reasoning_refresh_steps=60",
    ],
    "+ matryoshka": ["matryoshka=[576,256,128]"],
    "+ 4 hard negatives": ["negatives_per_pair=4"],
    "lora rank 4": ["lora.rank=4", "lora.alpha=8"],
    "lora rank 64": ["lora.rank=64", "lora.alpha=128"],
    "batches of any source": ["batch_sampler=any"],
}
FULL = [
    "global_batch_size=256",
    "activation_checkpointing=true",
    "mini_batch_size=128",
    "loop.steps=600",
    "loop.warmup_steps=30",
]
FIGURES = ("cosqa.dev.off", "scifact.dev.off", "cosqa.dev.on", "scifact.dev.on")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=BASE)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="parts to run, by their names")
    parser.add_argument("--full", action="store_true", help="the larger runs, for a GPU")
    parser.add_argument("--set", dest="also", nargs="*", default=[], help="section.key=value for every run")
    parser.add_argument("--output", type=Path, help="default: results/benchmarks/ablation.json")
    options = parser.parse_args(argv)
    parts = PARTS | (MORE if options.full else {})
    unknown = set(options.only or ()) - set(parts)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    common_settings = [*(FULL if options.full else []), *options.also]
    rows: list[dict[str, Any]] = []
    for name, changes in parts.items():
        if options.only and name not in options.only:
            continue
        found = []
        for seed in options.seeds:
            folder = options.runs / f"{''.join(c if c.isalnum() else '-' for c in name).strip('-')}-{seed}"
            settings = [*common_settings, *changes, f"loop.seed={seed}", f"output={folder}"]
            found.append(run(options.recipe, settings, folder))
        means = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        rows.append({"part": name, "changes": changes, "seeds": options.seeds, **means})
        print(line(rows[-1]), flush=True)
        figures = {"recipe": options.recipe, "for_all": common_settings, **about(folder), "parts": rows}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        common.write_report("ablation", figures, device=device, seed=options.seeds[0], output=options.output)
    print(table(rows))


def run(recipe: str, settings: list[str], folder: Path) -> dict[str, float]:
    """Dev figures at the end of one run, and its seconds a step."""
    train(recipe, settings)
    records = [json.loads(text) for text in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    dev = next(record["dev"] for record in reversed(records) if "dev" in record)
    seconds = [record["seconds"] for record in records if "loss" in record]
    return {key: dev[key] for key in dev} | {"seconds_per_step": float(np.median(seconds))}


def train(recipe: str, settings: Sequence[str]) -> None:
    """Run stage 1; a finished run is not repeated."""
    changes = (part for setting in settings for part in ("--set", setting))
    subprocess.run([sys.executable, "-m", "search_r3", "train", "sft", recipe, *changes], check=True)


def about(folder: Path) -> dict[str, Any]:
    """What all runs have in common, from one of them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pools = {key: config[key] for key in ("dev", "dev_queries", "dev_documents")}
    size = {"steps": config["loop"]["steps"], "global_batch_size": config["global_batch_size"]}
    return {**size, **pools, "pairs_sha256": config["pairs_sha256"]}


def line(row: dict[str, Any]) -> str:
    figures = " | ".join(f"{row[key]:.3f}" for key in FIGURES)
    mean = np.mean([row[key] for key in FIGURES[:2]])
    return f"| {row['part']} | {figures} | {mean:.3f} | {row['seconds_per_step']:.1f} |"


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "| part | cosqa off | scifact off | cosqa on | scifact on | mean off | s/step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *(line(row) for row in rows)])


if __name__ == "__main__":
    main()
