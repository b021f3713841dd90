"""How fast stage 1 trains: against sentence-transformers' cached loss, and large gradient-cached batches against small.

    python benchmarks/sft.py                                # CPU: 32 pairs a step; 256 cached against 32 plain
    python benchmarks/sft.py --device cuda --rounds 20      # GPU: 128 pairs a step; 1,024 cached against 32 plain
    python benchmarks/sft.py --pairs pairs.jsonl --only speed
    python benchmarks/sft.py --tiny                         # random tiny weights, seconds; writes no result

Ours is a step of `SFTTask` with InfoNCE alone on the direct conversation, once as it stands and once with the gradient
cache. The peer is `CachedMultipleNegativesRankingLoss` over a `SentenceTransformer` with the same LoRA, last-token
pooling, its mini-batch our chunk, AdamW and clipping as ours. Each system runs in its own process (peak memory) and
they take turns (time). Both tokenise within the step, and the token ids, the first loss and the first gradient's norm
must agree, or there is no report. What may differ is how the work is done: ours runs the prompt's prefix once and
sorts a batch by length; the peer pads as it ships. Ours also trains the embed token's row, which the peer does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import Comparison, Table, Worker, compare, give_memory_back, in_turns, peak_memory, serve, write_report

from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs

SEED = 0
PLAIN_BATCH = 32
"""The batch without gradient cache that the large one is held against."""
SPEED_GOAL = 1.2
"""Times the peer's speed, at no more memory than it."""
CACHE_GOAL = 1.6
"""Times the plain time per pair, at the same memory."""
SAME_MEMORY = 1.05
"""Peaks that differ by less than this count as the same: the C library's own pools make that much."""
TOLERANCE = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 5e-2)}
"""How far the first loss may differ (absolute) and the first gradient's norm (relative), by precision."""
TRIAL_STEPS = 2
"""Timed steps of each of the peer's attentions, by which the faster is chosen."""


@dataclass(frozen=True)
class Spec:
    """What a worker runs; it goes to it as JSON."""

    system: str
    """"ours" or "peer"."""
    model: str
    """The base as this project names it."""
    folder: str
    """The same weights and tokenizer with the embed token, for the peer."""
    pairs: str
    """JSONL of pairs in the order in which batches are cut from it, round and round."""
    pairs_per_step: int
    chunk: int
    """Rows of a backbone call: our `rows_per_chunk`, the peer's `mini_batch_size`."""
    gradient_cache: bool
    attention: str
    device: str
    bf16: bool
    """Autocast; the weights are float32 either way."""
    query_tokens: int
    document_tokens: int
    threads: int | None


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
            figures["gradient_cache"] = cache(base, options)
    if options.tiny and options.output is None:
        print("\na tiny run: nothing written (--json FILE writes it)")
        return
    target = write_report("sft", figures, device=options.device, seed=SEED, output=options.output)
    print(f"\nwritten to {target.name}")


