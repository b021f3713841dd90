"""How fast stage 2 trains: seconds of an optimizer step, against TRL's GRPOTrainer doing the same job, or an earlier
version.

    python benchmarks/grpo.py                       # CPU: sizes of configs/grpo/cpu.yaml, 600 documents
    python benchmarks/grpo.py --device cuda         # GPU: sizes of configs/grpo/gpu.yaml
    python benchmarks/grpo.py --peer-precision autocast --peer-attention sdpa       # no trial of the peer's settings
    python benchmarks/grpo.py --against build/before     # after: git worktree add build/before f444c4d
    python benchmarks/grpo.py --tiny                # random tiny weights, seconds; writes no result

Both start from the same merged stage 1 model and the same embeddings of the same documents, with the same LoRA and
trained row, prompts, groups, budget, loss, KL and learning rate, at temperature 1. Ours is `GRPOTask`, driven as the
training loop drives it, once without the contrastive term, as the peer has none, and once with it. The peer's reward
function encodes its finished rollouts once, searches and refreshes a `LiveCorpus` of its own by
`RetrievalEnvironment.score`, and encodes by the same means as ours. Its precision and attention are those that are
fastest here in a trial.

Before anything is timed, both compute the loss of the same rollouts with the same rewards: prompts, loss, KL, entropy,
gradient norm and the rollouts' embeddings must agree, or there is no report. Each system runs in its own process (peak
memory) and they take turns (time).

With `--against`, ours is timed beside ours of another checkout (f444c4d) in place of the peer, by that checkout's own
copy of this script; the loss of the first batch, sampled by each, must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Table,
    Worker,
    compare,
    finish,
    give_memory_back,
    in_turns,
    peak_memory,
    ratio_cell,
    ratio_figures,
    rounded,
    say,
    serve,
    shrunk,
)
from grpo_systems import PARTS, SEED, Ours, Spec, config_of
from sft import distinct

from search_r3.data.pairs import write_pairs

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "grpo"
GOAL = 2.0
"""Times the peer's speed."""
BEFORE_GOAL = 1.5
"""Times the speed of the checkout of `--against`."""
RENAMED = {
    "num_generations": "group_size",
    "min_positive_rank": "from_rank",
    "max_positive_rank": "to_rank",
    "staleness_eval_every": "gauge_every",
    "log_completions_every": "samples_every",
    "num_iterations": "epochs",
    "num_mini_batches": "minibatches",
    "advantage_estimator": "advantage",
}
"""Settings by the names that f444c4d has for them."""
TOLERANCE = {
    "float32": {"loss": 1e-3, "kl": 1e-3, "entropy": 1e-2, "gradient_norm": 1e-2, "cosine": 1e-4},
    "bfloat16": {"loss": 1e-2, "kl": 1e-2, "entropy": 1e-1, "gradient_norm": 5e-2, "cosine": 1e-2},
}
"""How far the two may differ on the same rollouts: absolute, but for the gradient's norm, which is relative."""
NOT_ALIKE = [
    "Ours runs the conversation's prefix once a step and a query once for its group; TRL runs every rollout's whole "
    "prompt, padded on the left, when it samples, for the reference and for the policy.",
    "Ours takes a rollout's embedding from the pass that wrote it; the peer's reward function prefills the finished "
    "rollout.",
    "Ours samples with a merged copy of the weights; TRL generates with the adapter apart. The peer's reward function "
    "has such a copy too, and our engine with its shared prefix: rollouts and documents are encoded by the same means.",
    "Ours drops finished rollouts from the batch once a quarter of it is; TRL generates until the last one ends.",
    "The peer's training pass takes peer.rows_per_pass rollouts at a time and accumulates; it generates all at once.",
    "Ours computes logits where the assistant speaks; without Triton, TRL's fused head does so at every position.",
    "Both train the embed token's row (unless peer.other_parameters is 0). PEFT writes it into a copy of the matrix at "
    "every call; ours does not. TRL 1.16 fails on such a head, as it asks it for a bias: the peer is given that one.",
    "Ours runs the decoder written out for a CPU (fused_decoder); the peer runs transformers'.",
    "Ours also embeds each query without reasoning, for its log. The peer does not.",
    "Where the budget ends a rollout, TRL trains one sampled token more: it has no place for a forced embed token.",
    "The two sample by their own random numbers: rollouts are alike in law, not one by one (rollout_tokens).",
    "The peer's step is timed from on_step_begin to on_step_end: its data loader and its logging are not counted.",
]


