"""A recipe is read exactly, and whatever is wrong with it is named: file, key, value, what to write instead."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from search_r3.config import to_dict
from search_r3.errors import InputError
from search_r3.training.config import (
    RENAMED_KEYS,
    SPLIT_KEYS,
    LoopConfig,
    LoraSettings,
    load_config,
    with_present_keys,
)


@dataclass
class Recipe:
    data: Path
    loop: LoopConfig = field(default_factory=LoopConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    name: str = "run"
    packed: bool = False
    tags: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    budget: int | None = None
    mode: Literal["on", "off", "mixed"] = "on"


@dataclass
class Inner:
    a: int = 1
    b: int = 1


@dataclass
class Middle:
    inner: Inner = field(default_factory=Inner)
    c: int = 1


@dataclass
class Outer:
    middle: Middle = field(default_factory=lambda: Middle(Inner(a=2, b=2), c=2))
    maybe: Inner | None = field(default_factory=lambda: Inner(a=3, b=3))


def recipe(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, Recipe, list(overrides))


def test_a_recipe_fills_nested_sections_and_leaves_the_rest_at_its_defaults(tmp_path):
    text = """
data: pairs.jsonl
loop: {steps: 7, learning_rate: 3e-4, max_grad_norm: 2, betas: [0.8, 0.9], time_limit_minutes: 5}
lora:
  target_modules: [q_proj, v_proj]
