"""The product of an int8 matrix is exact, whichever bytes the processor multiplies."""

from __future__ import annotations

import pytest
import torch

from search_r3.model.engines.int8 import int8_weights
from search_r3.model.engines.int8.int8_weights import Int8Matrix


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_product_is_exact_with_signed_and_with_shifted_inputs(
    signed: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_weights, "has_amx", lambda: signed)
    generator = torch.Generator().manual_seed(rows)
    weight_OI = torch.randint(-127, 128, (48, 80), dtype=torch.int8, generator=generator)
    x_NI = torch.randint(-128, 128, (rows, 80), dtype=torch.int8, generator=generator)
    x_NI[0] = 127  # the largest sums, of either sign
    weight_OI[:2] = torch.tensor([[127], [-127]])
    before = x_NI.clone()
    scale_O = torch.full((48,), 0.5)

    found = Int8Matrix.of(weight_OI, scale_O)(x_NI)

    assert torch.equal(found, (x_NI.double() @ weight_OI.double().T * 0.5).float())
    assert torch.equal(x_NI, before)