def main() -> None:
    """Compare, time, print the table, write the JSON."""
    options = parse()
    if options.worker:
        spec = Spec(**json.loads(options.worker))
        serve(lambda: load(spec))
        return
    with tempfile.TemporaryDirectory() as scratch:
        base, figures = prepare(options, Path(scratch))
        figures |= speed(base, options) if options.against is None else against(base, options)
    finish("grpo" if options.against is None else "grpo-against", figures, options, SEED)


def load(spec: Spec) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """Load a system; returns what it says of itself, and the function that answers "compare", "step N", "peak".

    The peer's "compare" is followed by what ours gave to compare with, as JSON.
    """
    import torch

    if spec.threads:
        torch.set_num_threads(spec.threads)
    system: Any
    if spec.system == "ours":
        system = Ours(spec)
    else:
        from grpo_peer import Peer

        system = Peer(spec)

    def answer(line: str) -> dict[str, Any]:
        command, _, rest = line.partition(" ")
        if command == "peak":
            return {"peak_bytes": peak_memory(spec.device)}
        given = json.loads(rest) if rest else None
        found = system.compare(given) if command == "compare" else system.step(given)
        give_memory_back(spec.device)
        return found

    trained = {name: p.numel() for name, p in system.model.named_parameters() if p.requires_grad}
    lora = sum(size for name, size in trained.items() if "lora_" in name)
    about = system.about | {
        "lora_parameters": lora,
        "other_parameters": sum(trained.values()) - lora,
        "threads": torch.get_num_threads(),
        "loaded_peak_bytes": peak_memory(spec.device),
    }
    return about, answer


