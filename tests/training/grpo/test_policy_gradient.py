from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from search_r3.training.grpo.log_probs import padded, token_log_probs
from search_r3.training.grpo.policy_gradient import (
    LOSS_TYPES,
    advantages,
    entropy_floor_loss,
    group_std,
    grpo_loss,
)

MAX_TOKENS = 11


def batch(seed: int = 0, rollouts: int = 6, width: int = 9) -> dict[str, Tensor]:
    """Rollouts of different lengths whose ratios cross both bounds, with advantages of both signs."""
    rng = torch.Generator().manual_seed(seed)
    new = -3 * torch.rand(rollouts, width, generator=rng)
    mask = torch.arange(width)[None] < torch.randint(1, width + 1, (rollouts, 1), generator=rng)
    return {
        "new_RT": new,
        "old_RT": new + 0.4 * torch.randn(rollouts, width, generator=rng),
        "reference_RT": new + 0.3 * torch.randn(rollouts, width, generator=rng),
        "advantages_R": torch.randn(rollouts, generator=rng),
        "mask_RT": mask,
    }


@pytest.fixture(scope="module")
def trl_loss(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's own loss of a batch: a real GRPOTrainer, whose model's log-probabilities are replaced by the batch's."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'search-r3[trl]'")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Trainer(trl.GRPOTrainer):
        given: Tensor

        def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
            return self.given, torch.zeros_like(self.given), None

    settings: dict[str, Any] = {
        "output_dir": str(tmp_path_factory.mktemp("trl")), "use_cpu": True, "bf16": False, "report_to": [],
        "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": MAX_TOKENS,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(**settings),
            train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    def loss(
        values: dict[str, Tensor], loss_type: str, beta: float, low: float, high: float, unbiased_kl: bool
    ) -> tuple[Tensor, Any]:
        trainer.args.use_bias_correction_kl = unbiased_kl
        trainer.loss_type, trainer.beta, trainer.epsilon_low, trainer.epsilon_high = loss_type, beta, low, high
        trainer.given = values["new_RT"]
        trainer._metrics["train"].clear()
        ids = torch.ones_like(values["mask_RT"], dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
            "completion_mask": values["mask_RT"].long(), "advantages": values["advantages_R"],
            "old_per_token_logps": values["old_RT"], "ref_per_token_logps": values["reference_RT"],
            "num_items_in_batch": values["mask_RT"].sum(),
        }  # fmt: skip
        return trainer._compute_loss(trainer.model, inputs), trainer._metrics["train"]

    return loss


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("beta", "unbiased_kl"), [(0.0, False), (0.04, False), (0.04, True)])
def test_loss_gradient_and_figures_equal_trls(loss_type: Any, beta: float, unbiased_kl: bool, trl_loss: Any) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "beta": beta, "unbiased_kl": unbiased_kl}
    for low, high in ((0.2, 0.2), (0.2, 0.28)):
        ours, theirs = batch(), batch()
        for values in (ours, theirs):
            values["new_RT"].requires_grad_()
        expected, metrics = trl_loss(theirs, low=low, high=high, **options)
        found, figures = grpo_loss(**ours, **options, epsilon_low=low, epsilon_high=high, max_tokens=MAX_TOKENS)
        expected.backward()
        found.backward()
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)
        torch.testing.assert_close(ours["new_RT"].grad, theirs["new_RT"].grad, atol=1e-5, rtol=0)
        assert figures["clip_low"] == pytest.approx(metrics["clip_ratio/low_mean"][0], abs=1e-6)
        assert figures["clip_high"] == pytest.approx(metrics["clip_ratio/high_mean"][0], abs=1e-6)
        assert figures["clip_low"] > 0
        assert figures["clip_high"] > 0
        if beta and not unbiased_kl:  # TRL then reports it times the ratio
            assert figures["kl"] == pytest.approx(metrics["kl"][0], abs=1e-6)


