"""What every benchmark shares: peers timed side by side in one run, and a JSON of figures that can be had again.

Speeds on a shared machine drift by the minute, so A and B take turns and only their ratio, pair by pair, is trusted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search_r3.evaluation.provenance import git_commit, provenance
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
        return {k: v if isinstance(v, int) else rounded(v) for k, v in asdict(self).items()}


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
    return compare([a for a, _ in pairs], [b for _, b in pairs])


def in_turns(runs: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Call each run once a round with the round's number, the one that begins changing; what they return, a list each.

    For more than two systems, and for those that time themselves in a process of their own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(runs[name](turn))
    return seconds


def compare(ours: Sequence[float], peer: Sequence[float]) -> Comparison:
    """The comparison of two lists of seconds, one entry a round."""
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    return Comparison(
        ours_seconds=statistics.median(ours),
        peer_seconds=statistics.median(peer),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        rounds=len(ratios),
    )


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


def say(line: str) -> None:
    """Progress, on standard error: on a CPU a round of the real model takes a while."""
    print(line, file=sys.stderr, flush=True)


def shrunk(model: str, folder: Path, seed: int = 0) -> Path:
    """A random two-layer model of the same architecture, with the same tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from search_r3.model.resolve import resolve

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
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _seconds(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - start


class Worker:
    """A system in a process of its own, so that its peak memory is its own: a line in, a line of JSON out.

    The process runs `script --worker SPEC`, which calls `serve`.
    """

    def __init__(self, script: str, spec: dict[str, Any], checkout: Path | None = None) -> None:
        """Start the process; it loads while the caller goes on to `ready`.

        Args:
            checkout: another checkout, from which the process takes the package and the benchmarks' modules.
        """
        environment = dict(os.environ)
        if checkout is not None:
            environment["PYTHONPATH"] = os.pathsep.join((str(checkout), str(checkout / "benchmarks")))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process: `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ready(self) -> dict[str, Any]:
        """Wait until the system is loaded; returns what it says of itself."""
        return self._answer()

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for its answer. Raises SystemExit with the end of the worker's log if it has died."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let the process end: it stops at the end of its input."""
        if self._process.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace")[-3000:]
        raise SystemExit(f"a worker ended with code {code} (-9: killed, perhaps for memory):\n{tail}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(load: Callable[[], tuple[dict[str, Any], Callable[[str], dict[str, Any]]]]) -> None:
    """A worker's side: `load` gives what to say when ready, and the function from a line to its answer."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the answers
    ready, answer = load()
    print(json.dumps(ready), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=channel, flush=True)


def peak_memory(device: str) -> int:
    """This process's peak so far in bytes: what torch's allocator held on a GPU, the resident set on a CPU.

    The resident set is Linux's VmHWM; `ru_maxrss`, which a child takes over from its parent, only where that is not.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kept if sys.platform == "darwin" else kept * 1024


def give_memory_back(device: str) -> None:
    """Return what Python and the C library hold free, so that the workers that wait do not fill the machine."""
    import ctypes
    import gc

    gc.collect()
    if not device.startswith("cuda"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def write_report(name: str, figures: dict[str, Any], *, device: str, seed: int, output: Path | None = None) -> Path:
    """Write `results/benchmarks/NAME.json` (or `output`): figures, command, commit, machine, seed, versions."""
    record = provenance(seed, device)
    record["command"] = f"python benchmarks/{record['command']}"
    target = output or RESULTS / f"{name}.json"
    atomic_write_text(target, json.dumps({"benchmark": name, **record, "figures": figures}, indent=2) + "\n")
    return target


def finish(name: str, figures: dict[str, Any], options: argparse.Namespace, seed: int) -> None:
    """Write the report where `options` say and tell so; a tiny run is written only where --json says."""
    if options.tiny and options.output is None:
        print("\na tiny run: nothing written (--json FILE writes it)")
        return
    target = write_report(name, figures, device=options.device, seed=seed, output=options.output)
    print(f"\nwritten to {target.name}")


class Kept:
    """Measurements in a file of `folder`, by name, so that a run that was killed goes on with those that are missing.

    Raises:
        SystemExit: the folder holds measurements that were made under other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._path = folder / "measured.json"
        self._settings = json.loads(json.dumps(settings))
        self._commit = git_commit()
        self._values: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            record = json.loads(self._path.read_text(encoding="utf-8"))
            old = record["settings"]
            other = sorted(k for k in {*old, *self._settings} if old.get(k) != self._settings.get(k))
            if other:
                found = ", ".join(f"{k} {old.get(k)!r} (now {self._settings.get(k)!r})" for k in other)
                raise SystemExit(f"{folder} holds measurements with {found}; give another folder")
            self._values = record["values"]

    def measure(self, name: str, run: Callable[[], Any]) -> Any:
        """The value of `name` if it is there, else what `run` returns, which is then kept."""
        if name not in self._values:
            self._values[name] = {"commit": self._commit, "value": json.loads(json.dumps(run()))}
            record = {"settings": self._settings, "values": self._values}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self._path, json.dumps(record) + "\n")
        return self._values[name]["value"]

    def has(self, name: str) -> bool:
        """Whether `name` was measured."""
        return name in self._values

    @property
    def commits(self) -> list[str]:
        """The commits that the measurements are of: one, unless the source changed while they were made."""
        return sorted({str(one["commit"]) for one in self._values.values()})


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