def parse() -> argparse.Namespace:
    """The command line, with the defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="search-r3-smollm2-135m-sft", help="stage 1: bundled name or folder")
    parser.add_argument("--recipe", type=Path, help="sizes and settings (default: configs/grpo/cpu.yaml or gpu.yaml)")
    parser.add_argument("--pairs", nargs="*", default=[], help="JSONL of pairs (default: stdlib's docstrings)")
    parser.add_argument("--documents", type=int, help="of the corpus (default: 600; on a GPU the recipe's, or all)")
    parser.add_argument("--queries", type=int, help="of a step (default: the recipe's)")
    parser.add_argument("--group", type=int, help="rollouts of a query (default: the recipe's)")
    parser.add_argument("--tokens", type=int, help="reasoning tokens at most (default: the recipe's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument(
        "--peer-precision",
        default="auto",
        choices=["auto", "float32", "autocast", "bfloat16"],
        help="bfloat16: autocast and frozen weights in bfloat16; auto: the fastest in a trial",
    )
    parser.add_argument(
        "--peer-attention", default="auto", choices=["auto", "eager", "sdpa"], help="auto: the faster in a trial"
    )
    parser.add_argument(
        "--peer-rows", type=int, help="rollouts of the peer's training pass (default: 24; on a GPU all of a step)"
    )
    parser.add_argument("--peer-without-row", action="store_true", help="it trains LoRA alone: a lighter job than ours")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--against", type=Path, help="another checkout, f444c4d, which is timed in place of the peer")
    parser.add_argument("--tiny", action="store_true", help="random weights, two layers: tries the script; --adapter "
                        "then names the base whose tokenizer is taken")  # fmt: skip
    parser.add_argument(
        "--json",
        "--output",
        dest="output",
        type=Path,
        help=f"where it goes (default: {RESULTS.name}/grpo.json or grpo-against.json)",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.on_gpu = options.device.startswith("cuda")
    options.recipe = options.recipe or RECIPES / ("gpu.yaml" if options.on_gpu else "cpu.yaml")
    if options.steps < 1 or options.warmup < 1:
        parser.error("--steps and --warmup must be 1 or more: the first step refreshes nothing, all being fresh")
    return options


def prepare(options: argparse.Namespace, scratch: Path) -> tuple[Spec, dict[str, Any]]:
    """Put what the workers share into `scratch`: the merged model, the pairs, the documents' embeddings."""
    import numpy as np
    import torch
    from transformers.utils import logging

    from search_r3.model.searchr3 import SearchR3
    from search_r3.training.grpo.grpo_task import load_stage_one
    from search_r3.training.precision import resolve_mixed_precision

    logging.disable_progress_bar()
    adapter = tiny_adapter(options.adapter, scratch) if options.tiny else options.adapter
    wanted = {"auto": "auto", "float32": "no", "bfloat16": "bf16"}[options.dtype]
    bf16 = resolve_mixed_precision(wanted, torch.device(options.device)) == "bf16"
    settings = settings_of(options, scratch, bf16)
    spec = Spec(
        system="ours",
        recipe=str(options.recipe),
        settings=settings,
        adapter=str(adapter),
        merged=str(scratch / "merged"),
        pairs=str(scratch / "pairs.jsonl"),
        vectors=str(scratch / "vectors.npy"),
        device=options.device,
        attention="sdpa" if options.on_gpu else "eager",  # what `train_grpo` takes
        precision="autocast" if bf16 else "float32",
        peer_rows=0,
        peer_row=not options.peer_without_row,
        scratch=str(scratch),
        batches=options.warmup + options.steps,
        threads=options.threads,
    )
    config = config_of(spec)
    rollouts = config.queries_per_step * config.num_generations
    rows = options.peer_rows or (rollouts if options.on_gpu else next(n for n in range(24, 0, -1) if not rollouts % n))
    if rollouts % rows:
        raise SystemExit(f"--peer-rows {rows} does not divide the {rollouts} rollouts of a step")
    spec = replace(spec, peer_rows=rows)
    most = options.documents or (config.max_documents if options.on_gpu else 600)
    pairs = distinct(options.pairs)[:most]
    if len(pairs) < spec.batches * config.queries_per_step:
        raise SystemExit(
            f"{len(pairs)} documents are too few for {spec.batches} steps of {config.queries_per_step} queries; "
            "raise --documents or give more with --pairs"
        )
    write_pairs(scratch / "pairs.jsonl", pairs)
    checkpoint, _ = load_stage_one(str(adapter))
    encoder = SearchR3(checkpoint)
    encoder.save_pretrained(spec.merged)
    checkpoint.model.to(options.device, torch.bfloat16 if bf16 else torch.float32)
    say(f"encoding {len(pairs)} documents once, for all")
    texts = [pair.positive for pair in pairs]
    vectors = SearchR3(checkpoint).encode_document(texts, max_length=config.max_document_tokens, batch_size=64)
    np.save(spec.vectors, vectors)
    del encoder, checkpoint
    give_memory_back(options.device)
    return spec, {
        "model": "tiny random" if options.tiny else Path(options.adapter).name,
        "texts": [Path(path).name for path in options.pairs] or "docstrings of the standard library",
        "documents": len(pairs),
        "precision": "bfloat16 autocast" if bf16 else "float32",
        "recipe": options.recipe.name,
        "job": {
            "queries": config.queries_per_step,
            "num_generations": config.num_generations,
            "max_reasoning_tokens": config.max_reasoning_tokens,
            "max_query_tokens": config.max_query_tokens,
            "max_document_tokens": config.max_document_tokens,
            "refresh": config.environment.refresh,
            "loss_type": config.loss_type,
            "beta": config.beta,
            "temperature": config.temperature,
            "learning_rate": config.loop.learning_rate,
            "lora_rank": config.lora.rank,
            "lora_alpha": config.lora.alpha,
        },
    }


