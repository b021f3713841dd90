"""Searching: exact, fused, filtered, and unimpressed by whatever a user types."""

import inspect
import json

import numpy as np
import pytest

from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.results.snippets import make_snippet
from search_r3.index.run_search import ReasoningTrace, SearchOptions, SearchResult, run_search
from search_r3.rank_fusion import fuse_scores, reciprocal_rank_fusion

ODD_QUERIES = [
    *(
        '"planet" AND (sun OR',
        "planet*~^2:",
        "-planet +sun",
        "???",
        "'; DROP TABLE chunks; --",
        '{"match": 1}',
        "x\udc80",
    ),
    *("title:planet", "東京", "🪐🪐", "the of and", "planet " * 14_000, "\\", "a" * 100_000),
]
PLANETS = [
    ("mercury", "Mercury", "Mercury is the smallest planet and closest to the sun.", {"year": 1631, "language": "en"}),
    ("saturn", "Saturn", "Saturn has rings of ice. Its moon Titan has lakes.", {"year": 1655, "language": "en"}),
    ("neptun", "Neptun", "Der äußerste Planet, entdeckt 1846.", {"year": 1846, "language": "de", "Größe": 24.6}),
    ("tokyo", "東京", "東京都の人口は多い。電車も多い。", {"language": "ja", "path": "x/y", "is-open": True}),
    ("o'brien", "It's", "quotes 'single' and \"double\"; DROP TABLE chunks", {"language": "it's"}),
]


@pytest.fixture
def index(tmp_path, model):
    build_index(tmp_path / "index", [SourceDocument(i, t, x, m) for i, t, x, m in PLANETS], model)
    return SearchIndex.open(tmp_path / "index")


def ids(result):
    return [hit.id for hit in result.hits]


def test_vector_search_is_exact(tmp_path, model):
    words = "red green blue gold pink grey teal plum lime rust sand mint".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=8)) for _ in range(300)]
    build_index(tmp_path / "i", [SourceDocument(f"{i:03d}", "", text) for i, text in enumerate(texts)], model)
    cosines = model.encode_document(texts) @ model.encode_query(["red gold gold teal"])[0]
    hits = SearchIndex.open(tmp_path / "i").search("red gold gold teal", model, mode="vector", k=20).hits
    assert [hit.score for hit in hits] == pytest.approx(np.sort(cosines)[::-1][:20], abs=1e-5)
    assert all(hit.score == pytest.approx(cosines[int(hit.id)], abs=1e-5) for hit in hits)


def test_a_hit_tells_where_it_is_and_why(index, model):
    result = index.search("lakes on Titan", model, k=2)
    hit = result.hits[0]
    assert (hit.id, hit.document, hit.title, hit.metadata) == ("saturn", "saturn", "Saturn", PLANETS[1][3])
    assert hit.text == PLANETS[1][2]
    assert [hit.snippet[a:b] for a, b in hit.highlights] == ["Titan", "lakes"]
    assert hit.ranks == {"vector": 1, "text": 1}
    assert hit.score == pytest.approx(1)
    assert (result.reasoning.text, result.reasoning.num_tokens) == ("about: lakes on Titan", 3)
    assert result.timings.search_ms > 0
    json.dumps(result.to_dict())


def test_hybrid_holds_every_hit_of_both_lists(index, model):
    both = set(ids(index.search("planet rings", model, mode="hybrid")))
    for mode in ("vector", "text"):
        assert set(ids(index.search("planet rings", model, mode=mode))) <= both


def test_hybrid_scores_are_the_fusion_of_both_lists(index, model):
    found = {mode: index.search("planet rings", model, mode=mode, k=5) for mode in ("vector", "text")}
    lists = [{hit.id: hit.score for hit in found[mode].hits} for mode in ("vector", "text")]
    for weight in (0.0, 0.3, 0.7, 1.0):
        hybrid = index.search("planet rings", model, vector_weight=weight)
        assert [(hit.id, hit.score) for hit in hybrid.hits] == fuse_scores(*lists, weight)
        assert all(0 <= hit.score <= 1 for hit in hybrid.hits)
    ranked = reciprocal_rank_fusion([ids(found[mode]) for mode in ("vector", "text")])
    assert [(hit.id, hit.score) for hit in index.search("planet rings", model, fusion="rrf").hits] == ranked


