from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.training.config import LoraSettings
from search_r3.training.lora.policy import Policy, Rows, add_lora, freeze_lowest_layers


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    return make_policy(tiny_model)


def make_policy(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Policy:
    checkpoint = checkpoints.load_base(folder, dtype=dtype)
    torch.manual_seed(0)
    model = add_lora(checkpoint, LoraSettings(rank=2, **settings))
    for name, weight in model.named_parameters():
        if weight.requires_grad and ("lora_B" in name or "trainable_tokens" in name):
            nn.init.normal_(weight, std=0.3)  # an adapter that does something
    return Policy(model, checkpoint.contract.embed_token_id, vocab_size=len(checkpoint.tokenizer))


def rows(policy: Policy) -> Rows:
    embed = policy.embed_id
    return Rows([3, 4, 5], [[10, 11, 12, 13, embed], [20, embed], [30, 31, 32, embed]], [2, 1, 0])


def test_embeddings_and_logits_are_those_of_the_plain_adapted_model(policy: Policy) -> None:
    part = rows(policy)
    encoded = policy({"query": part})["query"]
    assert encoded.logits_TV is not None
    line = 0
    for row, answers, embedding in zip(part.rows, part.num_target_tokens, encoded.embedding_BD, strict=True):
        ids = torch.tensor([[*part.prefix, *row]])
        plain = policy.model(ids, output_hidden_states=True)
        hidden = policy.causal_lm.get_decoder()(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(embedding, hidden / hidden.norm(), atol=1e-5, rtol=1e-5)
        for back in range(answers, 0, -1):
            expected = plain.logits[0, -1 - back, : policy.vocab_size]
            torch.testing.assert_close(encoded.logits_TV[line], expected, atol=1e-4, rtol=1e-4)
            line += 1
    assert encoded.target_T is not None
    assert encoded.target_T.tolist() == [13, policy.embed_id, policy.embed_id]


def test_gradients_are_those_of_the_plain_adapted_model(policy: Policy) -> None:
    part = rows(policy)
    encoded = policy({"query": part})["query"]
    assert encoded.logits_TV is not None
    (encoded.embedding_BD.sum() + encoded.logits_TV.logsumexp(-1).sum()).backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    total = torch.zeros(())
    for row, answers in zip(part.rows, part.num_target_tokens, strict=True):
        ids = torch.tensor([[*part.prefix, *row]])
        hidden = policy.causal_lm.get_decoder()(ids).last_hidden_state[0, -1]
        total = total + (hidden / hidden.norm()).sum()
        if answers:
            total = total + policy.model(ids).logits[0, -1 - answers : -1, : policy.vocab_size].logsumexp(-1).sum()
    total.backward()
    plain = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert ours.keys() == plain.keys()
    assert any("trainable_tokens" in name for name in ours)
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_token_losses_are_the_logits_cross_entropy_with_its_gradients(policy: Policy, fused: bool) -> None:
    policy.fused = fused
    found = []
    for names in ((), ("query",)):
        policy.zero_grad()
        encoded = policy({"query": rows(policy)}, return_token_losses=names)["query"]
        losses = encoded.token_loss_T
        if losses is None:
            assert encoded.logits_TV is not None
            assert encoded.target_T is not None
            losses = nn.functional.cross_entropy(encoded.logits_TV, encoded.target_T, reduction="none")
        (losses * torch.tensor([0.3, 2.0, 1.0])).sum().backward()
        found.append((losses, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}))
    (losses, expected), (got_losses, got) = found
    torch.testing.assert_close(got_losses, losses, atol=1e-5, rtol=1e-5)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() < 3e-5 * gradient.norm(), name


def test_base_logits_are_the_untouched_model_s(policy: Policy, tiny_model: Path) -> None:
    part = rows(policy)
    encoded = policy({"query": part}, return_base_logits=["query"])["query"]
    base = checkpoints.load_base(tiny_model, dtype=torch.float32).model
    expected = base(torch.tensor([[*part.prefix, *part.rows[0]]])).logits[0, -3:-1, : policy.vocab_size]
    assert encoded.base_logits_TV is not None
    assert not encoded.base_logits_TV.requires_grad
    torch.testing.assert_close(encoded.base_logits_TV[:2], expected, atol=1e-4, rtol=1e-4)


def test_the_size_of_a_chunk_changes_nothing(policy: Policy) -> None:
    part = rows(policy)
    whole = policy({"query": part})["query"]
    policy.mini_batch_size = 1
    single = policy({"query": part})["query"]
    torch.testing.assert_close(single.embedding_BD, whole.embedding_BD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(single.logits_TV, whole.logits_TV, atol=1e-4, rtol=1e-4)


def test_only_the_adapter_and_one_row_are_trained(policy: Policy) -> None:
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    assert [tuple(p.shape) for name, p in trained.items() if "trainable_tokens" in name] == [(1, 32)]


@pytest.mark.parametrize("fused", [True, False])
def test_with_frozen_lowest_layers_the_others_get_the_same_gradients_and_those_none(
    fused: bool, tiny_model: Path
) -> None:
    gradients = []
    for count in (0, 1):
        policy = make_policy(tiny_model)
        policy.fused = fused
        freeze_lowest_layers(policy.model, count)
        policy({"query": rows(policy)})["query"].embedding_BD.sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    everything, upper = gradients
    assert {name for name in everything if "lora" in name and ".layers.0." not in name} == set(upper)
    for name, gradient in upper.items():
        torch.testing.assert_close(gradient, everything[name], atol=0, rtol=0)


def test_no_run_freezes_every_layer(policy: Policy) -> None:
    with pytest.raises(InputError, match=r"lora\.frozen_layers is 2, but the model has 2 layers"):
        freeze_lowest_layers(policy.model, 2)


def test_target_modules_that_do_not_exist_are_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="no_such_proj"):
        make_policy(tiny_model, target_modules="no_such_proj")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            r".*\.[01]\.self_attn\.(q|v)_proj",
            {"0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"},
        ),
        (r".*\.0\.mlp\.\w+_proj", {"0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"}),
        ("q_proj,o_proj", {f"{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "o_proj")}),
        (["k_proj"], {"0.self_attn.k_proj", "1.self_attn.k_proj"}),
    ],
)
def test_target_modules_are_a_regular_expression_or_names(tiny_model: Path, targets: Any, expected: set[str]) -> None:
    policy = make_policy(tiny_model, target_modules=targets)
    trained = {name.split(".layers.")[1] for name, _ in policy.named_parameters() if ".lora_A." in name}
    assert {name.split(".lora_A.")[0] for name in trained} == expected


