"""Dev pools: fixed, within their limits, and apart from what is trained on."""

from __future__ import annotations

import zlib

import pytest

from search_r3.data.beir import BeirDataset, Document, load_beir, write_beir
from search_r3.data.dev_pools import MAX_JUDGED, dev_pool, dev_set
from search_r3.data.sources.beir_pairs import query_pairs
from search_r3.errors import InputError


@pytest.fixture
def root(tmp_path):
    corpus = {f"d{i}": Document(f"d{i}", f"Title {i}", f"text {i}") for i in range(120)}
    queries = {str(i): f"query {i}" for i in range(80)}
    qrels = {str(i): {f"d{i}": 1, f"d{i + 1}": 1} for i in range(80)}
    write_beir(tmp_path / "scifact", BeirDataset("scifact", corpus, queries, qrels), "train")
    half = {q: judged for q, judged in qrels.items() if int(q) < 40}
    write_beir(tmp_path / "cosqa", BeirDataset("cosqa", corpus, queries, half), "dev")
    for name in ("hotpotqa_more", "entailmentbank", "strategyqa"):
        named = {f"q-{q}": text for q, text in queries.items()}
        train = {f"q-{q}": judged for q, judged in half.items()}
        write_beir(tmp_path / name, BeirDataset(name, corpus, named, train), "train")
        rest = {f"q-{q}": judged for q, judged in qrels.items() if int(q) >= 40}
        write_beir(tmp_path / name, BeirDataset(name, corpus, named, rest), "dev")
    rest = {q: judged for q, judged in qrels.items() if int(q) >= 40}
    write_beir(tmp_path / "cosqa", BeirDataset("cosqa", corpus, queries, rest), "test")
    return tmp_path


def test_a_pool_keeps_to_its_limits_and_holds_every_judged_document(root):
    pool = dev_pool("cosqa", root, max_queries=10, max_documents=50)
    assert pool.name == "cosqa.dev"
    assert (len(pool.queries), len(pool.corpus)) == (10, 50)
    assert {d for judged in pool.qrels.values() for d in judged} <= set(pool.corpus)


def test_a_pool_is_the_same_every_time_and_another_for_another_seed(root):
    assert dev_pool("cosqa", root, 10, 50) == dev_pool("cosqa", root, 10, 50)
    assert dev_pool("cosqa", root, 10, 50, seed=1).queries != dev_pool("cosqa", root, 10, 50).queries


def test_no_test_query_of_cosqa_is_in_its_pool(root):
    pool = dev_pool("cosqa", root)
    assert set(pool.queries) == set(map(str, range(40)))


def test_the_scifact_pool_and_its_training_pairs_share_no_query(root):
    pool = dev_pool("scifact", root)
    assert set(pool.queries) == {str(i) for i in range(0, 80, 8)}
    pairs, _ = query_pairs(load_beir(root / "scifact", "train"), split="train", hold_out_modulus=8)
    assert not {pair.query for pair in pairs} & set(pool.queries.values())
    assert len(pairs) == 2 * 70


def test_queries_give_way_where_their_judged_documents_are_too_many(root):
    pool = dev_pool("cosqa", root, max_queries=40, max_documents=12)
    assert len(pool.corpus) <= 12
    assert 5 <= len(pool.queries) < 12


@pytest.mark.parametrize("kind", ["hotpotqa_more", "entailmentbank", "strategyqa"])
def test_where_the_dev_split_is_a_test_the_pool_is_of_train_queries_that_no_pair_has(root, kind):
    pool = dev_pool(kind, root)
    assert set(pool.queries) == {f"q-{i}" for i in range(40) if zlib.crc32(f"q-{i}".encode()) % 8 == 0}
    dataset = load_beir(root / kind, "train")
    pairs, dropped = query_pairs(dataset, split="train", hold_out_modulus=8, hold_out="crc32", graded=True)
    assert not {pair.query for pair in pairs} & set(pool.queries.values())
    assert dropped["held out for dev"] == len(pool.queries)


def test_a_pool_leaves_out_queries_with_too_many_judged_documents_and_the_whole_set_does_not(root):
    corpus = {f"d{i}": Document(f"d{i}", "", f"text {i}") for i in range(60)}
    qrels = {"few": {f"d{i}": 1 for i in range(MAX_JUDGED)}, "many": {f"d{i}": 1 for i in range(MAX_JUDGED + 1)}}
    queries = {name: f"query {name}" for name in qrels}
    write_beir(root / "nfcorpus", BeirDataset("nfcorpus", corpus, queries, qrels), "dev")
    assert set(dev_pool("nfcorpus", root).queries) == {"few"}
    whole = dev_set("nfcorpus", root)
    assert (set(whole.queries), len(whole.corpus), whole.name) == ({"few", "many"}, 60, "nfcorpus")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("cosq",), 'did you mean "cosqa"'),
        (("cosqa", None, 0), "max_queries must be 1 or more, got 0"),
        (("cosqa", None, 5, 1), "has 2 judged documents, more than max_documents 1"),
    ],
)
def test_wrong_arguments_are_named(root, arguments, expected, monkeypatch):
    monkeypatch.setenv("SEARCH_R3_DATA", str(root))
    with pytest.raises(InputError) as caught:
        dev_pool(*arguments)
    assert expected in str(caught.value)
