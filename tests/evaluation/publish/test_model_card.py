from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from search_r3.config import to_dict
from search_r3.errors import InputError
from search_r3.evaluation.publish.model_card import card, keep_run, write_card
from search_r3.evaluation.rollouts.reasoning_rewards import METRICS
from search_r3.model.query_normalizer import QUERY_NORMALIZER_FILE, QueryNormalizer
from search_r3.model.spelling import SpellingCorrector
from search_r3.model.truecasing import Truecaser
from search_r3.prompts import render
from search_r3.training.grpo.grpo_config import GRPOConfig, QuerySet, Source


@pytest.fixture
def run(trained_run: Path) -> Path:
    return trained_run


def test_the_card_says_what_the_run_and_the_results_say(run: Path, adapter: Path, tmp_path: Path) -> None:
    keep_run(run, tmp_path / "kept", [tmp_path / "manifest.json"], "search-r3 train sft configs/x.yaml")
    written = write_card(adapter, tmp_path / "kept", tmp_path / "results").read_text()
    assert written.startswith("---\nlicense: apache-2.0\n")
    for said in (
        "search-r3 train sft configs/x.yaml",
        "7 steps of 8 pairs (2.5 million tokens) in 1.00 hours",
        "cosqa.dev.off 0.125",
        "1.5 MB",
        "1,234 titles of scifact",
        "Not evaluated yet",
        "without the KL term",
    ):
        assert said in written, said


def test_the_card_tells_of_a_query_normalizer(run: Path, adapter: Path, tmp_path: Path) -> None:
    keep_run(run, tmp_path / "kept", [tmp_path / "manifest.json"], "x")
    assert "query normalizer" not in card(adapter, tmp_path / "kept", tmp_path / "results")
    record = json.loads((adapter / "search_r3.json").read_text())
    normalizer = QueryNormalizer(Truecaser({}, {}, {}), SpellingCorrector(["word"]), ["scifact", "words of names.txt"])
    normalizer.save(adapter / QUERY_NORMALIZER_FILE)
    record["contract"]["query_normalizer"] = normalizer.hash
    (adapter / "search_r3.json").write_text(json.dumps(record))
    text = card(adapter, tmp_path / "kept", tmp_path / "results")
    assert "Queries first go through its query normalizer" in text
    assert "The known words are those of scifact, words of names.txt." in text


def test_the_card_names_the_terms_of_what_it_was_trained_on(run: Path, adapter: Path, tmp_path: Path) -> None:
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    keep_run(run, tmp_path / "kept", [tmp_path / "manifest.json"], "x")
    assert "academic use" not in card(adapter, tmp_path / "kept", tmp_path / "results")
    source = manifest["sources"][0] | {"dataset": "nfcorpus"}
    (tmp_path / "kept" / "pairs.manifest.json").write_text(json.dumps(manifest | {"sources": [source]}))
    written = card(adapter, tmp_path / "kept", tmp_path / "results")
    assert "nfcorpus, which it was trained on, is free for academic use" in written


def test_the_card_shows_what_was_compared_on_dev(run: Path, adapter: Path, tmp_path: Path) -> None:
    keep_run(run, tmp_path / "kept", [tmp_path / "manifest.json"], "x")
    assert "## Candidates" not in card(adapter, tmp_path / "kept", tmp_path / "results")
    rows = {
        "seed-0.off": {"ndcg@10": {"cosqa.dev.9.80": 0.5}, "mean": 0.5, "difference": 0.0, "p": 1.0},
        "average.off": {"ndcg@10": {"cosqa.dev.9.80": 0.625}, "mean": 0.625, "difference": 0.125, "p": 0.03},
    }
    figures = {"mode": "off", "max_length": 96, "queries": {"cosqa.dev.9.80": 9}, "systems": rows}
    record = {"command": "python benchmarks/dev_sets.py a b", "commit": "abcdef012", "figures": figures}
    (tmp_path / "kept" / "candidates.json").write_text(json.dumps(record))
    written = card(adapter, tmp_path / "kept", tmp_path / "results")
    assert "| average | 0.625 | 0.625 | +0.125 (0.03) |" in written
    assert "| seed-0 | 0.500 | 0.500 |  |" in written
    assert "nDCG@10 on dev queries (9 of cosqa), mode off, documents cut at 96 tokens" in written
    assert "`python benchmarks/dev_sets.py a b` at abcdef0." in written


