from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.training.config import LoraSettings, load_config
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.lora.policy import add_lora
from search_r3.training.planning import memory_estimate
from search_r3.training.planning.architectures import KNOWN, architecture_of, random_model
from search_r3.training.planning.dry_run import conditions_of, conversations, dry_run, memory_of, shape_of, warnings_of
from search_r3.training.planning.memory_estimate import Conditions, Part, Shape
from search_r3.training.planning.peak_memory import peak_memory
from search_r3.training.sft.sft_config import SFTConfig

PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008 + 64 * 576,  # the embed token's row, padded to 64
    "smollm2-360m": 361_821_120 + 64 * 960,
    "smollm2-1.7b": 1_711_376_384 + 64 * 2 * 2048 // 2,
}
WITHIN = 1.5
"""The formula and the measured peak agree within this factor, either way."""
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def write(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    def recipe(stage: str, **changes: Any) -> Path:
        values: dict[str, Any] = {"output": str(tmp_path / "never"), "dev": [], "loop": {"steps": 10}}
        if stage == "sft":
            values |= {"pairs": ["never.jsonl"], "base": str(tiny_model), "global_batch_size": 4}
        else:
            values |= {"adapter": "never", "queries": [{"beir": "never"}], "corpus": [{"beir": "never"}]}
            values |= {"queries_per_step": 2, "num_generations": 4, "max_reasoning_tokens": 12, "max_documents": 1000}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(values | changes))
        return path

    return recipe


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures_have_the_published_number_of_parameters(name):
    architecture = architecture_of(f"somebody/{name.upper()}-Instruct")
    model = random_model(replace(architecture, tokenizer=_FewTokens(architecture)), None, "meta").model
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]


class _FewTokens:
    """Counts as many tokens as the architecture's tokenizer, and takes the embed token."""

    def __init__(self, architecture: Any) -> None:
        self.size = KNOWN[architecture.name.partition("/")[2].lower().removesuffix("-instruct")][1]

    def add_special_tokens(self, *_: Any, **__: Any) -> None: ...

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.size


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "base"), [("no", "float32"), ("bf16", "float32"), ("bf16", "bfloat16")])
def test_the_formula_of_stage_1_is_near_what_a_step_takes(write, activation_checkpointing, precision, base):
    recipe = write(
        "sft", activation_checkpointing=activation_checkpointing, mini_batch_size=2,
        reasoning_ratio=1.0, max_document_tokens=200,
        loop={"steps": 10, "mixed_precision": precision}, base_dtype=base,
    )  # fmt: skip
    trial = dry_run("sft", recipe)["trial_step"]
    assert trial["formula"] / WITHIN < trial["measured"] < trial["formula"] * WITHIN


def test_the_formula_counts_what_is_read(write, tiny_model):
    trial = dry_run("grpo", write("grpo", reading_ratio=1.0), base=str(tiny_model))["trial_step"]
    assert trial["formula"] / WITHIN < trial["measured"] < trial["formula"] * WITHIN
    trial = dry_run("sft", write("sft", reading_ratio=1.0, mini_batch_size=2, reasoning_ratio=1.0))["trial_step"]
    assert trial["formula"] / WITHIN < trial["measured"] < trial["formula"] * WITHIN


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_formula_of_stage_2_is_near_what_a_step_takes(write, tiny_model, precision, capsys):
    recipe = write("grpo", loop={"steps": 10, "mixed_precision": precision})
    trial = dry_run("grpo", recipe, base=str(tiny_model))["trial_step"]
    assert "nothing to learn" not in capsys.readouterr().err  # whatever the random weights' rollouts earn
    assert trial["formula"] / WITHIN < trial["measured"] < trial["formula"] * WITHIN


