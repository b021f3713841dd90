"""A disk that fills up while the index, a training run, training data or an evaluation is written.

The disk is a tmpfs of a part of the bytes that the whole result takes, so every write of every library meets it, those
in Rust as well. Then it gets more room, and the same command must go on to the same result.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kill_process import Ended, ask, tail
from kill_stores import Index
from kill_subject import Subject
from kill_victims import SFT, DataBuild, Victim, command_line, helper, same_trees, write_dataset

SHARES = (0.3, 0.8)
"""Of the undisturbed result's bytes: the disk is full near the beginning, and near the end."""
ROOM = "size=1g"
SPACE, TO_DO = "no space left", "free some space|make room"


class Evaluate(Victim):
    """`evaluate`: the runs of BM25 and of a model, whose embeddings are cached."""

    name = "evaluate"

    def prepare(self) -> None:
        helper("conftest").save_tiny_model(self.root / "tiny")
        write_dataset(self.root / "data/toy", 400)

    def command(self, folder: Path) -> int:
        os.environ["SEARCH_R3_CACHE"] = str(folder / "cache")  # on the small disk too
        return command_line(
            "evaluate", "--data", self.root / "data", "--dataset", "toy", "--system", "bm25",
            "--system", self.root / "tiny", "--mode", "off", "--device", "cpu", "--output", folder / "results",
        )  # fmt: skip

    def inspect(self, folder: Path, whole: Path, ended: Ended) -> tuple[str, list[str]]:
        mine = {str(file.relative_to(folder)) for file in (folder / "results").rglob("[!.]*") if file.is_file()}
        wrong = [
            f"{name} stands under its name and is not the whole"
            for name in mine
            if _of_results(folder / name) != _of_results(whole / name)
        ]
        return f"{len(mine)} files of results", wrong

    def compare(self, folder: Path, whole: Path, log: str, found: str) -> tuple[str, list[str]]:
        return "", same_trees(folder / "results", whole / "results", _of_results)


def _of_results(file: Path) -> bytes | None:
    """A run's bytes; of the figures what is no time and names no folder."""
    if file.suffix != ".json":
        return file.read_bytes() if file.exists() else None
    record = json.loads(file.read_text(encoding="utf-8"))
    return json.dumps([record["dataset"], record["system"], record["measures"], record["run_sha256"]]).encode()


CASES: tuple[type[Victim], ...] = (Index, SFT, DataBuild, Evaluate)


def fill_disks(scratch: Path, seed: int, shares: tuple[float, ...] = SHARES) -> list[dict[str, Any]]:
    """Every case on disks of every size; empty where no tmpfs can be mounted, which needs root."""
    records = []
    for case in CASES:
        try:
            with disk(scratch / f"try-{case.name}", "size=1m"):
                pass
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no small disk can be mounted here ({error}): the full disk is left to the tests, which inject it")
            return []
        subject = Subject(case, scratch / "disk", seed)
        whole = subject.whole(0).folder
        size = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
        for share in shares:
            records.append(_fill(subject, whole, int(share * size), share))
            verdict = "; ".join(records[-1]["wrong"]) or "nothing lost, one clear line, went on"
            print(f"full disk, {case.name} at {share:.0%}  {records[-1]['said']}  {verdict}", flush=True)
    return records


def _fill(subject: Subject, whole: Path, size: int, share: float) -> dict[str, Any]:
    victim = subject.victim
    with disk(subject.scratch / f"disk-{share}", f"size={size}") as folder:
        ended = subject.run(folder)
        log = subject.log(folder).read_text(encoding="utf-8", errors="replace")
        errors = [line for line in log.splitlines() if line.startswith("error: ")]
        wrong = [] if ended.code == 2 else [f"it ended with code {ended.code}: {tail(subject.log(folder))[-300:]}"]
        said = errors[-1] if errors else ""
        if len(errors) != 1 or "Traceback" in log or SPACE not in said.lower() or not re.search(TO_DO, said):
            wrong.append(f"it does not say in one line what happened and what to do: {log.strip()[-500:]}")
        try:
            found, faults = ask(lambda: victim.inspect(folder, whole, ended), subject.scratch)
            subprocess.run(["mount", "-o", f"remount,{ROOM}", str(folder)], check=True)
            again = subject.run(folder)
            log = subject.log(folder).read_text(encoding="utf-8", errors="replace")
            if again.code:
                then, differs = "", [f"going on ended with code {again.code}: {log.strip()[-300:]}"]
            else:
                then, differs = ask(lambda: victim.compare(folder, whole, log, found), subject.scratch)
        except RuntimeError as error:
            found, then, faults, differs = "", "", [str(error).strip().splitlines()[-1]], []
    said = said.replace(str(folder), "DISK")
    return {
        "what": victim.name, "bytes": size, "share": share, "said": said, "found": found, "then": then,
        "wrong": wrong + faults + differs,
    }  # fmt: skip


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs mounted on the new folder `folder`."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
        folder.rmdir()
