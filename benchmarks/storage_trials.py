"""Object storage that fails at random moments: no traceback, no wait beyond the deadline, nothing lost or doubled.

    python benchmarks/storage_trials.py                         # 50 of each; results/benchmarks/storage_trials.json
    python benchmarks/storage_trials.py --trials 2 --json FILE  # a rehearsal

A local server speaks S3 (moto's). In each trial an index is created, updated, compacted, searched, or documents are
deleted, while requests are slow, or are answered with 503, 500 or 403 (wrong keys), or every connection is cut, from a
random request on. What failed must have failed with one line and in time. Then the storage is well again: every
document must be there once, in its old or its new form, and the same call must bring the index to where it should be.
A run that is interrupted goes on behind its last line of log.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, say, write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

FAULTS = ("delay", "503", "500", "403", "gone")
CALLS = ("create", "update", "delete", "compact", "search")
REQUEST_SECONDS, DEADLINE_SECONDS = 0.4, 10.0
"""For a request, and for an operation."""
LIMITS = {"SEARCH_R3_STORAGE_TIMEOUT": str(REQUEST_SECONDS), "SEARCH_R3_STORAGE_DEADLINE": str(DEADLINE_SECONDS)}
NO_LIMITS = dict.fromkeys(LIMITS, "600")
"""While nothing fails: a busy machine is slow, too."""
DEADLINES = {"search": 2, "create": 6, "update": 6, "delete": 6, "compact": 6}
"""How many a call may take, by docs/scale.md ("Deadlines"): a search one for opening the index and one for searching; a
change of the index three minutes where a deadline is 30 seconds. What the same call takes when nothing fails is added
to that, as the machine may be busy."""
LONGEST_DELAY = 0.6
"""Of one request, in seconds."""
REQUESTS = {"search": 8, "create": 60, "update": 60, "delete": 45, "compact": 45}
"""About as many requests does each make; the fault begins at one of them."""
DOCUMENTS = 24
LEASE_SECONDS = 2.0

Documents = dict[str, str]


class Encoder:
    """Hashes words."""

    name, contract_hash, dimension, source = "hashed words", "a" * 64, 32, "hashed words"

    def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
        matrix = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in zip(matrix, texts, strict=True):
            for word in re.findall(r"\w+", text):
                row[zlib.crc32(word.encode()) % self.dimension] += 1
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)

    encode_query = encode_document


def changed(documents: Documents, rng: random.Random, number: int) -> Documents:
    """The corpus with a third of its documents rewritten, some gone and some new."""
    kept = {name: text for name, text in documents.items() if rng.random() > 0.1}
    rewritten = {name: f"{text} again" if rng.random() < 0.3 else text for name, text in kept.items()}
    return rewritten | {f"new{number}-{i}": f"water of a new text {i}" for i in range(rng.randrange(1, 6))}


class Trial:
    """One call on an index of its own while the storage fails."""

    def __init__(self, storage: Any, place: str, fault: str, rng: random.Random) -> None:
        self.storage, self.place, self.fault, self.rng = storage, place, fault, rng
        self.call = rng.choice(CALLS)
        self.before: Documents = {f"d{i}": f"text number {i} of water" for i in range(DOCUMENTS)}
        self.after = dict(self.before)
        self.wrong: list[str] = []
        self.begin = rng.randrange(REQUESTS[self.call])
        self.delay = rng.uniform(0.02, LONGEST_DELAY) if fault == "delay" else 0.0

    def run(self) -> dict[str, Any]:
        """Do it; returns the record, with what was wrong."""
        call = self._prepare()
        self.storage.after = self.begin
        self.storage.delay, self.storage.fault = self.delay, "none" if self.fault == "delay" else self.fault
        os.environ |= LIMITS
        started = time.monotonic()
        outcome = self._outcome(call)
        seconds = time.monotonic() - started
        os.environ |= NO_LIMITS
        self.storage.delay, self.storage.fault = 0.0, "none"
        self._check_between()
        if "another" in outcome or (self.call == "compact" and outcome != "done"):
            time.sleep(LEASE_SECONDS)  # of a lease that could not be given back, for which a compaction does not wait
        started = time.monotonic()
        if (again := self._outcome(call)) != "done":
            self.wrong.append(f"once more: {again}")
        well = time.monotonic() - started
        if seconds > (limit := DEADLINES[self.call] * DEADLINE_SECONDS + well):
            self.wrong.append(f"took {seconds:.0f} s, more than {limit:.0f} s")
        self._check(self.after)
        record = {"fault": self.fault, "call": self.call, "from_request": self.begin, "delay": round(self.delay, 3)}
        times = {"seconds": round(seconds, 2), "seconds_when_well": round(well, 2)}
        return record | {"outcome": outcome, **times, "wrong": self.wrong}

    def _prepare(self) -> Callable[[], None]:
        from search_r3.index.maintenance import UnknownDocument, compact_index, delete_documents

        if self.call == "create":
            self.before = {}
            return self._build
        self._build()
        if self.call == "update":
            self.after = changed(self.before, self.rng, self.begin)
            return self._build
        if self.call == "delete":
            gone = self.rng.sample(sorted(self.before), 5)
            self.after = {name: text for name, text in self.before.items() if name not in gone}

            def delete() -> None:
                with contextlib.suppress(UnknownDocument):  # they were deleted, but the answer was lost
                    delete_documents(self.place, gone, wait=3 * LEASE_SECONDS)

            return delete
        if self.call == "compact":
            self._build(self.before | {"more": "one text more"})
            self.before = self.after = self.before | {"more": "one text more"}
            return lambda: compact_index(self.place)
        return self._search

    def _build(self, documents: Documents | None = None) -> None:
        from search_r3.index import SourceDocument, build_index

        given = self.after if documents is None else documents
        corpus = [SourceDocument(name, "", text) for name, text in given.items()]
        build_index(self.place, corpus, Encoder(), commit_every=6, wait=3 * LEASE_SECONDS, progress=False)

    def _search(self) -> None:
        """As a user searches: code 0 and all hits, or code 2 and one line."""
        from search_r3.cli import main
        from search_r3.errors import InputError

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["search", self.place, "water", "--mode", "text", "-k", "100", "--json"])
        if code == 2 and len(err.getvalue().splitlines()) == 1:
            raise InputError(err.getvalue().strip())
        if code or {hit["id"] for hit in json.loads(out.getvalue())["hits"]} != set(self.after):
            raise RuntimeError(f"code {code}: {err.getvalue()[-500:]}")

    def _outcome(self, call: Callable[[], None]) -> str:
        from search_r3.errors import InputError

        try:
            call()
        except InputError as error:
            if "\n" in str(error):
                self.wrong.append(f"an error of several lines: {error}")
            return str(error)
        except Exception:
            self.wrong.append(f"a traceback: {traceback.format_exc()[-1500:]}")
            return "a traceback"
        return "done"

    def _rows(self) -> list[tuple[str, str]]:
        from search_r3.index import SearchIndex
        from search_r3.index.row_keys import CONTENT

        rows = SearchIndex.open(self.place).table.search().select(["id", CONTENT]).to_arrow().to_pylist()
        return [(row["id"], row[CONTENT]) for row in rows]

    def _check_between(self) -> None:
        """Every document that is to stay is there once, in its old or its new form, and nothing that never was."""
        from search_r3.errors import InputError

        try:
            rows = self._rows()
        except InputError:
            if self.before:
                self.wrong.append("the index cannot be opened after the failure")
            return
        times = Counter(name for name, _ in rows)
        if doubled := [name for name, count in times.items() if count > 1]:
            self.wrong.append(f"doubled: {doubled[:3]}")
        if lost := [name for name in self.before if name in self.after and name not in times]:
            self.wrong.append(f"lost: {lost[:3]}")
        if any(text not in (self.before.get(name), self.after.get(name)) for name, text in rows):
            self.wrong.append("a text that never was")

    def _check(self, expected: Documents) -> None:
        rows = self._rows()
        if len(rows) != len(expected) or dict(rows) != expected:
            self.wrong.append(f"{len(rows)} rows in the end, not the {len(expected)} expected")


@contextlib.contextmanager
def faulty_storage() -> Iterator[Any]:
    """moto's server with a bucket, behind an address that can fail; the environment leads there."""
    from storage_faults import s3_bucket, s3_variables, storage

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_bucket() as url, storage(url) as found:
        os.environ |= s3_variables(found.url) | NO_LIMITS
        yield found


