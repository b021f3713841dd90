"""How fast stage 1 trains: against sentence-transformers' cached loss and an earlier version, and large recomputed
batches against small ones.

    python benchmarks/sft.py                                # CPU: 32 pairs a step; 256 cached against 32 plain
    python benchmarks/sft.py --device cuda --rounds 20      # GPU: 128 pairs a step; 1,024 cached against 32 plain
    python benchmarks/sft.py --pairs pairs.jsonl --only speed
    python benchmarks/sft.py --only speed --against build/before    # after: git worktree add build/before f444c4d
    python benchmarks/sft.py --tiny                         # random tiny weights, seconds; writes no result

Ours is a step of `SFTTask` with InfoNCE alone on the direct conversation, once plain and once ("cached") with
activation checkpointing. The peer is `CachedMultipleNegativesRankingLoss` over a `SentenceTransformer` with the same
LoRA, last-token pooling, the same mini-batch, AdamW and clipping as ours. Each system runs in its own process (peak
memory) and they take turns (time). Both tokenize within the step; token ids, first loss and norm of the first gradient
must agree, or there is no report. What may differ is how the work is done: ours runs the prompt's prefix once and
sorts a batch by length; the peer pads as it ships. Ours also trains the embed token's row, which the peer does not.
With `--against`, the plain step of another checkout (f444c4d or later) takes turns with them, on the same batches.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import (
    Table,
    Worker,
    compare,
    finish,
    in_turns,
    ratio_cell,
    ratio_figures,
    rounded,
    say,
    serve,
    shrunk,
)
from sft_systems import SEED, Spec, load

from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs

PLAIN_BATCH = 32
"""The batch without activation checkpointing that the large one is compared with."""
SPEED_GOAL = 4.5
"""Times the peer's speed, at no more memory than it."""
BEFORE_GOAL = 1.8
"""Times the speed of f444c4d's plain step, at no more memory than it."""
CACHE_GOAL = 1.6
"""Times the plain time per pair, at the same memory."""
SAME_MEMORY = 1.05
"""Peaks that differ by less than this count as the same: the C library's own pools make that much."""
FORMER_FIELDS = {"global_batch_size": "pairs_per_step", "activation_checkpointing": "gradient_cache"}
"""Fields of `Spec` and their names in f444c4d."""
TOLERANCE = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 5e-2)}
"""How far the first loss may differ (absolute) and the first gradient's norm (relative), by precision."""
TRIAL_STEPS = 2
"""Timed steps of each of the peer's attentions, by which the faster is chosen."""


def main() -> None:
    """Run what `--only` asks for, print the tables, write the JSON."""
    options = parse()
    if options.worker:
        spec = Spec(**json.loads(options.worker))
        serve(lambda: load(spec))
        return
    with tempfile.TemporaryDirectory() as scratch:
        base, figures = prepare(options, Path(scratch))
        if options.only in ("speed", "both"):
            figures["speed"] = speed(base, options)
        if options.only in ("cache", "both"):
            figures["activation_checkpointing"] = cache(base, options)
    finish("sft", figures, options, SEED)