def settings_of(options: argparse.Namespace, scratch: Path, bf16: bool) -> list[str]:
    """What is set over the recipe, in all systems."""
    sizes = {
        "queries_per_step": options.queries,
        "num_generations": options.group,
        "max_reasoning_tokens": options.tokens,
    }
    if options.tiny:
        tiny = {"queries_per_step": 2, "num_generations": 3, "max_reasoning_tokens": 5}
        sizes = {name: sizes[name] or size for name, size in tiny.items()} | {
            "environment.refresh.budget": 6, "lora.rank": 3, "lora.alpha": 6,
        }  # fmt: skip
    fixed = {
        "output": str(scratch / "ours"),
        "dev": [],
        "min_positive_rank": 1,
        "max_positive_rank": None,
        "staleness_eval_every": 0,
        "log_completions_every": 0,
        "engine": "torch",
        "num_iterations": 1,
        "num_mini_batches": 1,
        "temperature": 1.0,
        "advantage_estimator": "grpo",
        "zero_variance": "keep",  # TRL keeps them
        "contrastive_weight": 0,  # TRL has none
        "environment.gain_weight": 0,  # it would need the direct embeddings, which the peer does not make
        "loop.seed": SEED,
        "loop.schedule": "constant",
        "loop.warmup_steps": 0,
        "loop.mixed_precision": "bf16" if bf16 else "no",
    }
    chosen = {name: size for name, size in sizes.items() if size is not None}
    return [f"{name}={json.dumps(value)}" for name, value in (fixed | chosen).items()]


def tiny_adapter(model: str, scratch: Path) -> Path:
    """A random stage 1 adapter of a random tiny base with `model`'s tokenizer."""
    import torch

    from search_r3.model import checkpoint as checkpoints
    from search_r3.training.config import LoraSettings
    from search_r3.training.lora.policy import add_lora

    name = "smollm2-135m" if model.startswith("search-r3-") else model
    checkpoint = checkpoints.load_base(str(shrunk(name, scratch / "tiny")), dtype=torch.float32)
    torch.manual_seed(SEED)
    adapted = add_lora(checkpoint, LoraSettings(rank=2, alpha=4))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    checkpoints.save_adapter(adapted, checkpoint.contract, scratch / "stage1")
    return scratch / "stage1"


def speed(base: Spec, options: argparse.Namespace) -> dict[str, Any]:
    """Check that ours and the peer do the same, time them in turns, print the table."""
    spec, trial = chosen_peer(replace(base, system="peer"), options)
    weight = config_with_contrast(base)
    with ExitStack() as stack:

        def start(name: str, spec: Spec) -> System:
            system = System(name, spec, options.warmup)
            stack.callback(system.close)
            system.load()
            return system

        ours, peer = start("ours", base), start("peer", spec)
        agreement = agree(ours, peer)
        contrasted = [*base.settings, f"contrastive_weight={weight}"]
        contrastive = start("ours_contrastive", replace(base, settings=contrasted))
        systems = [ours, contrastive, peer]
        for system in systems:
            system.warm_up()
        seconds = in_turns({system.name: system.step for system in systems}, options.steps)
        for system in systems:
            system.peak_bytes = system.ask("peak")["peak_bytes"]
    measured = {one.name: compare(seconds[one.name], seconds[peer.name]) for one in (ours, contrastive)}
    table = Table(
        f"seconds of a step, median of {options.steps}; peer: TRL {peer.about['trl']}, {spec.precision}, "
        f"{spec.attention}",
        *("part            ", "ours", "contrastive", "peer"),
    )
    for part in ("seconds", *PARTS):
        medians = [statistics.median(system.seconds(part)) for system in systems]
        table.row("step" if part == "seconds" else part, *(f"{median:.3g}" for median in medians))
    table.row("peak MiB", *(f"{system.peak_bytes / 2**20:.0f}" for system in systems))
    table.row("tokens written", *(f"{statistics.median(s.taken('rollout_tokens')):.0f}" for s in systems))
    table.row("peer / ours", *(ratio_cell(measured[one.name]) for one in (ours, contrastive)), "")
    found = measured["ours"].ratio
    print(f"\n{found:.2f} times the peer's speed; goal {GOAL}: {'met' if found >= GOAL else 'missed'}")
    figures: dict[str, Any] = {system.name: system.figures() for system in systems}
    for name, one in measured.items():
        figures[name] |= ratio_figures("times_the_peers_speed", one)
    figures["ours_contrastive"]["contrastive_weight"] = weight
    return {
        "steps": options.steps,
        "goal": GOAL,
        "peer_trial_seconds": trial,
        "agreement": agreement,
        **figures,
        "peak_of_peer": rounded(ours.peak_bytes / peer.peak_bytes),
        "not_alike": NOT_ALIKE,
    }


