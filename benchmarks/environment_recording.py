"""A recording: what a corpus's embeddings were at each of a run's checkpoints, so that refreshing can be replayed.

A folder with `recording.json` and one `step-000100.safetensors` a checkpoint. `environment_record.py` makes one from a
run's checkpoints; any other model's rows will do, written by `begin` and `write`.

Shape suffixes: N documents, Q queries, B queries of a batch, R rollouts, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text

FORMAT = 1
FACTS = "recording.json"


@dataclass(frozen=True)
class Frame:
    """One checkpoint.

    Attributes:
        step: optimizer steps that its weights had taken.
        documents_ND, queries_QD: float32 unit rows.
        batch: numbers of the queries that were trained on from here to the next checkpoint, in their order; empty if
            that is not known.
        rollouts_RD: float32 unit rows of sampled reasoning traces, R may be 0.
        rollout_query_R: int64, the query of each.
    """

    step: int
    documents_ND: Tensor
    queries_QD: Tensor
    batch: list[int]
    rollouts_RD: Tensor
    rollout_query_R: Tensor


class Recording:
    """Reads a recording's folder.

    Attributes:
        facts: what `begin` was given: "source", "documents" (how many) and others.
        grades: for each query row number -> grade.
        dev: numbers of the queries that were never trained on.
        steps: of the checkpoints, ascending.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises InputError if the folder holds no recording, or a newer one."""
        self.folder = Path(folder)
        try:
            self.facts: dict[str, Any] = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
            self.grades = [{int(row): float(g) for row, g in judged.items()} for judged in self.facts.pop("grades")]
            self.dev: list[int] = self.facts.pop("dev")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.folder} cannot be read as a recording ({type(error).__name__}: {error}); make one with "
                "environment_record.py"
            ) from error
        if self.facts.get("format") != FORMAT:
            raise InputError(f"{self.folder} has format {self.facts.get('format')!r}, this version reads {FORMAT}")
        self.steps = [step for step, _ in frame_files(self.folder)]

    @property
    def train(self) -> list[int]:
        """Numbers of the other queries."""
        dev = set(self.dev)
        return [number for number in range(len(self.grades)) if number not in dev]

    @property
    def digest(self) -> str:
        """Tells one recording from another: of the facts, the steps and the files' sizes."""
        sizes = [(path.name, path.stat().st_size) for _, path in frame_files(self.folder)]
        return hashlib.sha256(json.dumps([self.facts, self.grades, self.dev, sizes]).encode()).hexdigest()[:16]

    def documents_per_second(self) -> float | None:
        """How fast documents were encoded, the median over the checkpoints, if that was recorded."""
        found = []
        for _, path in frame_files(self.folder):
            try:
                with safe_open(path, framework="pt") as file:
                    if "documents_per_second" in file.keys():  # noqa: SIM118  # it is no mapping
                        found.append(float(file.get_tensor("documents_per_second")))
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
        return statistics.median(found) if found else None

    def frame(self, step: int) -> Frame:
        """One checkpoint's rows. Raises InputError if the file is damaged or does not fit the recording."""
        path = frame_path(self.folder, step)
        try:
            tensors = load_file(path)
            documents_ND, queries_QD = _unit(tensors["documents"]), _unit(tensors["queries"])
        except (OSError, SafetensorError, KeyError) as error:
            raise _damaged(path, error) from error
        if len(documents_ND) != self.facts["documents"] or len(queries_QD) != len(self.grades):
            raise InputError(
                f"{path} has {len(documents_ND)} documents and {len(queries_QD)} queries, the recording "
                f"{self.facts['documents']} and {len(self.grades)}; record it again"
            )
        none = torch.zeros(0, documents_ND.shape[1])
        return Frame(
            step,
            documents_ND,
            queries_QD,
            tensors.get("batch", torch.zeros(0)).long().tolist(),
            _unit(tensors.get("rollouts", none)),
            tensors.get("rollout_queries", torch.zeros(0)).long(),
        )


def begin(
    folder: str | Path, *, documents: int, grades: Sequence[Mapping[int, float]], dev: Sequence[int], **facts: Any
) -> None:
    """Write `recording.json`, or see that the one that is there says the same (so that an interrupted one goes on).

    Args:
        facts: where it comes from, JSON values.

    Raises:
        InputError: the folder holds a recording of something else.
    """
    record = {"format": FORMAT, "documents": documents, **facts, "dev": list(dev)}
    record["grades"] = [{str(row): grade for row, grade in judged.items()} for judged in grades]
    text, path = json.dumps(record) + "\n", Path(folder) / FACTS
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder} holds a recording of other documents, queries or settings; choose another folder")
    atomic_write_text(path, text)


def write(folder: str | Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write one checkpoint: "documents" and "queries"; perhaps "batch", "rollouts" and "rollout_queries"."""
    with atomic_path(frame_path(Path(folder), step)) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)


def frame_path(folder: Path, step: int) -> Path:
    """Where a checkpoint's rows are."""
    return folder / f"step-{step:06d}.safetensors"


def frame_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file), oldest first."""
    found = [(re.fullmatch(r"step-(\d+)\.safetensors", path.name), path) for path in folder.glob("step-*.safetensors")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read ({type(error).__name__}: {error}); remove it and record it again")


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=1)
