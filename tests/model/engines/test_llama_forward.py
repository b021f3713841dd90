"""The written-out Llama forward pass gives the states that transformers gives, and the model stays whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llama_family import MODELS, SIZES, make_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from search_r3.model.engines.llama_forward import LlamaSession, TransformersSession, merge_projections


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_both_sessions_give_the_same_states(name: str) -> None:
    model = make_model(name)
    ids_BL = torch.randint(128, (4, 7), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones(4, 14, dtype=torch.long)
    mask_BT[1, 3:6] = 0  # padding between a prefix of three tokens and the row
    position_BL = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    prefix_session = TransformersSession(model.model, [], 1)
    prefix_session.feed(ids_BL[:1, :3], torch.arange(3)[None])
    prefix = prefix_session.prefix()
    plain = TransformersSession(model.model, prefix, 4)
    expected = [
        plain.feed(ids_BL, position_BL[:, 3:10], mask_BT[:, :10]),
        plain.feed(ids_BL[:, :1], position_BL[:, 10:11], mask_BT[:, :11]),
    ]
    plain.keep(torch.tensor([1, 3]))
    expected.append(plain.feed(ids_BL[:2, 2:3], position_BL[[1, 3], 11:12], mask_BT[[1, 3], :12]))

    layers = merge_projections(model)
    assert layers is not None
    ours = LlamaSession(model.model, layers, prefix, 4, 9)
    found = [
        ours.feed(ids_BL, position_BL[:, 3:10], mask_BT[:, :10]),
        ours.feed(ids_BL[:, :1], position_BL[:, 10:11], mask_BT[:, :11]),
    ]
    ours.keep(torch.tensor([1, 3]))
    found.append(ours.feed(ids_BL[:2, 2:3], position_BL[[1, 3], 11:12], mask_BT[[1, 3], :12]))
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() < 1e-5


@torch.inference_mode()
def test_the_state_is_taken_where_it_is_asked_for() -> None:
    model = make_model("llama")
    layers = merge_projections(model)
    assert layers is not None
    ids_BL = torch.randint(128, (3, 6), generator=torch.Generator().manual_seed(0))
    hidden_BLD = model.model(input_ids=ids_BL).last_hidden_state
    last_B = torch.tensor([5, 0, 3])
    position_BL = torch.arange(6).expand(3, -1)
    for session in (LlamaSession(model.model, layers, [], 3, 6), TransformersSession(model.model, [], 3)):
        found_BD = session.feed(ids_BL, position_BL, None, last_B)
        assert (found_BD - hidden_BLD[torch.arange(3), last_B]).abs().max() < 1e-5


def test_merging_leaves_the_model_as_it_was_and_sees_changes_in_place() -> None:
    model = make_model("qwen2")
    ids = torch.arange(5)[None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = model(input_ids=ids).logits
    layers = merge_projections(model)
    assert layers is not None
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(model(input_ids=ids).logits, logits)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.fill_(3.0)
    assert (layers[0].qkv[48:64] == 3.0).all()
    assert torch.equal(layers[0].qkv[:48], before["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("case", ["window", "activation", "adapter"])
def test_what_it_cannot_compute_exactly_goes_through_transformers(case: str) -> None:
    if case == "window":
        model: Any = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    elif case == "activation":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    else:
        from peft import LoraConfig, get_peft_model

        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert merge_projections(model) is None
