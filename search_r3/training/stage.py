"""What both stages' training commands do: identify the run, run the loop, and write golden vectors at its end."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from search_r3.config import default_values, to_dict
from search_r3.model.checkpoint import CONTRACT_FILE
from search_r3.model.searchr3 import SearchR3
from search_r3.training.distributed import collectives
from search_r3.training.loop import Task, run_training


def train_stage(
    task: Task,
    config: Any,
    *,
    resume: bool,
    best_metric: str | None,
    ignored: Collection[str],
    identity: dict[str, Any],
) -> Path:
    """Run the training loop for a stage; the main process then adds golden vectors to the adapter.

    Args:
        config: the stage's recipe, with the fields `output` and `loop`.
        resume, best_metric: see `loop.run_training`.
        ignored: keys of the recipe that may differ when a run is resumed, because they change no result: paths, and
            how memory is used. Without them, a run could not be moved.
        identity: what replaces them, such as hashes of the data.

    Returns:
        The adapter's folder.

    Raises:
        InputError: see `loop.run_training`.
    """
    describe = {key: value for key, value in to_dict(config).items() if key not in ignored} | identity
    folder = run_training(
        task,
        config.loop,
        Path(config.output),
        resume=resume,
        best_metric=best_metric,
        describe=describe,
        defaults=default_values(type(config)),
    )
    if collectives.rank() == 0 and (folder / CONTRACT_FILE).is_file():
        SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
    return folder
