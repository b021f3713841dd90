"""The arithmetic of docs/scale.md: checked against figures done by hand and the models' real sizes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from search_r3.errors import InputError
from search_r3.training.planning.architectures import architecture_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale  # noqa: E402

PLAN = scale.Plan()


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-7b"])
def test_the_models_are_as_large_as_they_really_are(name):
    config, model = architecture_of(name).config, scale.MODELS[name]
    assert (model.layers, model.hidden, model.width) == (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
    )
    assert (model.heads, model.kv_heads, model.vocabulary) == (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
    )
    published = {"qwen2.5-1.5b": 1.54e9, "qwen2.5-7b": 7.62e9}[name]
    assert model.parameters == pytest.approx(published, rel=0.01)


def test_encoding_is_two_flops_a_parameter_and_token():
    """By hand: 1e8 chunks of 210 tokens, 2 x 6.525e9 FLOPs each, at 0.4 x 989e12 a second: 192 GPU-hours, and 0.3 % of
    attention."""
    got = scale.encoding(PLAN)
    by_hand = 1e8 * 210 * 2 * 6.525e9 / (0.4 * 989e12) / 3600
    assert got["gpu_hours"] == pytest.approx(by_hand, rel=0.01)
    assert got["gpu_hours"] > by_hand
    assert got["hours"] == pytest.approx(got["gpu_hours"] / 64)
    assert got["dollars"] == pytest.approx(3 * got["gpu_hours"])
    double = scale.encoding(replace(PLAN, documents=2e8, mfu=0.2))
    assert double["gpu_hours"] == pytest.approx(4 * got["gpu_hours"])


def test_vectors_and_table_add_up():
    sizes = scale.vectors(PLAN)
    assert sizes["float32"] == 1e8 * 3584 * 4
    assert sizes["bfloat16"] == sizes["float32"] / 2
    table = scale.table(PLAN)
    assert table["total"] == pytest.approx(sum(v for k, v in table.items() if k not in ("total", "dollars_month")))
    assert table["dollars_month"] == pytest.approx(table["total"] / 1e12 * 23)


def test_a_token_of_reasoning_costs_a_reading_of_the_weights():
    longer = scale.serving(replace(PLAN, reasoning_tokens=132))["reasoned_seconds"]
    assert longer - scale.serving(PLAN)["reasoned_seconds"] == pytest.approx(
        100 * 2 * 7.61e9 / (3.35e12 * 0.6), rel=0.01
    )


def test_training_grows_with_steps_and_shrinks_with_gpus():
    both = scale.training(PLAN)
    assert both["stage 1"]["flops"] == pytest.approx(4 * 512 * 500 * 2 * 6.525e9, rel=0.02)
    more = scale.training(replace(PLAN, sft_steps=1600, train_gpus=16))
    assert more["stage 1"]["hours"] == pytest.approx(both["stage 1"]["hours"])
    assert more["stage 1"]["dollars"] == pytest.approx(2 * both["stage 1"]["dollars"])


def test_a_page_is_filled_between_its_markers_and_must_have_every_table():
    page = "before\n<!-- scale: cost -->\nold\n<!-- /scale -->\nafter\n"
    assert scale.filled(page, {"cost": "new"}) == "before\n<!-- scale: cost -->\nnew\n<!-- /scale -->\nafter\n"
    for tables in ({}, {"cost": "new", "speed": "new"}):
        with pytest.raises(InputError, match="the page's blocks and the tables differ in"):
            scale.filled(page, tables)


def test_every_parameter_says_what_it_is_and_wrong_ones_are_refused(capsys):
    assert all(text for text in scale._docstrings().values())
    assert scale._docstrings().keys() == {field.name for field in scale.fields(scale.Plan)}
    settings = ["documents=1e9", "gpus=8", "model=qwen2.5-1.5b", "memory_gb=1024"]
    expected = replace(PLAN, documents=1e9, gpus=8, model="qwen2.5-1.5b")
    assert scale.plans_of(settings) == (expected, {"memory_gb": 1024})
    for setting, line in (
        ("documnts=1", 'did you mean "documents"'),
        ("mfu=1.5", "it is a share"),
        ("mfu=fast", 'mfu is "fast"; give a number'),
        ("model=gpt", "choose one of"),
        ("gpus=0", "above 0"),
        ("gpus", "write --set key=value"),
        ("busy_share=2", "it is a share"),
        ("cores=0", "above 0"),
    ):
        with pytest.raises(InputError, match=line):
            scale.plans_of([setting])
    assert scale.main(["--set", "gpus=0"]) == 2
    assert capsys.readouterr().err.startswith("error: gpus is 0")
