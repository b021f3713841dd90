"""Rounding for what a matrix sees: nearer products than the nearest integers give, and the same model when folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llama_family import MODELS, make_model
from torch import Tensor

from search_r3.model.engines.int8.quantization import (
    gptq,
    quantize_layers,
    round_to_nearest,
    smoothing_divisor,
)
from search_r3.model.engines.llama_forward import Layer, LlamaSession, merge_projections


@pytest.fixture
def inputs_NI() -> Tensor:
    """Inputs that go together, some of them much larger than others."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(400, 24, generator=random) @ torch.randn(24, 80, generator=random) * torch.logspace(-1, 1, 80)


@pytest.fixture
def weight_OI() -> Tensor:
    return torch.randn(33, 80, generator=torch.Generator().manual_seed(1))


def error(found: tuple[Tensor, Tensor], weight_OI: Tensor, inputs_NI: Tensor) -> float:
    """Mean squared error of the product."""
    rounded_OI, scale_O = found
    return float(((rounded_OI.float() * scale_O[:, None] - weight_OI) @ inputs_NI.T).square().mean())


class TestRoundFor:
    def test_products_are_much_nearer_than_to_the_nearest(self, weight_OI: Tensor, inputs_NI: Tensor) -> None:
        rounded_OI, scale_O = found = gptq(weight_OI, inputs_NI.T @ inputs_NI)
        assert rounded_OI.dtype == torch.int8
        assert rounded_OI.shape == weight_OI.shape
        assert torch.equal(scale_O, round_to_nearest(weight_OI)[1])
        assert error(found, weight_OI, inputs_NI) < error(round_to_nearest(weight_OI), weight_OI, inputs_NI) / 4

    def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest(self, weight_OI: Tensor) -> None:
        assert torch.equal(gptq(weight_OI, torch.eye(80))[0], round_to_nearest(weight_OI)[0])

    def test_the_scale_of_the_moments_does_not_matter(self, weight_OI: Tensor, inputs_NI: Tensor) -> None:
        moments_II = inputs_NI.T @ inputs_NI
        assert torch.equal(gptq(weight_OI, moments_II)[0], gptq(weight_OI, moments_II * 4096)[0])

    @pytest.mark.parametrize("moments_II", [torch.zeros(80, 80), torch.full((80, 80), torch.nan)])
    def test_without_moments_it_is_to_the_nearest(self, weight_OI: Tensor, moments_II: Tensor) -> None:
        assert torch.equal(gptq(weight_OI, moments_II)[0], round_to_nearest(weight_OI)[0])

    def test_a_row_of_zeros_stays_one(self, weight_OI: Tensor, inputs_NI: Tensor) -> None:
        weight_OI[3] = 0
        rounded_OI, scale_O = gptq(weight_OI, inputs_NI.T @ inputs_NI)
        assert not rounded_OI[3].any()
        assert torch.isfinite(scale_O).all()


def test_smoothing_leaves_inputs_of_one_size_alone_and_divides_large_ones() -> None:
    assert torch.equal(smoothing_divisor(torch.eye(4)), torch.ones(4))
    assert torch.allclose(smoothing_divisor(torch.diag(torch.tensor([1.0, 1.0, 16.0]))), torch.tensor([1.0, 1.0, 2.0]))
    assert torch.isfinite(smoothing_divisor(torch.zeros(3, 3))).all()


def unrounded(model: Any, layers: list[Layer], samples: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What `quantize_layers` gives when nothing is rounded."""

    def as_it_is(weight_OI: Tensor, moments_II: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(moments_II)
        return weight_OI.clone(), torch.ones(len(weight_OI))

    seen: list[Tensor] = []
    monkeypatch.setattr("search_r3.model.engines.int8.quantization.gptq", as_it_is)
    return quantize_layers(model, layers, samples)


@pytest.mark.parametrize("name", MODELS)
def test_divisors_change_nothing_but_the_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name)
    layers = merge_projections(model)
    assert layers is not None
    ids_BL = torch.randint(128, (4, 9), generator=torch.Generator().manual_seed(0))
    samples = [([1, 2], row) for row in ids_BL.tolist()]
    tensors = unrounded(model, layers, samples, monkeypatch)
    assert (tensors["0.qkv divisor"] != 1).any()
    assert torch.equal(tensors["1.down fine"], layers[1].down)
    divided = [
        Layer(
            qkv=tensors[f"{i}.qkv"],
            qkv_bias=layer.qkv_bias,
            out=tensors[f"{i}.out"],
            out_bias=layer.out_bias,
            gate_up=tensors[f"{i}.gate_up"] * tensors[f"{i}.gate_up scale"][:, None],
            down=tensors[f"{i}.down"],
            norm_attention=layer.norm_attention / tensors[f"{i}.qkv divisor"],
            norm_mlp=layer.norm_mlp / tensors[f"{i}.gate_up divisor"],
        )
        for i, layer in enumerate(layers)
    ]
    with torch.inference_mode():
        states = [
            LlamaSession(model.model, of, [], 4, 9).feed(ids_BL, torch.arange(9)[None]) for of in (layers, divided)
        ]
    assert torch.allclose(*states, atol=1e-4)


def test_prefixes_and_padding_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second moments are those of the rows' own tokens: those of one row, whatever stands beside it."""
    model = make_model("llama")
    layers = merge_projections(model)
    assert layers is not None
    counted = []
    for samples in ([([1, 2], [5, 6, 7])], [([1, 2], [5, 6, 7]), ([1, 2, 3, 4, 5, 6, 7], [])]):
        kept: list[Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                "search_r3.model.engines.int8.quantization.gptq",
                lambda weight, moments, kept=kept: kept.append(moments.clone()) or round_to_nearest(weight),
            )
            quantize_layers(model, layers, samples)
        counted.append(kept)
    for one, other in zip(*counted, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("qwen2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layers = merge_projections(model)
    assert layers is not None
    quantize_layers(model, layers, [([], [1, 2, 3])])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
