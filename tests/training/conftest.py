from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny task that was never killed."""
    from tiny_task import train

    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(output) == output / "adapter"
    return output


@pytest.fixture(scope="session")
def stage_one(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage 1 adapter of the tiny model that knows some letters; `pairs.jsonl` stands two folders above it."""
    from tiny_grpo import train_stage_one

    return train_stage_one(tiny_model, tmp_path_factory.mktemp("stage1"))
