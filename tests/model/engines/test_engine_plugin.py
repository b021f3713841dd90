"""An engine from outside the package: found by its entry point, with no line of ours changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from plugin_package import code_of_docstring, code_of_page, install_plugin, without_docstrings

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.model.concurrent_reasoning import concurrent_reasoning_of
from search_r3.model.engines import base
from search_r3.model.engines.registry import engine_spec, training_engine

ENTRIES = "[search_r3.engines]\nplain = MODULE:PLAIN\n"


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path / "site", monkeypatch, "plain-engine", ENTRIES, code_of_page("engine"))


def test_the_docstring_shows_the_engine_of_the_page() -> None:
    assert without_docstrings(code_of_docstring(base)) == without_docstrings(code_of_page("engine"))


@pytest.mark.usefixtures("plain")
def test_an_engine_of_another_package_gives_the_reference_engines_embeddings(tiny_adapter: Path):
    texts = ["where is Paris", "how do I read a file"]
    reference, model = (SearchR3.from_pretrained(tiny_adapter, engine=name) for name in ("torch", "plain"))
    assert model.engine_spec.name == "plain"
    np.testing.assert_allclose(model.encode_document(texts), reference.encode_document(texts), atol=1e-5)
    ours, theirs = (one.reason(texts, max_reasoning_tokens=5) for one in (reference, model))
    assert [found.token_ids for found in theirs] == [found.token_ids for found in ours]
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)


@pytest.mark.usefixtures("plain")
def test_its_capabilities_decide_what_it_is_used_for(tiny_adapter: Path):
    assert main(["models", "--check", str(tiny_adapter), "--engine", "plain", "--json"]) == 0
    model = SearchR3.from_pretrained(tiny_adapter, engine="plain")
    assert concurrent_reasoning_of(model) is None  # a server batches whole requests
    with pytest.raises(InputError, match="engine plain cannot load new weights"):
        training_engine("plain")


def test_an_entry_point_that_is_no_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install_plugin(tmp_path, monkeypatch, "wrong", "[search_r3.engines]\nwrong = MODULE:VALUE\n")
    with pytest.raises(InputError, match=r"'wrong' of search_r3.engines must be an EngineSpec called 'wrong', got 3"):
        engine_spec("wrong")
