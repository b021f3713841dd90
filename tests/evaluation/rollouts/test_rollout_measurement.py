"""`search-r3 rollouts` with tiny random models: metrics from the model's own fresh corpus, and nothing done twice."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.rollouts import rollout_measurement
from search_r3.evaluation.rollouts.reasoning_rewards import METRICS, rewards_markdown, score_embeddings
from search_r3.evaluation.rollouts.rollout_measurement import RolloutConfig, load_part, measure_rollouts
from search_r3.evaluation.suite import evaluate
from search_r3.model.engines.torch_engine import TorchEngine

TOPICS = ("aspirin", "bread", "moon", "python", "Paris", "tides", "yeast", "heart", "sea", "list", "mean", "file")
CONFIG = RolloutConfig(samples=3, budget=5, temperature=1.0, k=10, seed=0, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def emits() -> Iterator[None]:
    """Random models hardly ever write the embed token: here sampling takes it in three of ten steps."""
    choose = TorchEngine._choose

    def often(self: TorchEngine, state_BD: torch.Tensor, temperature: float, generator: torch.Generator) -> Any:
        chosen_B = choose(self, state_BD, temperature, generator)
        emit_B = torch.rand(len(chosen_B), generator=generator) < (0.3 if temperature else 0.0)
        return torch.where(emit_B, self.embed_id, chosen_B)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "_choose", often)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scifact's layout in small: train claims 1 to 24, of which 8, 16 and 24 are dev, and test claims 25 to 32."""
    rng = np.random.default_rng(0)
    corpus = {f"d{i}": Document(f"d{i}", "", " ".join(rng.choice(TOPICS, 6))) for i in range(36)}
    corpus["blank"] = Document("blank", "", " ")
    queries = {str(i): "what of " + " ".join(corpus[f"d{i}"].text.split()[:2]) for i in range(1, 33)}
    qrels = {qid: {f"d{qid}": 1, f"d{(int(qid) + 3) % 36}": 0} for qid in queries}
    qrels["16"]["blank"] = 1
    folder = tmp_path_factory.mktemp("data")
    for split, numbers in (("train", range(1, 25)), ("test", range(25, 33))):
        part = {str(i): qrels[str(i)] for i in numbers}
        write_beir(folder / "scifact", BeirDataset("scifact", corpus, queries, part), split)
    return folder


def run(
    place: Path, root: Path, before: Path, after: Path | None = None, split: str = "dev", **options: Any
) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_length": 16, "show_progress": False, "cache": EmbeddingCache(place / "embeddings")}
    names = f"before={before}", None if after is None else f"after={after}"
    given = settings | {"config": CONFIG} | options
    return measure_rollouts("scifact", split, *names, place / "results", data_root=root, device="cpu", **given)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, root: Path, tiny_model: Path, other_tiny_model: Path
) -> tuple[Path, dict]:
    place = tmp_path_factory.mktemp("rollouts")
    return place, run(place, root, tiny_model, other_tiny_model)