def test_the_best_hits_do_not_depend_on_how_many_are_asked_for(tmp_path, model):
    words = "red green blue gold pink grey teal plum lime rust sand mint".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=rng.integers(3, 9))) for _ in range(500)]
    build_index(tmp_path / "i", [SourceDocument(f"{i:03d}", "", text) for i, text in enumerate(texts)], model)
    index = SearchIndex.open(tmp_path / "i")
    most = [(hit.id, hit.score) for hit in index.search("red gold teal", model, k=500).hits]
    assert len(most) == 500
    for k in (1, 10, 70, 200):
        assert [(hit.id, hit.score) for hit in index.search("red gold teal", model, k=k).hits] == most[:k]


def test_the_only_text_with_a_rare_word_comes_first_in_a_hybrid_search(tmp_path, model):
    words = "water road bridge tax school park fire police harbor budget".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=12)) for _ in range(300)] + ["4b825dc642cb see ledger"]
    build_index(tmp_path / "i", [SourceDocument(f"{i:03d}", "", text) for i, text in enumerate(texts)], model)
    model.encode_query = lambda queries, **options: model.encode_document(["water road tax"])  # vectors lead astray
    hits = SearchIndex.open(tmp_path / "i").search("4b825dc642cb", model, reasoning=False).hits
    assert hits[0].id == "300"


def test_without_reasoning_there_is_no_trace_and_words_need_no_model(index, model):
    assert index.search("planet", model, reasoning=False).reasoning is None
    assert index.search("planet", model, reasoning="auto").reasoning is None
    assert "mercury" in ids(index.search("planet", None, mode="text"))
    with pytest.raises(InputError, match="needs a model"):
        index.search("planet", None)


def test_what_is_embedded_in_place_of_the_query_is_told(index, model):
    result = index.search("lakes on titan", model)
    assert (result.query, result.normalized_query, result.corrected_query) == ("lakes on titan", None, None)
    model.normalize_query = lambda text: text.replace("lkaes", "lakes").replace("titan", "Titan")
    result = index.search("lkaes on titan", model)
    assert result.query == "lkaes on titan"
    assert result.normalized_query == result.corrected_query == "lakes on Titan"
    assert SearchResult.from_dict(json.loads(json.dumps(result.to_dict()))).normalized_query == "lakes on Titan"
    result = index.search("lakes on titan", model)
    assert (result.normalized_query, result.corrected_query) == ("lakes on Titan", None)
    assert index.search("lkaes on titan", model, mode="text").normalized_query is None


def test_words_are_searched_for_as_typed_and_as_corrected(tmp_path, model):
    documents = [SourceDocument("typed", "", "lkaes of ice"), SourceDocument("corrected", "", "lakes of ice")]
    build_index(tmp_path / "i", [*documents, SourceDocument("other", "", "nothing of it")], model)
    index = SearchIndex.open(tmp_path / "i")
    model.normalize_query = lambda text: text.replace("lkaes", "Lakes")
    hits = index.search("lkaes", model, reasoning=False).hits
    assert {hit.id for hit in hits if "text" in hit.ranks} == {"typed", "corrected"}
    assert {hit.id: hit.highlights for hit in hits} == {"typed": [(0, 5)], "corrected": [(0, 5)], "other": []}
    model.normalize_query = lambda text: text.replace("lakes", "Lakes")
    hits = index.search("lakes", model, reasoning=False).hits
    assert {hit.id for hit in hits if "text" in hit.ranks} == {"corrected"}


class Rule:
    """Reasons unless the best score stands far above the second; keeps the scores that it was shown."""

    depth = 3

    def decide(self, scores_QK):
        self.shown = np.array(scores_QK)
        return self.shown[:, 0] - self.shown[:, 1] < 0.1


