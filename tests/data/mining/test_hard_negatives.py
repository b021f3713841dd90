"""Mining: what ranks high becomes a negative, what answers the query never does; the same run gives the same file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3.cli import main
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.data.mining import hard_negatives, scorers
from search_r3.data.mining.hard_negatives import MineSettings, choose, gather, mine_negatives, part_of
from search_r3.data.mining.scorers import DenseScorer, bm25_scorer, searchr3_scorer
from search_r3.data.mining.word_overlap import near_identical, word_set
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.errors import InputError

PAIRS = [
    TrainingPair("a", "aspirin heart attack", "Aspirin lowers the risk of a heart attack in men.", source="titles:toy"),
    TrainingPair("b", "aspirin bleeding", "Aspirin raises the risk of bleeding in the stomach.", source="titles:toy"),
    TrainingPair("c", "heart surgery", "Surgery on the heart needs a machine that pumps.", source="titles:toy"),
    TrainingPair(
        "d", "Aspirin  Heart ATTACK", "Attack rates of the heart fell with aspirin.", source="queries:toy/train"
    ),
    TrainingPair("e", "sort a list", "def sort(values): return sorted(values)", source="docstrings:x"),
]


class Table:
    """A scorer that answers from a table: query -> scores, in the candidates' order."""

    name = "table"
    zero_is_no_match = False

    def __init__(self, table: dict[str, list[float]]) -> None:
        self.table = table
        self.asked: list[str] = []

    @property
    def identity(self) -> dict[str, Any]:
        return {"table": self.table}

    def prepare(self, documents: list[str], folder: Path, report: Any = None) -> None:
        self.documents = documents

    def score(self, queries: list[str]) -> np.ndarray:
        self.asked += queries
        return np.array([self.table[query] for query in queries], dtype=np.float32)


def pairs_of(*documents: str) -> list[TrainingPair]:
    return [TrainingPair(str(i), f"query {i}", text) for i, text in enumerate(documents)]