def parse() -> argparse.Namespace:
    """The command line, with the defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="base: bundled name, folder or hub id")
    parser.add_argument("--pairs", nargs="*", default=[], help="JSONL of training pairs (default: stdlib's docstrings)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--global-batch-size", type=int, help="pairs a step of the speed table (32; on a GPU 128)")
    parser.add_argument("--cached-pairs", type=int, help="of the cache table's large batch (256; on a GPU 1024)")
    parser.add_argument("--chunk", type=int, default=32, help="rows of a forward pass: mini_batch_size of both")
    parser.add_argument("--query-tokens", type=int, default=48)
    parser.add_argument("--document-tokens", type=int, default=128)
    parser.add_argument("--attention", default="auto", choices=["auto", "eager", "sdpa"], help="ours")
    parser.add_argument(
        "--peer-attention", default="auto", choices=["auto", "eager", "sdpa"], help="auto: the faster in a trial"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; every system steps once in each")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before, at least 1: the compared one")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--only", choices=["speed", "cache", "both"], default="both")
    parser.add_argument("--against", type=Path, help="another checkout, whose plain step is timed too")
    parser.add_argument("--tiny", action="store_true", help="random weights, two layers, few pairs: tries the script")
    parser.add_argument(
        "--json", "--output", dest="output", type=Path, help="where it goes (default: results/benchmarks/sft.json)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    small, large = (4, 16) if options.tiny else (128, 1024) if on_gpu else (32, 256)
    options.global_batch_size = options.global_batch_size or small
    options.cached_pairs = options.cached_pairs or large
    options.plain_pairs = min(PLAIN_BATCH, options.cached_pairs // 4)
    if options.attention == "auto":  # what `train_sft` takes
        options.attention = "sdpa" if on_gpu else "eager"
    if options.global_batch_size < 2 or options.plain_pairs < 2 or options.rounds < 1 or options.warmup < 1:
        parser.error("a batch needs 2 pairs or more (--cached-pairs 8 or more), --rounds and --warmup 1 or more")
    return options


def prepare(options: argparse.Namespace, scratch: Path) -> tuple[Spec, dict[str, Any]]:
    """Put the pairs and the base's weights where every worker finds them; the specification that all share."""
    import torch
    from transformers.utils import logging

    from search_r3.model import checkpoint as checkpoints
    from search_r3.training.precision import resolve_mixed_precision

    logging.disable_progress_bar()
    model = str(shrunk(options.model, scratch / "tiny")) if options.tiny else options.model
    loaded = checkpoints.load_base(model, dtype=torch.float32)
    folder = scratch / "base"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    needed = []
    if options.only in ("speed", "both"):
        needed.append(options.global_batch_size)
    if options.only in ("cache", "both"):
        needed.append(options.cached_pairs)
    pairs = distinct(options.pairs)
    if len(pairs) < max(needed):
        raise SystemExit(f"{len(pairs)} distinct pairs are too few for a step of {max(needed)}; give more with --pairs")
    write_pairs(scratch / "pairs.jsonl", pairs)
    wanted = {"auto": "auto", "float32": "no", "bfloat16": "bf16"}[options.dtype]
    bf16 = resolve_mixed_precision(wanted, torch.device(options.device)) == "bf16"
    base = Spec(
        system="ours",
        model=model,
        folder=str(folder),
        pairs=str(scratch / "pairs.jsonl"),
        global_batch_size=options.global_batch_size,
        chunk=options.chunk,
        activation_checkpointing=False,
        attention=options.attention,
        device=options.device,
        bf16=bf16,
        query_tokens=options.query_tokens,
        document_tokens=options.document_tokens,
        threads=options.threads,
    )
    return base, {
        "model": "tiny random" if options.tiny else Path(options.model).name,
        "texts": [Path(path).name for path in options.pairs] or "docstrings of the standard library",
        "distinct_pairs": len(pairs),
        "precision": "bfloat16 autocast" if bf16 else "float32",
        "chunk": options.chunk,
        "query_tokens": options.query_tokens,
        "document_tokens": options.document_tokens,
    }


def distinct(files: list[str]) -> list[TrainingPair]:
    """The pairs in a fixed random order, no query or positive twice: the peer knows no false negatives to leave out."""
    if files:
        found = [pair for path in files for pair in read_pairs(path)]
    else:
        from search_r3.data.sources.docstrings import STDLIB, docstring_pairs

        found = docstring_pairs([STDLIB])[0]
    random.Random(SEED).shuffle(found)
    queries: set[str] = set()
    positives: set[str] = set()
    kept: list[TrainingPair] = []
    for pair in found:
        if pair.query not in queries and pair.positive not in positives:
            queries.add(pair.query)
            positives.add(pair.positive)
            kept.append(TrainingPair(str(len(kept)), pair.query, pair.positive))
    return kept


