"""MTEB's own result files of a SearchR3 model, in the layout that MTEB's repository of results takes.

MTEB evaluates and writes: `results/OWNER__NAME/REVISION/experiments/SETTINGS/TASK.json` with `model_meta.json` and
`run_settings.jsonl` beside it. What is written is read back and checked by MTEB before the paths are returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from search_r3.errors import InputError, first_line
from search_r3.evaluation.baselines.mteb_encoder import SearchR3Encoder
from search_r3.optional import require


class MtebScore(NamedTuple):
    """What a result file says: its task, the task's main measure, and the mean of it over splits and subsets."""

    task: str
    measure: str
    value: float
    file: Path


def mteb_tasks(tasks: Iterable[Any]) -> list[Any]:
    """MTEB's tasks of these names, without their data; tasks are returned as they are.

    Raises:
        InputError: mteb is not installed, there is no name, or MTEB has no such task.
    """
    mteb = require("mteb", "mteb", "MTEB")
    if not (chosen := [_task(mteb, task) for task in tasks]):
        raise InputError("no MTEB task was given; name some, such as SciFact")
    return chosen


def write_mteb_results(
    encoder: SearchR3Encoder, tasks: Iterable[Any], folder: str | Path, *, overwrite: bool = False
) -> list[MtebScore]:
    """Evaluate MTEB tasks and write their result files; finished ones are kept, so the same call resumes.

    To submit them, give the model's metadata (`encoder.mteb_model_meta`) to `mteb.ResultCache(folder).submit_results`.

    Example:
        >>> encoder = SearchR3Encoder("search-r3-smollm2-135m-v2", training="results/training/NAME")  # doctest: +SKIP
        >>> write_mteb_results(encoder, ["SciFact", "CosQA"], "results/mteb")

    Args:
        tasks: names of tasks, or MTEB's tasks.
        folder: MTEB's cache folder; the files are below `results` in it.
        overwrite: evaluate finished tasks again.

    Returns:
        The result file of each task, with its score.

    Raises:
        InputError: mteb is not installed, a task is unknown, its data cannot be had, or a result is not a number.
    """
    mteb = require("mteb", "mteb", "MTEB")
    chosen = mteb_tasks(tasks)
    cache = mteb.ResultCache(folder)
    try:
        mteb.evaluate(
            encoder,
            chosen,
            cache=cache,
            overwrite_strategy="always" if overwrite else "only-missing",
            encode_kwargs={"batch_size": encoder.batch_size or 32, "show_progress_bar": False},
            show_progress_bar=False,
        )
    except (OSError, ConnectionError) as error:  # `datasets` and the hub
        raise InputError(
            f"MTEB cannot evaluate {', '.join(task.metadata.name for task in chosen)}: {first_line(error)}; the first "
            "use of a task requires a network"
        ) from error
    meta = encoder.mteb_model_meta
    files = [cache.get_task_result_path(task.metadata.name, meta) for task in chosen]
    return [_checked(mteb, task, file) for task, file in zip(chosen, files, strict=True)]


def _task(mteb: Any, task: Any) -> Any:
    if not isinstance(task, str):
        return task
    try:
        return mteb.get_task(task)
    except (KeyError, ValueError) as error:
        raise InputError(f"MTEB has no task {task!r}: {str(error).strip(chr(34))}") from error


def _checked(mteb: Any, task: Any, file: Path) -> MtebScore:
    result = mteb.results.TaskResult.from_disk(file)
    name = task.metadata.main_score
    wanted = set(task.metadata.eval_splits)
    if missing := wanted - result.scores.keys():
        raise InputError(f"{file} lacks the split {min(missing)}; delete it and evaluate again")
    for split, entries in result.scores.items():
        for entry in entries:
            if not math.isfinite(entry["main_score"]) or entry["main_score"] != entry[name]:
                raise InputError(f"{file}: {name} of {split} is {entry['main_score']}; delete it and evaluate again")
    return MtebScore(task.metadata.name, name, float(result.get_score()), file)
