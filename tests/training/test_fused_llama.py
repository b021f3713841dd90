from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.training.config import LoraSettings
from search_r3.training.kernels import fused_llama, token_ops
from search_r3.training.lora.policy import Policy, Rows, add_lora

EXACT = {"atol": 1e-5, "rtol": 1e-5}


def make_policy(checkpoint: Checkpoint, run_fused: bool | None = True, lora: Any = None, **settings: Any) -> Policy:
    torch.manual_seed(0)
    model = add_lora(checkpoint, lora or LoraSettings(rank=3, alpha=5))
    for name, weight in model.named_parameters():
        if weight.requires_grad and ("lora_B" in name or "trainable_tokens" in name):
            nn.init.normal_(weight, std=0.15)  # an adapter that does something
    return Policy(model, checkpoint.contract.embed_token_id, len(checkpoint.tokenizer), fused=run_fused, **settings)


@pytest.fixture
def checkpoint(tiny_model: Path) -> Checkpoint:
    return checkpoints.load_base(tiny_model, dtype=torch.float32)


def parts(policy: Policy) -> dict[str, Rows]:
    """Two conversations; more rows than one chunk holds, of lengths that need padding, in no order."""
    embed = policy.embed_id
    lengths = [7, 2, 30, 1, 12, 12, 5, 40, 3, 9, 21]
    text = [[(7 * i + 3 * j) % 300 + 3 for j in range(n)] for i, n in enumerate(lengths)]
    query = [[*ids, embed] for ids in text]
    answers = [min(len(row) - 1, i % 4) for i, row in enumerate(query)]
    return {
        "query": Rows([3, 4, 5], query, answers),
        "document": Rows([6, 7], [[*reversed(ids), embed] for ids in text], [0] * len(text)),
    }


def loss_of(out: dict[str, Any]) -> Tensor:
    scores = out["query"].embedding_BD @ out["document"].embedding_BD.T
    return (5 * scores).logsumexp(1).sum() + out["query"].logits_TV.float().logsumexp(-1).sum()


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same_step(policy: Policy) -> None:
    """Embeddings, logits, the base model's logits and all gradients are those of transformers and PEFT."""
    found = []
    for run_fused in (False, True):
        policy.fused = run_fused
        policy.zero_grad()
        out = policy(parts(policy), return_base_logits=["query"])
        loss_of(out).backward()
        found.append((out, gradients(policy)))
    (plain, expected), (ours, got) = found
    for name in plain:
        torch.testing.assert_close(ours[name].embedding_BD, plain[name].embedding_BD, **EXACT)
    torch.testing.assert_close(ours["query"].logits_TV, plain["query"].logits_TV, **EXACT)
    torch.testing.assert_close(ours["query"].base_logits_TV, plain["query"].base_logits_TV, **EXACT)
    assert not torch.allclose(ours["query"].logits_TV, ours["query"].base_logits_TV, atol=1e-2)
    assert got.keys() == expected.keys()
    assert any("trainable_tokens" in name for name in got)
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 3e-5, f"{name}: {error}"  # plain float32 in another order differs by 1e-5


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_step_is_that_of_transformers_and_peft(checkpoint: Checkpoint, activation_checkpointing: bool) -> None:
    assert_same_step(make_policy(checkpoint, mini_batch_size=4, activation_checkpointing=activation_checkpointing))


def test_a_step_is_the_same_without_numba(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ops, "_compiled_kernels", lambda: None)
    assert_same_step(make_policy(checkpoint))