def parse() -> argparse.Namespace:
    """The command line, with the defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="base: bundled name, folder or hub id")
    parser.add_argument("--pairs", nargs="*", default=[], help="JSONL of training pairs (default: stdlib's docstrings)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--pairs-per-step", type=int, help="of the speed table (default: 32; on a GPU 128)")
    parser.add_argument("--cached-pairs", type=int, help="of the cache table's large batch (256; on a GPU 1024)")
    parser.add_argument("--chunk", type=int, default=32, help="our rows_per_chunk, the peer's mini_batch_size")
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
    parser.add_argument("--tiny", action="store_true", help="random weights, two layers, few pairs: tries the script")
    parser.add_argument(
        "--json", "--output", dest="output", type=Path, help="where it goes (default: results/benchmarks/sft.json)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    small, large = (4, 16) if options.tiny else (128, 1024) if on_gpu else (32, 256)
    options.pairs_per_step = options.pairs_per_step or small
    options.cached_pairs = options.cached_pairs or large
    options.plain_pairs = min(PLAIN_BATCH, options.cached_pairs // 4)
    if options.attention == "auto":  # what `train_sft` takes
        options.attention = "sdpa" if on_gpu else "eager"
    if options.pairs_per_step < 2 or options.plain_pairs < 2 or options.rounds < 1 or options.warmup < 1:
        parser.error("a batch needs 2 pairs or more (--cached-pairs 8 or more), --rounds and --warmup 1 or more")
    return options


def prepare(options: argparse.Namespace, scratch: Path) -> tuple[Spec, dict[str, Any]]:
    """Put the pairs and the base's weights where every worker finds them; the specification that all share."""
    import torch
    from transformers.utils import logging

    from search_r3.model import checkpoint as checkpoints
    from search_r3.training.loop import resolve_mixed_precision

    logging.disable_progress_bar()
    model = str(shrunk(options.model, scratch / "tiny")) if options.tiny else options.model
    loaded = checkpoints.load_base(model, dtype=torch.float32)
    folder = scratch / "base"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    needed = []
    if options.only in ("speed", "both"):
        needed.append(options.pairs_per_step)
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
        pairs_per_step=options.pairs_per_step,
        chunk=options.chunk,
        gradient_cache=False,
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


