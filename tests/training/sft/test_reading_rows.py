"""Stage 1 with passages: which of them a row reads, and that its rows are those that a search will embed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from search_r3 import SearchR3
from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.reading import reading_turns
from search_r3.model.tokenization import ReadingTurn
from search_r3.training.config import LoopConfig, LoraSettings
from search_r3.training.sft.contrastive import known_answers
from search_r3.training.sft.reading_rows import plan_reading
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask, train_sft

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
ALL = {"reading_dropped": 0.0, "reading_shuffled": 0.0, "reading_without_positive": 0.0}


def some_pairs() -> list[TrainingPair]:
    return [
        TrainingPair(
            id=word,
            query=f"what is {word}",
            positive=f"{word} is letter number {i}",
            reasoning=f"letter {word}" if i % 2 else None,
            source="greek",
            passages=tuple(f"{word} is letter number {i + j}" for j in (1, 0, 2, 3)) if i != 6 else (),
        )
        for i, word in enumerate(WORDS)
    ]


def config_of(**changes: Any) -> SFTConfig:
    settings: dict[str, Any] = {
        "pairs": ["-"], "output": "-", "global_batch_size": 8, "dev": [], "reasoning_ratio": 1.0,
        "reading_ratio": 1.0, "reading_passages": 3, "reading_passage_tokens": 5, "lora": LoraSettings(rank=4),
        "loop": LoopConfig(seed=3), "weights": LossWeights(sft=0.1, kl=0, infonce=1.0),
    }  # fmt: skip
    return SFTConfig(**settings | changes)


def task_of(tiny_model: Path, **changes: Any) -> SFTTask:
    torch.manual_seed(0)
    checkpoint = checkpoints.load_base(tiny_model, dtype=torch.float32)
    return SFTTask(config_of(**changes), checkpoint, some_pairs())


def plan(step: int = 0, **changes: Any):
    pairs = some_pairs()
    chosen = [i for i, pair in enumerate(pairs) if pair.reasoning]
    return plan_reading(config_of(**changes), step, pairs, chosen, known_answers(pairs))


def test_a_row_reads_the_first_passages_of_its_pair() -> None:
    found = plan(**ALL)
    pairs = some_pairs()
    assert found.direct == {i: pair.passages[:3] for i, pair in enumerate(pairs) if pair.passages}
    assert plan(reading_ratio=0.0).direct == plan(reading_ratio=0.0).before_reasoning == {}


def test_the_shares_hold_over_many_steps_and_the_plan_is_a_function_of_the_step() -> None:
    shares = {"reading_dropped": 0.2, "reading_shuffled": 0.3, "reading_without_positive": 0.4}
    pairs, counts = some_pairs(), Counter[str]()
    for step in range(400):
        found = plan(step, **shares, reading_ratio=0.5)
        assert found == plan(step, **shares, reading_ratio=0.5)
        counts["rows"] += len(found.direct)
        counts["reasoned"] += len(found.before_reasoning)
        for i, shown in found.direct.items():
            own = pairs[i].passages
            wrong = (own[0], own[2], own[3])
            other = [pair.passages[:3] for j, pair in enumerate(pairs) if j != i and pair.passages]
            kind = "own" if shown == own[:3] else "wrong" if shown == wrong else "other" if shown in other else "fewer"
            assert kind != "fewer" or shown == own[: len(shown)]
            counts[kind] += 1
    rows = counts["rows"]
    assert rows == pytest.approx(400 * 7 * 0.5, rel=0.1)
    assert counts["reasoned"] == pytest.approx(400 * 4 * 0.5, rel=0.1)
    for kind, share in (("fewer", 0.2), ("other", 0.3), ("wrong", 0.4), ("own", 0.1)):
        assert counts[kind] / rows == pytest.approx(share, abs=0.05)


def test_what_is_read_does_not_change_the_other_rows(tiny_model: Path) -> None:
    with_it, without = task_of(tiny_model), task_of(tiny_model, reading_ratio=0.0)
    for step in range(3):
        one, other = with_it.batch(step), without.batch(step)
        assert one.pairs == other.pairs
        assert one.with_reasoning == other.with_reasoning
        assert set(one.parts) - set(other.parts) == {"reading"}
        for part in ("document", "query"):
            assert one.parts[part] == other.parts[part]
    assert without.checkpoint.contract == checkpoints.load_base(tiny_model, dtype=torch.float32).contract


def test_the_rows_are_the_turns_that_a_search_embeds(tiny_model: Path) -> None:
    task = task_of(tiny_model, **ALL, reading_reasoning_ratio=1.0)
    model = SearchR3(task.checkpoint)
    batch = task.batch(0)
    pairs = [batch.pairs[i] for i in batch.with_passages]
    turns = reading_turns(model, [p.query for p in pairs], [p.passages[:3] for p in pairs])
    template = model.templates["reading"]
    assert batch.parts["reading"].rows == [[*turn.ids, *template.suffix] for turn in turns]
    assert batch.parts["reading"].prefix == template.prefix
    reasoned = [batch.pairs[i] for i in batch.with_reasoning]
    turns = reading_turns(model, [p.query for p in reasoned], [p.passages[:3] for p in reasoned])
    suffix = model.templates["reasoning"].suffix
    for turn, row in zip(turns, batch.parts["reasoning"].rows, strict=True):
        assert row[: len(turn.ids) + len(suffix)] == [*turn.ids, *suffix]


def test_the_loss_has_the_reading_rows_in_every_term(tiny_model: Path) -> None:
    task = task_of(tiny_model, reasoning_ratio=0.0)
    batch = task.batch(0)
    loss, metrics = task.compute_loss(task.module, batch)
    assert metrics["rows_reading"] == len(batch.with_passages) == 7
    assert metrics["infonce"] == pytest.approx((8 * metrics["infonce_query"] + 7 * metrics["infonce_reading"]) / 15)
    assert 0 <= metrics["accuracy_reading"] <= 1
    loss.backward()
    without = task_of(tiny_model, reading_ratio=0.0)
    assert "rows_reading" not in without.compute_loss(without.module, without.batch(0))[1]


def test_the_model_reasons_for_itself_after_what_it_reads(tiny_model: Path) -> None:
    task = task_of(
        tiny_model, self_reasoning_ratio=1.0, self_reasoning_start_step=0, max_reasoning_tokens=4,
        reading_reasoning_ratio=0.5, self_reasoning_refresh_steps=1,
    )  # fmt: skip
    batch = task.batch(0)
    wanted = dict(task.collator._self_reasoning_queries(0))
    reading = {name for name, text in wanted.items() if isinstance(text, ReadingTurn)}
    assert 0 < len(reading) < len(wanted) == len(batch.with_reasoning)
    own = task.collator.self_reasoning
    assert set(own.texts) == set(wanted)
    reasoned = task._encoder().reason(list(wanted.values()), max_reasoning_tokens=4, temperature=0.7,
                                      seed=[own._seed_of(name, 0) for name in wanted])  # fmt: skip
    assert [one.text for one in reasoned] == list(own.texts.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reading_ratio": 1.5}, "reading_ratio must be from 0 to 1"),
        ({"reading_passages": 0}, "reading_passages must be 1 or more"),
        ({"reading_passages": 11}, "reading_passages must be at most 10"),
        ({"reading_passage_tokens": 0}, "reading_passage_tokens must be 1 or more"),
        ({"reading_dropped": 0.6, "reading_shuffled": 0.5}, "must be at most 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(**changes)


def test_pairs_without_passages_are_refused(tiny_model: Path) -> None:
    pairs = [replace(pair, passages=()) for pair in some_pairs()]
    with pytest.raises(InputError, match="no pair has passages; search-r3 data read adds them"):
        SFTTask(config_of(), checkpoints.load_base(tiny_model, dtype=torch.float32), pairs)


def test_a_trained_adapter_reads_and_a_killed_run_goes_on_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "pairs.jsonl", some_pairs())
    recipe = {
        "pairs": [str(tmp_path / "pairs.jsonl")], "base": str(tiny_model), "global_batch_size": 4, "dev": [],
        "reading_ratio": 0.8, "reading_passages": 2, "reading_passage_tokens": 6, "lora": {"rank": 4},
        "loop": {"steps": 4, "learning_rate": 0.01, "warmup_steps": 1, "checkpoint_every": 2, "evaluate_every": 0,
                 "mixed_precision": "no"},
    }  # fmt: skip
    paths = {name: tmp_path / f"{name}.yaml" for name in ("whole", "killed")}
    for name, path in paths.items():
        path.write_text(json.dumps(recipe | {"output": str(tmp_path / name)}))
    folder, original = train_sft(paths["whole"]), SFTTask.batch

    def dying(self: SFTTask, step: int) -> Any:
        if step == 3:
            raise RuntimeError("killed")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTask, "batch", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train_sft(paths["killed"])
    again = train_sft(paths["killed"])
    files = [(place / checkpoints.ADAPTER_FILE).read_bytes() for place in (folder, again)]
    assert files[0] == files[1]
    model = SearchR3.from_pretrained(folder, device="cpu")
    assert model.reading is not None
    assert (model.reading.passages, model.reading.passage_tokens) == (2, 6)
    assert model.encode_query(["what is beta"], passages=[["beta is a letter"]], reasoning=False).shape == (1, 32)
