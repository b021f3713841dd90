"""Drivers, workers and nodes of a Ray build killed at random moments; the result must equal the single-process index.

    python benchmarks/kill_ray.py                     # 20 kills; results/benchmarks/kill_ray.json
    python benchmarks/kill_ray.py --kills 3 --json FILE   # a rehearsal

A cluster of three nodes (raylets) runs on this machine; two of them can be killed. Every build encodes the same corpus
with an encoder that hashes words, takes a fixed time for each call and notes what it encoded. After the kill of a
driver the same build is started again; after that of a worker or a node the build goes on. Then every row must be there
once and equal, and of what was encoded before the kill at most one part for each worker may have been encoded again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import say, write_report

SEED = 0
WORKERS, PART_ROWS, CALL_ROWS = 2, 8, 4
"""A part of the spool, which is the most a worker may encode again, and the texts of one call of the encoder."""
WORDS, WORDS_A_TEXT = 300, 12
CALL_SECONDS = 0.05
PATIENCE = 600.0
KINDS = ("driver", "worker", "node")


class Noting:
    """Hashes words; notes the texts of each call, when they are encoded, with its process and node."""

    name, contract_hash, dimension, source = "hashed words", "a" * 64, 32, "hashed words"

    def __init__(self, log: str) -> None:
        self.log = Path(log)

    def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
        import ray

        matrix = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in zip(matrix, texts, strict=True):
            for word in re.findall(r"\w+", text):
                row[sum(word.encode()) % self.dimension] += 1
        time.sleep(CALL_SECONDS)
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        note = {"process": os.getpid(), "node": node, "texts": list(texts), "time": time.time()}
        scratch = self.log / f"{uuid.uuid4().hex}.tmp"
        scratch.write_text(json.dumps(note))
        scratch.rename(scratch.with_suffix(".json"))
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)

    encode_query = encode_document


def write_corpus(path: Path, rows: int) -> None:
    rng = random.Random(SEED)
    texts = (" ".join(f"word{rng.randrange(WORDS)}" for _ in range(WORDS_A_TEXT)) for _ in range(rows))
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": f"{text} {i}"}) + "\n" for i, text in enumerate(texts)))


def build(spec: dict[str, Any]) -> None:
    """The driver's side."""
    from search_r3.index import open_source
    from search_r3.index.distributed import Cluster, build_distributed

    log = spec["log"]
    build_distributed(
        spec["index"],
        open_source(spec["corpus"]),
        lambda: Noting(log),
        Cluster(spec["address"], workers=WORKERS),
        part_rows=PART_ROWS,
        batch_size=CALL_ROWS,
    )


def notes(log: Path) -> list[dict[str, Any]]:
    """What was encoded so far, in order."""
    return sorted((json.loads(file.read_text()) for file in log.glob("*.json")), key=lambda note: note["time"])