def lines(place: Path, name: str, part: str = "scifact.dev") -> list[dict[str, Any]]:
    with gzip.open(place / f"results/rollouts/{part}/{name}.rollouts.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """How many texts each call of a SearchR3 method was given from now on."""
    calls: list[int] = []
    method = getattr(SearchR3, name)

    def counting(self: SearchR3, texts: list[str], *given: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return method(self, texts, *given, **options)

    monkeypatch.setattr(SearchR3, name, counting)
    return calls


def test_dev_of_scifact_is_the_claims_held_out_and_a_cut_part_says_so_in_its_name(root: Path) -> None:
    dev, name = load_part("scifact", "dev", root)
    assert (list(dev.queries), len(dev.corpus), name) == (["8", "16", "24"], 37, "scifact.dev")
    test, name = load_part("scifact", "test", root)
    assert (len(test.queries), name) == (8, "scifact.test")
    part, name = load_part("scifact", "test", root, queries=5, documents=20)
    assert (len(part.queries), len(part.corpus), name) == (5, 20, "scifact.test.5q.20d")
    assert {did for judged in part.qrels.values() for did in judged} <= part.corpus.keys()
    assert load_part("scifact", "test", root, queries=8, documents=99)[1] == "scifact.test"


def test_a_rollouts_rewards_and_rank_are_those_of_the_embedding_after_its_reasoning(
    whole: tuple[Path, dict], root: Path, other_tiny_model: Path
) -> None:
    place, found = whole
    data, _ = load_part("scifact", "dev", root)
    model = SearchR3.from_pretrained(other_tiny_model, device="cpu")
    texts = {did: document.full_text for did, document in data.corpus.items() if document.full_text.strip()}
    documents = model.encode_document(list(texts.values()), max_length=16)
    row = {did: i for i, did in enumerate(texts)}
    sampled = model.reason(
        list(data.queries.values()), max_reasoning_tokens=5, temperature=1.0, seed=0, samples=3, batch_size=8
    )
    grades = [{row[did]: grade for did, grade in data.qrels[qid].items() if did in row} for qid in data.queries]
    behind = np.stack([r.embedding for r in sampled])
    scored = score_embeddings(behind, np.repeat(range(3), 3), grades, documents, unfindable_Q=[[], [1], []])
    written = [line for line in lines(place, "after") if line["kind"] == "sampled"]
    assert [line["text"] for line in written] == [r.text for r in sampled]
    assert [line["forced"] for line in written] == [r.forced for r in sampled]
    assert [line["rank"] for line in written] == scored.rank_R.tolist()
    for name in ("dcg_scaled", "dcg"):
        assert [line[name] for line in written] == pytest.approx(scored.rewards[name], abs=1e-5)
        mean = found["after"]["figures"][f"sampled.{name}"]["mean"]
        assert mean == pytest.approx(scored.rewards[name].mean(), abs=1e-5)
    assert found["after"]["mean_tokens"]["sampled"] == np.mean([r.num_tokens for r in sampled])


def test_greedy_and_direct_stand_beside_the_samples(whole: tuple[Path, dict], root: Path, tiny_model: Path) -> None:
    place, found = whole
    kinds = [line["kind"] for line in lines(place, "before") if line["qid"] == "8"]
    assert kinds == ["sampled"] * 3 + ["greedy", "direct"]
    evaluated = evaluate(
        ["scifact"], [f"x={tiny_model}"], place / "check", "test", max_length=16, max_reasoning_tokens=5,
        data_root=root, cache=EmbeddingCache(place / "embeddings"), device="cpu", show_progress=False,
    )  # fmt: skip
    ndcg = {record["system"]: record["measures"]["nDCG@10"] for record in evaluated}
    side = run(place, root, tiny_model, split="test")
    assert side["figures"]["direct.dcg"]["mean"] == pytest.approx(ndcg["x.off"], abs=1e-5)
    assert side["figures"]["greedy.dcg"]["mean"] == pytest.approx(ndcg["x.on"], abs=1e-5)
    assert found["before"]["per_query"].keys() >= set(METRICS)


def test_the_comparison_file_holds_both_sides_differences_examples_and_provenance(whole: tuple[Path, dict]) -> None:
    place, found = whole
    path = place / "results/rollouts/scifact.dev/before--after.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert {"command", "commit", "seed", "versions", "hardware", "settings"} <= found.keys()
    assert str(place) not in path.read_text()
    for name in METRICS:
        before, after = (np.array(found[side]["per_query"][name]) for side in ("before", "after"))
        assert found["differences"][name] == pytest.approx(after - before, abs=1e-6)
        assert found["comparisons"][name]["difference"] == pytest.approx((after - before).mean(), abs=1e-5)
    best = found["examples"]["best"] + found["examples"]["worst"]
    assert best
    for example in best:
        assert example["query"].startswith("what of")
        assert [line["kind"] for line in example["after"]] == ["sampled"] * 3 + ["greedy", "direct"]
    shown = rewards_markdown(found)
    assert "before: mean" in shown
    assert f"{found['comparisons']['sampled.dcg']['difference']:+.4f}" in shown
    single = json.loads((place / "results/rollouts/scifact.dev/before.json").read_text())
    sampled = [line for line in lines(place, "before") if line["kind"] == "sampled"]
    assert {line["forced"] for line in sampled} == {True, False}
    for name, pick in (("best", max), ("worst", min)):
        paid = [-0.5 if line["forced"] else line["dcg_scaled"] for line in single["examples"][name]]
        assert paid[0] == pick(-0.5 if line["forced"] else line["dcg_scaled"] for line in sampled)
        assert len({line["qid"] for line in single["examples"][name]}) == 3


@pytest.mark.nightly
def test_a_model_against_itself_differs_nowhere(root: Path, tiny_model: Path, tmp_path: Path) -> None:
    found = run(tmp_path, root, tiny_model, tiny_model)
    for name in METRICS:
        assert set(found["differences"][name]) == {0.0}
        assert (found["comparisons"][name]["low"], found["comparisons"][name]["p"]) == (0.0, 1.0)


@pytest.mark.nightly
def test_a_finished_side_is_not_done_again_after_an_interruption(
    root: Path, tiny_model: Path, other_tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = rollout_measurement._measure

    def interrupted(*given: Any) -> Any:
        if given[3] == "after":
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(rollout_measurement, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, root, tiny_model, other_tiny_model)
    monkeypatch.setattr(rollout_measurement, "_measure", measure)
    calls = count_calls(monkeypatch, "reason")
    said: list[str] = []
    first = run(tmp_path, root, tiny_model, other_tiny_model, report=said.append)
    assert calls == [3, 3]  # the other side's greedy and sampled traces, and no more
    assert [line for line in said if "already there" in line] == [line for line in said if "before: " in line]
    again = run(tmp_path, root, tiny_model, other_tiny_model)
    assert calls == [3, 3]
    assert again["differences"] == first["differences"]
    other = run(tmp_path, root, tiny_model, config=RolloutConfig(samples=2, budget=5, batch_size=8))
    assert calls == [3, 3, 3, 3]
    assert other["settings"]["samples"] == 2
    path = tmp_path / "results/rollouts/scifact.dev/before.rollouts.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-3])  # damaged: the figures' witnesses are gone
    run(tmp_path, root, tiny_model, config=RolloutConfig(samples=2, budget=5, batch_size=8))
    assert calls == [3] * 6


def test_a_corpus_that_an_evaluation_encoded_is_not_encoded_again(
    root: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EmbeddingCache(tmp_path / "embeddings")
    settings: dict[str, Any] = {"max_length": 16, "device": "cpu", "show_progress": False, "cache": cache}
    evaluate(["scifact"], [str(tiny_model)], tmp_path, "test", modes=["off"], data_root=root, **settings)
    calls = count_calls(monkeypatch, "encode_document")
    run(tmp_path, root, tiny_model)
    assert calls == []
    run(tmp_path, root, tiny_model, max_length=8)
    assert sum(calls) == 36


def test_the_command_prints_a_table_or_json(
    root: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    command = ["rollouts", "--dataset", "scifact", "--before", f"mine={tiny_model}", "--samples", "2", "--budget", "3"]
    command += ["--documents", "20", "--data", str(root), "--output", str(tmp_path), "--device", "cpu"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "scifact.dev.20d: 3 queries, 20 documents" in shown.out
    assert "| penalized.dcg_scaled |" in shown.out
    assert "6 reasoning traces" in shown.err
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["system"] == "mine"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--before", "bm25"], "bm25 writes no reasoning"),
        (["--before", "nowhere/adapter"], "nowhere/adapter"),
        (["--before", "a--b=MODEL"], "called a--b, but --"),
        (["--after", "MODEL"], "are both called"),
        (["--split", "validation"], "no split 'validation'; it has: test, train"),
        (["--dataset", "scifcat"], 'did you mean "scifact"?'),
        (["--documents", "many"], "--documents many: expected a whole number from 1, or all"),
        (["--temperature", "0"], "temperature is 0.0; expected a sampling temperature above 0"),
        (["--samples", "0"], "--samples"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_written(
    change: list[str], expected: str, root: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--dataset": "scifact", "--before": str(tiny_model), "--data": str(root), "--output": str(tmp_path)}
    options |= {change[0]: change[1].replace("MODEL", str(tiny_model))}
    assert main(["rollouts", *(part for pair in options.items() for part in pair)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert expected in told[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [{"samples": 0}, {"budget": -1}, {"temperature": float("nan")}, {"k": 0}, {"seed": -1}, {"batch_size": 0}]
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        RolloutConfig(**bad)
