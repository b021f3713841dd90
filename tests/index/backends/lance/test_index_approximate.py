"""The approximate index: its recall is measured, kept, shown and held to; what is not in it yet is found as well."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from search_r3.cli import main
from search_r3.index import SearchIndex, SourceDocument, build_index, compact_index, delete_documents, update_documents
from search_r3.index.backends.lance import approximate as approximate_module
from search_r3.index.backends.lance.approximate import (
    Samples,
    encoder_of,
    filtered_probes,
    keep_approximate,
    nearest_cosines,
    probing,
    tuned,
)
from search_r3.index.row_keys import VECTOR

COUNT = 700
WORDS = "red green blue gold pink grey teal plum lime rust sand mint oak elm ash fir yew bay".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=10)) + f" n{i % 50} m{i % 31}" for i in range(COUNT)]
    return [SourceDocument(f"d{i:04d}", "", text, {"n": i}) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def kept():
    """Where the first test put the index that all of them begin with a copy of."""
    return []


@pytest.fixture
def path(tmp_path, tmp_path_factory, kept, model, documents, monkeypatch):
    monkeypatch.setattr(approximate_module, "SAMPLES", 40)
    if not kept:
        made = tmp_path_factory.mktemp("approximate") / "index"
        queries = [" ".join(words) for words in np.random.default_rng(1).choice(WORDS, (30, 4))]
        report = build_index(made, documents, model, approximate_from=500, queries=queries)
        assert report.approximate["recall_at_10"] >= 0.98
        kept.append(made)
    shutil.copytree(kept[0], tmp_path / "index")
    return tmp_path / "index"


def vector_of(model, text):
    return model.encode_query([text])[0]


def test_recall_is_measured_on_rows_and_queries_kept_in_the_index_and_shown(path, capsys):
    index = SearchIndex.open(path)
    held = index.approximate
    assert (held.kind, held.used, held.rows, held.measured_rows) == ("IVF_RQ", True, COUNT, COUNT)
    assert held.sampled == {"rows": 40, "queries": 30}
    assert held.recall_at_10 == min(held.recall_of.values()) >= held.goal == 0.98
    assert index.describe()["approximate"] == held.to_dict()
    assert main(["index", "--info", str(path)]) == 0
    assert f"recall@10 {held.recall_of['rows']:.4f} of 40 rows" in capsys.readouterr().out
    assert main(["index", "--info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["approximate"]["goal"] == 0.98


def test_the_recall_it_names_is_the_recall_of_the_search(path, model):
    """Against a search written out here: the ten nearest of all vectors by numpy."""
    index = SearchIndex.open(path)
    rows = index.table.search().select(["id", VECTOR]).to_list()
    matrix = np.array([row[VECTOR] for row in rows])
    found = []
    for text in ("red gold oak", "mint mint sand n7", "bay", "plum lime rust m3"):
        cosines = matrix @ vector_of(model, text)
        tenth = np.sort(cosines)[-10]
        hits = index.search(text, model, mode="vector", k=10, reasoning=False).hits
        exact = index.search(text, model, mode="vector", k=10, reasoning=False, exact=True).hits
        assert [hit.score for hit in exact] == pytest.approx(np.sort(cosines)[::-1][:10], abs=1e-5)
        found.append(np.mean([hit.score >= tenth - 1e-5 for hit in hits]))
    assert np.mean(found) >= 0.9


def test_search_goes_through_it_and_exact_or_a_narrow_filter_does_not(path, model, monkeypatch):
    index = SearchIndex.open(path)
    asked = []

    def watched(search, settings, kept, everywhere):
        asked.append("exact" if settings is None else "all" if everywhere else "nearest")
        return probing(search, settings, kept, everywhere)

    monkeypatch.setattr("search_r3.index.backends.lance.lance_backend.probing", watched)
    index.search("red", model, mode="vector")
    index.search("red", model, mode="vector", exact=True)
    hits = index.search("red", model, mode="vector", where="n IN (3, 5, 650)", k=10).hits
    assert {hit.id for hit in hits} == {"d0003", "d0005", "d0650"}
    monkeypatch.setattr("search_r3.index.backends.lance.lance_backend.EXACT_MATCHES", 10)
    index.search("red", model, mode="vector", where="n < 300", k=5)
    assert len(index.search("red", model, mode="vector", where="n < 300", k=300).hits) == 300  # all that there are
    assert len(index.search("red", model, mode="vector", k=600).hits) == 600  # more than the first partitions hold
    assert asked == ["nearest", "exact", "exact", "nearest", "nearest", "all", "nearest", "all"]


def test_a_filter_searches_more_partitions_the_fewer_rows_it_keeps(path, model):
    index = SearchIndex.open(path)
    settings = dataclasses.replace(index.approximate, nprobes=100, partitions=1000)
    assert [filtered_probes(settings, kept) for kept in (1, 0.5, 0.1, 0.01, 1e-9)] == [100, 119, 178, 317, 1000]
    assert filtered_probes(settings, 0) == filtered_probes(settings, 1.2) == 100  # rows since it was measured


def test_with_a_filter_it_finds_the_nearest_of_the_rows_that_are_left(path, model):
    """Against the ten nearest of those rows by numpy."""
    index = SearchIndex.open(path)
    rows = index.table.search().where("n % 4 = 1").select(["id", VECTOR]).limit(COUNT).to_list()
    assert len(rows) > 100  # fewer are compared exactly
    matrix, found = np.array([row[VECTOR] for row in rows]), []
    for text in ("red gold oak", "mint mint sand n7", "bay", "plum lime rust m3"):
        tenth = np.sort(matrix @ vector_of(model, text))[-10]
        hits = index.search(text, model, mode="vector", k=10, reasoning=False, where="n % 4 = 1").hits
        found.append(np.mean([hit.score >= tenth - 1e-5 for hit in hits]))
        assert {hit.id for hit in hits} <= {row["id"] for row in rows}
    assert np.mean(found) >= 0.9


def test_rows_that_came_later_are_found_before_and_after_they_are_merged(path, model):
    index = SearchIndex.open(path)
    index.table.add(  # a commit that no build has folded in yet
        [
            dict(
                index.table.search().limit(1).to_list()[0],
                id="late",
                document="late",
                r3_vector=vector_of(model, "zzz"),
            )
        ]
    )
    assert index.table.index_stats(f"{VECTOR}_idx").num_unindexed_rows == 1
    hit = SearchIndex.open(path).search("zzz", model, mode="vector", reasoning=False).hits[0]
    assert (hit.id, hit.score) == ("late", pytest.approx(1, abs=1e-5))
    compact_index(path)
    index = SearchIndex.open(path)
    assert index.table.index_stats(f"{VECTOR}_idx").num_unindexed_rows == 0
    assert index.search("zzz", model, mode="vector", reasoning=False).hits[0].id == "late"
    assert index.approximate.rows == COUNT
    update_documents(path, [SourceDocument("d0003", "", "zzz yyy")], model)
    delete_documents(path, ["late"])
    hits = SearchIndex.open(path).search("zzz yyy", model, mode="vector", reasoning=False).hits
    assert hits[0].id == "d0003"
    assert "late" not in {hit.id for hit in hits}


def test_a_table_that_outgrew_it_is_trained_again_and_one_that_changed_is_measured_again(path, model):
    table = SearchIndex.open(path).table
    held = SearchIndex.open(path).approximate
    assert keep_approximate(table) == held
    rows = table.search().limit(100).to_list()
    table.add([row | {"id": f"more{i}", "document": f"more{i}"} for i, row in enumerate(rows)])
    table.optimize()
    measured = keep_approximate(table)
    assert (measured.rows, measured.measured_rows, measured.built) == (COUNT, COUNT + 100, held.built)
    rows = table.search().limit(COUNT).to_list()
    table.add([row | {"id": f"most{i}", "document": f"most{i}"} for i, row in enumerate(rows)])
    table.optimize()
    assert keep_approximate(table).rows == 2 * COUNT + 100


def test_what_misses_the_goal_is_not_used_and_says_so(path, model, monkeypatch):
    monkeypatch.setattr(approximate_module, "SAMPLES", 3)
    index = SearchIndex.open(path)
    missed = tuned(index.table, dataclasses.replace(index.approximate, goal=1.1))
    assert not missed.used
    assert (missed.nprobes, missed.refine) == (missed.partitions, 32)  # all was tried
    assert "so search is exact" in str(missed)
    search = index.table.search(vector_of(model, "red"), vector_column_name=VECTOR, query_type="vector")
    assert "ANN" not in probing(search.distance_type("cosine"), missed).limit(5).explain_plan()


@pytest.mark.parametrize("enough", [1, 2, 37, 64, 100])
def test_it_searches_hardly_more_partitions_than_the_goal_needs(path, monkeypatch, enough):
    index = SearchIndex.open(path)
    start = dataclasses.replace(index.approximate, partitions=100)
    reached = {"rows": 0.985, "queries": 0.99}
    missed = {"rows": 0.5, "queries": 0.99}
    monkeypatch.setattr(Samples, "recall", lambda *given: reached if given[-1].nprobes >= enough else missed)
    found = tuned(index.table, start)
    assert found.used
    assert found.recall_of == reached
    assert enough <= found.nprobes <= max(enough, 1.25 * enough + 1)


def test_no_more_partitions_are_read_than_were_measured(path, model):
    """LanceDB goes on to all others where it may, though it has found enough."""
    index = SearchIndex.open(path)
    settings = dataclasses.replace(index.approximate, nprobes=2)
    assert settings.partitions > 4
    search = index.table.search(vector_of(model, "red"), vector_column_name=VECTOR, query_type="vector")
    plan = probing(search.distance_type("cosine"), settings).limit(5).explain_plan()
    assert "minimum_nprobes=2" in plan
    assert "maximum_nprobes=Some(2)" in plan


def test_a_small_table_has_none(tmp_path, model, documents):
    build_index(tmp_path / "i", documents[:50], model)
    index = SearchIndex.open(tmp_path / "i")
    assert index.approximate is None
    assert keep_approximate(index.table, None) is None


def test_nearest_cosines_are_those_of_the_whole_matrix_without_the_row_itself(path, monkeypatch):
    monkeypatch.setattr(approximate_module, "BLOCK", 128)
    table = SearchIndex.open(path).table
    rows = table.search().select(["id", VECTOR]).to_list()
    matrix = np.array([row[VECTOR] for row in rows], dtype=np.float32)
    own = [rows[3]["id"], ""]
    found = nearest_cosines(table, matrix[[3, 5]], own, 10)
    expected = matrix[[3, 5]] @ matrix.T
    expected[0, 3] = -1
    assert found == pytest.approx(-np.sort(-expected, axis=1)[:, :10], abs=1e-5)
    samples = Samples.of(table, None, seed=0)
    assert set(samples.queries) == {"rows"}
    assert samples.tenth["rows"].shape == (40,)


def test_queries_are_spread_over_all_that_are_given(model, monkeypatch):
    monkeypatch.setattr(approximate_module, "SAMPLES", 4)
    seen = []
    model.encode_query = lambda texts, **options: seen.extend(texts) or np.zeros((len(texts), 64))
    encoder_of(model, [f"q{i}" for i in range(9)])()
    assert seen == ["q0", "q2", "q4", "q6"]
    assert encoder_of(model, []) is None
