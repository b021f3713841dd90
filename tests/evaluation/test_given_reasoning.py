"""Mode given: queries with the reasoning of their data set, the control with another query's, and what lacks it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.data.reasoning.reasoning_writer import ReasoningWriter
from search_r3.data.synthesis.writers import Reply, Usage
from search_r3.errors import InputError
from search_r3.evaluation import suite
from search_r3.evaluation.remarks import remarks
from search_r3.evaluation.runs import read_gzip_lines, read_run
from search_r3.evaluation.shuffling import derangement
from search_r3.evaluation.suite import evaluate, load_dataset
from search_r3.evaluation.systems import SearchR3System
from search_r3.retrievers.dense import exact_search

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")
WORDS = {"q1": "aspirin thins the blood", "q2": "yeast makes gas", "q3": "the moon attracts water"}


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


def write_reasoning(folder: Path, words: dict[str, str], split: str = "test") -> None:
    lines = [json.dumps({"_id": qid, "split": split, "reasoning": text}) for qid, text in words.items()]
    (folder / "reasoning.jsonl").write_text("\n".join(lines))


@pytest.fixture
def run(tiny: SearchR3, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Evaluate the tiny model in these modes, on both data sets; only "tiny" has reasoning."""
    write_reasoning(data_root / "tiny", WORDS)

    def run(*modes: str, datasets=("tiny", "nested/en"), **options):
        def open_tiny(spec, *, modes, **_):
            return [SearchR3System(tiny, spec, mode) for mode in modes]

        monkeypatch.setattr(suite, "open_systems", open_tiny)
        monkeypatch.setattr(suite, "check_spec", lambda spec: None)
        return evaluate(
            datasets, ["m"], tmp_path / "results", data_root=data_root, modes=modes, use_cache=False, **options
        )

    return run


@pytest.mark.parametrize("mode", ["given", "given.shuffled"])
def test_queries_are_ranked_with_the_reasoning_of_their_set(run, tiny, data_root, tmp_path, mode: str) -> None:
    lines: list[str] = []
    (record,) = run(mode, report=lines.append)
    assert record["system"] == f"m.{mode}"
    assert f"nested/en m.{mode}: skipped, as the data set has no reasoning.jsonl" in lines
    dataset = load_dataset("tiny", None, data_root)
    order = [0, 1, 2] if mode == "given" else derangement(3, 0)
    qids = list(WORDS)
    words = [WORDS[qids[i]] for i in order]
    rows = tiny.encode_query(list(dataset.queries.values()), reasoning_text=words)
    documents = {did: document.full_text for did, document in dataset.corpus.items() if document.full_text}
    scores, _ = exact_search(rows, tiny.encode_document(list(documents.values())), 3)
    found = read_run(tmp_path / f"results/runs/tiny/m.{mode}.trec.gz")
    ranked = [sorted(found[qid].values(), reverse=True) for qid in qids]
    assert np.allclose(ranked, scores, atol=1e-5)
    kept = [json.loads(line) for line in read_gzip_lines(tmp_path / f"results/runs/tiny/m.{mode}.reasoning.jsonl.gz")]
    assert [one["text"] for one in kept] == words
    assert [one.get("from") for one in kept] == [None if mode == "given" else qids[i] for i in order]
    assert record["given_reasoning"] == {
        "own": mode == "given",
        "mean_tokens": np.mean(tiny.count_tokens(list(WORDS.values()))),
    }
    assert "reasoning" not in record, "the model wrote nothing"


def test_a_result_is_reused_until_the_reasoning_changes(run, data_root: Path) -> None:
    lines: list[str] = []
    run("given", datasets=("tiny",))
    run("given", datasets=("tiny",), report=lines.append)
    assert "(already there)" in lines[0]
    write_reasoning(data_root / "tiny", WORDS | {"q3": "the sun does"})
    run("given", datasets=("tiny",), report=lines.append)
    assert "(already there)" not in lines[1]


def test_what_lacks_reasoning_is_refused(run, data_root: Path) -> None:
    with pytest.raises(InputError, match=r"mode given needs a data set with reasoning\.jsonl"):
        run("off", "given", datasets=("nested/en",))
    write_reasoning(data_root / "tiny", {"q1": "only this"})
    with pytest.raises(InputError, match="no reasoning for 2 of 3 queries, such as q2"):
        run("given", datasets=("tiny",))
    write_reasoning(data_root / "tiny", WORDS, split="train")
    with pytest.raises(InputError, match='no reasoning for the split "test"'):
        run("given", datasets=("tiny",))


def test_changed_queries_keep_their_reasoning_and_other_modes_need_none(run, tmp_path: Path) -> None:
    given, off = run("given", "off", datasets=("tiny",), queries=("upper",))
    assert (given["system"], off["system"]) == ("m.given.upper", "m.off.upper")
    assert "reasoning_hash" in given["settings"]["identity"]
    assert "reasoning_hash" not in off["settings"]["identity"]


class Echo:
    """A writer that says what it is asked, and counts."""

    name, batch, identity = "echo", 2, {"writer": "echo"}

    def __init__(self) -> None:
        self.usage = Usage()

    def write(self, prompts):
        self.usage.input += len(prompts)
        return [Reply(f"about {prompt.user}") for prompt in prompts]


def test_another_model_writes_the_reasoning_once(run, tiny, data_root: Path, tmp_path: Path) -> None:
    writer, lines = ReasoningWriter(Echo(), tmp_path / "written"), []
    (record,) = run("written", datasets=("nested/en",), writer=writer, report=lines.append)
    assert record["system"] == "m.written"
    assert record["settings"]["identity"]["writer"]["writer"] == "echo"
    assert record["given_reasoning"]["own"] is False
    assert lines[0].startswith("nested/en: writer echo: 3 of 3 queries written, 3 tokens read")
    kept = read_gzip_lines(tmp_path / "results/runs/nested/en/m.written.reasoning.jsonl.gz")
    queries = load_dataset("nested/en", None, data_root).queries
    assert [json.loads(line)["text"] for line in kept] == [f"about Query: {text}" for text in queries.values()]
    run("written", datasets=("nested/en",), writer=writer)
    assert writer.writer.usage.input == 3
    with pytest.raises(InputError, match="name one with --writer"):
        run("written", datasets=("nested/en",))


def test_a_set_whose_reasoning_states_the_answer_says_so(tmp_path: Path) -> None:
    record = {"dataset": "entailmentbank", "given_reasoning": {"own": True}, "num_queries": 3}
    assert remarks(record) == ["its given reasoning states the answer: an upper bound"]
    assert remarks(record | {"given_reasoning": {"own": False}}) == []
    assert remarks(record | {"dataset": "strategyqa"}) == []