def speed(base: Spec, options: argparse.Namespace) -> dict[str, Any]:
    """Pairs per second and peak memory of ours (plain and cached) and the peer on the same batches."""
    with ExitStack() as stack:

        def start(name: str, **changes: Any) -> System:
            system = System(name, replace(base, **changes), options.warmup)
            stack.callback(system.close)
            return system

        ours = [start("ours, plain"), start("ours, cached", activation_checkpointing=True)]
        choices = ["eager", "sdpa"] if options.peer_attention == "auto" else [options.peer_attention]
        peers = [start("peer", system="peer", activation_checkpointing=True, attention=choice) for choice in choices]
        before = []
        if options.against is not None:
            before = [System("before, plain", base, options.warmup, options.against.resolve())]
            stack.callback(before[0].close)
        for system in (*ours, *before, *peers):
            system.warm_up()
        for system in (*ours[1:], *before, *peers):
            check_agreement(ours[0], system, base.bf16)
        trial = {peer.spec.attention: peer.trial(TRIAL_STEPS) for peer in peers} if len(peers) > 1 else {}
        peer = min(peers, key=lambda one: trial.get(one.spec.attention, 0.0))
        for other in peers:
            if other is not peer:
                other.close()
        systems = [*ours, *before, peer]
        seconds = in_turns({system.name: system.step for system in systems}, options.rounds)
        for system in systems:
            system.note_memory()
    title = f"training steps of {base.global_batch_size} pairs; peer: sentence-transformers' cached loss"
    header = ("system      ", "attention", "pairs/s", "ratio (min-max) ", "peak MiB", "of peer", "goal      ")
    table = Table(title, *header)
    figures: dict[str, Any] = {
        "global_batch_size": base.global_batch_size,
        "rounds": options.rounds,
        "goal": SPEED_GOAL,
        "peer_trial_seconds": {attention: rounded(found) for attention, found in trial.items()},
    }
    for system in systems:
        measured = compare(seconds[system.name], seconds[peer.name])
        share = system.peak_bytes / peer.peak_bytes
        rate = base.global_batch_size / measured.ours_seconds
        found = system.figures() | {
            "seconds_per_step": rounded(measured.ours_seconds),
            "pairs_per_second": rounded(rate),
        }
        cells = ["", f"{system.peak_bytes / 2**20:.0f}", "", ""]
        if system is not peer:
            # The peer computes activations twice. So do we with checkpointing: there the memory can be compared.
            met = "met" if measured.ratio >= SPEED_GOAL and share <= 1 else "missed"
            cells = [ratio_cell(measured), f"{system.peak_bytes / 2**20:.0f}", f"{share:.3f}", f"{SPEED_GOAL} {met}"]
            found |= ratio_figures("times_the_peers_speed", measured) | {"peak_of_peer": rounded(share)}
        table.row(system.name, system.spec.attention, f"{rate:.3g}", *cells)
        figures[system.name.replace(", ", "_")] = found
    for old in before:
        measured = compare(seconds[ours[0].name], seconds[old.name])
        share = ours[0].peak_bytes / old.peak_bytes
        met = "met" if measured.ratio >= BEFORE_GOAL and share <= 1 else "missed"
        print(f"\nours, plain, by before: {ratio_cell(measured)}, memory {share:.3f}; goal {BEFORE_GOAL}: {met}")
        figures["before"] = {"checkout": options.against.name, "goal": BEFORE_GOAL, "peak_of_before": rounded(share)}
        figures["before"] |= ratio_figures("times_its_speed", measured)
    loss, norm = TOLERANCE[precision(base.bf16)]
    figures["tolerance"] = {"loss_absolute": loss, "gradient_norm_relative": norm}
    return figures


def cache(base: Spec, options: argparse.Namespace) -> dict[str, Any]:
    """Time per pair and peak memory: the small batch without activation checkpointing against the large one with it."""
    steps = options.cached_pairs // options.plain_pairs  # small steps over about the texts of one large step
    with ExitStack() as stack:
        small = System("plain", replace(base, global_batch_size=options.plain_pairs), options.warmup)
        stack.callback(small.close)
        large = System(
            "cached",
            replace(base, global_batch_size=options.cached_pairs, activation_checkpointing=True),
            options.warmup,
        )
        stack.callback(large.close)
        for system in (small, large):
            system.warm_up()

        def plain(turn: int) -> float:
            return sum(small.step(turn * steps + i) for i in range(steps)) / (steps * options.plain_pairs)

        def cached(turn: int) -> float:
            return large.step(turn) / options.cached_pairs

        seconds = in_turns({"plain": plain, "cached": cached}, options.rounds)
        for system in (small, large):
            system.note_memory()
    measured = compare(seconds["plain"], seconds["cached"])
    share = large.peak_bytes / small.peak_bytes
    header = ("batch       ", "ms/pair", "times (min-max) ", "peak MiB", "of plain", "goal      ")
    table = Table("activation checkpointing", *header)
    first = ["", f"{small.peak_bytes / 2**20:.0f}", "", ""]
    table.row(f"{options.plain_pairs} plain", f"{1000 * measured.ours_seconds:.3g}", *first)
    met = "met" if measured.ratio <= CACHE_GOAL and share <= SAME_MEMORY else "missed"
    last = [ratio_cell(measured), f"{large.peak_bytes / 2**20:.0f}", f"{share:.3f}", f"{CACHE_GOAL} {met}"]
    table.row(f"{options.cached_pairs} cached", f"{1000 * measured.peer_seconds:.3g}", *last)
    return {
        "plain": small.figures() | {"ms_per_pair": rounded(1000 * measured.ours_seconds)},
        "cached": large.figures() | {"ms_per_pair": rounded(1000 * measured.peer_seconds)},
        **ratio_figures("times_per_pair", measured),
        "rounds": measured.rounds,
        "peak_of_plain": rounded(share),
        "goal": CACHE_GOAL,
    }


