"""Indexing as a pipeline: the reader is never far ahead, nothing is lost, and an error ends all of it."""

import threading

import numpy as np
import pytest

from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.build.build_index import COMMIT_CHUNKS, WAITING
from search_r3.index.build.embedding import by_length
from search_r3.index.build.pipeline import Pipe, run_stage, start_stage
from search_r3.index.seen_ids import SeenIds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index"


def test_the_reader_is_never_far_ahead_of_the_model_however_large_the_corpus(path, model):
    count, read, ahead, batches = 4000, [0], [], []

    def documents():
        for number in range(count):
            read[0] += 1
            yield SourceDocument(f"d{number:05d}", "", f"text {number} " + "word " * (number % 40))

    original = model.encode_document

    def encode(texts, **options):
        ahead.append(read[0] - len(model.encoded))
        batches.append((len(texts), max(1 + len(text) // 4 for text in texts)))
        return original(texts, **options)

    model.encode_document = encode
    report = build_index(path, documents(), model, batch_tokens=1000)
    assert (report.added, report.documents, len(SearchIndex.open(path))) == (count, count, count)
    windows = 2 * WAITING + 3  # in two queues, and in the hands of three stages
    assert max(ahead) <= windows * COMMIT_CHUNKS
    assert max(ahead) < count / 2
    assert all(texts == 1 or texts * longest <= 1000 for texts, longest in batches)
    assert sum(texts for texts, _ in batches) == count


def test_batches_are_of_like_length_and_under_the_budget():
    lengths = [3, 50, 7, 200, 9, 8, 50]
    batches = list(by_length(lengths, 100, 3))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches == [[3], [1, 6], [4, 5, 2], [0]]  # a text over the budget goes alone; at most three together


def test_vectors_belong_to_their_texts_whatever_the_batches(path, model):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 50, rng.integers(1, 60))) for _ in range(100)]
    build_index(path, [SourceDocument(f"d{i}", "", t) for i, t in enumerate(texts)], model, batch_tokens=64)
    held = SearchIndex.open(path).table.search().to_arrow().to_pylist()
    for row in held:
        expected = model.encode_query([texts[int(row["id"][1:])]])[0]
        assert np.allclose(row["r3_vector"], expected, atol=1e-6)


def test_a_broken_document_ends_the_build_and_what_came_before_is_kept(path, model):
    def documents():
        yield from (SourceDocument(f"d{i}", "", f"text {i}") for i in range(7))
        raise InputError("line 8 is broken")

    before = threading.active_count()
    with pytest.raises(InputError, match="line 8"):
        build_index(path, documents(), model, commit_every=2)
    assert len(SearchIndex.open(path)) == 6
    assert not SearchIndex.open(path).complete
    assert threading.active_count() <= before + 1  # LanceDB's own may have begun


def test_an_interruption_in_the_model_keeps_what_was_embedded(path, model):
    original = model.encode_document

    def interrupted(texts, **options):
        if len(model.encoded) >= COMMIT_CHUNKS:
            raise KeyboardInterrupt
        return original(texts, **options)

    model.encode_document = interrupted
    documents = [SourceDocument(f"d{i:04d}", "", f"text {i}") for i in range(3 * COMMIT_CHUNKS)]
    with pytest.raises(KeyboardInterrupt):
        build_index(path, documents, model)
    assert len(SearchIndex.open(path)) == COMMIT_CHUNKS
    model.encode_document = original
    assert build_index(path, documents, model).embedded == 2 * COMMIT_CHUNKS


def test_a_write_that_fails_stops_the_reader(path, model, monkeypatch):
    read = [0]

    def documents():
        for number in range(100_000):
            read[0] += 1
            yield SourceDocument(f"d{number}", "", f"text {number}")

    def full(*_):
        raise OSError("LanceError(IO): No space left on device (os error 28)")

    monkeypatch.setattr("search_r3.index.backends.lance.lance_backend.create_table", full)
    with pytest.raises(InputError, match=r"disk of .* is full.*run the same command again"):
        build_index(path, documents(), model, commit_every=10)
    assert read[0] < 1000


def test_a_pipe_holds_no_more_than_its_size_and_hands_errors_on_behind_the_work():
    first, second = Pipe(2), Pipe(2)
    taken, most = [], []

    def numbers():
        for number in range(50):
            most.append(number - len(taken))
            yield number
        raise RuntimeError("the end")

    start_stage("read", numbers(), lambda number: number, first)
    thread = threading.Thread(target=run_stage, args=(first, lambda number: 2 * number, second), daemon=True)
    thread.start()
    with pytest.raises(RuntimeError, match="the end"):
        taken.extend(second)
    thread.join(60)
    assert taken == [2 * number for number in range(50)]
    assert max(most) <= 2 + 2 + 3


def test_seen_ids_keep_the_first_place_and_say_which_are_missing():
    seen = SeenIds()
    assert seen.add("a", "line 1") is None
    assert seen.add("b\udc80'", "line 2") is None
    assert seen.add("a", "line 3") == "line 1"
    assert len(seen) == 2
    many = [f"n{i}" for i in range(1200)]
    assert seen.missing(["b\udc80'", *many, "a"]) == many
