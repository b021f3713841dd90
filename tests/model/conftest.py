"""A tiny model loaded once, and a tiny adapter on it, untrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from search_r3 import SearchR3


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "tiny-adapter")
