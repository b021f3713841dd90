"""One pass over two sessions gives the states and the caches that a pass over each gives."""

from __future__ import annotations

import copy

import pytest
import torch
from llama_family import MODELS, make_model

from search_r3.model.engines.chunked_prefill import SessionInput, feed_together
from search_r3.model.engines.llama_forward import LlamaSession, merge_projections


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_states_and_caches_are_those_of_separate_passes(name: str) -> None:
    model = make_model(name)
    ids = torch.randint(128, (8, 12), generator=torch.Generator().manual_seed(0))
    layers = merge_projections(model)
    assert layers is not None
    one, two = LlamaSession(model.model, layers, [], 3, 12), LlamaSession(model.model, layers, [], 2, 12)
    mask_BT = torch.ones(3, 7, dtype=torch.long)
    mask_BT[1, 2:5] = 0  # a gap
    one.feed(ids[:3, :6], torch.arange(6).expand(3, -1), mask_BT[:, :6])
    two.feed(ids[3:5, :3], torch.arange(3).expand(2, -1))

    def part_one(session: LlamaSession) -> SessionInput:
        return SessionInput(session, ids[:3, 6:7], torch.tensor([[6], [3], [6]]), mask_BT)

    def part_two(session: LlamaSession) -> SessionInput:
        return SessionInput(session, ids[3:5, 3:8], 3 + torch.arange(5).expand(2, -1), None, torch.tensor([4, 1]))

    def feed(part: SessionInput) -> torch.Tensor:
        return part.session.feed(part.ids_BL, part.position_BL, part.mask_BT, part.last_B)

    pair = [copy.copy(session) for session in (one, two)]
    for session in pair:
        session.keys, session.values = [k.clone() for k in session.keys], [v.clone() for v in session.values]
    expected = [feed(part_one(one)), feed(part_two(two))]
    found = feed_together([part_one(pair[0]), part_two(pair[1])])
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() < 1e-5
    for separate, together in zip((one, two), pair, strict=True):
        assert separate.length == together.length
        end = separate.length
        for a, b in zip(separate.keys + separate.values, together.keys + together.values, strict=True):
            assert (a[:, :, :end] - b[:, :, :end]).abs().max() < 1e-5
