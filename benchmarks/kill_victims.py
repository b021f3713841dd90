"""What is killed in `kill.py`, part 1: the protocol of a victim, data building, and training in both stages.

A victim knows its command, what must hold of its files right after a kill, and what must hold when the same command
has gone on to its end. Its files are small, but written by the commands that a user runs.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_process import Ended

TESTS = Path(__file__).resolve().parents[1] / "tests"
WORDS = [
    *("sleep", "waste", "brain", "mouse", "cell", "protein", "signal", "growth", "blood", "heart", "lung", "bone"),
    *("virus", "vaccine", "therapy", "dose", "trial", "risk", "age", "diet", "insulin", "glucose", "membrane"),
    *("receptor", "enzyme", "gene", "mutation", "cancer", "tumour", "immune", "antibody", "neuron", "memory"),
]


class Victim(ABC):
    """One command that is killed. Its methods run in forked processes, `fresh` and `beside` excepted.

    Attributes:
        name: in the log and the results.
        root: the inputs, the same for all kills.
    """

    name: str

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def prepare(self) -> None:
        """Write the inputs below `root`."""

    def fresh(self, folder: Path, kill: int) -> None:  # noqa: B027  # most start with nothing
        """Make what stands in `folder` before the command is run for kill number `kill`."""

    @abstractmethod
    def command(self, folder: Path) -> int:
        """Run the command on `folder` to its end; returns the exit code."""

    def beside(self, folder: Path, log: Path) -> Callable[[int], Callable[[], int | None]] | None:
        """What runs beside it (see `kill_process.run`); `log` is the command's."""
        return None

    @abstractmethod
    def inspect(self, folder: Path, whole: Path, ended: Ended) -> tuple[str, list[str]]:
        """After a kill: what is found in `folder`, and what is wrong with it. `whole` is an undisturbed run's folder of
        the same kind."""

    @abstractmethod
    def compare(self, folder: Path, whole: Path, log: str, found: str) -> tuple[str, list[str]]:
        """After the same command went on to its end with `log`: what it did, and where the result differs."""

    def kind(self, kill: int) -> str:
        """Victims of different kinds have different undisturbed runs."""
        return self.name


def command_line(*arguments: object) -> int:
    """The package's own command line, as a user runs it."""
    from search_r3.cli import main

    return main([str(argument) for argument in arguments])


def sentences(count: int, seed: int) -> list[str]:
    """Texts of 12 to 30 words; the last word of each is its own ("unique17")."""
    rng = random.Random(seed)
    return [f"{' '.join(rng.choices(WORDS, k=rng.randint(12, 30))).capitalize()} unique{i}." for i in range(count)]


def helper(name: str) -> Any:
    """A module of the tests' helpers, so that there is one tiny model for both."""
    for folder in (TESTS / "training", TESTS):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return __import__(name)


