"""Seconds and memory of `search-r3 index FOLDER` on mixed text files, here and in another checkout, in turns.

    python benchmarks/index_files.py --against CHECKOUT                           # results/benchmarks/index_files.json
    python benchmarks/index_files.py --against CHECKOUT --files 200 --rounds 1 --json FILE    # a rehearsal

The files are real ones: those of Python's library and of the packages installed beside it, of formats that have
been read from the beginning (Python, C, Markdown, reStructuredText, text, ...), evenly over the formats, no content
twice. Each run is a process of its own, as a user starts it: first into a new index, then again with nothing changed,
which reads all files and embeds nothing. By default with random weights of two layers, so that reading, cutting and
writing are what is timed; `--model` names a real one that both checkouts know. Memory is the process's peak (VmHWM).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import Table, compare, in_turns, ratio_cell, ratio_figures, rounded, say, shrunk, write_report

SEED = 0
HERE = Path(__file__).resolve().parent
SUFFIXES = (
    ".c", ".cfg", ".css", ".h", ".hpp", ".ini", ".js", ".md", ".proto", ".py", ".pyi", ".pyx", ".rst", ".scss", ".sh",
    ".sql", ".tcl", ".tex", ".toml", ".ts", ".txt", ".yaml", ".yml",
)  # fmt: skip
"""Formats that both read; HTML and others came later."""
SMALLEST, LARGEST = 200, 100_000
"""Bytes of a file: no empty `__init__.py`, no generated table."""
LEFT_OUT = {"__pycache__", "site-packages"}
BASE = "smollm2-135m"
POLL = 0.02
TASKS = ("first run", "nothing changed")
COMPARED = (("seconds", "times_as_fast", "as fast as"), ("cpu_seconds", "times_the_cpu", "the CPU of"))


def real_files(roots: list[Path], most: int) -> list[Path]:
    """At most `most` files below the roots, one of each suffix in turn, in the order of their names' hashes."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for root in roots:
        for path in _files(root):
            key = hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()
            found.setdefault(path.suffix.lower(), []).append((key, path))
    queues = [iter(sorted(paths)) for _, paths in sorted(found.items())]
    chosen: list[Path] = []
    contents: set[bytes] = set()
    while queues and len(chosen) < most:
        for queue in list(queues):
            path = next((path for _, path in queue if _is_new(path, contents)), None)
            if path is None:
                queues.remove(queue)
            else:
                chosen.append(path)
    return chosen[:most]


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        yield from (Path(folder, name) for name in names if Path(name).suffix.lower() in SUFFIXES)


def _is_new(path: Path, contents: set[bytes]) -> bool:
    """Whether the file is text of a fitting size whose content was not chosen yet; it is from now on."""
    try:
        if not SMALLEST <= path.stat().st_size <= LARGEST:
            return False
        (content := path.read_bytes()).decode()
    except (OSError, UnicodeDecodeError):
        return False
    digest = hashlib.sha256(content).digest()
    new = digest not in contents
    contents.add(digest)
    return new


def copy_files(files: list[Path], folder: Path) -> dict[str, Any]:
    """Copies the files to `folder`, a hundred in each subfolder; returns what they are."""
    digest = hashlib.sha256()
    for number, file in enumerate(files):
        target = folder / str(number // 100) / f"{number}{file.suffix.lower()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        digest.update(target.read_bytes())
    suffixes = Counter(file.suffix.lower() for file in files)
    size = sum(file.stat().st_size for file in files)
    return {
        "files": len(files),
        "bytes": size,
        "sha256": digest.hexdigest(),
        "suffixes": dict(sorted(suffixes.items())),
    }


def index_once(checkout: Path, folder: Path, index: Path, model: str) -> dict[str, Any]:
    """One run of the command with the code of a checkout: seconds, peak bytes, and what it reports."""
    command = [sys.executable, "-W", "ignore", "-m", "search_r3", "index", str(folder), "--into", str(index), "--json"]
    command += ["--model", model, "--device", "cpu", "--dtype", "float32"]
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as out:
        began, cpu_before = time.perf_counter(), _cpu_of_children()
        process = subprocess.Popen(
            command, stdout=out, stderr=log, cwd=index.parent, env=os.environ | {"PYTHONPATH": str(checkout)}
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _peak_of(process.pid))
            time.sleep(POLL)
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_of_children() - cpu_before
        log.seek(0)
        out.seek(0)
        if process.returncode:
            raise SystemExit(f"{checkout.name} ended with code {process.returncode}:\n{log.read()[-3000:]}")
        report = json.loads(out.read())
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "report": report}


