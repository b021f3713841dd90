"""Data sets of the hub in BEIR's layout and NanoBEIR become BEIR folders, once; offline, with the real `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search_r3.data.beir import load_beir
from search_r3.data.dev_pools import dev_pool
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.io.hub_beir import NANOBEIR_NAMES, nanobeir_name, with_nanobeir
from search_r3.data.io.remote_datasets import fetch
from search_r3.errors import InputError
from search_r3.evaluation.suite import evaluate
from search_r3.evaluation.suite_config import SuitePlan

datasets = pytest.importorskip("datasets")
CORPUS = [{"_id": "d1", "title": "Tides", "text": "follow the moon"}, {"_id": "d2", "title": "", "text": "bread rises"}]
QUERIES = [{"_id": "q1", "text": "what moves the sea"}, {"_id": "q2", "text": "why does bread rise"}]
QRELS = [{"query-id": "q1", "corpus-id": "d1", "score": 2}, {"query-id": "q2", "corpus-id": "d2", "score": 1}]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("search_r3.data.io.hub_beir.commit_of", lambda path, revision: "abc123")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def hub(monkeypatch: pytest.MonkeyPatch, tables: dict[str, dict[str, dict[str, list]]]) -> list[str]:
    """A hub with data set -> subset -> split -> rows; the list gets the names of what is loaded."""
    loaded: list[str] = []

    def load_dataset(path: str, name: str | None = None, revision: str | None = None, streaming: bool = False) -> dict:
        if path not in tables:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        assert streaming  # nothing is kept but the BEIR folder
        loaded.append(f"{path}/{name}@{revision}")
        parts = tables[path]
        return {split: datasets.Dataset.from_list(rows) for split, rows in parts[name or next(iter(parts))].items()}

    def names(path: str, revision: str | None = None) -> list[str]:
        if path not in tables:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return list(tables[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", names)
    return loaded


def subset_tables(judged: str = "default", split: str = "test") -> dict[str, Any]:
    return {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUERIES}, judged: {split: QRELS}}


def test_a_data_set_of_the_hub_becomes_a_folder_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = hub(monkeypatch, {"mteb/made": subset_tables()})
    folder = find_dataset("hf:mteb/made@v1", root)
    assert folder == root / "hf" / "mteb_made_v1"
    dataset = load_beir(folder, "test")
    assert [(d.id, d.title, d.text) for d in dataset.corpus.values()] == [
        ("d1", "Tides", "follow the moon"), ("d2", "", "bread rises"),
    ]  # fmt: skip
    assert dataset.queries == {"q1": "what moves the sea", "q2": "why does bread rise"}
    assert dataset.qrels == {"q1": {"d1": 2}, "q2": {"d2": 1}}
    assert "mteb/made at commit abc123" in (folder / "SOURCE.txt").read_text()
    assert loaded == ["mteb/made/corpus@v1", "mteb/made/queries@v1", "mteb/made/default@v1"]
    find_dataset("hf:mteb/made@v1", root)
    assert len(loaded) == 3


def test_judgments_may_be_in_a_data_set_of_their_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = subset_tables()
    hub(
        monkeypatch,
        {"BeIR/made": {k: parts[k] for k in ("corpus", "queries")}, "BeIR/made-qrels": {"x": parts["default"]}},
    )
    assert load_beir(find_dataset("hf:BeIR/made", root), "test").qrels == {"q1": {"d1": 2}, "q2": {"d2": 1}}


def test_nanobeir_is_known_by_name_and_as_a_whole(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = {f"Nano{name}": CORPUS for name in NANOBEIR_NAMES}
    judged = [{"query-id": q["_id"], "corpus-id": ["d1", "d2"][i : i + 1]} for i, q in enumerate(QUERIES)]
    tables = {"corpus": part, "queries": dict.fromkeys(part, QUERIES), "qrels": dict.fromkeys(part, judged)}
    hub(monkeypatch, {"sentence-transformers/NanoBEIR-en": tables})
    records = evaluate(["nanobeir"], ["bm25"], tmp_path / "r", data_root=root, use_cache=False)
    assert [record["dataset"] for record in records] == [f"nanobeir/{name}" for name in NANOBEIR_NAMES]
    assert records[0]["measures"]["nDCG@10"] > 0
    assert find_dataset("nanobeir:scifact", root) == root / "nanobeir" / "SciFact"
    pool = dev_pool("nanobeir:SciFact", root)
    assert pool.name == "NanoSciFact.dev"
    assert pool.qrels == {"q1": {"d1": 1}, "q2": {"d2": 1}}
    with pytest.raises(InputError, match='NanoBEIR has no part "SciFacts"; did you mean "SciFact"'):
        fetch("nanobeir:SciFacts", root)


def test_nanobeir_stands_for_all_its_parts() -> None:
    assert with_nanobeir(["cosqa", "nanobeir"])[:2] == ["cosqa", "nanobeir:ClimateFEVER"]
    assert len(SuitePlan(systems=["bm25"], datasets=["nanobeir"]).datasets) == 13
    assert nanobeir_name("msmarco") == "MSMARCO"


def test_the_names_are_those_of_sentence_transformers() -> None:
    nano = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation.nano_beir")
    assert set(nano.DATASET_NAME_TO_HUMAN_READABLE.values()) == set(NANOBEIR_NAMES)


def test_a_local_folder_of_parquet_files_is_read_and_again_when_it_changes(root: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    made = tmp_path / "made"
    (made / "qrels").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CORPUS), made / "corpus.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QUERIES), made / "queries.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QRELS[:1]), made / "qrels" / "test.parquet")
    (made / "qrels" / "dev.jsonl").write_text('{"query-id": "q2", "corpus-id": "d2", "score": 1}\n')
    first = find_dataset(f"hf:{made}", root)
    assert load_beir(first, "test").qrels == {"q1": {"d1": 2}}
    assert load_beir(first, "dev").qrels == {"q2": {"d2": 1}}
    more = [*QRELS[:1], {"query-id": "q1", "corpus-id": "d2", "score": 0}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(more), made / "qrels" / "test.parquet")
    second = find_dataset(f"hf:{made}", root)
    assert second != first
    assert load_beir(second, "test").qrels == {"q1": {"d1": 2, "d2": 0}}
    (made / "queries.parquet").unlink()
    with pytest.raises(InputError, match="has no file or folder queries"):
        find_dataset(f"hf:{made}", root)


def test_other_layouts_and_names_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = subset_tables() | {"corpus": {"a": CORPUS, "b": CORPUS}}
    bare = {"queries": {"x": [{"text": "no id"}]}, "corpus": {"x": CORPUS}, "qrels": {"x": QRELS}}
    hub(monkeypatch, {"o/several": several, "o/plain": {"default": {"train": CORPUS}}, "o/bare": bare})
    for name, message in (
        ("o/several", "has several splits; name one, hf:OWNER/NAME/SPLIT: a, b"),
        ("o/several/c", "has no split c: a, b"),
        ("o/plain", "has no subset corpus .it has: default."),
        ("o/bare", 'a row without an "_id"'),
        ("nobody/none", "Dataset 'nobody/none' doesn't exist"),
        ("scifact", "is no data set: expected hf:OWNER/NAME"),
    ):
        with pytest.raises(InputError, match=message):
            fetch(f"hf:{name}", root)
    assert list(root.rglob("*.jsonl")) == []
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'search-r3\[datasets\]'"):
        fetch("hf:mteb/other", root)