def test_auto_reasons_where_the_models_rule_says_so(index, model):
    model.adaptive_rule = rule = Rule()
    direct, reasoned = (index.search("rings", model, mode="vector", reasoning=on) for on in (False, True))
    decided = {}
    for query in ("rings", "Mercury is the nearest planet", "planet"):
        found = index.search(query, model, mode="vector", reasoning="auto")
        assert rule.shown.shape == (1, 3)
        assert (rule.shown[0, :-1] >= rule.shown[0, 1:]).all()
        usual = index.search(query, model, mode="vector", reasoning=found.reasoning is not None)
        assert [(hit.id, hit.score) for hit in found.hits] == [(hit.id, hit.score) for hit in usual.hits]
        assert (found.reasoning is not None) == bool(rule.decide(rule.shown)[0])
        decided[query] = found.reasoning is not None
    assert set(decided.values()) == {True, False}
    assert direct.reasoning is None
    assert reasoned.reasoning is not None
    assert index.search("rings", model, reasoning="auto", where="year = 1").hits == []  # nothing to decide by


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("language = 'en' AND year > 1640", {"saturn"}),
        ("LANGUAGE = 'de'", {"neptun"}),
        ("größe > 24", {"neptun"}),
        ("is_open", {"tokyo"}),
        ("meta_path = 'x/y'", {"tokyo"}),
        ("language = 'it''s'", {"o'brien"}),
        ("year IS NULL AND title LIKE '東%'", {"tokyo"}),
        ("year IN (1631, 1846)", {"mercury", "neptun"}),
        ("id = 'a;b'", set()),
        ("  ", {row[0] for row in PLANETS}),
    ],
)
def test_filters_are_sql_on_the_users_own_names(index, model, where, expected):
    assert set(ids(index.search("planet", model, mode="vector", where=where))) == expected
    assert set(ids(index.search("planet", model, mode="hybrid", where=where))) == expected
    assert set(ids(index.search("planet DROP", model, mode="text", where=where))) <= expected


def test_filters_come_before_the_search(tmp_path, model):
    """The one match is the farthest of 300 documents, and is still found first."""
    documents = [SourceDocument(f"{i}", "", "near near near", {"n": i}) for i in range(300)]
    documents.append(SourceDocument("far", "", "other words and near", {"n": 1000}))
    build_index(tmp_path / "i", documents, model)
    for mode in ("vector", "text", "hybrid"):
        found = SearchIndex.open(tmp_path / "i").search("near", model, mode=mode, k=1, where="n = 1000")
        assert ids(found) == ["far"]


def test_equal_scores_are_ordered_by_id(tmp_path, model):
    documents = [SourceDocument(f"{i:02d}", "", "the same words") for i in reversed(range(40))]
    build_index(tmp_path / "i", documents, model, commit_every=7)
    for mode in ("vector", "text", "hybrid"):
        found = SearchIndex.open(tmp_path / "i").search("same words", model, mode=mode, k=5)
        assert ids(found) == ["00", "01", "02", "03", "04"]


@pytest.mark.parametrize(
    "where", ["colour = 'red'", "year", "year >", "year > 'x'", "1=1; DROP TABLE chunks", "(", "nope()", "'", "\0"]
)
def test_a_bad_filter_is_one_line_that_lists_the_columns(index, model, where):
    with pytest.raises(InputError) as error:
        index.search("planet", model, where=where)
    message = str(error.value)
    assert "language (text)" in message
    assert "year (integer)" in message
    assert "r3_" not in message
    assert "\n" not in message
    assert ".rs" not in message


@pytest.mark.parametrize("query", ODD_QUERIES)
def test_queries_are_plain_words(index, model, query):
    for mode in ("hybrid", "text", "vector"):
        index.search(query, model, mode=mode)
    assert len(index) == len(PLANETS)


def test_a_filter_that_fails_on_a_row_is_the_users_error(index, model):
    with pytest.raises(InputError, match="CAST"):
        index.search("planet", model, where="year IS NULL AND CAST(language AS INT) > 3")


def test_operators_do_not_change_what_words_find(index, model):
    plain = index.search("planet sun", model, mode="text")
    dressed = index.search('+"planet" AND -(sun)', model, mode="text")
    assert {hit.id for hit in plain.hits} <= {hit.id for hit in dressed.hits}