def chosen(scores: list[float], teacher: list[float] | None = None, pairs: Any = None, **settings: Any):
    """What is chosen for pair 0 among five documents of a word each, given everybody's scores."""
    pairs = pairs or pairs_of("alpha", "beta", "gamma", "delta", "epsilon")
    row = None if teacher is None else np.array(teacher, dtype=np.float32)
    return choose(
        0, pairs[0], gather(pairs), np.array(scores, dtype=np.float32), row, MineSettings(**settings), Table({})
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path / "pairs.jsonl"


def test_a_further_positive_is_a_candidate_for_others_and_never_a_negative_of_its_query(tmp_path: Path) -> None:
    graded = replace(
        PAIRS[0], positives=(("A heart attack is rarer with aspirin.", 1.0),), grade=2.0, reasoning="think of medicine"
    )
    write_pairs(tmp_path / "pairs.jsonl", [graded, PAIRS[1], PAIRS[2], PAIRS[4]])
    mine_negatives(tmp_path / "pairs.jsonl", tmp_path / "out.jsonl", bm25_scorer(), MineSettings(share=None))
    mined = {pair.id: pair for pair in read_pairs(tmp_path / "out.jsonl")}
    assert set(mined["a"].negatives) == {PAIRS[1].positive, PAIRS[2].positive}
    assert replace(mined["a"], negatives=()) == graded
    assert graded.positives[0][0] in mined["b"].negatives


def test_bm25_finds_rivals_and_spares_every_answer_of_the_same_query(source: Path) -> None:
    output = source.with_name("out.jsonl")
    manifest = mine_negatives(source, output, bm25_scorer(), MineSettings(share=None))
    mined = {pair.id: pair for pair in read_pairs(output)}
    assert set(mined["a"].negatives) == {PAIRS[1].positive, PAIRS[2].positive}  # d's positive answers a's query
    assert mined["a"].negatives == mined["d"].negatives
    assert mined["e"].negatives == ()  # nothing shares a word with it: a score of 0 is no hard negative
    assert manifest["dropped"]["no match"] > 0
    assert manifest["dropped"]["known positive"] == 2 + 1 + 1 + 2 + 1
    assert (manifest["pairs"], manifest["pairs_with_none"]) == (5, 1)
    assert manifest["negatives"] == sum(len(pair.negatives) for pair in mined.values())
    assert manifest == json.loads(Path(f"{output}.manifest.json").read_text(encoding="utf-8"))
    assert not Path(f"{output}.partial").exists()


def test_the_highest_that_pass_are_taken_in_order() -> None:
    assert chosen([1.0, 0.2, 0.9, 0.1, 0.5], per_pair=2)[0] == [2, 4]


def test_the_share_guard_drops_what_scores_above_its_part_of_the_positive() -> None:
    indices, dropped = chosen([0.8, 0.77, 0.76, 0.9, 0.1], share=0.95)
    assert indices == [2, 4]
    assert dropped == {"known positive": 1, "share": 2}


def test_the_margin_guard_counts_in_the_retriever_s_own_units() -> None:
    indices, dropped = chosen([0.75, 0.5, 0.625, 0.25, 1.0], margin=0.25, share=None)
    assert indices == [1, 3]
    assert dropped["margin"] == 2


def test_a_share_of_a_negative_score_lies_below_it() -> None:
    assert part_of(2.0, 0.75) == 1.5
    assert part_of(-2.0, 0.75) == -2.5


def test_the_teacher_drops_what_it_finds_too_good() -> None:
    indices, dropped = chosen([1.0, 0.5, 0.4, 0.3, 0.2], [0.8, 0.79, 0.1, 0.75, 0.77], teacher_share=0.95)
    assert indices == [2, 3]
    assert dropped["teacher"] == 2


def test_the_window_leaves_out_the_first_ranks_and_those_beyond_it() -> None:
    scores = [1.0, 0.8, 0.7, 0.6, 0.5]
    assert chosen(scores, range_min=1, range_max=3)[0] == [2, 3]
    assert chosen(scores, range_max=2)[0] == [1, 2]


def test_known_positives_use_up_no_rank() -> None:
    pairs = [*pairs_of("alpha", "beta", "gamma", "delta"), TrainingPair("x", "Query  0", "epsilon")]
    indices, dropped = chosen([0.9, 0.5, 0.4, 0.3, 1.0], pairs=pairs, range_max=2)
    assert indices == [1, 2]
    assert dropped["known positive"] == 2


def test_a_near_copy_of_any_known_positive_is_no_negative() -> None:
    text = "one two three four five six seven eight nine ten"
    pairs = [*pairs_of("alpha", text + " eleven", "gamma", "ten words"), TrainingPair("x", "query 0", text)]
    indices, dropped = chosen([1.0, 0.5, 0.4, 0.3, 0.2], pairs=pairs)
    assert indices == [2, 3]
    assert dropped["near copy"] == 1


def test_near_copies_are_a_text_and_the_most_of_it_but_not_a_sentence_of_it() -> None:
    abstract = word_set(" ".join(f"w{i}" for i in range(20)))
    most = word_set(" ".join(f"w{i}" for i in range(15)))
    other = word_set(" ".join(f"w{i}" for i in range(10, 30)))
    assert near_identical(most, abstract, 0.85)
    assert near_identical(abstract, most, 0.85)
    assert not near_identical(word_set("w1 w2 w3"), abstract, 0.85)
    assert not near_identical(other, abstract, 0.85)
    assert not near_identical(frozenset(), frozenset(), 0.85)


def test_only_the_same_kind_or_data_set_if_asked() -> None:
    pairs = [*PAIRS, TrainingPair("f", "who", "Somebody of another data set.", source="queries:other/train")]
    candidates = gather(pairs)
    scores = np.array([0.1, 0.4, 0.3, 0.2, 1.0, 0.25], dtype=np.float32)
    settings = MineSettings(same_source=True, share=None, per_pair=6)

    def found(i: int) -> str:
        indices, dropped = choose(i, pairs[i], candidates, scores, None, settings, Table({}))
        assert dropped["other source"] == 5 - len(indices)
        return "".join(pairs[j].id for j in indices)

    assert found(4) == ""  # a function, and there is no other
    assert found(1) == "cda"  # a title of toy: other titles, and what answers toy's judged queries
    assert found(5) == "d"  # a judged query of another data set: judged queries' documents


def test_negatives_that_a_pair_has_stay_and_are_not_given_twice(source: Path) -> None:
    first, second = source.with_name("first.jsonl"), source.with_name("second.jsonl")
    mine_negatives(source, first, bm25_scorer(), MineSettings(share=None, per_pair=1))
    manifest = mine_negatives(first, second, bm25_scorer(), MineSettings(share=None, per_pair=1))
    before, after = read_pairs(first)[0].negatives, read_pairs(second)[0].negatives
    assert after[:1] == before
    assert len(set(after)) == 2
    assert manifest["dropped"]["had it already"] > 0


def test_a_corpus_gives_candidates_and_its_copies_of_positives_are_none(source: Path, tmp_path: Path) -> None:
    corpus = {
        "1": Document("1", "", PAIRS[0].positive),
        "2": Document("2", "Heart attack", "Aspirin after a heart attack is a matter of dose."),
    }
    write_beir(tmp_path / "data/toy", BeirDataset("toy", corpus, {"q": "x"}, {"q": {"1": 1}}), "test")
    output = source.with_name("out.jsonl")
    manifest = mine_negatives(
        source, output, bm25_scorer(), MineSettings(share=None), corpora=["toy"], data_root=tmp_path / "data"
    )
    assert manifest["candidates"] == len(PAIRS) + 1
    assert read_pairs(output)[0].negatives[0] == corpus["2"].full_text
    same = MineSettings(share=None, same_source=True)
    mine_negatives(source, output, bm25_scorer(), same, corpora=["toy"], data_root=tmp_path / "data")
    assert corpus["2"].full_text in read_pairs(output)[0].negatives  # pairs of toy may have toy's documents
    mine_negatives(source, output, bm25_scorer(), same, corpora=[tmp_path / "data/toy"])
    assert corpus["2"].full_text in read_pairs(output)[0].negatives
    assert PAIRS[0].positive not in read_pairs(output)[0].negatives


def test_random_choice_is_the_same_every_time_and_differs_by_seed() -> None:
    pairs = pairs_of(*(f"word{i}" for i in range(40)))
    scores = [1.0, *(0.5 - i / 100 for i in range(39))]
    once = chosen(scores, pairs=pairs, sample=True)[0]
    assert once == chosen(scores, pairs=pairs, sample=True)[0] == sorted(once)
    assert once != chosen(scores, pairs=pairs, sample=True, seed=1)[0]
    assert once != [1, 2, 3, 4]


def dense(calls: list[int] | None = None) -> DenseScorer:
    """Unit vectors that count letters; `calls` notes how many documents were encoded at a time."""

    def encode(texts: list[str]) -> np.ndarray:
        rows = np.array([[text.lower().count(letter) + 0.1 for letter in "aeioust"] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_document(texts: list[str]) -> np.ndarray:
        if calls is not None:
            calls.append(len(texts))
        return encode(texts)

    return DenseScorer("letters", {"letters": "aeioust"}, encode_document, encode)


def test_an_interrupted_run_goes_on_and_gives_the_same_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hard_negatives, "BLOCK", 2)
    monkeypatch.setattr(scorers, "CHUNK", 2)
    output = source.with_name("out.jsonl")
    settings = MineSettings(share=None, per_pair=2)
    mine_negatives(source, output, dense(), settings, teacher=dense())
    whole = output.read_bytes()
    output.unlink()

    def die(what: str, done: int, total: int) -> None:
        if (what, done) == ("queries mined", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine_negatives(source, output, dense(), settings, teacher=dense(), report=die)
    partial = Path(f"{output}.partial/finished.jsonl")
    finished = partial.read_text(encoding="utf-8")
    partial.write_text(finished + finished.splitlines()[0] + '\n{"id": "d", "neg', encoding="utf-8")
    calls: list[int] = []
    with pytest.raises(InputError, match=r"settings\.per_pair, settings\.share differ.*remove it"):
        mine_negatives(source, output, dense(), MineSettings(), teacher=dense())
    seen: list[int] = []
    mine_negatives(
        source, output, dense(calls), settings, teacher=dense(), report=lambda what, done, _: seen.append(done)
    )
    assert calls == []  # rows were on disk
    assert seen[-2:] == [4, 5]  # the first block was not mined again
    assert output.read_bytes() == whole


def test_lines_of_other_pairs_are_refused(source: Path) -> None:
    output = source.with_name("out.jsonl")
    with pytest.raises(KeyboardInterrupt):
        mine_negatives(source, output, bm25_scorer(), MineSettings(share=None), report=interrupt)
    partial = Path(f"{output}.partial/finished.jsonl")
    partial.write_text(partial.read_text().replace('"a"', '"z"'))
    with pytest.raises(InputError, match="belongs to other pairs"):
        mine_negatives(source, output, bm25_scorer(), MineSettings(share=None))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_searchr3_model_embeds_queries_without_reasoning(source: Path) -> None:
    class Model:
        name, contract_hash, dtype = "toy", "0" * 64, "float32"

        def encode_document(self, texts: list[str], **options: Any) -> np.ndarray:
            assert options["max_length"] == 96
            return np.eye(5, dtype=np.float32)[: len(texts)]

        def encode_query(self, texts: list[str], *, reasoning: bool = True, **_: Any) -> np.ndarray:
            assert reasoning is False
            return np.tile(np.array([[0.1, 0.5, 0.3, 0.2, 0.4]], np.float32), (len(texts), 1))

    scorer = searchr3_scorer(Model(), max_length=96)
    output = source.with_name("out.jsonl")
    manifest = mine_negatives(source, output, scorer, MineSettings(share=None, per_pair=1))
    assert manifest["retriever"]["contract_hash"] == "0" * 64
    assert [pair.negatives[0] for pair in read_pairs(output)] == [PAIRS[i].positive for i in (1, 4, 1, 1, 1)]


def test_a_real_checkpoint_mines(source: Path, tiny_model: Path, capsys: Any) -> None:
    output = source.with_name("out.jsonl")
    command = ["data", "mine", str(source), str(output), "--by", str(tiny_model), "--share", "0", "--per-pair", "1"]
    assert main([*command, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["negatives"] == 5
    assert manifest["settings"]["share"] is None
    assert all(len(pair.negatives) == 1 for pair in read_pairs(output))


def test_the_command_says_what_was_dropped(source: Path, capsys: Any) -> None:
    output = source.with_name("out.jsonl")
    assert main(["data", "mine", str(source), str(output), "--share", "0"]) == 0
    out = capsys.readouterr().out
    assert "candidates dropped: known positive" in out
    assert main(["data", "mine", str(source), str(output), "--range-min", "100"]) == 2
    assert "no rank is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"per_pair": 0}, "per_pair must be 1 or more, got 0"),
        ({"range_max": 5, "range_min": 5}, "no rank is left"),
        ({"share": 1.5}, "share must be above 0 and at most 1, got 1.5"),
        ({"near": 0.0}, "near must be above 0"),
        ({"margin": -0.1}, "margin must be 0 or more"),
        ({"margin": float("nan")}, "margin must be 0 or more"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        MineSettings(**settings)


def test_a_run_in_which_nothing_passes_says_so(tmp_path: Path) -> None:
    write_pairs(tmp_path / "in.jsonl", pairs_of("alpha", "beta"))
    with pytest.raises(InputError, match=r"no candidate passed.*no match"):
        mine_negatives(tmp_path / "in.jsonl", tmp_path / "out.jsonl", bm25_scorer())
    assert not (tmp_path / "out.jsonl").exists()
