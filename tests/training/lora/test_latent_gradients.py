"""Latent steps in training: what the engine computes, with a gradient through every step, in both decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_r3 import SearchR3
from search_r3.model import checkpoint as checkpoints
from search_r3.training.config import LoraSettings
from search_r3.training.lora.live_encoder import LiveEncoder
from search_r3.training.lora.policy import Policy, Rows, add_lora

STEPS = 3
PREFIX = [3, 4, 5]
TEXTS = [[10, 11, 12, 13], [20], [30, 31, 32], [7, 8, 9, 10, 11, 12, 13, 14]]


def make_policy(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Policy:
    loaded = checkpoints.load_base(folder, dtype=dtype)
    torch.manual_seed(0)
    model = add_lora(loaded, LoraSettings(rank=2))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
            if "lora_B" in name or "trainable_tokens" in name:
                nn.init.normal_(weight, std=0.05)  # an adapter that does something
    return Policy(model, loaded.contract.embed_token_id, vocab_size=len(loaded.tokenizer), **settings)


def latent_rows(texts: list[list[int]] = TEXTS) -> Rows:
    return Rows(PREFIX, texts, [0] * len(texts), STEPS)


def loss_of(embedding_BD: Tensor) -> Tensor:
    return (5 * embedding_BD @ embedding_BD.T).logsumexp(1).sum() + embedding_BD[:, ::2].sum()


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def plainly(policy: Policy, rows: Rows) -> Tensor:
    """The independent way: a row at a time, PEFT's model as it is, everything again at each step."""
    found = []
    embeddings = policy.model.get_input_embeddings()
    for row in rows.rows:
        inputs_TD = embeddings(torch.tensor([*rows.prefix, *row]))
        every_id = torch.arange(policy.vocab_size)
        for _ in range(rows.latent_steps):
            logits_V = policy.model(inputs_embeds=inputs_TD[None]).logits[0, -1, : policy.vocab_size]
            inputs_TD = torch.cat([inputs_TD, logits_V.softmax(-1)[None] @ embeddings(every_id)])
        states_TD = policy.causal_lm.get_decoder()(inputs_embeds=inputs_TD[None]).last_hidden_state[0]
        found.append(nn.functional.normalize(states_TD[-rows.latent_steps :].mean(0), dim=-1))
    return torch.stack(found)


@pytest.mark.parametrize("fused", [False, True])
def test_embeddings_and_gradients_are_those_of_the_plain_adapted_model(tiny_model: Path, fused: bool) -> None:
    policy = make_policy(tiny_model, fused=fused, mini_batch_size=3)
    encoded = policy({"latent": latent_rows()})["latent"]
    assert encoded.logits_TV is None
    loss_of(encoded.embedding_BD).backward()
    got = gradients(policy)
    policy.zero_grad()
    expected_BD = plainly(policy, latent_rows())
    loss_of(expected_BD).backward()
    expected = gradients(policy)
    torch.testing.assert_close(encoded.embedding_BD, expected_BD, atol=1e-5, rtol=1e-5)
    assert got.keys() == expected.keys()
    assert any("trainable_tokens" in name for name in got)
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 1e-3, f"{name}: {error}"  # float32 through four softmaxes; float64 below is exact


@pytest.fixture
def exact(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A policy in float64 throughout."""
    policy = make_policy(tiny_model, torch.float64)
    policy.model.set_attn_implementation("sdpa")
    norm = type(policy.causal_lm.get_decoder().norm)  # transformers' own computes in float32
    monkeypatch.setattr(
        norm, "forward", lambda self, x: nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )
    return policy


def exact_loss(policy: Policy, fused: bool) -> Tensor:
    layers = policy._decoder.layers() if fused else None
    keys = policy._fused_prefixes([latent_rows()], layers)[0] or policy._prefix(PREFIX, torch.device("cpu"))
    order = sorted(TEXTS, key=len, reverse=True)
    state_BD, _ = policy._latent_mini_batch(STEPS, order, [0] * len(order), layers, *keys)
    assert state_BD.dtype == torch.float64
    return loss_of(nn.functional.normalize(state_BD, dim=-1))


def test_the_fused_decoder_s_gradients_are_the_plain_one_s(exact: Policy) -> None:
    found = []
    for fused in (False, True):
        exact.zero_grad()
        exact_loss(exact, fused).backward()
        found.append(gradients(exact))
    expected, got = found
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 1e-8, f"{name}: {error}"


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_is_that_of_finite_differences(exact: Policy, fused: bool) -> None:
    policy = exact

    def loss() -> Tensor:
        return exact_loss(policy, fused)

    loss().backward()
    size = 1e-6
    generator = torch.Generator().manual_seed(1)
    for name, weight in policy.named_parameters():
        if not weight.requires_grad:
            continue
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weight += size * direction
            up = loss()
            weight -= 2 * size * direction
            down = loss()
            weight += size * direction
        assert weight.grad is not None
        expected = (up - down).item() / (2 * size)
        assert (weight.grad * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("fused", [False, True])
def test_activation_checkpointing_changes_no_gradient(tiny_model: Path, fused: bool) -> None:
    found = []
    for checkpointing in (False, True):
        policy = make_policy(tiny_model, fused=fused, mini_batch_size=2, activation_checkpointing=checkpointing)
        loss_of(policy({"latent": latent_rows()})["latent"].embedding_BD).backward()
        found.append(gradients(policy))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_a_row_does_not_depend_on_its_batch_and_the_live_encoder_gives_the_same(tiny_model: Path) -> None:
    policy = make_policy(tiny_model).eval()
    loaded = checkpoints.load_base(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        together = policy({"latent": latent_rows()})["latent"].embedding_BD
        for row, text in zip(together, TEXTS, strict=True):
            torch.testing.assert_close(policy({"latent": latent_rows([text])})["latent"].embedding_BD[0], row)
    encoder: SearchR3 = LiveEncoder(policy, loaded, torch.float32).sync()
    engine: Any = encoder.engine
    found = torch.from_numpy(engine.embed_latent(PREFIX, TEXTS, STEPS))
    torch.testing.assert_close(found, together, atol=1e-5, rtol=1e-5)


def test_tokens_of_a_step_count_the_soft_ones() -> None:
    assert latent_rows().tokens == 3 + 16 + 4 * STEPS