def against(base: Spec, options: argparse.Namespace) -> dict[str, Any]:
    """Ours beside ours of `--against`: without the contrastive term and with it, in turns; prints the table."""
    checkout, weight = options.against.resolve(), config_with_contrast(base)
    contrasted = replace(base, settings=[*base.settings, f"contrastive_weight={weight}"])
    script = checkout / "benchmarks" / Path(__file__).name
    with ExitStack() as stack:
        systems: dict[str, System] = {}
        for name, spec in (("ours", base), ("ours_contrastive", contrasted)):
            for of, where in ((name, None), (name.replace("ours", "before"), checkout)):
                old = spec if where is None else of_before(spec, checkout)
                systems[of] = stack.enter_context(System(of, old, options.warmup, where and script, where))
                systems[of].load()
        said = {name: systems[name].ask("compare") for name in ("ours", "before")}
        if said["ours"]["tokens_sha256"] == said["before"]["tokens_sha256"]:
            difference = abs(said["ours"]["loss"] - said["before"]["loss"])
            if difference > TOLERANCE["bfloat16"]["loss"]:
                raise SystemExit(f"the two differ on the same rollouts: their losses by {difference:.6f}")
        for system in systems.values():
            system.warm_up()
        seconds = in_turns({name: system.step for name, system in systems.items()}, options.steps)
        for system in systems.values():
            system.peak_bytes = system.ask("peak")["peak_bytes"]
    table = Table(f"seconds of a step, median of {options.steps}", "part            ", *systems)
    for part in ("seconds", *PARTS):
        medians = [statistics.median(system.seconds(part)) for system in systems.values()]
        table.row("step" if part == "seconds" else part, *(f"{median:.3g}" for median in medians))
    table.row("peak MiB", *(f"{system.peak_bytes / 2**20:.0f}" for system in systems.values()))
    table.row("tokens written", *(f"{statistics.median(s.taken('rollout_tokens')):.0f}" for s in systems.values()))
    figures: dict[str, Any] = {name: system.figures() for name, system in systems.items()}
    for name in ("ours", "ours_contrastive"):
        old = name.replace("ours", "before")
        measured = compare(seconds[name], seconds[old])
        met = "met" if measured.ratio >= BEFORE_GOAL else "missed"
        print(f"{name}, times the speed before: {ratio_cell(measured)}; goal {BEFORE_GOAL}: {met}")
        figures[name] |= ratio_figures("times_the_speed_before", measured)
        figures[name]["peak_of_before"] = rounded(systems[name].peak_bytes / systems[old].peak_bytes)
    return {
        "steps": options.steps,
        "goal": BEFORE_GOAL,
        "checkout": options.against.name,
        "same_rollouts": said["ours"]["tokens_sha256"] == said["before"]["tokens_sha256"],
        "losses": {name: one["loss"] for name, one in said.items()},
        "contrastive_weight": weight,
        **figures,
    }


def of_before(spec: Spec, checkout: Path) -> Spec:
    """A spec of ours, in the words of f444c4d."""
    settings = []
    for setting in spec.settings:
        name, _, value = setting.partition("=")
        settings.append(
            f"{RENAMED.get(name, name)}={value if name != 'advantage_estimator' else json.dumps('standard')}"
        )
    return replace(spec, settings=settings, recipe=str(checkout / "configs" / "grpo" / Path(spec.recipe).name))


def config_with_contrast(base: Spec) -> float:
    """The recipe's own weight of the contrastive term, which the settings have put to 0."""
    bare = [setting for setting in base.settings if not setting.startswith("contrastive_weight=")]
    return config_of(replace(base, settings=bare)).contrastive_weight


def chosen_peer(spec: Spec, options: argparse.Namespace) -> tuple[Spec, dict[str, float]]:
    """The peer with the precision, then the attention, whose step is the fastest here; the seconds of the trials."""
    trial: dict[str, float] = {}

    def seconds(one: Spec) -> float:
        name = f"{one.precision}, {one.attention}"
        if name not in trial:
            with System(f"peer in a trial ({name})", one, 1) as system:
                system.load()
                system.warm_up()
                trial[name] = rounded(system.step(0))
        return trial[name]

    def fastest(of: Sequence[Spec]) -> Spec:
        return min(of, key=seconds) if len(of) > 1 else of[0]

    precisions = [options.peer_precision]
    if options.peer_precision == "auto":
        precisions = ["autocast", "bfloat16", "float32"] if spec.precision == "autocast" else ["float32"]
    attentions = ["sdpa", "eager"] if options.peer_attention == "auto" else [options.peer_attention]
    chosen = fastest([replace(spec, precision=one, attention=attentions[0]) for one in precisions])
    return fastest([replace(chosen, attention=one) for one in attentions]), trial


