"""Cached embeddings are what the encoder gave; an interruption costs one shard; nothing stale or broken is read."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache, content_hash

TEXTS = [f"{'word ' * (i % 7)}text {i}" for i in range(23)]
IDS = [f"d{i}" for i in range(23)]
IDENTITY = {"contract_hash": "a" * 64, "dtype": "float32", "max_length": 128, "side": "document"}


class FakeEncoder:
    """One row per text, from the text alone; counts the texts, and can be interrupted."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.encoded: list[str] = []
        self.stop_after = stop_after

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.encoded += texts
        if self.stop_after is not None and len(self.encoded) > self.stop_after:
            raise KeyboardInterrupt
        return np.array([[len(text), int(text.split()[-1])] for text in texts], dtype=np.float32)


def rows_of(texts):
    return FakeEncoder()(list(texts)).tolist()


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "cache", shard_size=5)


def test_rows_come_in_the_order_of_the_texts_and_the_second_time_from_the_disk(cache):
    first = cache.encode(FakeEncoder(), IDS, TEXTS, IDENTITY, step=2)
    assert first.rows.tolist() == rows_of(TEXTS)
    assert first.rows.dtype == np.float32
    again = FakeEncoder()
    second = cache.encode(again, IDS, TEXTS, IDENTITY)
    assert again.encoded == []
    assert second.rows.tolist() == first.rows.tolist()
    assert (second.shards, second.shards_from_disk) == (5, 5)
    assert second.seconds == pytest.approx(first.seconds, abs=0.01)


def test_an_interrupted_encoding_goes_on_at_the_last_finished_shard(cache):
    with pytest.raises(KeyboardInterrupt):
        cache.encode(FakeEncoder(stop_after=12), IDS, TEXTS, IDENTITY, step=1)
    rest = FakeEncoder()
    encoded = cache.encode(rest, IDS, TEXTS, IDENTITY)
    assert len(rest.encoded) == 23 - 10  # two shards of five were finished
    assert encoded.shards_from_disk == 2
    assert encoded.rows.tolist() == rows_of(TEXTS)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "garbage", "swap"])
def test_a_damaged_shard_is_encoded_again(cache, damage):
    cache.encode(FakeEncoder(), IDS, TEXTS, IDENTITY)
    shards = sorted(cache.folder.rglob("*.safetensors"))
    data = bytearray(shards[1].read_bytes())
    if damage == "truncate":
        data = data[:-7]
    elif damage == "flip":
        data[-2] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "garbage":
        data = bytearray(b"\xff" * 100)
    else:
        data = bytearray(shards[-1].read_bytes())  # the last shard, which holds fewer rows
    shards[1].write_bytes(bytes(data))
    fixed = FakeEncoder()
    assert cache.encode(fixed, IDS, TEXTS, IDENTITY).rows.tolist() == rows_of(TEXTS)
    assert len(fixed.encoded) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {**IDENTITY, "contract_hash": "b" * 64}},
        {"identity": {**IDENTITY, "max_length": 256}},
        {"identity": {**IDENTITY, "side": "query"}},
        {"texts": [*TEXTS[:-1], "another text 99"]},
        {"texts": TEXTS[::-1]},
        {"ids": [*IDS[:-1], "d99"]},
    ],
)
def test_other_texts_or_another_encoder_share_nothing(cache, change):
    cache.encode(FakeEncoder(), IDS, TEXTS, IDENTITY)
    other = FakeEncoder()
    texts = change.get("texts", TEXTS)
    encoded = cache.encode(other, change.get("ids", IDS), texts, change.get("identity", IDENTITY))
    assert len(other.encoded) == 23
    assert encoded.rows.tolist() == rows_of(texts)


def test_a_shard_copied_from_another_encoder_is_not_read(cache):
    cache.encode(FakeEncoder(), IDS, TEXTS, IDENTITY)
    mine = sorted(cache.folder.rglob("shard-00001-*"))[0]
    cache.encode(lambda texts: np.ones((len(texts), 2)), IDS, TEXTS, {**IDENTITY, "dtype": "bfloat16"})
    other = next(path for path in cache.folder.rglob("shard-00001-*") if path != mine)
    mine.write_bytes(other.read_bytes())
    assert cache.encode(FakeEncoder(), IDS, TEXTS, IDENTITY).rows.tolist() == rows_of(TEXTS)


def test_a_wrong_encoder_is_caught_before_anything_is_kept(cache):
    with pytest.raises(ValueError, match="NaN"):
        cache.encode(lambda texts: np.full((len(texts), 2), np.nan), IDS, TEXTS, IDENTITY)
    with pytest.raises(ValueError, match="shape"):
        cache.encode(lambda texts: np.zeros((1, 2)), IDS, TEXTS, IDENTITY)
    assert list(cache.folder.rglob("*.safetensors")) == []
    with pytest.raises(InputError, match="22 ids for 23 texts"):
        cache.encode(FakeEncoder(), IDS[:-1], TEXTS, IDENTITY)
    assert cache.encode(FakeEncoder(), [], [], IDENTITY).rows.shape[0] == 0


def test_the_default_folder_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path))
    assert EmbeddingCache().folder == tmp_path / "embeddings"


def test_a_content_hash_sees_boundaries():
    assert content_hash(["ab", "c"]) != content_hash(["a", "bc"])
    assert content_hash(["a"], ["b"]) != content_hash(["a", "b"])


def test_a_progress_bar_shows_what_is_left(cache, capsys):
    cache.encode(FakeEncoder(), IDS, TEXTS, IDENTITY, label="fake: documents", show_progress=True)
    shown = capsys.readouterr().err
    assert "fake: documents" in shown
    assert "23/23" in shown