def test_the_first_step_has_ratio_one_and_the_gradient_of_reinforce() -> None:
    values = batch()
    new = values["new_RT"].requires_grad_()
    values["old_RT"] = new.detach()
    loss, figures = grpo_loss(**values, loss_type="dapo")
    loss.backward()
    assert figures["ratio"] == 1.0
    assert figures["clip_low"] == figures["clip_high"] == 0
    weight = values["mask_RT"].float()
    expected = -values["advantages_R"][:, None] * weight / weight.sum()
    torch.testing.assert_close(new.grad, expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_is_masked_is_ignored_even_if_it_is_not_a_number(loss_type: Any) -> None:
    values = batch()
    options: dict[str, Any] = {"loss_type": loss_type, "beta": 0.04, "max_tokens": MAX_TOKENS}
    clean, figures = grpo_loss(**values, **options)
    for name, bad in (("new_RT", -math.inf), ("old_RT", math.nan), ("reference_RT", math.inf)):
        values[name] = values[name].masked_fill(~values["mask_RT"], bad)
    values["new_RT"].requires_grad_()
    dirty, again = grpo_loss(**values, **options)
    dirty.backward()
    assert dirty.item() == clean.item()
    assert figures == again
    assert torch.isfinite(values["new_RT"].grad).all()
    assert (values["new_RT"].grad[~values["mask_RT"]] == 0).all()
    unmasked, _ = grpo_loss(**batch() | {"mask_RT": torch.ones_like(values["mask_RT"])}, **options)
    assert unmasked.item() != pytest.approx(clean.item(), abs=1e-3)  # the mask mattered


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_unmasked_gives_zero_with_a_gradient_of_zero(loss_type: Any) -> None:
    values = batch() | {"mask_RT": torch.zeros(6, 9, dtype=torch.bool)}
    values["new_RT"].requires_grad_()
    loss, figures = grpo_loss(**values, loss_type=loss_type, beta=0.04, max_tokens=MAX_TOKENS)
    loss.backward()
    assert loss.item() == 0
    assert figures == {"clip_low": 0, "clip_high": 0, "ratio": 1, "kl": 0}
    assert (values["new_RT"].grad == 0).all()


def test_clipping_higher_lets_a_rare_good_token_grow_further() -> None:
    new = torch.tensor([[math.log(0.125)]], requires_grad=True)
    old, one = torch.tensor([[math.log(0.1)]]), torch.ones(1)
    for high, flows in ((0.2, False), (0.28, True)):  # the ratio is 1.25
        new.grad = None
        grpo_loss(new, old, None, one, torch.ones(1, 1, dtype=torch.bool), epsilon_high=high)[0].backward()
        assert bool(new.grad.abs() > 0) == flows


def test_dr_grpo_does_not_favour_short_rollouts_and_grpo_does() -> None:
    mask = torch.tensor([[True] + [False] * 7, [True] * 8])
    new = torch.zeros(2, 8)
    gradients = {}
    for loss_type in ("grpo", "dr_grpo"):
        leaf = new.clone().requires_grad_()
        grpo_loss(leaf, new, None, torch.ones(2), mask, loss_type=loss_type, max_tokens=8)[0].backward()  # type: ignore[arg-type]
        gradients[loss_type] = leaf.grad
    assert gradients["grpo"][0, 0] == 8 * gradients["grpo"][1, 0]
    assert gradients["dr_grpo"][0, 0] == gradients["dr_grpo"][1, 0]


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    rng = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(12, generator=rng), 0) for _ in range(2))
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True, generator=rng)
    new, reference = p[drawn][None], q[drawn][None]
    figures = grpo_loss(new, new, reference, torch.zeros(1), torch.ones_like(new, dtype=torch.bool))[1]
    assert figures["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=0.03)
    assert (torch.exp(reference - new) - (reference - new) - 1 >= 0).all()


def test_advantages_by_their_formulas() -> None:
    rewards, groups = np.array([0.2, 0.9, 0.4, 1.0, 0.0, 0.3], dtype=np.float32), np.array([7, 7, 7, 2, 2, 2])
    for kind in (("grpo", "group"), ("grpo", "none"), ("rloo", "none"), ("rloo", "group")):
        found = advantages(rewards, groups, *kind)  # type: ignore[arg-type]
        for group in (7, 2):
            r = rewards[groups == group].astype(np.float64)
            others = np.array([x - np.delete(r, i).mean() for i, x in enumerate(r)])
            expected = others if kind[0] == "rloo" else r - r.mean()
            if kind[1] == "group":
                expected = expected / (r.std(ddof=1) + 1e-4)
            np.testing.assert_allclose(found[groups == group].numpy(), expected, atol=1e-6)
    order = np.random.default_rng(0).permutation(6)
    torch.testing.assert_close(advantages(rewards[order], groups[order]), advantages(rewards, groups)[order])


def test_standard_advantages_equal_trls() -> None:
    nanstd = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed").nanstd
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(1))
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    ours = advantages(rewards.flatten(), torch.arange(5).repeat_interleave(6))
    torch.testing.assert_close(ours.view(5, 6), theirs, atol=1e-5, rtol=0)


