"""A data set named as ir_datasets or MTEB name it becomes a BEIR folder, once, whole or not at all."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from search_r3.data.beir import load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.io.remote_datasets import fetch, is_remote
from search_r3.errors import InputError
from search_r3.evaluation.suite import evaluate, load_dataset

Doc = namedtuple("Doc", "doc_id title text")
Query = namedtuple("Query", "query_id text")
Qrel = namedtuple("Qrel", "query_id doc_id relevance")


class Plain:
    """A row of a kind of its own, of which ir_datasets says by `default_text` what its text is."""

    def __init__(self, doc_id: str, abstract: str) -> None:
        self.doc_id, self.abstract = doc_id, abstract

    def default_text(self) -> str:
        return self.abstract


class IrDataset:
    """What `ir_datasets.load` gives, for a data set that is there; counts how often it is read."""

    def __init__(self) -> None:
        self.read = 0
        self.docs = [Doc("d 1", "Aspirin", "lowers the risk"), Plain("d2", "yeast makes bread rise")]
        self.queries = [Query("q1", "does aspirin help"), Query("q2", "why does bread rise"), Query("q3", " ")]
        self.qrels = [Qrel("q1", "d 1", 2), Qrel("q1", "d 1", 1), Qrel("q2", "d2", 1), Qrel("q3", "d2", 1)]

    def has_docs(self) -> bool:
        return True

    def has_queries(self) -> bool:
        return True

    def has_qrels(self) -> bool:
        return bool(self.qrels)

    def docs_iter(self):
        self.read += 1
        yield from self.docs

    def queries_iter(self):
        yield from self.queries

    def qrels_iter(self):
        yield from self.qrels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def ir_dataset(monkeypatch) -> IrDataset:
    dataset, module = IrDataset(), ModuleType("ir_datasets")
    module.__version__ = "0.0"
    module.load = lambda name: {"made/test": dataset}[name]
    monkeypatch.setitem(sys.modules, "ir_datasets", module)
    return dataset


def install_mteb(monkeypatch, dataset: dict, **metadata) -> SimpleNamespace:
    """A stand-in for the package mteb with one task, "Made", that holds `dataset` (subset -> split -> parts)."""
    about = {"type": "Retrieval", "license": "mit", "reference": "https://example.com"} | metadata
    about["dataset"] = {"path": "mteb/made", "revision": "abc"}

    def get_task(name: str, hf_subsets: list[str] | None = None) -> SimpleNamespace:
        if name != "Made":
            raise KeyError(f"KeyError: '{name}' not found. Did you mean: 'Made'?")
        return SimpleNamespace(
            metadata=SimpleNamespace(**about),
            hf_subsets=hf_subsets or list(dataset),
            dataset={subset: dataset[subset] for subset in hf_subsets or dataset},
            load_data=lambda: None,
            convert_v1_dataset_format_to_v2=lambda num_proc: None,
        )

    module = ModuleType("mteb")
    module.get_task = get_task
    monkeypatch.setitem(sys.modules, "mteb", module)
    return module


def part(**changes) -> dict:
    made = {
        "corpus": [{"id": "d1", "title": "Tides", "text": "follow the moon"}, {"id": "d2", "text": "bread"}],
        "queries": [{"id": "q1", "text": "what moves the sea"}],
        "relevant_docs": {"q1": {"d1": 1}},
        "top_ranked": None,
    }
    return made | changes


def test_a_name_of_ir_datasets_becomes_a_folder_that_is_fetched_once(root, ir_dataset):
    folder = find_dataset("ir_datasets:made/test", root)
    assert folder == root / "ir_datasets" / "made_test"
    dataset = load_beir(folder, "test")
    assert [(d.id, d.title, d.text) for d in dataset.corpus.values()] == [
        ("d%201", "Aspirin", "lowers the risk"),
        ("d2", "", "yeast makes bread rise"),
    ]
    assert dataset.queries == {"q1": "does aspirin help", "q2": "why does bread rise"}
    assert dataset.qrels == {"q1": {"d%201": 2}, "q2": {"d2": 1}}
    source = (folder / "SOURCE.txt").read_text()
    assert source.startswith("ir_datasets:made/test\n")
    assert "left out: 1 blank queries" in source
    assert "left out: 1 judgments of blank or missing queries" in source
    assert "left out: 1 judgments below a higher one" in source
    find_dataset("ir_datasets:made/test", root)
    assert ir_dataset.read == 1


def test_it_is_evaluated_under_its_own_name_like_any_other(root, ir_dataset, tmp_path):
    record = evaluate(["ir_datasets:made/test"], ["bm25"], tmp_path / "r", data_root=root, use_cache=False)[0]
    assert (record["dataset"], record["num_queries"]) == ("ir_datasets/made_test", 2)
    assert record["measures"]["nDCG@10"] == 1.0
    assert load_dataset("ir_datasets:made/test.small", None, root).name == "ir_datasets/made_test.small"


def test_a_fetch_that_fails_leaves_nothing_and_says_so(root, ir_dataset, monkeypatch):
    def broken():
        yield ir_dataset.docs[0]
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(ir_dataset, "docs_iter", broken)
    with pytest.raises(InputError, match=r"cannot download ir_datasets:made/test: Name or service.*requires a network"):
        fetch("ir_datasets:made/test", root)
    assert not (root / "ir_datasets" / "made_test").exists()
    assert not list(root.rglob("*.tmp*"))


def test_names_that_nothing_answers_to_are_refused(root, ir_dataset, monkeypatch, tmp_path):
    assert is_remote("mteb:SciFact")
    assert not is_remote("scifact")
    assert not is_remote("c:/data")
    with pytest.raises(InputError, match="ir_datasets has no data set 'made'"):
        fetch("ir_datasets:made", root)
    with pytest.raises(InputError, match="is not the name of a data set"):
        fetch("ir_datasets:", root)
    monkeypatch.delenv("SEARCH_R3_DATA", raising=False)
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))  # the default folder is made
    assert fetch("ir_datasets:made/test") == tmp_path / "cache" / "data" / "ir_datasets" / "made_test"
    with pytest.raises(InputError, match=r"no folder .* to download"):
        fetch("ir_datasets:made/test", tmp_path / "elsewhere")
    ir_dataset.qrels = []
    with pytest.raises(InputError, match="has no qrels"):
        fetch("ir_datasets:made/test", root)
    ir_dataset.qrels = [Qrel("q1", "d2", 0.5)]
    with pytest.raises(InputError, match=r"by 0\.5; expected whole numbers"):
        fetch("ir_datasets:made/test", root)
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(InputError, match=r"pip install 'search-r3\[ir-datasets\]'"):
        fetch("ir_datasets:made/test", root)


def test_a_task_of_mteb_keeps_its_splits_and_what_it_lacks(root, monkeypatch):
    dev = part(
        corpus=[*part()["corpus"], {"id": "d3", "title": None, "text": "more"}],
        queries=[{"id": "q2", "text": "how does it rise", "instruction": "find recipes"}],
        relevant_docs={"q2": {"d2": 1, "gone": 1}},
    )
    install_mteb(monkeypatch, {"default": {"test": part(), "dev": dev}})
    folder = find_dataset("mteb:Made", root)
    assert folder == root / "mteb" / "Made"
    whole = load_beir(folder, allow_missing=True)
    assert list(whole.corpus) == ["d1", "d2", "d3"]
    assert whole.queries["q2"] == "how does it rise find recipes"  # as MTEB puts them together
    assert load_beir(folder, "test").qrels == {"q1": {"d1": 1}}
    with pytest.raises(InputError, match='"gone" is not in corpus'):  # never hidden from who measures
        load_beir(folder, "dev")
    assert "mteb/made at revision abc\nlicense: mit\n" in (folder / "SOURCE.txt").read_text()
    assert json.loads((folder / "corpus.jsonl").read_text().splitlines()[0])["title"] == "Tides"


def test_tasks_of_mteb_that_do_not_fit_are_refused(root, monkeypatch):
    install_mteb(monkeypatch, {"en": {"test": part()}, "de": {"test": part()}})
    with pytest.raises(InputError, match="several subsets; name one, mteb:Made/SUBSET: en, de"):
        fetch("mteb:Made", root)
    assert fetch("mteb:Made/de", root) == root / "mteb" / "Made_de"
    with pytest.raises(InputError, match=r"mteb:Mad: KeyError: 'Mad' not found\. Did you mean: 'Made'\?"):
        fetch("mteb:Mad", root)
    install_mteb(monkeypatch, {"default": {"test": part()}}, type="STS")
    with pytest.raises(InputError, match="of type STS"):
        fetch("mteb:Made", root)
    for changes, message in (
        ({"top_ranked": {"q1": ["d1"]}}, "reranks given candidates"),
        ({"queries": [{"id": "q1", "text": [{"role": "user", "content": "x"}]}]}, "conversations or images"),
        ({"relevant_docs": {}}, "has no judged query in test"),
    ):
        install_mteb(monkeypatch, {"default": {"test": part(**changes)}})
        with pytest.raises(InputError, match=message):
            fetch("mteb:Made", root)
    other = part(corpus=[{"id": "d1", "text": "another text"}])
    install_mteb(monkeypatch, {"default": {"test": part(), "dev": other}})
    with pytest.raises(InputError, match="the id 'd1' for different texts"):
        fetch("mteb:Made", root)
    assert not (root / "mteb" / "Made").exists()