def test_a_dry_run_reads_no_data_and_leaves_nothing_behind(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write("sft", teacher="never.rows.safetensors", weights={"distillation": 0.5}, batch_sampler="topic")
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", "sft", str(recipe), "--dry-run", "--json", "--gpus", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before
    assert report["warnings"] == [] or "vocabulary" in report["warnings"][0]
    alone = dry_run("sft", recipe)
    assert report["step"] == alone["step"]  # the batch is shared out
    assert report["memory"]["activations"] < 0.7 * alone["memory"]["activations"]
    with pytest.raises(InputError, match="is too small for that many"):
        dry_run("sft", recipe, gpus=5)
    assert report["memory"]["gradients"] == 2 * alone["memory"]["gradients"]  # DDP's buckets
    assert main(["train", "sft", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "at the peak" in out
    assert "trial: one step of 2 random layers on" in out


def test_tokens_and_rollouts_of_a_step_are_the_recipes(write, tiny_model):
    config = load_config(write("grpo", num_generations=8, num_mini_batches=2), GRPOConfig)
    parts = conversations(config, random_model(architecture_of(str(tiny_model)), None, "meta"))
    assert parts["rollouts"].rows == 8  # 2 queries of 8 rollouts, in two optimiser steps
    assert parts["rollouts"].answers == 8 * 13
    assert parts["rollouts"].tokens > config.max_query_tokens + 13


def test_trainable_parameters_are_the_adapters(write, tiny_model):
    shape = shape_of(random_model(architecture_of(str(tiny_model)), None, "meta"), LoraSettings(rank=4))
    layer = 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)  # q and o, k and v, gate and up and down
    assert shape.trainable == 2 * layer + 32  # and the embed token's row
    assert shape.matrices == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)


def test_warnings_name_what_to_mend(write, make_tiny_model, tmp_path):
    odd = make_tiny_model(tmp_path / "odd")
    first = dry_run("sft", write("sft", base=str(odd), max_document_tokens=2000))["warnings"]
    assert any("multiple of 64" in line for line in first)
    assert any("a document row can have 2,0" in line and "context is 1,024" in line for line in first)


def test_a_recipe_that_does_not_fit_is_said_to_with_what_would_help(write):
    config = replace(load_config(write("sft"), SFTConfig), global_batch_size=128, max_document_tokens=256)
    architecture = architecture_of("smollm2-1.7b")
    full = random_model(architecture, None, "meta")
    shape, parts, how = shape_of(full, LoraSettings()), conversations(config, full), conditions_of(config)
    found = memory_of(config, shape, parts, how, 1)
    found["with_activation_checkpointing"] = memory_of(
        config, shape, parts, replace(how, activation_checkpointing=True), 1
    )["peak"]
    (warning,) = warnings_of(config, architecture, full, parts, found)
    assert warning.endswith("activation_checkpointing: true")


def test_an_adapter_that_is_not_there_asks_for_its_base(write):
    with pytest.raises(InputError, match="--base NAME"):
        dry_run("grpo", write("grpo"))


def test_stage_2_finds_the_base_below_its_adapter(tiny_model, tmp_path):
    loaded = checkpoints.load_base(tiny_model, dtype=torch.float32)
    checkpoints.save_adapter(add_lora(loaded, LoraSettings(rank=2)), loaded.contract, tmp_path / "adapter")
    architecture = architecture_of(str(tmp_path / "adapter"))
    assert (architecture.name, architecture.stand_in) == (str(tiny_model), False)
    assert architecture.config.hidden_size == 32


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/qwen2.5-*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_recipes_of_the_papers_sizes_are_valid_and_fit_where_they_say(path):
    stage: Any = path.parent.name
    config: Any = load_config(path, SFTConfig if stage == "sft" else GRPOConfig)
    name = path.stem
    heads = {"qwen2.5-1.5b": (28, 1536, 12, 2, 128, 8960), "qwen2.5-7b": (28, 3584, 28, 4, 128, 18_944)}[name]
    matrices = {"qwen2.5-1.5b": 1_310_195_712, "qwen2.5-7b": 6_525_288_448}[name]
    trainable = {"qwen2.5-1.5b": 36_931_072, "qwen2.5-7b": 80_747_520}[name]
    shape = Shape(*heads, 151_666, PUBLISHED[name], matrices, trainable, 32)
    if stage == "sft":
        assert config.base.lower().endswith(f"{name}-instruct")
        pairs = config.global_batch_size
        behind = round(config.reasoning_ratio * pairs)
        parts = {
            "document": Part(pairs * (1 + config.negatives_per_pair), config.max_document_tokens + 12, 12),
            "query": Part(pairs, config.max_query_tokens + 12, 12, pairs * 4),
            "reasoning": Part(behind, config.max_query_tokens + 40, 60, behind * (config.max_reasoning_tokens + 1)),
        }
    else:
        said = config.max_reasoning_tokens + 1
        rows = config.queries_per_step * config.num_generations
        parts = {"rollouts": Part(rows, config.max_query_tokens + said + 6, 60, rows * said)}
    peak = memory_of(config, shape, parts, conditions_of(config), 8)["peak"]
    assert peak < (50e9 if (stage, name) == ("sft", "qwen2.5-7b") else 78e9)


def test_a_copy_is_counted_for_models_that_have_one():
    small, large = (Shape(2, 8, 2, 1, 4, 16, 100, size, 10, 5, 2) for size in (1000, 5_000_000_000))
    how = Conditions(4, False, True, False, "grpo", True)
    assert memory_estimate.live_copy(small, how, 4_000_000_000) == (2000, 4 * 1005)
    assert memory_estimate.live_copy(large, how, 4_000_000_000) == (0, 0)


def test_peak_memory_counts_what_is_there_at_once_and_no_views():
    with peak_memory(torch.device("cpu")) as peak:
        for _ in range(3):
            made = torch.zeros(1000) + 1  # the zeros go, the sum stays until the next one is there
            made.view(10, 100).add_(1)
    assert peak.bytes in (8000, 12_000)


def test_fixed_documents_take_no_rows(write: Callable[..., Path]) -> None:
    trained = dry_run("sft", write("sft", reasoning_ratio=0.0))
    fixed = dry_run("sft", write("sft", reasoning_ratio=0.0, documents="fixed", init_adapter="never"))
    assert trained["step"]["rows"] == 8
    assert fixed["step"]["rows"] == 4
    assert fixed["memory"]["peak"] < trained["memory"]["peak"]