def shrunk(model: str, folder: Path) -> Path:
    """A random two-layer model of the same architecture, with the same tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from search_r3.model.bundled import resolve

    source = resolve(model)
    config = AutoConfig.from_pretrained(source)
    config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": None,
            "initializer_range": 0.2,  # far enough from zero that different texts get different embeddings
        }
    )
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def distinct(files: list[str]) -> list[TrainingPair]:
    """The pairs in a fixed random order, no query or positive twice: the peer knows no false negatives to leave out."""
    if files:
        found = [pair for path in files for pair in read_pairs(path)]
    else:
        from search_r3.data.docstrings import STDLIB, docstring_pairs

        found = docstring_pairs([STDLIB])[0]
    random.Random(SEED).shuffle(found)
    queries: set[str] = set()
    positives: set[str] = set()
    kept = []
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
            return stack.enter_context(System(name, replace(base, **changes), options.warmup))

        ours = [start("ours, plain"), start("ours, cached", gradient_cache=True)]
        choices = ["eager", "sdpa"] if options.peer_attention == "auto" else [options.peer_attention]
        peers = [start("peer", system="peer", gradient_cache=True, attention=choice) for choice in choices]
        for system in (*ours, *peers):
            system.warm_up()
        for system in (*ours[1:], *peers):
            check_agreement(ours[0], system, base.bf16)
        trial = {peer.spec.attention: peer.trial(TRIAL_STEPS) for peer in peers} if len(peers) > 1 else {}
        peer = min(peers, key=lambda one: trial.get(one.spec.attention, 0.0))
        for other in peers:
            if other is not peer:
                other.close()
        systems = [*ours, peer]
        seconds = in_turns({system.name: system.step for system in systems}, options.rounds)
        for system in systems:
            system.note_memory()
    title = f"training steps of {base.pairs_per_step} pairs; peer: sentence-transformers' cached loss"
    header = ("system      ", "attention", "pairs/s", "ratio (min-max) ", "peak MiB", "of peer", "goal      ")
    table = Table(title, *header)
    figures: dict[str, Any] = {
        "pairs_per_step": base.pairs_per_step,
        "rounds": options.rounds,
        "goal": SPEED_GOAL,
        "peer_trial_seconds": {attention: rounded(found) for attention, found in trial.items()},
    }
    for system in systems:
        measured = compare(seconds[system.name], seconds[peer.name])
        share = system.peak_bytes / peer.peak_bytes
        rate = base.pairs_per_step / measured.ours_seconds
        found = system.figures() | {
            "seconds_per_step": rounded(measured.ours_seconds),
            "pairs_per_second": rounded(rate),
        }
        cells = ["", f"{system.peak_bytes / 2**20:.0f}", "", ""]
        if system is not peer:
            # The peer computes activations twice. So do we with the cache: there the memory can be held against its.
            met = "met" if measured.ratio >= SPEED_GOAL and share <= 1 else "missed"
            cells = [ratio_cell(measured), f"{system.peak_bytes / 2**20:.0f}", f"{share:.3f}", f"{SPEED_GOAL} {met}"]
            found |= ratio_figures("times_the_peers_speed", measured) | {"peak_of_peer": rounded(share)}
        table.row(system.name, system.spec.attention, f"{rate:.3g}", *cells)
        figures[system.name.replace(", ", "_")] = found
    loss, norm = TOLERANCE[precision(base.bf16)]
    figures["tolerance"] = {"loss_absolute": loss, "gradient_norm_relative": norm}
    return figures


def cache(base: Spec, options: argparse.Namespace) -> dict[str, Any]:
    """Time per pair and peak memory: the small batch without gradient cache against the large one with it."""
    steps = options.cached_pairs // options.plain_pairs  # small steps over about the texts of one large step
    with ExitStack() as stack:
        small, large = (
            stack.enter_context(System(name, replace(base, pairs_per_step=size, gradient_cache=cached), options.warmup))
            for name, size, cached in (("plain", options.plain_pairs, False), ("cached", options.cached_pairs, True))
        )
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
    table = Table("gradient cache", *header)
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


def rounded(value: float) -> float:
    """Four significant digits, for the JSON."""
    return float(f"{value:.4g}")


def ratio_figures(name: str, measured: Comparison) -> dict[str, float]:
    """The ratio with its extremes, for the JSON."""
    ratios = {"": measured.ratio, "_min": measured.ratio_min, "_max": measured.ratio_max}
    return {name + end: rounded(ratio) for end, ratio in ratios.items()}


def ratio_cell(measured: Comparison) -> str:
    """The ratio with its extremes, for the table."""
    return f"{measured.ratio:.2f} ({measured.ratio_min:.2f}-{measured.ratio_max:.2f})"


def precision(bf16: bool) -> str:
    """The key of `TOLERANCE`."""
    return "bfloat16" if bf16 else "float32"


class System(Worker):
    """A worker with what it has said so far. Batches are numbered: the warm-up's first, then the rounds'."""

    def __init__(self, name: str, spec: Spec, warmup: int) -> None:
        super().__init__(__file__, asdict(spec))
        self.name, self.spec, self.warmup = name, spec, warmup
        self.about: dict[str, Any] = {}
        self.first: dict[str, Any] = {}
        self.peak_bytes = 0

    def warm_up(self) -> None:
        """Untimed steps; the first one's loss, gradient and tokens are kept."""
        self.about = self.ready()
        self.first = self.ask("first 0")
        for number in range(1, self.warmup):
            self.ask(f"step {number}")

    def trial(self, steps: int) -> float:
        """Seconds of the fastest of a few steps on the warm-up's batches, which later steps do not use."""
        return min(self.ask(f"step {i % self.warmup}")["seconds"] for i in range(steps))

    def step(self, number: int) -> float:
        """Seconds of a timed step."""
        return self.ask(f"step {self.warmup + number}")["seconds"]

    def note_memory(self) -> None:
        """Ask for the peak, when all steps are done."""
        self.peak_bytes = self.ask("peak")["peak_bytes"]

    def figures(self) -> dict[str, Any]:
        """For the JSON."""
        first = {f"first_{key}": self.first[key] for key in ("loss", "gradient_norm", "tokens", "tokens_sha256")}
        pairs = {"pairs_per_step": self.spec.pairs_per_step, "attention": self.spec.attention}
        return {**pairs, **self.about, **first, "peak_bytes": self.peak_bytes}


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


# What follows runs in a worker.