def precision(bf16: bool) -> str:
    """The key of `TOLERANCE`."""
    return "bfloat16" if bf16 else "float32"


class System(Worker):
    """A worker and its answers so far. Batches are numbered: the warm-up's first, then the rounds'."""

    def __init__(self, name: str, spec: Spec, warmup: int, checkout: Path | None = None) -> None:
        """Start the worker, of this or another checkout; `warm_up` waits until it is loaded."""
        if checkout is None:
            super().__init__(__file__, asdict(spec))
        else:
            super().__init__(str(checkout / "benchmarks" / "sft.py"), fields_of(checkout, asdict(spec)), checkout)
        self.name, self.spec, self.warmup = name, spec, warmup
        self.about: dict[str, Any] = {}
        self.first: dict[str, Any] = {}
        self.peak_bytes = 0

    def warm_up(self) -> None:
        """Untimed steps; the first one's loss, gradient and tokens are kept."""
        self.about = self.ready()
        say(f"{self.name} ({self.spec.attention}) is loaded; warming up")
        self.first = self.ask("first 0")
        for number in range(1, self.warmup):
            self.ask(f"step {number}")

    def trial(self, steps: int) -> float:
        """Seconds of the fastest of a few steps on the warm-up's batches, which later steps do not use."""
        return min(self.ask(f"step {i % self.warmup}")["seconds"] for i in range(steps))

    def step(self, number: int) -> float:
        """Seconds of a timed step."""
        seconds = self.ask(f"step {self.warmup + number}")["seconds"]
        say(f"{self.name}, step {number + 1}: {seconds:.3g} s")
        return seconds

    def note_memory(self) -> None:
        """Ask for the peak, when all steps are done."""
        self.peak_bytes = self.ask("peak")["peak_bytes"]

    def figures(self) -> dict[str, Any]:
        """For the JSON."""
        first = {f"first_{key}": self.first[key] for key in ("loss", "gradient_norm", "tokens", "tokens_sha256")}
        pairs = {"global_batch_size": self.spec.global_batch_size, "attention": self.spec.attention}
        return {**pairs, **self.about, **first, "peak_bytes": self.peak_bytes}


def fields_of(checkout: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """The specification under the field names of another checkout's `Spec`."""
    source = (checkout / "benchmarks" / "sft_systems.py").read_text(encoding="utf-8")
    renamed = {new: old for new, old in FORMER_FIELDS.items() if f"    {old}:" in source}
    return {renamed.get(name, name): value for name, value in spec.items()}


def check_agreement(ours: System, other: System, bf16: bool) -> None:
    """Stop unless both had the same tokens, loss and gradient norm at the first step, when neither was trained yet."""
    a, b = ours.first, other.first
    near, relative = TOLERANCE[precision(bf16)]
    who = f"{ours.name} and {other.name} ({other.spec.attention})"
    sizes = [system.about["lora_parameters"] for system in (ours, other)]
    if sizes[0] != sizes[1]:
        raise SystemExit(f"{who} train different adapters: {sizes[0]} and {sizes[1]} parameters")
    if a["tokens_sha256"] != b["tokens_sha256"]:
        raise SystemExit(f"{who} were given different tokens: {a['tokens']} and {b['tokens']}")
    if not abs(a["loss"] - b["loss"]) <= near:
        raise SystemExit(f"{who} differ at the first step: loss {a['loss']:.6f} and {b['loss']:.6f}, allowed {near}")
    if not abs(a["gradient_norm"] - b["gradient_norm"]) <= relative * a["gradient_norm"]:
        norms = f"{a['gradient_norm']:.6f} and {b['gradient_norm']:.6f}"
        raise SystemExit(f"{who} differ at the first step: gradient norm {norms}, allowed {relative:.0%}")


if __name__ == "__main__":
    main()