def test_the_card_shows_how_pairs_were_chosen_and_an_ablation_on_the_same_pairs(
    run: Path, adapter: Path, tmp_path: Path
) -> None:
    config = json.loads((run / "config.json").read_text())
    config |= {
        "self_reasoning_ratio": 0.5,
        "self_reasoning_refresh_steps": 9,
        "batch_sampler": "topic",
        "teacher_temperature": 0.05,
    }
    config["weights"]["distillation"] = 0.5
    (run / "config.json").write_text(json.dumps(config | {"pairs_sha256": ["d"]}))
    chosen = {"count": 900, "by_kind": {"titles": 900}, "scorer": {"name": "bm25"}, "top": 3}
    (tmp_path / "chosen.json").write_text(json.dumps(chosen))
    part = {"part": "+ teacher", "seeds": [0], "cosqa.dev.off": 0.5, "cosqa.dev.on": 0.25}
    figures = {"pairs_sha256": ["d"], "dev": ["cosqa"], "steps": 60, "global_batch_size": 16, "parts": [part]}
    figures |= {"dev_queries": 100, "dev_documents": 400}
    place = tmp_path / "results" / "benchmarks" / "ablation.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"command": "python x.py", "commit": "abc", "figures": figures}))
    keep_run(run, tmp_path / "kept", [tmp_path / "manifest.json", tmp_path / "chosen.json"], "x")
    written = card(adapter, tmp_path / "kept", tmp_path / "results")
    assert "| + teacher | 0.500 | 0.250 |" in written
    assert "60 steps of 16 pairs, seed 0" in written
    assert "900 were selected that bm25 ranks among the first 3: 900 titles" in written
    assert "batches of one topic" in written
    assert "a teacher's scores as soft labels (temperature 0.05)" in written
    assert "50% of these written by the model itself, sampled every 9 steps" in written
    place.write_text(json.dumps({"command": "x", "commit": "abc", "figures": figures | {"pairs_sha256": ["other"]}}))
    assert "Ablations" not in card(adapter, tmp_path / "kept", tmp_path / "results")