def measure(options: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """Every trial that the log does not have yet; returns all."""
    from search_r3.index.storage import lease

    lease.SECONDS = LEASE_SECONDS
    head = json.dumps({"seed": options.seed})
    kept = log.read_text().splitlines() if log.exists() else []
    if kept[:1] != [head]:
        kept = [head]
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(head + "\n")
    trials = [json.loads(line) for line in kept[1:]]
    done = {(trial["fault"], trial["trial"]) for trial in trials}
    with faulty_storage() as storage:
        for number in range(options.trials):
            for fault in options.faults:
                if (fault, number) in done:
                    continue
                rng = random.Random(f"{options.seed} {fault} {number}")
                record = {"trial": number} | Trial(storage, f"s3://bucket/{fault}-{number}", fault, rng).run()
                trials.append(record)
                with open(log, "a") as file:
                    file.write(json.dumps(record) + "\n")
                say(json.dumps(record)[:400])
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="of each fault")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", dest="output", type=Path, help="where to write; the log stands beside it")
    options = parser.parse_args()
    output = options.output or RESULTS / "storage_trials.json"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SEARCH_R3_CACHE"] = folder
        trials = measure(options, output.with_suffix(".jsonl"))
    bad = [trial for trial in trials if trial["wrong"]]
    figures = {
        "trials": len(trials),
        "trials_with_something_wrong": len(bad),
        "by_fault": {
            fault: {
                "trials": len(of := [trial for trial in trials if trial["fault"] == fault]),
                "failed_in_one_line": sum(trial["outcome"] != "done" for trial in of),
                "most_seconds": max(trial["seconds"] for trial in of),
                "wrong": sum(bool(trial["wrong"]) for trial in of),
            }
            for fault in options.faults
        },
        "most_seconds_by_call": {
            call: max((trial["seconds"] for trial in trials if trial["call"] == call), default=None) for call in CALLS
        },
        "request_seconds": REQUEST_SECONDS,
        "deadline_seconds": DEADLINE_SECONDS,
        "deadlines_allowed": DEADLINES,
        "wrong": bad,
    }
    write_report("storage_trials", figures, device="cpu", seed=options.seed, output=output)
    print(f"{len(trials)} trials, {len(bad)} with something wrong: {output}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