def test_a_broken_regular_expression_is_one_line(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"lora.target_modules '\(q_proj' does not fit this model: .*unterminated"):
        make_policy(tiny_model, target_modules="(q_proj")


def test_gradient_caching_gives_the_plain_gradients_also_with_dropout(tiny_model: Path) -> None:
    found = []
    for cached in (False, True):
        policy = make_policy(tiny_model, dropout=0.3)
        policy.mini_batch_size, policy.activation_checkpointing = 2, cached
        policy.train()
        torch.manual_seed(1)
        part = rows(policy)
        encoded = policy({"query": part, "document": part})
        scores = encoded["query"].embedding_BD @ encoded["document"].embedding_BD.T
        logits = encoded["query"].logits_TV
        assert logits is not None
        (scores.logsumexp(1).sum() + logits.logsumexp(-1).sum()).backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_a_bfloat16_base_trains_float32_weights_and_is_near_the_float32_one(fused: bool, tiny_model: Path) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = make_policy(tiny_model, dtype)
        policy.fused = fused
        assert policy.causal_lm.get_decoder().norm.weight.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            encoded = policy({"query": rows(policy)}, return_base_logits=["query"])["query"]
        assert encoded.logits_TV is not None
        assert encoded.base_logits_TV is not None
        (encoded.embedding_BD.sum() + encoded.logits_TV.float().logsumexp(-1).sum()).backward()
        gradients = [weight.grad for weight in policy.parameters() if weight.grad is not None]
        assert len(gradients) == 2 * 2 * 7 + 1  # of two layers the A and B of seven matrices, and the token's row
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        found.append((encoded.embedding_BD, torch.cat([gradient.flatten() for gradient in gradients])))
    (one, one_gradient), (other, other_gradient) = found
    assert other.dtype == torch.float32
    assert (one * other).sum(1).min() > 0.99
    assert torch.cosine_similarity(one_gradient, other_gradient, dim=0) > 0.9  # what rounding to 8 bits leaves
