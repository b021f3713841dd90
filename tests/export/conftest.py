"""A tiny adapter with a README."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that nobody trained, far from its base, with a README."""
    folder = save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "tiny-adapter")
    head = "---\nlicense: apache-2.0\nbase_model: someone/tiny\n---\n"
    body = "\n# tiny-adapter\n\n```sh\n# a comment\n```\n\n## Use\n"
    (folder / "README.md").write_text(head + body, encoding="utf-8")
    return folder