def write_dataset(folder: Path, count: int) -> None:
    """A BEIR folder with the splits train and test."""
    from search_r3.data.beir import BeirDataset, Document, write_beir

    corpus = {str(i): Document(str(i), f"On {text.split()[0]} number {i}", text) for i, text in
              enumerate(sentences(count, 1))}  # fmt: skip
    queries = {str(i): f"what is known of {text[:40]}" for i, text in enumerate(sentences(count // 4, 1))}
    for split in ("train", "test"):
        mine = {q: {q: 1} for q in queries if (int(q) % 5 == 1) == (split == "test")}
        write_beir(folder, BeirDataset(folder.name, corpus, {q: queries[q] for q in mine}, mine), split)
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": q, "text": text}) + "\n" for q, text in queries.items())
    )
    (folder / "SOURCE.txt").write_text("Made up.\nlicense: CC0\n")


def same_trees(folder: Path, whole: Path, normal: Callable[[Path], bytes | None]) -> list[str]:
    """How two folders differ; `normal` gives what of a file is compared, None for nothing. Scratch files that a killed
    writer left count as a difference."""
    trees = [{str(file.relative_to(root)): file for file in root.rglob("*") if file.is_file()} for root in
             (folder, whole)]  # fmt: skip
    mine, theirs = ({name: file for name, file in tree.items() if normal(file) is not None} for tree in trees)
    wrong = [f"{name} is there, but not in the undisturbed run" for name in sorted(set(mine) - set(theirs))]
    wrong += [f"{name} is missing" for name in sorted(set(theirs) - set(mine))]
    both = sorted(set(mine) & set(theirs))
    return wrong + [f"{name} differs" for name in both if normal(mine[name]) != normal(theirs[name])]


class DataBuild(Victim):
    """`data build` over four kinds of sources, with cleaning."""

    name = "data"

    def prepare(self) -> None:
        from search_r3.data.io.jsonl import write_jsonl

        write_dataset(self.root / "data/toy", 700)
        texts = sentences(900, 2)
        rows = [{"query": f"find {text[:30]}", "positive": text, "wrong": [texts[i - 1]]} for i, text in
                enumerate(texts)]  # fmt: skip
        write_jsonl(self.root / "own.jsonl", rows)
        sources = [
            {"kind": "titles", "dataset": "toy"},
            {"kind": "queries", "dataset": "toy", "split": "train"},
            {"kind": "pairs", "path": str(self.root / "own.jsonl"), "license": "CC0", "negatives": ["wrong"]},
            {"kind": "docstrings", "packages": ["json", "logging"], "min_body_lines": 1},
            {"kind": "docstrings", "packages": ["email"], "min_body_lines": 1},
        ]
        recipe = {"seed": 3, "sources": sources, "deduplicate": True,
                  "decontaminate": {"against": [{"dataset": "toy", "split": "test"}]}}  # fmt: skip
        (self.root / "recipe.yaml").write_text(json.dumps(recipe))

    def command(self, folder: Path) -> int:
        return command_line(
            "data", "build", self.root / "recipe.yaml", folder / "out.jsonl", "--data", self.root / "data"
        )

    def inspect(self, folder: Path, whole: Path, ended: Ended) -> tuple[str, list[str]]:
        wrong = []
        for name in ("out.jsonl", "out.jsonl.manifest.json"):
            if (folder / name).exists() and (folder / name).read_bytes() != (whole / name).read_bytes():
                wrong.append(f"{name} stands under its name and is not the whole")
        parts = sorted((folder / "out.jsonl.partial").glob("*.part.jsonl"))
        finished = [part for part in parts if part.name != "output.part.jsonl"]
        wrong += [f"the part {part.name} is not whole" for part in finished if not _ends_with_its_hash(part)]
        gone = {path for what, path in ended.events if what == "deleted"}
        for found in ended.moved_in(r"out\.jsonl\.partial/[^.].*\.part\.jsonl"):
            if not (folder / found[0]).exists() and found[0] not in gone and "output" not in found[0]:
                wrong.append(f"the finished part {found[0]} is lost")
        there = "the output, " if (folder / "out.jsonl").exists() else ""
        return f"{there}{len(finished)} finished parts", wrong

    def compare(self, folder: Path, whole: Path, log: str, found: str) -> tuple[str, list[str]]:
        wrong = same_trees(folder, whole, lambda file: file.read_bytes())
        again = log.count("(finished before)")
        held = re.search(r"(\d+) finished parts", found)
        sources = min(int(held[1]) if held else 0, 5)
        if again < sources and "the output" not in found:
            wrong.append(f"{sources} sources were finished, but only {again} were taken over")
        return f"{again} of 5 sources taken over", wrong


def _ends_with_its_hash(part: Path) -> bool:
    *lines, last = part.read_bytes().splitlines(keepends=True)
    try:
        return json.loads(last) == {"end": hashlib.sha256(b"".join(lines)).hexdigest()}
    except ValueError:
        return False


class Training(Victim):
    """A training run in `folder/run`: log, checkpoints, best adapter, final adapter with its golden vectors."""

    steps: int

    def inspect(self, folder: Path, whole: Path, ended: Ended) -> tuple[str, list[str]]:
        from search_r3.errors import InputError
        from search_r3.training.run_checkpoint import list_checkpoints, read_checkpoint

        run, wrong = folder / "run", []
        steps = []
        for step, path in list_checkpoints(run):
            try:
                read_checkpoint(path)
                steps.append(step)
            except InputError as error:
                wrong.append(f"a half-written checkpoint under its name: {error}")
        seen = [int(match[1]) for match in ended.moved_in(r"run/checkpoints/step-(\d+)")]
        if seen and max(steps, default=0) < max(seen):
            wrong.append(f"the checkpoint of step {max(seen)} was written and is lost")
        for name in ("adapter", "best"):
            if (run / name).exists():
                wrong += [f"{name}: {what}" for what in _adapter_faults(run / name)]
            elif ended.moved_in(f"run/{name}"):
                wrong.append(f"{name} was written and is lost")
        for name in ("config.json", "finished.json"):
            if (run / name).exists() and not _is_json((run / name).read_text(encoding="utf-8")):
                wrong.append(f"{name} is half written")
        logged = (run / "log.jsonl").read_text(encoding="utf-8").splitlines() if (run / "log.jsonl").exists() else []
        if any(not _is_json(line) for line in logged[:-1]):
            wrong.append("log.jsonl has a broken line before its last")
        return f"checkpoint of step {max(steps, default=0)} of {self.steps}, {len(logged)} lines of log", wrong

    def compare(self, folder: Path, whole: Path, log: str, found: str) -> tuple[str, list[str]]:
        wrong = same_trees(folder / "run", whole / "run", _of_a_run)
        step = int(re.search(r"step (\d+)", found)[1])  # type: ignore[index]
        finished = f"all {self.steps} steps are done already" in log
        if step and not finished and f"resuming from step-{step:06d}" not in log:
            wrong.append(f"it did not go on from the checkpoint of step {step}")
        return "was finished" if finished else f"went on from step {step}", wrong


def _of_a_run(file: Path) -> bytes | None:
    """What of a run's file must be the same: all but times, the lock, and TensorBoard's copy of the log."""
    if file.name == ".lock" or "tensorboard" in file.parts:
        return None
    if file.name != "log.jsonl":
        return file.read_bytes()
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for record in records:
        for name in ("seconds", "tokens_per_second", "memory_gib"):
            record.pop(name, None)
        if "terms" in record:
            record["terms"] = {k: v for k, v in record["terms"].items() if not k.startswith("seconds")}
    return json.dumps(records).encode()


def _adapter_faults(folder: Path) -> list[str]:
    from search_r3.errors import InputError
    from search_r3.model.checkpoint import ADAPTER_FILE, CONTRACT_FILE, read_record
    from search_r3.model.contract import Contract
    from search_r3.model.golden import read_golden
    from search_r3.model.resolve import weights_sha256

    try:
        record = read_record(folder)
        if record is None:
            return ["it has no contract"]
        contract = Contract.from_dict(record["contract"], CONTRACT_FILE)
        read_golden(folder)
        if weights_sha256(folder, ADAPTER_FILE) != contract.adapter_weights:
            return ["its weights are not its contract's"]
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (InputError, OSError, ValueError) as error:
        return [f"it cannot be read: {error}"]
    except Exception as error:  # what safetensors raises has no base class of its own
        return [f"it cannot be read: {type(error).__name__}: {error}"]
    return []


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class SFT(Training):
    """`train sft`: 12 steps, a checkpoint every 2, dev figures every 4."""

    name, steps = "sft", 12

    def prepare(self) -> None:
        from search_r3.data.pairs import write_pairs

        tiny = helper("tiny_grpo")
        base = helper("conftest").save_tiny_model(self.root / "tiny")
        write_pairs(self.root / "pairs.jsonl", tiny.some_pairs())
        write_dataset(self.root / "data/scifact", 60)
        recipe = {
            "pairs": [str(self.root / "pairs.jsonl")], "output": str(self.root / "run"), "base": str(base),
            "global_batch_size": 8, "reasoning_ratio": 1.0, "lora": {"rank": 8}, "dev": ["scifact"],
            "data_root": str(self.root / "data"), "dev_queries": 3, "dev_documents": 20, "max_reasoning_tokens": 8,
            "loop": {"steps": self.steps, "learning_rate": 0.03, "warmup_steps": 3, "evaluate_every": 4,
                     "checkpoint_every": 2, "keep_checkpoints": 2, "mixed_precision": "no"},
        }  # fmt: skip
        (self.root / "recipe.yaml").write_text(json.dumps(recipe))

    def command(self, folder: Path) -> int:
        return command_line("train", "sft", self.root / "recipe.yaml", "--set", f"output={folder / 'run'}")


class GRPO(Training):
    """`train grpo`: 8 steps, a checkpoint every 2, behind a stage 1 adapter of the same tiny model."""

    name, steps = "grpo", 8

    def prepare(self) -> None:
        tiny = helper("tiny_grpo")
        base = helper("conftest").save_tiny_model(self.root / "tiny")
        adapter = tiny.train_stage_one(base, self.root, steps=40)
        loop = {"steps": self.steps, "learning_rate": 0.01, "warmup_steps": 1, "checkpoint_every": 2,
                "evaluate_every": 3, "mixed_precision": "no"}  # fmt: skip
        tiny.write_recipe(adapter, self.root / "recipe.yaml", loop=loop)

    def command(self, folder: Path) -> int:
        return command_line("train", "grpo", self.root / "recipe.yaml", "--set", f"output={folder / 'run'}")
