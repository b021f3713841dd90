"""Refreshing the corpus where training touches it, against re-encoding all of it: what it costs in rewards and in time.

    python benchmarks/environment.py --recording build/recording       # all three parts; see environment_record.py
    python benchmarks/environment.py --only simulated --rows 10000     # without a recording: drift as in --drift

recorded   a run's checkpoints over a real corpus: recall, reward error and age for each refresh policy. No model.
simulated  10,000 and 100,000 rows that move as those of the recording did: the same, and the share re-encoded.
million    1,000,000 rows and an approximate graph: time by part and memory only.

Each policy of each world is kept in --work as soon as it is done; a killed benchmark goes on with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Table, Worker, rounded, say, write_report
from environment_drift import ASSUMED, Drift, drift_json, measure, read_drift
from environment_million import Spec
from environment_plot import PANELS, draw
from environment_recording import Recording
from environment_replay import MATCHED, PARTS, RANDOM, SELECTIVE, policies, replay, summary
from environment_worlds import RecordedWorld, SimulatedWorld, Simulation

from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.errors import InputError
from search_r3.files import atomic_write_text

GOAL_ROWS = 100_000
GOALS = {"share_reencoded": 0.05, "error": 0.02, "error_of_random": 1 / 3, "choose_and_relink": 0.10}
ASSUMED_SPEED = 20.0
"""Documents a second where no recording says: what 135M parameters do on two cores."""
TINY = {"rows": [600], "steps": 12, "dimension": 32, "queries": 64, "million": 3000, "million_steps": 2,
        "million_budget": 200}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run what `--only` asks for, print the tables, write the JSON and the plot."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        run(options)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["recorded", "simulated", "million"])
    parser.add_argument("--recording", type=Path, help="a folder that environment_record.py made")
    parser.add_argument("--between", type=int, default=1, help="recorded: steps from a checkpoint to the next")
    parser.add_argument("--drift", type=Path, help="simulated: measured drift (default: the recording's, else assumed)")
    parser.add_argument("--save-drift", type=Path, help="where to write the recording's drift as JSON")
    parser.add_argument("--scale", type=float, default=1.0, help="simulated: multiplies the drift")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, GOAL_ROWS], help="simulated: sizes")
    parser.add_argument("--steps", type=int, default=60, help="simulated: steps")
    parser.add_argument("--dimension", type=int, default=576, help="without a recording")
    parser.add_argument("--queries", type=int, default=1024, help="simulated: training queries")
    parser.add_argument("--budget-share", type=float, default=0.05, help="of the rows, re-encoded in a step at most")
    parser.add_argument("--million", type=int, default=1_000_000, help="rows of the third part")
    parser.add_argument("--million-steps", type=int, default=20)
    parser.add_argument("--million-budget", type=int, default=2000)
    parser.add_argument("--documents-per-second", type=float, help="of encoding (default: the recording's, else 20)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/environment"), help="finished parts")
    parser.add_argument("--fresh", action="store_true", help="compute finished parts again")
    parser.add_argument("--tiny", action="store_true", help="small sizes, seconds; results only where --output says")
    parser.add_argument("--output", type=Path, help="the JSON (default: results/benchmarks/environment.json)")
    parser.add_argument("--plot", type=Path, help="the image (default: beside the JSON)")
    options = parser.parse_args(argv)
    if options.tiny:
        for name, value in TINY.items():
            if getattr(options, name) == parser.get_default(name):
                setattr(options, name, value)
    if not 0 < options.budget_share <= 1:
        parser.error("--budget-share must be above 0 and at most 1")
    if options.between < 1 or options.steps < 2:
        parser.error("--between must be 1 or more, --steps 2 or more")
    options.only = options.only or ["recorded", "simulated", "million"]
    return options


def run(options: argparse.Namespace) -> None:
    """The parts in their order, then the report."""
    recording = Recording(options.recording) if options.recording else None
    parts = Parts(options.work, options.fresh)
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    curves: dict[str, dict[str, Any]] = {}
    speed, origin = documents_per_second(recording, options)
    figures["documents_per_second"] = {"value": rounded(speed), "source": origin}
    if recording is None and "recorded" in options.only:
        say("no --recording: the recorded part is left out (environment_record.py makes one)")
    drift = find_drift(recording, options)
    if recording is not None and "recorded" in options.only:
        figures["recorded"], curves[f"{recording.facts['documents']:,} recorded"] = recorded(recording, parts, options)
    if recording is not None or "simulated" in options.only:
        figures["drift"] = drift_json(drift)
    if "simulated" in options.only:
        figures["simulated"] = {}
        for rows in options.rows:
            found, curves[f"{rows:,} simulated"] = simulated(rows, drift, recording, speed, parts, options)
            figures["simulated"][str(rows)] = found
        figures["goals"] = goals(figures["simulated"], GOAL_ROWS if GOAL_ROWS in options.rows else max(options.rows))
    if "million" in options.only:
        figures["million"] = million(parts, speed, options)
    if options.tiny and options.output is None:
        say("a tiny run is not written; say where with --output")
        return
    target = write_report("environment", figures, device="cpu", seed=options.seed, output=options.output)
    print(f"\nwritten to {target.name}")
    if curves:
        image = options.plot or (target.with_suffix(".png") if options.output else RESULTS / "environment.png")
        print(f"drawn to {draw(curves, image).name}")


def recorded(recording: Recording, parts: Parts, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The main result: every policy through the recording's checkpoints. Returns (figures, curves)."""
    world = RecordedWorld(recording, between=options.between, seed=options.seed)
    settings = {"recording": recording.digest, "between": options.between, "seed": options.seed}
    title = (
        f"recorded: {world.rows:,} documents, {len(recording.steps)} checkpoints (steps {recording.steps[0]} to "
        f"{recording.steps[-1]}), {options.between} step(s) from one to the next"
    )
    if not recording.facts.get("known_batches", True):
        title += ", which queries were trained on when is not known"
    records = compare(title, "recorded", world, settings, None, parts, options)
    return (
        {
            "recording": {k: v for k, v in recording.facts.items() if k not in ("format", "steps")},
            "checkpoints": len(recording.steps),
            "checkpoint_steps": recording.steps,
            "steps_between": options.between,
            "budget_share": options.budget_share,
            "policies": {name: summary(found, world.rows) for name, found in records.items()},
            "curves": tabled(records),
        },
        drawn(records),
    )


