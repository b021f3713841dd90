"""`reasoning="latent"`: only where the checkpoint was trained for it, and by an engine that can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.evaluation.systems import open_systems
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.engines.registry import VLLM
from search_r3.model.latent_steps import check_latent, has_latent
from search_r3.prompts import latent_conversation

QUERIES = ["how do I delete a folder", "capital of France", "x", "read a file line by line in Python " * 3]


def with_latent(model: SearchR3, steps: int = 3) -> SearchR3:
    """The same weights with a latent mode in the contract."""
    loaded = model.checkpoint
    prompts = replace(loaded.contract.prompts, latent=latent_conversation(steps))
    return SearchR3(Checkpoint(
        loaded.name, loaded.model, loaded.tokenizer, replace(loaded.contract, prompts=prompts), loaded.path
    ))  # fmt: skip


@pytest.fixture(scope="module")
def thinker(tiny: SearchR3) -> SearchR3:
    return with_latent(tiny)


def test_it_is_the_engine_s_embedding_behind_the_conversation_of_its_own(thinker: SearchR3) -> None:
    found = thinker.encode_query(QUERIES, reasoning="latent")
    template = thinker.templates["latent"]
    rows = [[*ids, *template.suffix] for ids in thinker.tokenizer(QUERIES, add_special_tokens=False)["input_ids"]]
    engine: Any = thinker.engine
    assert np.abs(found - engine.embed_latent(template.prefix, rows, 3, 1)).max() < 1e-5
    assert found.shape == (4, thinker.dimension)
    assert np.abs(thinker.encode_query(QUERIES, reasoning="latent", batch_size=1) - found).max() < 1e-5
    assert thinker.encode_query([], reasoning="latent").shape == (0, thinker.dimension)


def test_the_number_of_steps_is_the_contract_s_and_the_other_modes_stay_as_they_are(
    tiny: SearchR3, thinker: SearchR3
) -> None:
    assert (thinker.latent_steps, with_latent(tiny, 1).latent_steps, tiny.latent_steps) == (3, 1, 0)
    one = with_latent(tiny, 1).encode_query(QUERIES, reasoning="latent")
    three = thinker.encode_query(QUERIES, reasoning="latent")
    assert np.abs(one - three).max() > 1e-3
    for reasoning in (False, True):
        assert np.array_equal(
            thinker.encode_query(QUERIES, reasoning=reasoning, max_reasoning_tokens=4),
            tiny.encode_query(QUERIES, reasoning=reasoning, max_reasoning_tokens=4),
        )
    assert thinker.contract_hash != tiny.contract_hash


def test_bad_texts_are_refused_as_in_the_other_modes(thinker: SearchR3) -> None:
    with pytest.raises(InputError, match="text 2 of 2 is empty"):
        thinker.encode_query(["x", " "], reasoning="latent")
    with pytest.raises(InputError, match="batch_size must be 1 or more"):
        thinker.encode_query(["x"], reasoning="latent", batch_size=0)


def test_a_checkpoint_that_was_not_trained_for_it_refuses_in_a_line(tiny: SearchR3, tiny_adapter: Path) -> None:
    for model in (tiny, SearchR3.from_pretrained(tiny_adapter, device="cpu")):
        assert not has_latent(model)
        with pytest.raises(InputError, match="has no latent mode: it was not trained with latent_steps") as caught:
            model.encode_query(["x"], reasoning="latent")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="has no latent mode"):
        check_latent(object())


def test_an_engine_that_cannot_feed_soft_tokens_refuses_in_a_line(
    thinker: SearchR3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thinker, "engine_spec", VLLM)
    assert not has_latent(thinker)
    with pytest.raises(InputError, match="engine vllm has no latent mode; use engine torch"):
        thinker.encode_query(["x"], reasoning="latent")


def test_it_is_saved_and_loaded_with_the_contract(thinker: SearchR3, tmp_path: Path) -> None:
    thinker.save_pretrained(tmp_path / "merged")
    loaded = SearchR3.from_pretrained(tmp_path / "merged", device="cpu")
    assert loaded.contract_hash == thinker.contract_hash
    assert loaded.latent_steps == 3
    expected = thinker.encode_query(QUERIES, reasoning="latent")
    assert np.abs(loaded.encode_query(QUERIES, reasoning="latent") - expected).max() < 1e-5
    (system,) = open_systems(str(tmp_path / "merged"), modes=["latent"])
    assert system.name == "merged.latent"


def test_evaluation_refuses_a_model_without_it_before_anything_is_encoded(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="has no latent mode"):
        open_systems(str(tiny_model), modes=["off", "latent"])
    with pytest.raises(InputError, match="unknown mode 'latnt'; choose from: off, on, latent"):
        open_systems(str(tiny_model), modes=["latnt"])