packed: true
weights: {kl: 1, triplet: 0.5}
budget: 3
"""
    config = recipe(tmp_path, text)
    assert config.data == Path("pairs.jsonl")
    assert config.loop == LoopConfig(
        steps=7, learning_rate=3e-4, max_grad_norm=2.0, betas=(0.8, 0.9), time_limit_minutes=5.0
    )
    assert config.lora == LoraSettings(target_modules=["q_proj", "v_proj"])
    assert (config.packed, config.weights, config.budget) == (True, {"kl": 1.0, "triplet": 0.5}, 3)
    assert isinstance(config.loop.learning_rate, float)
    assert isinstance(config.loop.max_grad_norm, float)
    assert config.name == "run"


def test_to_dict_is_read_back_as_the_same_recipe(tmp_path):
    import yaml

    config = recipe(tmp_path, "data: a\nloop: {steps: 3, mixed_precision: 'no'}\ntags: [x, y]\n")
    assert recipe(tmp_path, yaml.safe_dump(to_dict(config))) == config


def test_an_override_wins_over_the_file_and_the_last_one_wins(tmp_path):
    config = recipe(
        tmp_path, "data: a\nloop: {steps: 5}\n", "loop.steps=6", "loop.steps=7", "lora.rank=4", "tags=[a, b]"
    )
    assert (config.loop.steps, config.lora.rank, config.tags) == (7, 4, ["a", "b"])
    assert recipe(tmp_path, "data: a", "loop.learning_rate=1e-5", "budget=null").loop.learning_rate == 1e-5
    assert recipe(tmp_path, "loop:\ndata: a", "loop.steps=2").loop.steps == 2


@pytest.mark.parametrize(("written", "read"), [("no", "no"), ("'no'", "no"), ("bf16", "bf16"), ("auto", "auto")])
def test_an_unquoted_no_is_a_word_where_a_word_is_wanted(tmp_path, written, read):
    assert recipe(tmp_path, f"data: a\nloop: {{mixed_precision: {written}}}").loop.mixed_precision == read


def test_on_and_off_are_words_too(tmp_path):
    assert recipe(tmp_path, "data: a\nmode: off").mode == "off"
    assert recipe(tmp_path, "data: a", "mode=on").mode == "on"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: a\nlop: {}", r"recipe\.yaml: unknown key lop; did you mean loop\?"),
        ("data: a\nloop: {stepz: 1}", r"unknown key loop\.stepz; did you mean loop\.steps\?"),
        ("data: a\nlora: {zzz: 1}", "valid keys are rank, alpha, dropout, target_modules"),
        ("data: a\nloop: {steps: true}", "loop.steps must be a whole number, got True"),
        ("data: a\nloop: {steps: 1.5}", "loop.steps must be a whole number, got 1.5"),
        ("data: a\nloop: {steps: '10'}", "loop.steps must be a whole number, got '10'"),
        ("data: a\nloop: {learning_rate: fast}", "loop.learning_rate must be a number, got 'fast'"),
        ("data: a\nloop: {learning_rate: true}", "loop.learning_rate must be a number, got True"),
        ("data: a\nloop: {learning_rate: .nan}", "loop.learning_rate must be a finite number"),
        ("data: a\nloop: {schedule: cosin}", r"one of cosine, linear, constant \(did you mean cosine\?\)"),
        ("data: a\nloop: {betas: [0.9]}", "loop.betas must be a list of 2 values"),
        ("data: a\nloop: 3", "loop must be a section with keys, got 3"),
        ("data: a\nname: 12", "name must be text"),
        ("data: a\npacked: 1", "packed must be true or false, got 1"),
        ("data: a\nbudget: x", "budget must be a whole number, got 'x'"),
        ("data: a\nlora: {target_modules: 3}", "lora.target_modules must be text .* or a list, got 3"),
        ("data: a\ntags: x", "tags must be a list, got 'x'"),
        ("loop: {}", r"recipe\.yaml: data is missing; it has no default"),
        ("data: a\nloop: {steps: 0}", r"recipe\.yaml: in loop, steps must be 1 or more, got 0"),
        ("data: a\ndata: b", r"not valid YAML: data is given twice \(line 2, column 1\)"),
        ("data: a\nloop: [1", r"recipe\.yaml is not valid YAML: .*line 2"),
        ("- a\n- b", "must contain a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        recipe(tmp_path, text)


@pytest.mark.parametrize(("cls", "old"), [(cls, old) for cls, table in RENAMED_KEYS.items() for old in table])
def test_a_renamed_key_is_refused_with_its_present_name(tmp_path, cls, old):
    new, file = RENAMED_KEYS[cls][old], tmp_path / "recipe.yaml"
    file.write_text(f"inner: {{{old}: 3}}\n", encoding="utf-8")
    inner = make_dataclass(cls, [(new, Any, None)])
    outer = make_dataclass("Outer", [("inner", inner, field(default_factory=inner))])
    line = f'recipe.yaml: the key "inner.{old}" is now called inner.{new}; rename it'
    with pytest.raises(InputError, match=re.escape(line)):
        load_config(file, outer)
    file.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f'--set inner.{old}=4: the key "inner.{old}" is now called')):
        load_config(file, outer, [f"inner.{old}=4"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("standard", "advantage_estimator: grpo, scale_rewards: group"),
        ("leave_one_out", "advantage_estimator: rloo, scale_rewards: none"),
        ("[1]", "advantage_estimator: grpo, scale_rewards: group"),
    ],
)
def test_a_key_that_was_split_is_refused_with_what_to_write(tmp_path, value, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"advantage: {value}\n", encoding="utf-8")
    settings = make_dataclass("GRPOConfig", [("advantage_estimator", str, "grpo"), ("scale_rewards", str, "group")])
    with pytest.raises(InputError, match=f"is now split into advantage_estimator and scale_rewards; write {words}"):
        load_config(file, settings)


def test_the_settings_of_an_older_run_are_read_by_their_present_names():
    old = {"memory": 3, "weights.distil": 0.5, "samples_every": 7, "betas": [0.9, 1.0], "loop.steps": 4}
    new = dict.fromkeys(("cross_batch_memory_size", "weights.distillation", "log_completions_every", "loop.steps"))
    assert with_present_keys(old, new) == {
        "cross_batch_memory_size": 3, "weights.distillation": 0.5, "log_completions_every": 7, "betas": [0.9, 1.0],
        "loop.steps": 4,
    }  # fmt: skip
    words = SPLIT_KEYS["GRPOConfig"]["advantage"]["dr_grpo"]
    assert with_present_keys({"advantage": "dr_grpo"}, dict.fromkeys(words)) == words
    assert with_present_keys({"samples_every": 7}, {"samples_every": 8}) == {"samples_every": 7}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("loop..steps=3", "expected section.key=value"),
        ("loop.stepz=3", r"--set loop.stepz=3: unknown key loop.stepz; did you mean loop.steps\?"),
        ("loop.steps=many", "--set loop.steps=many: loop.steps must be a whole number"),
        ("name.first=x", "--set name.first=x: name is 'n', not a section"),
        ("loop.steps=0", r"steps must be 1 or more, got 0 \(after --set loop.steps=0\)"),
        ("tags=[a", "the value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused_by_name(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        recipe(tmp_path, "data: a\nname: n", override)


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path):
    with pytest.raises(InputError, match="no configuration file at"):
        load_config(tmp_path / "nowhere.yaml", Recipe)
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path, Recipe)
    (tmp_path / "bytes.yaml").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "bytes.yaml", Recipe)


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "empty.yaml", LoopConfig) == LoopConfig()


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (LoopConfig, {"steps": 0}), (LoopConfig, {"learning_rate": 0.0}), (LoopConfig, {"warmup_steps": -1}),
        (LoopConfig, {"schedule": "step"}), (LoopConfig, {"min_lr_ratio": 1.1}), (LoopConfig, {"weight_decay": -0.1}),
        (LoopConfig, {"betas": (0.9, 1.0)}), (LoopConfig, {"max_grad_norm": -1.0}), (LoopConfig, {"seed": -1}),
        (LoopConfig, {"mixed_precision": "fp16"}), (LoopConfig, {"gradient_accumulation": 0}),
        (LoopConfig, {"checkpoint_every": -1}), (LoopConfig, {"keep_checkpoints": 0}),
        (LoopConfig, {"evaluate_every": -1}), (LoopConfig, {"log_every": 0}),
        (LoopConfig, {"patience": -1}), (LoopConfig, {"evaluate_every": 0, "patience": 2}),
        (LoopConfig, {"time_limit_minutes": 0.0}), (LoraSettings, {"rank": 0}), (LoraSettings, {"alpha": 0}),
        (LoraSettings, {"dropout": 1.0}), (LoraSettings, {"target_modules": []}),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused_from_python_too(cls, change):
    with pytest.raises(InputError, match=next(iter(change))):
        cls(**change)


@pytest.mark.parametrize("key", ["steps=200", "seed=1", "log_every=5"])
def test_setting_one_key_of_a_section_changes_one_key(tmp_path, key):
    """A section may have defaults of its own in a recipe: GRPO's learning rate is a fifteenth of stage 1's."""
    from search_r3.training.grpo.grpo_config import GRPOConfig

    file = tmp_path / "grpo.yaml"
    file.write_text("{adapter: a, queries: [{pairs: p}], corpus: [{pairs: p}], output: o}", encoding="utf-8")
    default, changed = load_config(file, GRPOConfig), load_config(file, GRPOConfig, [f"loop.{key}"])
    assert default.loop.learning_rate == changed.loop.learning_rate == 2e-5
    before, after = to_dict(default), to_dict(changed)
    assert {name for name in before["loop"] if before["loop"][name] != after["loop"][name]} == {key.split("=")[0]}
    assert before | {"loop": None} == after | {"loop": None}


def test_a_section_keeps_the_defaults_of_its_recipe_at_any_depth(tmp_path):
    file = tmp_path / "outer.yaml"
    file.write_text("middle: {inner: {a: 9}}\nmaybe: {b: 9}\n", encoding="utf-8")
    assert load_config(file, Outer) == Outer(Middle(Inner(a=9, b=2), c=2), Inner(a=3, b=9))
    file.write_text("middle:\nmaybe: null\n", encoding="utf-8")
    assert load_config(file, Outer) == Outer(Middle(Inner(a=2, b=2), c=2), None)
