"""Modes that read: which passages each query is embedded with, and where the results are put."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest

from search_r3.errors import InputError
from search_r3.evaluation import reading_modes, suite
from search_r3.evaluation.publish.tables import load_records
from search_r3.evaluation.reading_modes import READING_MODES, check_mode, embed_queries, mode_identity, rocchio
from search_r3.evaluation.runs import read_gzip_lines
from search_r3.evaluation.shuffling import derangement
from search_r3.evaluation.study.latency import time_mode
from search_r3.evaluation.suite import evaluate
from search_r3.evaluation.suite_config import SuitePlan
from search_r3.evaluation.systems import ALL_MODES, SearchR3System

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")
DOCUMENTS = ["aspirin prevents a heart attack", "yeast makes bread rise", "the moon moves the sea", "sea bread"]
QUERIES = ["heart attack", "why does bread rise", "what moves the sea"]


@pytest.fixture
def reader(make_model):
    """The fake model, which embeds a query's words with those of its passages and remembers the passages."""
    model = make_model()
    direct, reason = model.encode_query, model.reason
    model.reading, model.asked = SimpleNamespace(passages=2), []

    def joined(texts, passages):
        model.asked.append(passages)
        return texts if passages is None else [" ".join([t, *p]) for t, p in zip(texts, passages, strict=True)]

    model.encode_query = lambda texts, passages=None, **options: direct(joined(texts, passages), **options)
    model.reason = lambda texts, passages=None, **options: reason(joined(texts, passages), **options)
    return model


def embed(model, mode):
    rows_ND = model.encode_document(DOCUMENTS)
    return embed_queries(
        model, mode, QUERIES, DOCUMENTS, rows_ND, max_reasoning_tokens=4, batch_size=2, show_progress_bar=False
    ), rows_ND


def best(rows_QD, rows_ND, count):
    return np.argsort(-(rows_QD @ rows_ND.T), axis=1, kind="stable")[:, :count]


def test_the_first_hits_of_the_direct_search_are_read_in_their_order(reader):
    found, rows_ND = embed(reader, "read")
    expected = best(reader.encode_query(QUERIES, reasoning=False), rows_ND, 2)
    assert found.hits_QK.tolist() == expected.tolist()
    assert reader.asked[1] == [[DOCUMENTS[n] for n in row] for row in expected]
    assert found.reasoned is None
    reasoned, _ = embed(reader, "read+on")
    assert reader.asked[-1] == reader.asked[1]
    assert np.array_equal(reasoned.rows_QD, np.stack([one.embedding for one in reasoned.reasoned]))


def test_a_second_hop_reads_the_hits_of_the_first(reader):
    one, rows_ND = embed(reader, "read")
    two, _ = embed(reader, "read-2")
    assert two.hits_QK.tolist() == best(one.rows_QD, rows_ND, 2).tolist()
    assert reader.asked[-1] == [[DOCUMENTS[n] for n in row] for row in two.hits_QK]


def test_the_controls_read_another_query_s_hits_or_nothing(reader):
    own, _ = embed(reader, "read")
    shuffled, _ = embed(reader, "read.shuffled")
    assert shuffled.hits_QK.tolist() == own.hits_QK[derangement(3, reading_modes.SEED)].tolist()
    assert all(a != b for a, b in zip(shuffled.hits_QK.tolist(), own.hits_QK.tolist(), strict=True))
    embed(reader, "read.empty")
    assert reader.asked[-1] == [[], [], []]


def test_rocchio_is_the_mean_of_the_query_and_its_hits_and_needs_no_training(reader, make_model):
    found, rows_ND = embed(reader, "read.rocchio")
    query_QD = reader.encode_query(QUERIES, reasoning=False)
    for query_D, row_D, hits in zip(query_QD, found.rows_QD, found.hits_QK, strict=True):
        mean_D = np.mean([query_D, *(rows_ND[n] for n in hits)], axis=0)
        assert row_D == pytest.approx(mean_D / np.linalg.norm(mean_D), abs=1e-6)
    assert np.allclose(rocchio(query_QD, np.empty((3, 0, 64), dtype=np.float32)), query_QD)
    plain = make_model()
    check_mode(plain, "read.rocchio")
    assert mode_identity(plain, "read.rocchio") == {"passages": 4}
    assert embed(plain, "read.rocchio")[0].hits_QK.shape == (3, 4)
    with pytest.raises(InputError, match="has no reading mode"):
        check_mode(plain, "read")


def test_each_mode_has_a_run_and_controls_stay_out_of_the_tables(reader, data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "check_spec", lambda spec: None)
    monkeypatch.setattr(
        suite, "open_systems", lambda spec, modes, **_: [SearchR3System(reader, "fake", mode) for mode in modes]
    )
    modes = ["off", *READING_MODES]
    output = tmp_path / "results"
    records = evaluate(["tiny"], ["fake"], output, modes=modes, data_root=data_root, use_cache=False)
    for mode, record in zip(modes, records, strict=True):
        assert record["system"] == f"fake.{mode}"
        assert (output / f"runs/tiny/fake.{mode}.trec.gz").is_file()
        folder = "controls" if "." in mode else "metrics"
        assert (output / folder / f"tiny/fake.{mode}.json").is_file()
    assert {record["system"] for record in load_records(output)} == {
        "fake.off",
        "fake.read",
        "fake.read+on",
        "fake.read-2",
    }
    lines = read_gzip_lines(output / "runs/tiny/fake.read+on.reasoning.jsonl.gz")
    traces = [json.loads(line) for line in lines]
    assert [len(trace["read"]) for trace in traces] == [2, 2, 2]
    assert set(traces[0]["read"]) <= {"d1", "d2", "d3"}
    identities = [SearchR3System(reader, "fake", mode).identity for mode in modes]
    assert all(one not in identities[:i] for i, one in enumerate(identities))
    assert identities[0] == SearchR3System(reader, "fake", "off").document_identity | {"mode": "off"}
    done = reader.queries
    evaluate(["tiny"], ["fake"], output, modes=modes, data_root=data_root, use_cache=False)
    assert reader.queries == done


def test_a_suite_may_name_every_mode():
    named = tuple(mode for mode in ALL_MODES if mode != "written")  # which needs a writer
    assert get_args(get_args(get_type_hints(SuitePlan)["modes"])[0]) == named


def test_reading_is_timed_with_the_passages_of_each_query(reader):
    passages = [[f"passage of {query}"] for query in QUERIES]
    time_mode(reader, QUERIES, None, passages)
    time_mode(reader, QUERIES, 4, passages)
    assert {text for batch in reader.asked for of_query in batch for text in of_query} == {p for [p] in passages}
