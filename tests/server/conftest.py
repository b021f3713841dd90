"""A server with a tiny random model and a small index, for all tests that leave it as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving_tools import Held, Running, running

from search_r3 import SearchR3
from search_r3.index.build.build_index import build_index
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.server.logs import LOGGER
from search_r3.server.service import Loaded

DOCUMENTS = [
    SourceDocument("bread", "Baking", "Bread needs flour, water and yeast.", {"lang": "en", "year": 2020}),
    SourceDocument("zug", "", "Der Zug nach Wien fährt um neun.", {"lang": "de", "year": 2021}),
    SourceDocument("train", "", "The train to Vienna leaves at nine.", {"lang": "en", "old": True}),
]


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """What `serve` does to the process's loggers ends with the test."""
    loggers = [logging.getLogger(name) for name in (LOGGER, "uvicorn", "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def make_index(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], SearchIndex]:
    def make() -> SearchIndex:
        folder = tmp_path_factory.mktemp("served") / "small.index"
        build_index(folder, DOCUMENTS, tiny, progress=False)
        return SearchIndex.open(folder)

    return make


@pytest.fixture(scope="session")
def served(tiny: SearchR3, make_index: Callable[[], SearchIndex]) -> Iterator[Running]:
    """One server with an index for all tests that leave it as it is."""
    index = make_index()
    with running(lambda: Loaded.of(tiny, index)) as found:
        yield found


@pytest.fixture
def held(tiny: SearchR3) -> Iterator[Held]:
    model = Held(tiny)
    yield model
    model.gate.set()
