"""A tiny adapter, untrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "tiny-adapter")


@pytest.fixture(scope="session")
def query_adapter(tiny_adapter: Path, save_query_adapter: Callable[..., Path]) -> Path:
    """A query adapter for documents of `tiny_adapter`, in another folder."""
    return save_query_adapter(tiny_adapter, tiny_adapter.parent / "queries" / "tiny-queries")