def _cpu_of_children() -> float:
    """Seconds of CPU of all processes that have ended, which other work on the machine changes less than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _peak_of(process: int) -> int:
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return 0


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The figures of all checkouts."""
    roots = options.roots or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    about = copy_files(real_files(roots, options.files), folder := scratch / "files")
    say(f"{about['files']:,} files, {about['bytes'] / 1e6:.1f} MB: {about['suffixes']}")
    model = options.model or str(shrunk(BASE, scratch / "model", SEED))
    checkouts = {"ours": HERE.parent} | ({"before": options.against.resolve()} if options.against else {})
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {task: [] for task in TASKS} for name in checkouts}

    def run(name: str, turn: int) -> float:
        index = scratch / f"{name}-{turn}.index"
        for task in TASKS:
            runs[name][task].append(one := index_once(checkouts[name], folder, index, model))
            say(
                f"round {turn + 1}, {name}, {task}: {one['seconds']:.1f} s, {one['cpu_seconds']:.1f} of CPU, "
                f"{one['peak_bytes'] / 2**20:,.0f} MiB"
            )
        shutil.rmtree(index)
        return runs[name][TASKS[0]][-1]["seconds"]

    in_turns({name: lambda turn, name=name: run(name, turn) for name in checkouts}, options.rounds)
    return about | {"systems": {name: _figures(kinds) for name, kinds in runs.items()}} | _ratios(runs)


def _figures(kinds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        task: {
            "seconds": rounded(statistics.median(run["seconds"] for run in runs)),
            "cpu_seconds": rounded(statistics.median(run["cpu_seconds"] for run in runs)),
            "peak_bytes": int(statistics.median(run["peak_bytes"] for run in runs)),
            "report": runs[-1]["report"],
        }
        for task, runs in kinds.items()
    }


def _ratios(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """How many times as fast ours is, for each task."""
    if "before" not in runs:
        return {}
    found: dict[str, Any] = {}
    for task in TASKS:
        for measure, key, said in COMPARED:
            ours, before = ([run[measure] for run in runs[name][task]] for name in ("ours", "before"))
            compared = compare(ours, before) if measure == "seconds" else compare(before, ours)
            found.setdefault(task, {}).update(ratio_figures(key, compared))
            print(f"{task}: {ratio_cell(compared)} times {said} before, of {compared.rounds} rounds")
    return {"ratios": found}


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--roots", type=Path, nargs="+", help="folders to take files from (default: Python's library)")
    parser.add_argument("--model", help="a model that both checkouts know (default: random weights of two layers)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", dest="output", type=Path, help="where to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        figures = measure(options, Path(folder))
    table = Table("search-r3 index", "code", "run", "seconds", "of CPU", "MiB")
    for name, kinds in figures["systems"].items():
        for task, run in kinds.items():
            seconds = [f"{run[name]:.4g}" for name in ("seconds", "cpu_seconds")]
            table.row(name, task.ljust(15), *seconds, f"{run['peak_bytes'] / 2**20:,.0f}")
    against = options.against.name if options.against else None
    settings = {"rounds": options.rounds, "against": against, "model": options.model or f"random, shaped as {BASE}"}
    print(write_report("index_files", settings | figures, device="cpu", seed=SEED, output=options.output).name)


if __name__ == "__main__":
    main()