def simulated(
    rows: int, drift: Drift, recording: Recording | None, speed: float, parts: Parts, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every policy in a simulated corpus. Returns (figures, curves)."""
    simulation = Simulation(
        rows, options.steps, dimension=options.dimension, queries=options.queries, scale=options.scale
    )
    world = SimulatedWorld(simulation, drift, recording, seed=options.seed)
    settings = {
        "simulation": dataclasses.asdict(simulation),
        "drift": drift_json(drift),
        "recording": recording.digest if recording else None,
        "seed": options.seed,
    }
    check = parts.get("check", settings, lambda: drift_json(world.check()))
    print(f"\ndrift of one step, {rows:,} rows: as measured ({drift.source}), and as simulated (x {options.scale:g})")
    for name, value in drift.summary().items():
        print(f"  {name:20} {value:<10g} {Drift(**check).summary()[name]:g}")
    title = f"simulated: {rows:,} rows, {options.steps} steps"
    records = compare(title, f"simulated {rows}", world, settings, world.graph, parts, options)
    summaries = {name: summary(found, rows) for name, found in records.items()}
    table = Table("seconds of a step, by part", "policy" + " " * 32, *PARTS, "model's", "choose+relink: share")
    for name, found in summaries.items():
        found["time"] = timed(found, rows, speed)
        seconds = [f"{found['seconds'][part]:.3f}" for part in PARTS]
        share = f"{found['time']['share_of_step']:.1%} ({found['time']['share_without_encoding']:.0%} without encoding)"
        table.row(name, *seconds, f"{found['time']['encode_seconds']:.1f}", share)
    figures = {
        "simulation": dataclasses.asdict(simulation),
        "geometry": world.facts(),
        "drift_as_simulated": check,
        "budget_share": options.budget_share,
        "policies": summaries,
        "curves": tabled(records),
    }
    level = summaries[SELECTIVE]
    print(f"true reward {level['reward']:.3f}, nDCG@10 {level['ndcg']:.3f}, mean over the steps")
    return figures, drawn(records)


def compare(
    title: str,
    name: str,
    world: RecordedWorld | SimulatedWorld,
    settings: dict[str, Any],
    graph: Callable[[], NeighborGraph] | None,
    parts: Parts,
    options: argparse.Namespace,
) -> dict[str, list[dict[str, Any]]]:
    """Replay every policy, print a row for each: policy -> its records."""
    budget = max(1, math.floor(options.budget_share * world.rows))
    header = ("policy" + " " * 32, "share", "age", "recall", "error", "at the end", "dev recall", "dev error", "stale")
    table = Table(f"{title}; at most {budget:,} rows re-encoded in a step", *header)
    records: dict[str, list[dict[str, Any]]] = {}
    for policy, refresh in policies(world.rows, budget).items():
        if policy == MATCHED:
            used = [record["refreshed"] for record in records[SELECTIVE][1:]]
            refresh = refresh | {"budget": max(1, math.ceil(np.mean(used)))}
        environment = EnvironmentConfig()
        records[policy] = parts.get(
            f"{name} {policy}",
            settings | {"environment": dataclasses.asdict(environment), "refresh": refresh},
            lambda r=refresh, p=policy, e=environment: replay(
                world, r, environment=e, graph=graph, seed=options.seed, label=f"{name}, {p}"
            ),
        )
        found = summary(records[policy], world.rows)
        cells = [f"{found['share_reencoded']:.2%}", f"{found['age']:.1f}", f"{found['recall']:.4f}"]
        cells += [f"{found['error']:.5f}", f"{found['end_error']:.5f}"]
        cells += [
            f"{found[key]:.4f}" if key in found else "-" for key in ("dev_recall", "dev_error", "staleness_error")
        ]
        table.row(policy, *cells)
    return records


def timed(found: dict[str, Any], rows: int, speed: float) -> dict[str, float]:
    """How much of the environment's step choosing and relinking are, with the model's time for re-encoding put in."""
    seconds = found["seconds"]
    ours = seconds["choose"] + seconds["relink"]
    others = sum(seconds[part] for part in PARTS if part not in ("choose", "relink", "encode"))
    encode = found["share_reencoded"] * rows / speed
    return {
        "encode_seconds": rounded(encode),
        "share_of_step": rounded(ours / (ours + others + encode)),
        "share_without_encoding": rounded(ours / (ours + others)),
    }


def goals(simulated: dict[str, Any], rows: int) -> dict[str, Any]:
    """What was asked for, what was found, and whether it is met; printed too."""
    found = simulated[str(rows)]["policies"]
    selective = found[SELECTIVE]
    error = selective["error"]
    measured = {
        "share_reencoded": selective["most_reencoded"],
        "error": error,
        "error_of_random": error / found[MATCHED]["error"] if found[MATCHED]["error"] else math.inf,
        "choose_and_relink": selective["time"]["share_of_step"],
    }
    words = {
        "share_reencoded": "selective re-encodes at most this share in any step",
        "error": "selective's reward error",
        "error_of_random": "that error over random's, which re-encodes as many rows",
        "choose_and_relink": "choosing and relinking, share of the environment's step",
    }
    table = Table(f"goals at {rows:,} rows", "what" + " " * 56, "found", "goal", "")
    result: dict[str, Any] = {"rows": rows}
    for name, value in measured.items():
        met = bool(value <= GOALS[name])
        result[name] = {"found": rounded(value), "goal": rounded(GOALS[name]), "met": met}
        table.row(words[name], f"{value:.4f}", f"{GOALS[name]:.4f}", "met" if met else "missed")
    whole = found[RANDOM]["error"]
    result["error_of_random_at_the_whole_budget"] = rounded(error / whole) if whole else None
    result["dev_error_of_random"] = {
        name: rounded(selective["dev_error"] / found[name]["dev_error"])
        for name in (MATCHED, RANDOM)
        if found[name].get("dev_error")
    }
    print(f"error over that of random with the whole budget: {result['error_of_random_at_the_whole_budget']}")
    print(f"the same on fixed dev queries, over random's: {result['dev_error_of_random']}")
    return result


def million(parts: Parts, speed: float, options: argparse.Namespace) -> dict[str, Any]:
    """Time by part and memory at a million rows."""
    spec = Spec(
        rows=options.million, dimension=options.dimension, budget=options.million_budget, threads=options.threads,
        seed=options.seed,
    )  # fmt: skip
    steps = options.million_steps

    def compute() -> dict[str, Any]:
        script = Path(__file__).with_name("environment_million.py")
        say(f"million: filling {spec.rows:,} rows and building the graph")
        with Worker(str(script), dataclasses.asdict(spec)) as worker:
            found, answers = worker.ready(), []
            say(f"million: graph built in {found['approximate_build_seconds']:.0f} s")
            for step in range(1, steps + 1):
                answers.append(worker.ask(str(step)))
                say(f"million: step {step} of {steps}: {sum(answers[-1]['seconds'].values()):.1f} s")
        return found | {"answers": answers}

    settings = {"spec": dataclasses.asdict(spec), "steps": steps}
    found = dict(parts.get("million", settings, compute))
    answers = found.pop("answers")
    found["steps"] = len(answers)
    found["rows_per_step"] = rounded(float(np.mean([a["refreshed"] for a in answers])))
    found["seconds"] = {part: rounded(float(np.mean([a["seconds"][part] for a in answers]))) for part in PARTS}
    found["model_encode_seconds"] = rounded(found["rows_per_step"] / speed)
    found["peak_bytes"] = answers[-1]["peak_bytes"]
    found["peak_of_matrix"] = rounded(found["peak_bytes"] / found["matrix_bytes"])
    title = f"{spec.rows:,} rows of {spec.dimension}: {found['rows_per_step']:g} rows re-encoded in a step, seconds"
    table = Table(title, "build", *PARTS, "model's encode", "peak GiB", "matrix GiB", "graph GiB")
    gib = [f"{found[key] / 2**30:.2f}" for key in ("peak_bytes", "matrix_bytes", "graph_bytes")]
    table.row(
        f"{found['approximate_build_seconds']:.1f}",
        *(f"{found['seconds'][part]:.3f}" for part in PARTS),
        f"{found['model_encode_seconds']:.1f}",
        *gib,
    )
    return found


def find_drift(recording: Recording | None, options: argparse.Namespace) -> Drift:
    """As --drift says, else measured from the recording, else assumed."""
    if options.drift:
        return read_drift(options.drift)
    if recording is None:
        return read_drift(ASSUMED)
    drift = measure(recording)
    if options.save_drift:
        atomic_write_text(options.save_drift, json.dumps(drift_json(drift), indent=1) + "\n")
    return drift


def documents_per_second(recording: Recording | None, options: argparse.Namespace) -> tuple[float, str]:
    """How fast a model encodes documents, and who says so."""
    if options.documents_per_second:
        return options.documents_per_second, "--documents-per-second"
    if recording is not None and (speed := recording.documents_per_second()):
        return speed, "measured while recording"
    return ASSUMED_SPEED, "assumed"


class Parts:
    """Finished parts on disk, by their name, their settings and the source of what computed them."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh
        here = Path(__file__).resolve().parent
        files = [*here.glob("environment*.py"), *(here.parent / "search_r3" / "environment").glob("*.py")]
        files = [path for path in files if path.name not in ("environment_plot.py", "environment_record.py")]
        self.source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()

    def get(self, name: str, settings: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What `compute` gave the last time for these settings, or gives now."""
        key = hashlib.sha256(json.dumps([name, settings, self.source], sort_keys=True).encode()).hexdigest()[:12]
        safe = "".join(letter if letter.isalnum() else "-" for letter in name)
        path = self.folder / f"{safe}-{key}.json"
        if path.is_file() and not self.fresh:
            return json.loads(path.read_text(encoding="utf-8"))
        found = compute()
        atomic_write_text(path, json.dumps(found) + "\n")
        return json.loads(json.dumps(found))


def drawn(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Policy -> curve -> (steps, values), of the figures that a step has."""
    return {
        policy: {
            curve: ([r["step"] for r in found if curve in r], [r[curve] for r in found if curve in r])
            for curve, _ in PANELS
        }
        for policy, found in records.items()
    }


def tabled(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The same for the JSON, rounded."""
    return {
        policy: {name: {"steps": steps, "values": [rounded(v) for v in values]} for name, (steps, values) in of.items()}
        for policy, of in drawn(records).items()
    }


if __name__ == "__main__":
    main()