def test_words_are_found_in_scripts_without_spaces(index, model):
    hit = index.search("人口", model, mode="text").hits[0]
    assert hit.id == "tokyo"
    assert [hit.snippet[a:b] for a, b in hit.highlights] == ["人口"]


@pytest.mark.parametrize("function", [SearchIndex.search, run_search])
def test_every_option_is_one_that_a_handle_forwards(function):
    parameters = inspect.signature(function).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == set(SearchOptions.__annotations__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": ""}, "empty"),
        ({"query": " \n"}, "empty"),
        ({"query": "x" * 100_001}, r"100,001 characters.*100,000"),
        ({"k": 0}, "k is 0"),
        ({"k": 1001}, "1,000"),
        ({"k": True}, "whole number"),
        ({"mode": "fuzzy"}, "hybrid, vector, text"),
        ({"fusion": "sum"}, "linear, dbsf, rsf, rrf"),
        ({"vector_weight": 1.5}, "vector_weight is 1.5"),
        ({"vector_weight": float("nan")}, "vector_weight is nan"),
        ({"vector_weight": "half"}, "0 .words only. to 1"),
    ],
)
def test_bad_arguments_are_named(index, model, options, message):
    with pytest.raises(InputError, match=message):
        index.search(**{"query": "planet", "model": model, **options})


def test_a_query_embedding_that_is_not_finite_is_refused(index, model):
    model.encode_query = lambda texts, **options: np.full((1, 64), np.nan, dtype=np.float32)
    with pytest.raises(InputError, match="no usable embedding"):
        index.search("planet", model, reasoning=False)


def test_snippet_picks_the_sentences_with_the_words():
    text = "Nothing here at all. " * 30 + "Cafés were indexed quickly.\nNext line. " + "More filler text. " * 30
    snippet = make_snippet(text, "How to index a cafe?", length=80)
    assert text[snippet.offset : snippet.offset + len(snippet.text)] == snippet.text
    assert [snippet.text[a:b] for a, b in snippet.highlights] == ["Cafés", "indexed"]
    assert len(snippet.text) <= 80


def test_snippet_of_a_sentence_without_end_is_cut_around_the_match():
    text = "filler " * 500 + "needle " + "filler " * 500
    snippet = make_snippet(text, "needle", length=100)
    assert "needle" in snippet.text
    assert len(snippet.text) <= 100
    assert not snippet.text.startswith("iller")


@pytest.mark.parametrize(("text", "query"), [("", "x"), ("abc", ""), ("a_needle_b", "needle"), ("x" * 10_000, "y")])
def test_snippets_of_odd_texts(text, query):
    snippet = make_snippet(text, query)
    assert snippet.text in text
    assert len(snippet.highlights) == (1 if "needle" in text else 0)


def test_own_words_are_embedded_behind_the_query_and_shown_as_its_reasoning(index, model):
    read = []

    def encode_with_reasoning(texts, reasoning, *, max_reasoning_tokens=None):
        read.append((*texts, *reasoning, max_reasoning_tokens))
        return model._bags([f"{text} {words}" for text, words in zip(texts, reasoning, strict=True)])

    model.encode_with_reasoning = encode_with_reasoning
    model.count_tokens = lambda texts: [len(text.split()) for text in texts]
    result = index.search("what has lakes", model, mode="vector", reasoning_text="Titan, a moon of Saturn", k=1)
    assert result.hits[0].id == "saturn"
    assert read == [("what has lakes", "Titan, a moon of Saturn", 512)]
    assert result.reasoning == ReasoningTrace("Titan, a moon of Saturn", 5, False)
    hybrid = index.search("quotes", model, reasoning_text="Titan, a moon of Saturn")
    assert [hit.id for hit in hybrid.hits if "text" in hit.ranks] == ["o'brien"], "full text searches for the query"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reasoning": False}, "must be True, got False"),
        ({"reasoning": "auto"}, "must be True, got 'auto'"),
        ({"mode": "text"}, 'mode "text" does not use'),
        ({}, "the model fake cannot read reasoning_text"),
    ],
)
def test_own_words_that_nothing_would_read_are_refused(index, model, options, message):
    with pytest.raises(InputError, match=message):
        index.search("what has lakes", model, reasoning_text="Titan", **options)
