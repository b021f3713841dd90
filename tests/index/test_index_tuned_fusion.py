"""An index keeps a tuned fusion: searches use it, unless they ask for another one or their model is another one."""

from __future__ import annotations

import json

import pytest

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.hybrid_fusion import FEATURES, HybridFusion, WeightRule
from search_r3.index import SearchIndex, SourceDocument, backup_index, build_index
from search_r3.index.maintenance import keep_fusion

COUNT = 40
TUNED = HybridFusion("rsf", 0.2, contract_hash="a" * 64)


def word(number):
    return f"t{number:02d}"


@pytest.fixture
def misled(make_model):
    """The query "q07 t08" means t07, but names t08."""
    model = make_model()
    bags = model._bags

    def meant(texts):
        return bags([f"t{text[1:3]}" if text.startswith("q") else text for text in texts])

    model._bags = meant
    return model


@pytest.fixture
def folder(tmp_path, misled):
    build_index(tmp_path / "i", [SourceDocument(word(i), "", f"{word(i)} text") for i in range(COUNT)], misled)
    return tmp_path / "i"


def scores(result):
    return [(hit.id, hit.score) for hit in result.hits]


def test_searches_use_what_is_kept_unless_they_ask_for_something_else(folder, misled, tmp_path):
    query = "q07 t08"
    plain = SearchIndex.open(folder).search(query, misled)
    keep_fusion(folder, TUNED)
    index = SearchIndex.open(folder)
    assert index.complete
    tuned = index.search(query, misled)
    assert scores(tuned) == scores(index.search(query, misled, fusion="rsf", vector_weight=0.2)) != scores(plain)
    assert scores(index.search(query, misled, vector_weight=0.65)) == scores(plain)
    assert scores(index.search(query, misled, fusion="linear")) == scores(plain)
    assert scores(SearchIndex.open_snapshot(folder).search(query, misled)) == scores(tuned)
    backup_index(folder, tmp_path / "copy")
    assert scores(SearchIndex.open(tmp_path / "copy").search(query, misled)) == scores(tuned)
    keep_fusion(folder, HybridFusion("rsf", 0.2, contract_hash="b" * 64))
    assert scores(SearchIndex.open(folder).search(query, misled)) == scores(plain), "tuned for another model"
    keep_fusion(folder, None)
    assert scores(SearchIndex.open(folder).search(query, misled)) == scores(plain)


def test_it_outlasts_changes_of_the_index(folder, misled):
    keep_fusion(folder, TUNED)
    documents = [SourceDocument(word(i), "", f"{word(i)} text") for i in range(COUNT + 1)]
    build_index(folder, documents, misled)
    assert SearchIndex.open(folder).backend.tuned_fusion == TUNED


def test_a_weight_by_query_is_used_in_searches(folder, misled):
    numbers = (0.0,) * len(FEATURES)
    rule = WeightRule(numbers, numbers, (1.0,) * len(FEATURES), 1e6, 0.1, 0.9)
    keep_fusion(folder, HybridFusion("dbsf", 0.5, rule, contract_hash="a" * 64))
    index = SearchIndex.open(folder)
    assert scores(index.search("q07 t08", misled)) == scores(
        index.search("q07 t08", misled, fusion="dbsf", vector_weight=0.9)
    )


def test_the_words_of_the_reasoning_are_searched_for_too(folder, misled):
    index = SearchIndex.open(folder)
    misled.encode_with_reasoning = lambda queries, texts, **_: misled._bags(queries)
    misled.count_tokens = lambda texts: [len(text.split()) for text in texts]
    given = {"reasoning_text": "perhaps t30", "k": 40}
    without = {hit.id for hit in index.search("q07 t08", misled, **given).hits if "text" in hit.scores}
    more = {
        hit.id for hit in index.search("q07 t08", misled, reasoning_words=True, **given).hits if "text" in hit.scores
    }
    assert more - without == {"t30"}
    reasoned = index.search("q07 t08", misled, reasoning_words=True)  # "about: q07 t08"
    assert reasoned.hits[0].id in {"t07", "t08"}
    with pytest.raises(InputError, match="reasoning_words needs reasoning"):
        index.search("q07", misled, reasoning_words=True, reasoning=False)
    with pytest.raises(InputError, match='mode is "vector"'):
        index.search("q07", misled, reasoning_words=True, mode="vector")
    keep_fusion(folder, HybridFusion(reasoning_words=True))
    index = SearchIndex.open(folder)
    assert index.search("q07 t08", misled, reasoning=False).hits
    found = {hit.id for hit in index.search("q07 t08", misled, **given).hits if "text" in hit.scores}
    assert found == more


@pytest.fixture
def judged(tmp_path):
    file = tmp_path / "judged.jsonl"
    rows = [{"query": f"{'q' + word(i)[1:]} {word((i + 1) % COUNT)}", "relevant": [word(i)]} for i in range(COUNT)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_tune_stores_what_is_better_and_refuses_what_is_not(folder, misled, judged, monkeypatch, capsys):
    monkeypatch.setattr("search_r3.cli.tune.load", lambda *arguments: misled)
    keep_fusion(folder, HybridFusion("linear", 0.0))  # words alone, which are always wrong here
    command = ["tune", str(folder), str(judged), "--model", "fake"]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["about"]["held_out"]["after"]["ndcg@10"] > answer["about"]["held_out"]["before"]["ndcg@10"]
    assert answer["before"]["vector_weight"] == 0.0
    assert answer["better"] == answer["about"]["held_out_queries"]
    kept = SearchIndex.open(folder).backend.tuned_fusion
    assert kept is not None
    assert (kept.contract_hash, kept.vector_weight) == (misled.contract_hash, answer["vector_weight"])
    assert SearchIndex.open(folder).search("q07 t08", misled).hits[0].id == "t07"
    assert SearchIndex.open(folder).describe()["fusion"]["vector_weight"] == kept.vector_weight
    assert main(["index", "--info", str(folder)]) == 0
    assert f"fusion:   {kept} (search-r3 tune)" in capsys.readouterr().out
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: nothing is better on the ")
    assert error.count(str(kept)) == 1, "what was found again is named once"
    assert SearchIndex.open(folder).backend.tuned_fusion == kept
    keep_fusion(folder, HybridFusion("linear", 0.0))
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "| before | 0." in out
    assert "held-out queries are better off" in out
    assert main(["tune", str(folder), "--forget"]) == 0
    assert SearchIndex.open(folder).backend.tuned_fusion is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give judged queries to tune on"),
        (["{judged}", "--forget"], "or --forget"),
        (["missing"], 'no data set "missing"'),
        (["missing.jsonl"], "error: missing.jsonl does not exist; check the path"),
        (["{judged}.none"], ".none does not exist; check the path"),
        (
            ["{two}"],
            "2 of 2 queries have a relevant document in the index: 0 are held out and 2 are left, but both are",
        ),
    ],
)
def test_bad_input_is_one_line(folder, judged, more, message, capsys):
    two = judged.with_name("two.jsonl")
    two.write_text("".join(judged.read_text().splitlines(keepends=True)[:2]))
    assert main(["tune", str(folder), *(part.format(judged=judged, two=two) for part in more)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
