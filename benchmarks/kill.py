"""Kill -9 at random moments: indexing, training, data building and the server, 50 times each; then a full disk.

    python benchmarks/kill.py                    # 200 kills; a log line each; results/benchmarks/kill.json
    python benchmarks/kill.py --kills 2 --output FILE   # a rehearsal
    python benchmarks/kill.py --sabotage         # files are not written aside: the harness must find it

After a kill the files are read as a user's next command would read them: nothing that was committed may be lost, and
nothing half-written may be taken for whole. Then the same command goes on, and its result must be that of a run that
nobody killed. A run that is interrupted goes on behind its last line of log.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import kill_disk  # noqa: E402
from common import RESULTS, write_report  # noqa: E402
from kill_stores import Index, Server  # noqa: E402
from kill_subject import Subject  # noqa: E402
from kill_victims import GRPO, SFT, DataBuild, Victim  # noqa: E402

AREAS: dict[str, tuple[type[Victim], ...]] = {
    "index": (Index,),
    "training": (SFT, GRPO),
    "data": (DataBuild,),
    "server": (Server,),
}
PAUSE = 0.2
"""Seconds between the two halves of a file, where the writing is broken on purpose."""


def kill_all(options: argparse.Namespace, scratch: Path, log: Path) -> list[dict[str, Any]]:
    """Every kill that the log does not have yet; returns all."""
    settings = {"seed": options.seed, "kills": options.kills, "sabotage": options.sabotage}
    done = _read_log(log, settings)
    for area in options.only:
        victims = AREAS[area]
        counts = [(options.kills + i) // len(victims) for i in reversed(range(len(victims)))]
        for victim, count in zip(victims, counts, strict=True):
            waiting = [kill for kill in range(count) if (victim.name, kill) not in
                       {(record["victim"], record["kill"]) for record in done}]  # fmt: skip
            subject = Subject(victim, scratch, options.seed) if waiting else None
            for kill in waiting:
                assert subject is not None
                record = {"victim": victim.name, **subject.kill(kill, count)}
                done.append(record)
                with open(log, "a", encoding="utf-8") as handle:
                    handle.write(json.dumps(record) + "\n")
                verdict = "; ".join(record["wrong"]) or "nothing lost"
                what, when = f"{record['what']} {kill + 1}/{count}", f"{record['when']} ({record['last_event']})"
                print(f"{what}  {when}  {record['found']}; {record['then']}  {verdict}", flush=True)
    return done


def _read_log(log: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if log.exists():
        head, *lines = log.read_text(encoding="utf-8").splitlines() or ["{}"]
        if json.loads(head) == settings:
            return [json.loads(line) for line in lines]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return []


def sabotage() -> None:
    """Break `atomic_path`: what is written comes to stand under its final name in two halves, with a pause between."""
    from search_r3 import files

    def slowly(source: Path, target: Path) -> None:
        if source.is_dir():
            target.mkdir(exist_ok=True)
            for item in sorted(source.iterdir()):
                slowly(item, target / item.name)
            return
        content = source.read_bytes()
        with open(target, "wb") as handle:
            handle.write(content[: len(content) // 2])
            handle.flush()
            time.sleep(PAUSE)
            handle.write(content[len(content) // 2 :])

    @contextmanager
    def in_halves(target: str | Path) -> Iterator[Path]:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) / f"scratch{Path(target).suffix}"
            yield scratch
            slowly(scratch, Path(target))

    files.atomic_path = in_halves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each of the four areas")
    parser.add_argument("--only", nargs="+", choices=(*AREAS, "disk"), default=[*AREAS, "disk"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help=f"instead of {RESULTS.name}/kill.json; the log stands beside it")
    parser.add_argument("--sabotage", action="store_true", help="break the writing of files: kills must find it")
    parser.add_argument("--keep", type=Path, help="work in this new folder, and keep it")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills must be 1 or more")
    warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    if options.sabotage:
        sabotage()
        options.output = options.output or Path(tempfile.mkdtemp()) / "kill.json"
    output = options.output or RESULTS / "kill.json"
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-", ignore_cleanup_errors=True) as folder:
        scratch = options.keep or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        os.environ["SEARCH_R3_CACHE"] = str(scratch / "cache")
        disk = kill_disk.fill_disks(scratch, options.seed) if "disk" in options.only else []
        options.only = [area for area in options.only if area != "disk"]
        records = kill_all(options, scratch, output.with_suffix(".jsonl"))
    bad = [record for record in records if record["wrong"]] + [case for case in disk if case["wrong"]]
    figures = {
        "kills": len(records),
        "kills_by_victim": dict(Counter(record["what"] for record in records)),
        "kills_that_lost_something": sum(bool(record["wrong"]) for record in records),
        "kills_at": {"file events": sum("event" in r["when"] for r in records),
                     "shares of CPU time": sum("CPU" in r["when"] for r in records),
                     "while going on after a kill": sum(r["when"].startswith("again") for r in records)},
        "last_file_event_before": dict(Counter(f"{r['victim']}: {r['last_event']}" for r in records).most_common()),
        "full_disk": disk,
        "minutes": round((time.monotonic() - begun) / 60, 2),
    }  # fmt: skip
    write_report("kill", figures, device="cpu", seed=options.seed, output=output)
    print(f"{len(records)} kills, {len(disk)} full disks; {len(bad)} found something wrong: {output}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
