"""What workers of a Ray build have encoded is found again by what it is, and by nothing else; without Ray."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from search_r3.index import SearchIndex, SourceDocument, build_index, open_source
from search_r3.index.backends.lance.table_columns import table_schema
from search_r3.index.backends.lance.table_rows import make_row
from search_r3.index.chunking.chunker import chunk_document
from search_r3.index.row_keys import VECTOR
from search_r3.index.storage.location import Remote
from search_r3.index.storage.locking import ENCODED

lance = pytest.importorskip("lance", reason="Lance is not installed: pip install 'search-r3[search]'")

from search_r3.index.distributed.encoded import EncodedParts, drop_encoded, parts  # noqa: E402
from search_r3.index.distributed.ray_worker import Described, EncodeRows, Job  # noqa: E402
from search_r3.index.distributed.spool import spool_schema  # noqa: E402


def hashes_of(*texts: str) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]


def unit_rows(count: int, dimension: int = 8) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((count, dimension), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def kept(tmp_path) -> EncodedParts:
    return EncodedParts(tmp_path, "a" * 64, 8)


def test_parts_cover_all_rows_and_a_change_moves_no_other_parts_ends():
    hashes = hashes_of(*map(str, range(5000)))
    found = list(parts(hashes, mean=64, longest=256))
    assert [one.start for one in found] == [0, *(one.stop for one in found[:-1])]
    assert found[-1].stop == 5000
    assert 30 < np.mean([one.stop - one.start for one in found]) < 130
    assert max(one.stop - one.start for one in found) <= 256
    before = {tuple(hashes[one]) for one in found}
    with_one_more = [*hashes[:100], *hashes_of("one more"), *hashes[100:]]
    after = {tuple(with_one_more[one]) for one in parts(with_one_more, mean=64, longest=256)}
    assert len(before - after) <= 3
    assert list(parts([])) == []


def test_a_part_is_found_by_its_texts_and_its_model(kept, tmp_path):
    hashes, vectors = hashes_of("a", "b", "c"), unit_rows(3)
    assert kept.read(hashes) is None
    kept.write(hashes, vectors)
    np.testing.assert_array_equal(kept.read(hashes), vectors)
    assert kept.read(hashes[:2]) is None
    assert kept.read(hashes[::-1]) is None
    assert EncodedParts(tmp_path, "b" * 64, 8).read(hashes) is None, "another model"
    drop_encoded(tmp_path)
    assert not (tmp_path / ENCODED).exists()
    drop_encoded(tmp_path)


@pytest.mark.slow
def test_parts_on_object_storage_are_kept_and_removed_too(s3):
    from search_r3.index.storage.object_store import open_objects

    place = Remote(f"s3://bucket/encoded/{uuid.uuid4().hex}").for_writing()
    kept, hashes, vectors = EncodedParts(place, "a" * 64, 8), hashes_of("a", "b", "c"), unit_rows(3)
    assert kept.read(hashes) is None
    kept.write(hashes, vectors)
    np.testing.assert_array_equal(kept.read(hashes), vectors)
    drop_encoded(place)
    assert [one for batch in open_objects(place).list() for one in batch] == []
    drop_encoded(place)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 200])
def test_a_damaged_part_counts_as_missing_and_is_written_again(kept, tmp_path, damage):
    hashes, vectors = hashes_of("a", "b"), unit_rows(2)
    kept.write(hashes, vectors)
    [file] = (tmp_path / ENCODED / "data").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert kept.read(hashes) is None
    kept.write(hashes, vectors)
    np.testing.assert_array_equal(kept.read(hashes), vectors)


def test_a_worker_encodes_nothing_that_another_one_has_kept(model, tmp_path):
    """Two workers in turn; the second one's model is never called."""
    rows = [
        make_row(chunk, None, "docs", "docs")
        for i in range(5)
        for chunk in chunk_document(SourceDocument(f"d{i}", "", f"text {i} of water"))
    ]
    spooled = pa.Table.from_pylist([row | {"r3_held": None} for row in rows], schema=spool_schema())
    described = Described(model.name, model.contract_hash, model.dimension, "")
    job = Job(tmp_path, lambda: model, described, table_schema(model.dimension), None, 1000, None)
    first = EncodeRows(job)(spooled)
    assert len(model.encoded) == 5
    second = EncodeRows(job)(spooled)
    assert len(model.encoded) == 5
    assert first[VECTOR].to_pylist() == second[VECTOR].to_pylist()


def test_what_a_killed_driver_left_is_no_obstacle_to_a_local_build(kept, model, tmp_path):
    kept.write(hashes_of("a"), unit_rows(1))
    docs = tmp_path / "docs.jsonl"
    docs.write_text(json.dumps({"id": "a", "text": "water"}) + "\n")
    folder = tmp_path / "index"
    folder.mkdir()
    Path(tmp_path / ENCODED).rename(folder / ENCODED)
    build_index(folder, open_source(docs), model, progress=False)
    assert len(SearchIndex.open(folder)) == 1