def test_the_card_says_which_step_s_weights_were_kept(run: Path, adapter: Path, tmp_path: Path) -> None:
    log = [
        {"step": 3, "loss": 0.3, "tokens": 10, "seconds": 1},
        {"step": 3, "dev": {"ndcg@10.on": 0.6}, "seconds": 1},
        {"step": 9, "loss": 0.3, "tokens": 10, "seconds": 1},
        {"step": 9, "dev": {"ndcg@10.on": 0.5}, "seconds": 1},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    (run / "best").mkdir()
    for folder, weights in ((run / "best", b"third"), (adapter, b"third")):
        (folder / "adapter_model.safetensors").write_bytes(weights)
    keep_run(run, tmp_path / "kept", (), "x", adapter)
    assert "The weights are those of step 3" in card(adapter, tmp_path / "kept", tmp_path / "results")
    (run / "best" / "adapter_model.safetensors").write_bytes(b"other")
    keep_run(run, tmp_path / "kept", (), "x", adapter)
    assert "weights are those" not in card(adapter, tmp_path / "kept", tmp_path / "results")


def test_the_card_of_stage_2_says_what_it_was_rewarded_for(run: Path, adapter: Path, tmp_path: Path) -> None:
    config = to_dict(
        GRPOConfig("stage1", [QuerySet(beir="scifact")], [Source(beir="scifact")], "out", min_positive_rank=2)
    )
    del config["queries"], config["corpus"]  # a run's config.json holds what decides it, not places
    (run / "config.json").write_text(
        json.dumps(config | {"adapter_contract": "d" * 64, "trained_on": [{"dataset": "scifact", "split": "train"}]})
    )
    log = [
        {"step": 0, "dev": {"cosqa.dev.on": 0.5, "live.reward": 0.25}, "seconds": 1},
        {"step": 9, "loss": 0.3, "tokens": 1e6, "seconds": 3598},
        {"step": 9, "dev": {"cosqa.dev.on": 0.6, "live.reward": 0.375}, "seconds": 1},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    keep_run(run, tmp_path / "kept", (), "search-r3 train grpo configs/x.yaml")
    written = card(adapter, tmp_path / "kept", tmp_path / "results")
    for said in (
        "9 steps of 8 queries with 8 rollouts each (1.0 million tokens) in 1.00 hours",
        "the stage 1 adapter of contract `dddddddddddd`",
        "ranks 2 or lower, of scifact (train)",
        "reward dcg_scaled of the first 10",
        "loss dapo, advantages grpo (scale_rewards: group)",
        "KL to stage 1 0.02",
        "step 0: cosqa.dev.on 0.500; step 9: cosqa.dev.on 0.600",
        "partially refreshed corpus: 0.250 before, 0.375 after",
    ):
        assert said in written, said
    assert "without the KL term" not in written
    assert "Rewards of its reasoning" not in written
    side = {"figures": {name: {"mean": 0.25, "share_above_half": 0.5} for name in METRICS}, "system": "before"}
    side |= {
        "emission_rate": dict.fromkeys(("sampled", "greedy"), 1.0),
        "mean_tokens": dict.fromkeys(("sampled", "greedy"), 7.0),
    }
    difference = {"difference": 0.125, "low": 0.1, "high": 0.2, "p": 0.01}
    measured = {"dataset": "scifact.dev", "num_queries": 9, "num_documents": 8, "before": side, "after": side}
    measured["comparisons"] = dict.fromkeys(METRICS, difference)
    place = tmp_path / "results" / "rollouts" / "scifact.dev" / f"before--{adapter.name}.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(measured))
    written = card(adapter, tmp_path / "kept", tmp_path / "results")
    assert "## Rewards of its reasoning traces\n\nscifact.dev: 9 queries, 8 documents" in written
    assert "| sampled.dcg | 0.2500 | 0.2500 | 50.0% | 50.0% | +0.1250 | +0.1000 to +0.2000 | 0.0100 |" in written


def test_a_folder_that_is_no_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    keep_run(run, tmp_path / "kept", (), "x")
    with pytest.raises(InputError, match=r"no search_r3\.json"):
        card(run, tmp_path / "kept")


def test_a_run_without_curves_is_told_how_to_draw_them(run: Path, tmp_path: Path) -> None:
    (run / "curves.png").unlink()
    with pytest.raises(InputError, match="search-r3 plot"):
        keep_run(run, tmp_path / "kept", (), "x")
    assert not (tmp_path / "kept").exists()


def test_without_a_documented_run_there_is_no_card(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not document a training run"):
        card(adapter, tmp_path / "nothing")


def test_the_snippets_of_a_card_run_and_peft_gives_the_same_embedding(
    run: Path,
    tiny_model: Path,
    save_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    keep_run(run, tmp_path / "kept", [], "search-r3 train sft configs/x.yaml")
    saved = save_adapter(tiny_model, tmp_path / "tiny-adapter")
    written = card(saved, tmp_path / "kept", tmp_path / "results")
    assert "library_name: peft" not in written  # the hub's own snippet for it would be the one that fails
    monkeypatch.chdir(tmp_path)  # where "tiny-adapter" is a folder
    snippets = re.findall(r"```python\n(.+?)```", written, re.DOTALL)
    assert len(snippets) == 2
    ours, peft = ({}, {})  # type: ignore[var-annotated]
    exec(snippets[0], ours)
    exec(snippets[1], peft)
    model, token = ours["model"], ours["model"].contract.embed_token_id
    text = "shutil.rmtree: delete a directory tree"
    prompt = render(model.contract.prompts.document, model.tokenizer, give_answer=True)
    middle = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt.prefix, *middle, *prompt.suffix]])
    assert ids[0, -1] == token
    with torch.no_grad():
        state = peft["model"].base_model.model.model(input_ids=ids).last_hidden_state[0, -1]
    expected = model.encode_document([text])[0]
    np.testing.assert_allclose(torch.nn.functional.normalize(state, dim=0).numpy(), expected, atol=1e-5)
