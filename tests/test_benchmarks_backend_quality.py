"""The comparison of Milvus with LanceDB on a small collection: both find the same documents."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from benchmark_scripts import FOLDER
from processes import run

pytest.importorskip("lancedb")
pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed: pip install 'search-r3[milvus]'")

WORDS = ("bread", "violin", "river", "sorting a list", "a train to Vienna", "water", "yeast", "strings", "the sea")


@pytest.mark.nightly
def test_both_backends_find_the_same_documents(tmp_path: Path) -> None:
    collection, output = tmp_path / "words", tmp_path / "found.json"
    (collection / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "", "text": f"about {word}"} for i, word in enumerate(WORDS)]
    (collection / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    queries = [{"_id": f"q{i}", "text": word} for i, word in enumerate(WORDS)]
    (collection / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(WORDS)))
    (collection / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    command = [sys.executable, str(FOLDER / "backend_quality.py"), str(collection), "--tiny", "--json", str(output)]
    run(command, env=os.environ | {"PYTHONPATH": str(FOLDER.parent)})
    found = json.loads(output.read_text())["figures"]["words"]
    assert (found["documents"], found["queries"], found["queries_with_the_same_ten"]) == (9, 9, 9)
    assert found["equal"]
    assert found["ndcg_at_10_lance"] == found["ndcg_at_10_numpy"]
