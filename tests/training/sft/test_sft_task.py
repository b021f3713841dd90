from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nightly import nightly

from search_r3 import SearchR3
from search_r3.data.mining.teacher import write_teacher_rows
from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.query_normalizer import QueryNormalizer
from search_r3.model.spelling import SpellingCorrector
from search_r3.model.truecasing import Truecaser
from search_r3.training import dev_evaluation
from search_r3.training.config import RENAMED_KEYS, LoopConfig, LoraSettings
from search_r3.training.sft.batch_sampler import BatchSampler
from search_r3.training.sft.contrastive import Candidates, document_key
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask, train_sft

DEV_FIGURES = ("off", "off_se", "on", "on_se", "emission", "tokens", "median_tokens", "distinct", "uniformity",
               "alignment")  # fmt: skip
WORDS = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"),
    *("iota", "kappa", "lamda", "mu", "nu", "xi", "omicron", "pi"),
]


def some_pairs(n: int = 16) -> list[TrainingPair]:
    return [
        TrainingPair(
            id=f"p{i}",
            query=f"what is {WORDS[i % 16]} {i // 16}",
            positive=f"{WORDS[i % 16]} {i // 16} is the letter number {i}",
            negatives=(f"{WORDS[(i + 1) % 16]} is another letter",),
            reasoning=f"letter {WORDS[i % 16]}" if i % 2 else None,
            source="greek" if i % 16 < 8 else "more greek",
        )
        for i in range(n)
    ]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        write_pairs(tmp_path / "pairs.jsonl", some_pairs())
        values = {
            "pairs": [str(tmp_path / "pairs.jsonl")],
            "output": str(tmp_path / "run"),
            "base": str(tiny_model),
            "global_batch_size": 4,
            "reasoning_ratio": 0.9,
            "dev": [],
            "lora": {"rank": 4},
            "weights": {"sft": 0.1, "kl": 0.1, "infonce": 1.0, "triplet": 0.1},
            "loop": {
                "steps": 6,
                "learning_rate": 0.01,
                "warmup_steps": 1,
                "checkpoint_every": 2,
                "evaluate_every": 0,
                "mixed_precision": "no",
            },
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(values | changes))
        return path

    return write


def task_of(tiny_model: Path, pairs: list[TrainingPair], **changes: Any) -> SFTTask:
    settings: dict[str, Any] = {
        "pairs": ["-"],
        "output": "-",
        "global_batch_size": 4,
        "dev": [],
        "reasoning_ratio": 1.0,
    }
    config = SFTConfig(**settings | {"lora": LoraSettings(rank=4), "loop": LoopConfig(seed=3)} | changes)
    return SFTTask(config, checkpoints.load_base(tiny_model, dtype=torch.float32), pairs)


def losses(run: Path) -> list[tuple[int, float, dict[str, float]]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["terms"]) for r in records if "loss" in r]


@pytest.mark.slow
def test_training_lowers_the_terms_and_gives_an_adapter_that_loads(recipe: Callable[..., Path], tmp_path: Path) -> None:
    loop = {"steps": 150, "learning_rate": 0.02, "warmup_steps": 5, "evaluate_every": 0, "mixed_precision": "no"}
    folder = train_sft(recipe(loop=loop, reasoning_ratio=1.0))
    curve = losses(tmp_path / "run")
    first, last = curve[:5], curve[-5:]
    for term in ("infonce", "sft"):
        before, after = (sum(terms[term] for *_, terms in part) / 5 for part in (first, last))
        assert after < 0.7 * before, term
    model = SearchR3.from_pretrained(folder, device="cpu")
    distance = model.check_golden()
    assert distance is not None
    assert distance < 1e-5
    assert model.contract.adapter_weights
    assert not model.reason(["what is beta 0"])[0].forced  # it has learned to end with the token