class Ours:
    """A stage 1 step: `SFTTask` with InfoNCE alone, query to document, on the direct conversation."""

    def __init__(self, spec: Spec, pairs: list[TrainingPair]) -> None:
        import torch

        from search_r3.model import checkpoint as checkpoints
        from search_r3.training.sft import LossWeights, SFTConfig, SFTTask

        config = SFTConfig(
            pairs=[spec.pairs],
            output="unused",
            base=spec.model,
            pairs_per_step=spec.pairs_per_step,
            batch_of="any",
            max_query_tokens=spec.query_tokens,
            max_document_tokens=spec.document_tokens,
            reasoning_share=0.0,
            symmetric=False,
            weights=LossWeights(sft=0.0, kl=0.0, infonce=1.0, triplet=0.0),
            gradient_cache=spec.gradient_cache,
            rows_per_chunk=spec.chunk,
            dev=[],
        )
        checkpoint = checkpoints.load_base(spec.model, dtype=torch.float32)
        checkpoint.model.set_attn_implementation(spec.attention)
        torch.manual_seed(SEED)  # LoRA's first weights
        self.task = SFTTask(config, checkpoint, pairs)
        self.task.sampler = InOrder(pairs, spec.pairs_per_step)  # type: ignore[assignment]
        self.module = self.task.module.to(spec.device)
        self.spec, self.lora, self.loop, self.temperature = spec, config.lora, config.loop, config.temperature

    def loss(self, number: int) -> Any:
        """The loss of batch `number`, with its graph."""
        import torch

        batch = self.task.batch(number)
        autocast = torch.autocast(torch.device(self.spec.device).type, torch.bfloat16)
        with autocast if self.spec.bf16 else nullcontext():
            return self.task.loss(self.module, batch)[0]

    def tokens(self, number: int) -> list[list[int]]:
        """The token ids of batch `number`, queries then documents, each with its prefix."""
        parts = self.task.batch(number).parts
        return [[*parts[name].prefix, *row] for name in ("query", "document") for row in parts[name].rows]


class Peer:
    """sentence-transformers as its documentation trains a LoRA: `add_adapter`, cached loss; autocast on the forward."""

    def __init__(self, spec: Spec, pairs: list[TrainingPair]) -> None:
        import torch
        from peft import LoraConfig, TaskType
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        from search_r3.prompts import Prompts, render
        from search_r3.training.sft import SFTConfig

        defaults = SFTConfig(pairs=[spec.pairs], output="unused")
        self.spec, self.lora, self.loop, self.temperature = spec, defaults.lora, defaults.loop, defaults.temperature
        options = {"dtype": torch.float32, "attn_implementation": spec.attention}
        backbone = Transformer(spec.folder, model_kwargs=options)
        backbone.model.config.use_cache = False  # no keys and values kept that nobody reads
        pooling = Pooling(backbone.model.config.hidden_size, pooling_mode="lasttoken")
        self.module = SentenceTransformer(modules=[backbone, pooling, Normalize()], device="cpu")
        torch.manual_seed(SEED)  # LoRA's first weights, the same as ours
        self.module.add_adapter(
            LoraConfig(
                r=self.lora.rank,
                lora_alpha=self.lora.alpha,
                lora_dropout=self.lora.dropout,
                target_modules=self.lora.target_modules,
                task_type=TaskType.FEATURE_EXTRACTION,
            )
        )
        self.module.to(spec.device)
        if spec.bf16:  # as accelerate wraps it for the trainer: the second forward runs inside the backward pass
            autocast = torch.autocast(torch.device(spec.device).type, torch.bfloat16)
            self.module.forward = autocast(self.module.forward)  # type: ignore[method-assign]
        self.criterion = CachedMultipleNegativesRankingLoss(
            self.module, scale=1 / self.temperature, mini_batch_size=spec.chunk
        )
        self.tokenizer, self.batches = backbone.tokenizer, InOrder(pairs, spec.pairs_per_step)
        prompts = Prompts()
        self.frames = [render(c, self.tokenizer, give_answer=True) for c in (prompts.query, prompts.document)]

    def columns(self, number: int) -> list[list[list[int]]]:
        """Token ids of the queries and of the documents of batch `number`: the whole conversations."""
        from search_r3.model.searchr3 import encode_as_text

        pairs = self.batches.batch(number)
        texts = [[pair.query for pair in pairs], [pair.positive for pair in pairs]]
        limits = (self.spec.query_tokens, self.spec.document_tokens)
        return [
            [[*frame.prefix, *ids[:limit], *frame.suffix] for ids in encode_as_text(self.tokenizer, column)]
            for frame, column, limit in zip(self.frames, texts, limits, strict=True)
        ]

    def loss(self, number: int) -> Any:
        """The loss of batch `number`; its backward pass runs the cached one."""
        import torch

        features = []
        for rows in self.columns(number):
            longest = max(map(len, rows))
            padded = {
                "input_ids": [row + [0] * (longest - len(row)) for row in rows],
                "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
            }
            features.append({key: torch.tensor(value).to(self.spec.device) for key, value in padded.items()})
        return self.criterion(features, torch.empty(0))

    def tokens(self, number: int) -> list[list[int]]:
        """The token ids of batch `number`, queries then documents."""
        return [row for column in self.columns(number) for row in column]


