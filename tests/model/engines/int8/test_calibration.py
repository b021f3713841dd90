"""The texts that int8 weights are rounded for, in a model's own conversations."""

from __future__ import annotations

from pathlib import Path

from search_r3 import SearchR3
from search_r3.model.engines.int8 import calibration


def test_blocks_are_of_a_question_reasoning_and_a_passage() -> None:
    blocks = calibration.blocks()
    assert len(blocks) == 40
    assert all(len(block) == 3 and all(line.strip() for line in block) for block in blocks)
    assert blocks[0][0] == "how to remove duplicates from a list but keep the order"
    assert "\n    seen = set()\n" in blocks[0][2]


def test_samples_are_what_the_model_will_be_given(tiny_model: Path) -> None:
    model = SearchR3.from_pretrained(tiny_model)
    embed_id = model.contract.embed_token_id
    rows = calibration.calibration_rows(model.templates, model.tokenizer, embed_id)
    by_prefix = {tuple(prefix) for prefix, _ in rows}
    assert by_prefix == {tuple(template.prefix) for template in model.templates.values()}
    assert len(rows) == 3 * len(calibration.blocks())
    assert all(row[-1] == embed_id for _, row in rows)
    assert all(row.count(embed_id) == 1 for _, row in rows)
    longest = max(len(template.suffix) for template in model.templates.values())
    assert all(len(row) <= 2 * calibration.LONGEST + longest + 1 for _, row in rows)