def agree(ours: System, peer: System) -> dict[str, Any]:
    """Both losses of the same rollouts; stops unless they are the same job."""
    mine = ours.ask("compare")
    given = mine.pop("given")
    theirs = peer.ask("compare " + json.dumps(given))
    sizes = [(s.about["lora_parameters"], s.about["other_parameters"]) for s in (ours, peer)]
    if sizes[0] != (sizes[1] if peer.spec.peer_row else (sizes[1][0], sizes[0][1])):
        raise SystemExit(f"ours and the peer train different adapters: {sizes[0]} and {sizes[1]} parameters")
    if mine["tokens_sha256"] != theirs["tokens_sha256"]:
        raise SystemExit(f"ours and the peer were given different tokens: {mine['tokens']} and {theirs['tokens']}")
    exact = {ours.spec.precision, peer.spec.precision} == {"float32"}
    allowed = TOLERANCE["float32" if exact else "bfloat16"]
    norms = ["gradient_norm", *(["row_gradient_norm"] if peer.spec.peer_row else [])]
    for name in ("loss", "kl", "entropy", *norms):
        near = allowed["gradient_norm"] * mine[name] if name in norms else allowed[name]
        if not abs(mine[name] - theirs[name]) <= near:
            raise SystemExit(
                f"ours and the peer differ on the same rollouts: {name} {mine[name]:.6f} and {theirs[name]:.6f}, "
                f"allowed {near:.6f}"
            )
    if not theirs["least_cosine"] >= 1 - allowed["cosine"]:
        raise SystemExit(f"ours and the peer embed the same rollouts differently: cosine {theirs['least_cosine']:.6f}")
    say("both have the same loss, gradient and embeddings on the same rollouts")
    return {"ours": mine, "peer": theirs, "tolerance": allowed}


class System(Worker):
    """A worker with what it has said so far. Steps are numbered: the warm-up's first, then the timed ones."""

    def __init__(
        self, name: str, spec: Spec, warmup: int, script: Path | None = None, checkout: Path | None = None
    ) -> None:
        """Start the worker; `load` waits until it is loaded."""
        super().__init__(str(script or __file__), asdict(spec), checkout)
        self.name, self.spec, self.warmup = name, spec, warmup
        self.about: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self.peak_bytes = 0

    def load(self) -> None:
        """Wait until it is loaded."""
        self.about = self.ready()
        say(f"{self.name} is loaded")

    def warm_up(self) -> None:
        """Untimed steps."""
        for number in range(self.warmup):
            self.ask(f"step {number}")

    def step(self, number: int) -> float:
        """Seconds of a timed step."""
        self.steps.append(self.ask(f"step {self.warmup + number}"))
        seconds = self.steps[-1]["seconds"]
        say(f"{self.name}, step {number + 1}: {seconds:.3g} s")
        return seconds

    def taken(self, name: str) -> list[Any]:
        """What each timed step said of `name`."""
        return [step[name] for step in self.steps]

    def seconds(self, part: str) -> list[float]:
        """Seconds of a part in each timed step, or of the whole step ("seconds")."""
        return self.taken("seconds") if part == "seconds" else [parts[part] for parts in self.taken("parts")]

    def figures(self) -> dict[str, Any]:
        """For the JSON."""

        def spread(values: list[float]) -> dict[str, float]:
            found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            return {name: rounded(value) for name, value in found.items()}

        return {
            "precision": self.spec.precision,
            "attention": self.spec.attention,
            **({"rows_per_pass": self.spec.peer_rows} if self.spec.system == "peer" else {}),
            **self.about,
            "seconds_per_step": spread(self.seconds("seconds")),
            "parts": {part: spread(self.seconds(part)) for part in PARTS},
            "rollouts": self.taken("rollouts"),
            "rollout_tokens": self.taken("rollout_tokens"),
            "peak_bytes": self.peak_bytes,
        }


if __name__ == "__main__":
    main()
