"""A tiny adapter with a README, and a tiny model with a query normalizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from search_r3 import SearchR3
from search_r3.model.query_normalizer import QueryNormalizer
from search_r3.model.spelling import SpellingCorrector
from search_r3.model.truecasing import Truecaser


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that nobody trained, far from its base, with a README."""
    folder = save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "tiny-adapter")
    head = "---\nlicense: apache-2.0\nbase_model: someone/tiny\n---\n"
    body = "\n# tiny-adapter\n\n```sh\n# a comment\n```\n\n## Use\n"
    (folder / "README.md").write_text(head + body, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def normalizing(tiny_adapter: Path) -> SearchR3:
    """The adapter's model with a query normalizer."""
    normalizer = QueryNormalizer(Truecaser({"khan": "Khan"}, {}, {}), SpellingCorrector(["hungary"]))
    plain = SearchR3.from_pretrained(tiny_adapter, device="cpu")
    return SearchR3(plain.checkpoint.with_query_normalizer(normalizer))