def test_a_step_is_the_same_in_threads(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_llama, "TOKENS_A_PART", 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        policy = make_policy(checkpoint)
        layers = policy._decoder.layers()
        rows = sorted(parts(policy)["query"].rows, key=len, reverse=True)
        plan = policy._decoder.plan(rows, 3, layers, [1] * len(rows))
        assert len(plan.parts) == 3
        assert_same_step(policy)
    finally:
        torch.set_num_threads(threads)


def test_what_is_in_a_part_twice_is_encoded_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(checkpoint)
    embed = policy.embed_id
    texts = [[9, 8, embed], [7, embed], [9, 8, embed], [9, 8, embed]]
    policy.fused, part = True, Rows([3, 4], texts, [1, 1, 1, 2])
    packed: list[int] = []
    plan = policy._decoder.plan
    monkeypatch.setattr(
        policy._decoder, "plan", lambda rows, *rest, **more: (packed.append(len(rows)), plan(rows, *rest, **more))[1]
    )
    once = policy({"query": part})["query"]
    assert packed == [1, 3]  # the prefix; two rows, and one of them again with another number of targets
    assert torch.equal(once.embedding_BD[0], once.embedding_BD[2])
    policy.fused = False
    plain = policy({"query": part})["query"]
    torch.testing.assert_close(once.embedding_BD, plain.embedding_BD, **EXACT)
    torch.testing.assert_close(once.logits_TV, plain.logits_TV, **EXACT)


def test_the_next_step_uses_the_new_weights(checkpoint: Checkpoint) -> None:
    policy = make_policy(checkpoint)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    before = policy(parts(policy))
    loss_of(before).backward()
    optimizer.step()
    after = policy(parts(policy))
    assert not torch.allclose(after["query"].embedding_BD, before["query"].embedding_BD, atol=1e-3)
    assert_same_step(policy)


def test_the_base_s_new_weights_are_seen(checkpoint: Checkpoint) -> None:
    policy = make_policy(checkpoint)
    policy(parts(policy))
    with torch.no_grad():
        for weight in policy.causal_lm.get_decoder().layers.parameters():
            weight.mul_(1.1)
    assert_same_step(policy)


@pytest.mark.parametrize("targets", ["q_proj,down_proj", "k_proj,v_proj,o_proj,up_proj"])
def test_modules_without_an_adapter_are_run_as_they_are(checkpoint: Checkpoint, targets: str) -> None:
    assert_same_step(make_policy(checkpoint, lora=LoraSettings(rank=2, target_modules=targets)))


def test_qwen_s_biases_are_added(checkpoint: Checkpoint) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = {name: getattr(checkpoint.model.config, name) for name in names}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**settings, num_key_value_heads=2, tie_word_embeddings=True))
    for name, weight in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(weight, std=0.2)
    checkpoint.model = model
    assert_same_step(make_policy(checkpoint))


def test_bfloat16_is_as_near_to_float32_as_autocast_s_own(checkpoint: Checkpoint) -> None:
    policy = make_policy(checkpoint)
    found = []
    for run_fused, autocast in ((False, False), (False, True), (True, True)):
        policy.fused = run_fused
        policy.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(policy(parts(policy)))
        loss.backward()
        grads = gradients(policy)
        assert all(gradient.dtype == torch.float32 for gradient in grads.values())
        found.append(torch.cat([gradient.flatten() for gradient in grads.values()]))
    cosine = [torch.cosine_similarity(found[0], other, dim=0).item() for other in found[1:]]
    assert cosine[1] > 0.999
    assert 1 - cosine[1] < 2 * (1 - cosine[0]) + 1e-4


def test_it_runs_by_itself_on_a_cpu(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(checkpoint, run_fused=None)
    monkeypatch.setattr(policy.causal_lm.get_decoder(), "forward", lambda *_, **__: pytest.fail("transformers ran"))
    policy(parts(policy))


def test_weights_that_change_before_the_backward_pass_are_an_error(checkpoint: Checkpoint) -> None:
    policy = make_policy(checkpoint)
    loss = loss_of(policy(parts(policy)))
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "lora_A" in name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dropout_is_left_to_peft(checkpoint: Checkpoint) -> None:
    policy = make_policy(checkpoint, run_fused=None, lora=LoraSettings(rank=2, dropout=0.5))
    assert not fused_llama.supports(policy.model)
    policy.train()
    first, second = (policy(parts(policy))["query"].embedding_BD for _ in range(2))
    assert not torch.allclose(first, second)


def test_asking_for_what_does_not_fit_is_an_error(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM with this adapter cannot run fused"):
        make_policy(checkpoint, lora=LoraSettings(rank=2, dropout=0.5))


def test_a_base_weight_that_is_trained_does_not_fit(checkpoint: Checkpoint) -> None:
    policy = make_policy(checkpoint)
    assert fused_llama.supports(policy.model)
    policy.causal_lm.get_decoder().norm.weight.requires_grad_(True)
    assert not fused_llama.supports(policy.model)


def test_gradients_arrive_through_ddp(checkpoint: Checkpoint, tmp_path: Path) -> None:
    policy = make_policy(checkpoint)
    loss_of(policy(parts(policy))).backward()
    expected = gradients(policy)
    policy.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        module = DistributedDataParallel(policy)
        loss_of(module(parts(policy))).backward()
        del module  # freed after its process group, it can wait for that group's threads forever
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)