def rows_of(index: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The rows by id without their vectors' rounding, and how many there are."""
    from search_r3.index import SearchIndex
    from search_r3.index.row_keys import VECTOR

    rows = SearchIndex.open(index).table.search().to_arrow().to_pylist()
    return {row["id"]: row | {VECTOR: np.round(row[VECTOR], 4).tolist()} for row in rows}, len(rows)


class Cluster:
    """A head, and two nodes that can be killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
        os.environ |= {"RAY_health_check_timeout_ms": "60000"}  # a busy machine
        memory = {"object_store_memory": 80 * 2**20}
        self._settings = {"num_cpus": WORKERS, **memory}
        head = {"num_cpus": 0, "include_dashboard": False, **memory}  # no worker runs where nothing can be killed
        self._cluster = RayCluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._cluster.add_node(**self._settings) for _ in range(2)]
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return self._cluster.address

    def kill(self, node_id: str) -> None:
        """Kill the raylet of a node, and with it the workers there."""
        node = next(node for node in self.nodes if node.node_id == node_id)
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def repair(self) -> None:
        while len(self.nodes) < 2:
            self.nodes.append(self._cluster.add_node(**self._settings))
        self._cluster.wait_for_nodes()

    def close(self) -> None:
        self._cluster.shutdown()


class Trial:
    """One build of which one process is killed."""

    def __init__(self, folder: Path, corpus: Path, cluster: Cluster) -> None:
        folder.mkdir()
        self.folder, self.cluster = folder, cluster
        self.log, self.index = folder / "log", folder / "index"
        self.log.mkdir()
        paths = {"log": str(self.log), "index": str(self.index), "corpus": str(corpus)}
        self.spec = json.dumps(paths | {"address": cluster.address})

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.folder / "driver.log", "ab") as log:
            command = [sys.executable, __file__, "--build", self.spec]
            return subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, kind: str, calls: int, expected: dict[str, Any]) -> dict[str, Any]:
        """Kill a `kind` once the encoder was called `calls` times, and bring the build to its end."""
        started, driver = time.monotonic(), self.start()
        while (done := len(notes(self.log))) < calls:
            if driver.poll() is not None or time.monotonic() > started + PATIENCE:
                return self.ended(kind, calls, started, [f"the build ended or hung after {done} calls"])
            time.sleep(0.01)
        latest = notes(self.log)[-1]
        if kind == "driver":
            driver.send_signal(signal.SIGKILL)
        elif kind == "worker":
            os.kill(latest["process"], signal.SIGKILL)
        else:
            self.cluster.kill(latest["node"])
        before = notes(self.log)
        if kind == "driver":
            driver.wait()
            driver = self.start()
        try:
            code = driver.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            driver.kill()
            code = -1
        wrong = [] if code == 0 else [f"the build ended with code {code}"]
        return self.ended(kind, calls, started, wrong, before, expected)

    def ended(
        self,
        kind: str,
        calls: int,
        started: float,
        wrong: list[str],
        before: list[dict[str, Any]] | None = None,
        expected: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The trial's record, with what is wrong in it."""
        known = Counter(text for note in before or [] for text in note["texts"])
        every = Counter(text for note in notes(self.log) for text in note["texts"])
        again = sum(min(1, every[text] - 1) for text in known)
        if again > WORKERS * PART_ROWS:
            wrong.append(f"{again} texts were encoded again")
        if not wrong and expected is not None:
            found, count = rows_of(self.index)
            wrong += [f"{count} rows of {len(expected)}"] if count != len(expected) else []
            wrong += ["rows differ"] if found != expected else []
            left = sorted(item.name for item in self.index.iterdir() if not item.name.startswith("."))
            wrong += [f"left behind: {left}"] if left != ["chunks.lance"] else []
        seconds = round(time.monotonic() - started, 1)
        record = {"kind": kind, "after_calls": calls, "encoded_before": len(known), "encoded_again": again}
        return record | {"seconds": seconds, "wrong": wrong}


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from search_r3.index import build_index, open_source

    corpus, alone, rng = scratch / "corpus.jsonl", scratch / "alone", random.Random(options.seed)
    write_corpus(corpus, options.rows)
    (scratch / "unread").mkdir()
    build_index(alone, open_source(corpus), Noting(str(scratch / "unread")), progress=False)
    expected, _ = rows_of(alone)
    calls, trials = options.rows // CALL_ROWS, []
    cluster = Cluster()
    try:
        for number in range(options.kills):
            kind = KINDS[number % len(KINDS)]
            cluster.repair()
            record = Trial(scratch / f"trial{number}", corpus, cluster).kill(kind, rng.randrange(1, calls), expected)
            trials.append(record)
            say(f"{number + 1}/{options.kills}  {json.dumps(record)}")
    finally:
        cluster.close()
    return {
        "rows": options.rows,
        "kills": len(trials),
        "kills_by_kind": dict(Counter(trial["kind"] for trial in trials)),
        "kills_with_something_wrong": sum(bool(trial["wrong"]) for trial in trials),
        "texts_encoded_before": sum(trial["encoded_before"] for trial in trials),
        "texts_encoded_again": sum(trial["encoded_again"] for trial in trials),
        "most_encoded_again": max(trial["encoded_again"] for trial in trials),
        "allowed_again": WORKERS * PART_ROWS,
        "trials": trials,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", dest="output", type=Path, help="where to write")
    parser.add_argument("--build", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build is not None:
        build(options.build)
        return 0
    warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)  # these only start programs
    warnings.filterwarnings("ignore", message=".*fork-safe", category=UserWarning)
    with tempfile.TemporaryDirectory(prefix="kill-ray-", ignore_cleanup_errors=True) as folder:
        figures = measure(options, Path(folder))
    target = write_report("kill_ray", figures, device="cpu", seed=options.seed, output=options.output)
    bad = figures["kills_with_something_wrong"]
    print(f"{figures['kills']} kills, {bad} with something wrong; most encoded again: {figures['most_encoded_again']} "
          f"texts; {target}")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
