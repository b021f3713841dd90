"""The ablations of the direct embedder: their settings are a recipe's keys, and all runs are measured together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import benchmark_script

from search_r3 import InputError
from search_r3.config import load_config
from search_r3.training.sft.sft_config import SFTConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.chdir(ROOT)
    with benchmark_script("direct_ablation", monkeypatch) as module:
        yield module


def test_every_part_is_a_recipe_that_differs_from_the_baseline(script: ModuleType) -> None:
    recipes = {
        part: load_config(ROOT / script.RECIPE, SFTConfig, [*script.BASELINE, *changes])
        for part, changes in script.PARTS.items()
    }
    assert len({repr(recipe) for recipe in recipes.values()}) == len(script.PARTS)
    assert all(recipe.loop.steps == 100 for recipe in recipes.values())


def test_each_part_is_trained_once_and_all_are_measured_together(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, measured = [], []
    monkeypatch.setattr(script, "train", lambda recipe, settings: trained.append(settings))
    monkeypatch.setattr(script.dev_sets, "main", measured.append)
    script.main(["--only", "baseline", "frozen", "--runs", str(tmp_path), "--queries", "5"])
    assert [settings[-1] for settings in trained] == [f"output={tmp_path}/baseline", f"output={tmp_path}/frozen"]
    assert "lora.frozen_layers=15" in trained[1]
    assert "lora.frozen_layers=15" not in trained[0]
    systems = [f"baseline={tmp_path}/baseline/adapter", f"frozen={tmp_path}/frozen/adapter"]
    assert measured == [[*systems, *script.MEASURED, "--queries", "5"]]


def test_a_part_that_does_not_exist_is_refused(script: ModuleType) -> None:
    with pytest.raises(InputError, match='did you mean "latent"'):
        script.main(["--only", "latnt"])