def test_equal_rewards_and_groups_of_one_have_no_advantage() -> None:
    rewards, groups = [0.7] * 4 + [0.1], [0, 0, 0, 0, 1]
    for estimator in ("grpo", "rloo"):
        for scale in ("group", "none"):
            found = advantages(rewards, groups, estimator, scale)  # type: ignore[arg-type]
            assert found.abs().max() < 1e-6
    assert group_std(rewards, groups).abs().max() < 1e-6
    assert group_std([0.0, 1.0], [3, 3]).tolist() == pytest.approx([0.5**0.5] * 2)


def test_log_probs_are_those_of_the_sampling_distribution() -> None:
    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(300) % 7
    found, entropy = token_log_probs(logits, ids, temperature=0.7)
    distribution = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(found, distribution.log_prob(ids))
    torch.testing.assert_close(entropy, distribution.entropy())


def test_padded_rows_are_the_rollouts_behind_each_other() -> None:
    assert padded(torch.arange(4.0), [1, 3]).tolist() == [[0, 0, 0], [1, 2, 3]]
    with pytest.raises(ValueError, match="4 values"):
        padded(torch.arange(4.0), [1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "ppo"}, "no loss type 'ppo'"),
        ({"epsilon_low": 0}, "clip bounds"),
        ({"epsilon_low": 1.5}, "clip bounds"),
        ({"beta": -1}, "beta must be"),
        ({"beta": 0.1, "reference_RT": None}, "give reference_RT"),
        ({"loss_type": "dr_grpo"}, "give max_tokens"),
        ({"mask_RT": torch.ones(6, 9)}, "boolean"),
        ({"old_RT": torch.ones(6, 8)}, "old_RT has the shape"),
        ({"advantages_R": torch.ones(5)}, "advantages_R has the shape"),
        ({"new_RT": torch.ones(0, 9)}, "with a rollout"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_loss(**batch() | changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1], [0], "ppo"), "no advantage estimator 'ppo'"),
        (([0.1], [0], "grpo", "batch"), "no scale_rewards 'batch'"),
        (([0.1, math.nan], [0, 0]), "NaN"),
        (([0.1, 0.2], [0]), "two equal vectors"),
        (([0.1, 0.2], [0.0, 1.0]), "two equal vectors"),
    ],
)
def test_wrong_rewards_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(*arguments)


def test_entropies_have_a_gradient_where_it_is_asked_for_and_the_same_values() -> None:
    logits = torch.randn(200, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(200) % 7
    plain, with_gradient = token_log_probs(logits, ids)[1], token_log_probs(logits, ids, entropy_gradient=True)[1]
    assert not plain.requires_grad
    assert torch.equal(plain, with_gradient)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(with_gradient, expected)
    (found,) = torch.autograd.grad(with_gradient.sum(), logits)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(found, wanted)


def test_the_entropy_floor_pulls_only_from_below_and_only_over_sampled_tokens() -> None:
    entropy = torch.tensor([[0.2, 0.4, 9.0], [0.3, 9.0, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = entropy_floor_loss(entropy, mask, 0.5)
    assert loss.item() == pytest.approx(0.2)
    loss.backward()
    assert torch.allclose(entropy.grad, torch.where(mask, -1 / 3, 0.0))
    entropy.grad = None
    above = entropy_floor_loss(entropy, mask, 0.25)
    above.backward()
    assert above.item() == 0
    assert not entropy.grad.any()
    nothing = entropy_floor_loss(entropy, torch.zeros_like(mask), 0.5)
    nothing.backward()
    assert nothing.item() == 0
