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