@pytest.mark.parametrize("killed_at", [3, *nightly(1, 2, 5)])
def test_a_killed_run_goes_on_with_the_same_curve(
    killed_at: int, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_sft(recipe(output=str(tmp_path / "whole")))
    original = SFTTask.batch

    def dying(self: SFTTask, step: int) -> Any:
        if step == killed_at:
            raise RuntimeError("killed")
        return original(self, step)

    path = recipe(output=str(tmp_path / "killed"))
    monkeypatch.setattr(SFTTask, "batch", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train_sft(path)
    monkeypatch.setattr(SFTTask, "batch", original)
    train_sft(path)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    files = [(tmp_path / run / "adapter" / checkpoints.ADAPTER_FILE).read_bytes() for run in ("killed", "whole")]
    assert files[0] == files[1]


def test_a_run_folder_with_the_keys_of_an_earlier_version_resumes(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"cross_batch_memory_size": 6, "self_reasoning_ratio": 0.5, "self_reasoning_start_step": 1}
    train_sft(recipe(output=str(tmp_path / "whole"), **changes))
    path, run = recipe(output=str(tmp_path / "run"), **changes), tmp_path / "run"
    original = SFTTask.batch

    def dying(self: SFTTask, step: int) -> Any:
        if step == 5:
            raise RuntimeError("killed")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTask, "batch", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train_sft(path)
    old = {new: name for cls in ("SFTConfig", "LossWeights") for name, new in RENAMED_KEYS[cls].items()}
    settings = json.loads((run / "config.json").read_text())
    settings["weights"] = {old.get(key, key): value for key, value in settings["weights"].items()}
    (run / "config.json").write_text(json.dumps({old.get(key, key): value for key, value in settings.items()}))
    for state in run.glob("checkpoints/step-*/state.json"):
        facts = json.loads(state.read_text())
        task = {"own": facts["task"]["self_reasoning"], "memory": facts["task"]["cross_batch_memory"]}
        facts |= {"format": 1, "task": task, "fruitless": facts.pop("evals_without_improvement")}
        state.write_text(json.dumps(facts))
    train_sft(path)
    assert losses(run) == losses(tmp_path / "whole")
    assert "batch_sampler" in json.loads((run / "config.json").read_text())
    with pytest.raises(InputError, match='the key "memory" is now called cross_batch_memory_size; rename it'):
        train_sft(path, ["memory=7"])


def test_a_batch_follows_from_the_step_alone(tiny_model: Path) -> None:
    task, again = (task_of(tiny_model, some_pairs(), reasoning_ratio=0.5) for _ in range(2))
    again.batch(7)
    for step in (0, 3, 11):
        assert task.batch(step) == again.batch(step)
    assert task.batch(0) != task.batch(1)


def test_every_epoch_gives_each_pair_at_most_once_and_batches_of_one_source() -> None:
    sampler = BatchSampler(some_pairs(), 4, seed=0, one_source=True)
    for epoch in range(3):
        batches = [sampler.batch(epoch * sampler.per_epoch + i) for i in range(sampler.per_epoch)]
        assert all(len({pair.source for pair in batch}) == 1 for batch in batches)
        seen = [pair.id for batch in batches for pair in batch]
        assert len(seen) == len(set(seen)) == 16
    assert sampler.batch(0) != sampler.batch(sampler.per_epoch)


def test_rows_end_with_the_embed_token_and_reasoning_stands_before_it(tiny_model: Path) -> None:
    task = task_of(tiny_model, some_pairs())
    batch = task.batch(0)
    embed = task.checkpoint.contract.embed_token_id
    assert all(row[-1] == embed and row.count(embed) == 1 for part in batch.parts.values() for row in part.rows)
    written = task.collator.tokenizer.decode(batch.parts["reasoning"].rows[0])
    assert f"{batch.pairs[batch.with_reasoning[0]].reasoning}<|embed_token|>" in written
    part = batch.parts["query"]
    said = [row[len(row) - n :] for row, n in zip(part.rows, part.num_target_tokens, strict=True)]
    assert all(task.collator.tokenizer.decode(tokens) == "The embedding is<|embed_token|>" for tokens in said)


def test_a_document_that_answers_two_queries_is_no_negative(tiny_model: Path) -> None:
    pairs = some_pairs(4)
    twin = TrainingPair("twin", query=pairs[0].query, positive=pairs[1].positive, source="greek")
    pairs = [pairs[0], pairs[1], twin, pairs[3]]
    task = task_of(tiny_model, pairs, batch_sampler="any")
    keys = np.array([document_key(pair.positive) for pair in pairs])
    candidates = Candidates(torch.zeros(4, 2), keys)
    mask = candidates.false_negatives([task.answers[pair.query] for pair in pairs], [0, 1, 2, 3])
    assert mask.int().tolist() == [
        [0, 1, 1, 0],  # the twin's document answers the first query as well, wherever it stands
        [0, 0, 1, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_explicit_negatives_join_the_documents(tiny_model: Path) -> None:
    batch = task_of(tiny_model, some_pairs(), negatives_per_pair=1).batch(0)
    assert len(batch.documents) == 8
    assert batch.documents[4:] == [pair.negatives[0] for pair in batch.pairs]


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny_model: Path) -> None:
    weights = LossWeights(sft=0.3, kl=0.2, infonce=0.7, triplet=0.5)
    task = task_of(tiny_model, some_pairs(), weights=weights)
    loss, figures = task.compute_loss(task.module, task.batch(0))
    expected = sum(getattr(weights, name) * figures[name] for name in ("sft", "kl", "infonce", "triplet"))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert figures["kl"] == pytest.approx(0, abs=1e-5)  # an untrained adapter is the base


def teacher_of(path: Path, pairs: list[TrainingPair]) -> str:
    """Rows that a teacher might give: one-hot by letter, so that it knows which documents are alike."""

    class Teacher:
        name, identity = "letters", {"retriever": "test"}

        def encode_query(self, texts: list[str]) -> np.ndarray:
            return np.stack([[float(word in text.split()) for word in WORDS] for text in texts]).astype(np.float32)

        encode_document = encode_query

    source = path / "taught.jsonl"
    write_pairs(source, pairs)
    write_teacher_rows([source], path / "taught.rows.safetensors", Teacher())
    return str(path / "taught.rows.safetensors")


def test_a_teacher_pulls_the_scores_to_its_own(tiny_model: Path, tmp_path: Path) -> None:
    pairs = some_pairs()
    weights = LossWeights(sft=0, kl=0, infonce=0, triplet=0, distillation=1.0)
    task = task_of(tiny_model, pairs, weights=weights, teacher=teacher_of(tmp_path, pairs), reasoning_ratio=0.0)
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    curve = []
    for step in range(30):
        loss, figures = task.compute_loss(task.module, task.batch(step))
        assert loss.item() == pytest.approx(figures["distillation"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(figures["distillation"])
    assert np.mean(curve[-5:]) < 0.5 * np.mean(curve[:5])


def test_self_generated_reasoning_is_that_of_the_model_at_the_start_of_its_block(tiny_model: Path) -> None:
    task = task_of(
        tiny_model,
        some_pairs(),
        self_reasoning_ratio=1.0,
        self_reasoning_start_step=2,
        self_reasoning_refresh_steps=3,
        self_reasoning_temperature=0.0,
    )
    before = task.batch(1)
    assert not any(before.self_generated)
    batch = task.batch(2)
    assert len(batch.self_generated) == len(batch.with_reasoning) == 4  # pairs without reasoning have the model's own
    assert all(batch.self_generated)
    queries = [batch.pairs[i].query for i in batch.with_reasoning]
    said = [r.text for r in task._encoder().reason(queries, max_reasoning_tokens=32)]
    assert [task.collator.self_reasoning.texts[batch.pairs[i].id] for i in batch.with_reasoning] == said
    cut = [int(batch.pairs[i].id in task.collator.self_reasoning.cut) for i in batch.with_reasoning]
    # Of its own words only the end is taught, where the budget cut them.
    assert batch.parts["reasoning"].num_target_tokens == cut
    assert any(cut)
    task.collator.self_reasoning.cut.clear()
    assert task.batch(2).parts["reasoning"].num_target_tokens == [0] * 4
    with torch.no_grad():
        for parameter in task.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert task.batch(4) == task.batch(4)
    assert task.collator.self_reasoning.block == 0
    task.batch(5)
    assert task.collator.self_reasoning.block == 1
    assert [r.text for r in task._encoder().reason(queries, max_reasoning_tokens=32)] != said


@pytest.mark.parametrize("killed_at", [3, *nightly(5)])
def test_a_run_with_self_generated_reasoning_and_a_memory_resumes_exactly(
    killed_at: int, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"sft": 0.1, "kl": 0.0, "infonce": 1.0, "distillation": 0.5}
    changes = {
        "self_reasoning_ratio": 0.7,
        "self_reasoning_start_step": 1,
        "self_reasoning_refresh_steps": 3,
        "cross_batch_memory_size": 6,
        "weights": weights,
        "teacher": teacher_of(tmp_path, some_pairs()),
        "matryoshka": [8, 4],
    }
    train_sft(recipe(output=str(tmp_path / "whole"), **changes))
    original = SFTTask.batch

    def dying(self: SFTTask, step: int) -> Any:
        if step == killed_at:
            raise RuntimeError("killed")
        return original(self, step)

    path = recipe(output=str(tmp_path / "killed"), **changes)
    monkeypatch.setattr(SFTTask, "batch", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train_sft(path)
    monkeypatch.setattr(SFTTask, "batch", original)
    train_sft(path)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    record = json.loads((tmp_path / "killed" / "adapter" / checkpoints.CONTRACT_FILE).read_text())
    assert record["dimensions"] == [4, 8]  # what embeddings may be cut at


def test_remembered_documents_are_negatives_unless_they_answer(tiny_model: Path) -> None:
    task = task_of(tiny_model, some_pairs(), cross_batch_memory_size=6, reasoning_ratio=0.0)
    for step in range(3):
        task.compute_loss(task.module, task.batch(step))
    assert [len(part.key_M) for part in task.memory.steps] == [4, 4]  # 8 are more than 6, 4 would be fewer
    batch = task.batch(3)
    own = Candidates(torch.zeros(4, task.checkpoint.contract.dimension), np.zeros(4, dtype=np.int64))
    extended = task.memory.extend(own)
    assert len(extended.key_M) == 12
    answer = extended.key_M[7]
    mask = extended.false_negatives([{int(answer)}] * len(batch.pairs), [0, 1, 2, 3])
    assert mask[:, 7].all()
    assert mask.sum() == 4


def test_a_prefilled_memory_holds_documents_of_the_pairs_from_the_first_step(tiny_model: Path) -> None:
    pairs = some_pairs()
    task = task_of(tiny_model, pairs, cross_batch_memory_size=6, cross_batch_memory_prefill=True, reasoning_ratio=0.0)
    task.compute_loss(task.module, task.batch(0))
    *filled, step = task.memory.steps
    keys = {document_key(text): text for pair in pairs for text in pair.relevant}
    stored = np.concatenate([part.key_M for part in filled])
    assert len(step.key_M) == 4
    assert set(stored) <= set(keys)
    expected = task._encoder().encode_document([keys[int(key)] for key in stored], max_length=128)
    assert torch.allclose(torch.cat([part.embedding_MD for part in filled]), torch.from_numpy(expected), atol=1e-5)
    with pytest.raises(InputError, match="set cross_batch_memory_size above 0"):
        task_of(tiny_model, pairs, cross_batch_memory_prefill=True)


def test_figures_have_the_same_names_with_and_without_reasoning(tiny_model: Path) -> None:
    task = task_of(tiny_model, some_pairs())
    quiet = task_of(tiny_model, some_pairs(), reasoning_ratio=0.0)
    assert (
        task.compute_loss(task.module, task.batch(0))[1].keys()
        == quiet.compute_loss(quiet.module, quiet.batch(0))[1].keys()
    )


def test_a_run_from_an_adapter_starts_where_that_ended(recipe: Callable[..., Path], tmp_path: Path) -> None:
    first = train_sft(recipe())
    second = train_sft(recipe(output=str(tmp_path / "second"), init_adapter=str(first)))
    assert losses(tmp_path / "second")[0][1] < losses(tmp_path / "run")[0][1]
    assert SearchR3.from_pretrained(second, device="cpu").contract_hash != SearchR3.from_pretrained(first).contract_hash


def test_a_run_has_the_query_normalizer_of_its_recipe_and_goes_on_with_no_other(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    words = tmp_path / "words.json"
    QueryNormalizer(Truecaser({}, {}, {}), SpellingCorrector(["hungary"])).save(words)
    path = recipe(query_normalizer=str(words))
    model = SearchR3.from_pretrained(train_sft(path), device="cpu")
    assert model.normalize_query("in hunfary") == "In hungary"
    QueryNormalizer(Truecaser({}, {}, {}), SpellingCorrector(["hunter"])).save(words)
    with pytest.raises(InputError, match="query_normalizer_sha256"):
        train_sft(path)


def test_dev_metrics_are_of_the_weights_of_the_moment(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from search_r3.data.beir import BeirDataset, Document

    corpus = {p.id: Document(p.id, "", p.positive) for p in some_pairs()}
    pool = BeirDataset("greek", corpus, {p.id: p.query for p in some_pairs()}, {p.id: {p.id: 1} for p in some_pairs()})
    monkeypatch.setattr(dev_evaluation, "dev_pool", lambda *_: pool)
    task = task_of(tiny_model, some_pairs(), dev=["greek"])
    before = task.evaluate(task.module, 0)
    means = {f"ndcg@10.{mode}{end}" for mode in ("off", "on") for end in ("", "_se")}
    assert set(before) == {f"greek.{n}" for n in DEV_FIGURES} | means
    assert 0 < before["ndcg@10.off_se"] == before["greek.off_se"] < 0.5
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    for step in range(30):
        task.compute_loss(task.module, task.batch(step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.evaluate(task.module, 30)["ndcg@10.off"] > before["ndcg@10.off"] + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 1}, "InfoNCE needs negatives"),
        ({"temperature": 0}, "temperature"),
        ({"reasoning_ratio": 2}, "reasoning_ratio"),
        ({"attention": "flash"}, "attention"),
        ({"pairs": []}, "pairs is empty"),
        ({"weights": {"distillation": 1}}, "needs a teacher"),
        ({"teacher": "none.rows.safetensors", "weights": {"distillation": 1}}, "not a file of teacher rows"),
        ({"matryoshka": [4096]}, "dimensions, not more"),
        ({"self_reasoning_ratio": 2}, "self_reasoning_ratio"),
        ({"global_batch_size": 64}, "too few for a batch of 64"),
        ({"weights": {"kl": -1}}, "kl must be 0 or more"),
        ({"base": "no-such-model"}, "no model 'no-such-model'"),
        ({"temprature": 0.1}, "did you mean"),
        ({"query_normalizer": "none.json"}, r"none\.json is not a query normalizer"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(changes: dict[str, Any], message: str, recipe: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=message):
        train_sft(recipe(**changes))