class InOrder:
    """In the place of stage 1's sampler: batches as the file has them, so that all sizes see the same texts."""

    def __init__(self, pairs: list[TrainingPair], size: int) -> None:
        self.batches = [pairs[i : i + size] for i in range(0, len(pairs) - size + 1, size)]

    def batch(self, number: int) -> list[TrainingPair]:
        """The pairs of batch `number`; after the last comes the first."""
        return self.batches[number % len(self.batches)]


def load(spec: Spec) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """Load a system; returns what it says of itself, and the function that answers "first N", "step N", "peak"."""
    import torch

    if spec.threads:
        torch.set_num_threads(spec.threads)
    kind: Callable[[Spec, list[TrainingPair]], Ours | Peer] = {"ours": Ours, "peer": Peer}[spec.system]
    system = kind(spec, read_pairs(spec.pairs))
    system.module.train()
    trained = {name: p for name, p in system.module.named_parameters() if p.requires_grad}
    parameters, lora = list(trained.values()), [p for name, p in trained.items() if "lora_" in name]
    loop = system.loop
    optimizer = torch.optim.AdamW(parameters, lr=loop.learning_rate, betas=loop.betas, weight_decay=loop.weight_decay)
    on_gpu = spec.device.startswith("cuda")

    def step(number: int, looking: bool) -> dict[str, Any]:
        """From texts to new weights, as the training loop does it; `looking` measures the gradient before clipping."""
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = system.loss(number)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in lora if p.grad is not None]).norm().item() if looking else None
        torch.nn.utils.clip_grad_norm_(parameters, loop.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if on_gpu:
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "loss": value, "gradient_norm": norm}

    def answer(line: str) -> dict[str, Any]:
        command, _, number = line.partition(" ")
        if command == "peak":
            return {"peak_bytes": peak_memory(spec.device)}
        found = step(int(number), looking=command == "first")
        give_memory_back(spec.device)
        if command == "first":
            rows = system.tokens(int(number))
            found["tokens"] = sum(map(len, rows))
            found["tokens_sha256"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return found

    about = {
        "gradient_cache": spec.gradient_cache,
        "lora_parameters": sum(p.numel() for p in lora),
        "other_parameters": sum(p.numel() for p in parameters) - sum(p.numel() for p in lora),
        "threads": torch.get_num_threads(),
        "loaded_peak_bytes": peak_memory(spec.device),
    }
    return about, answer


if __name__ == "__main__":
    main()
