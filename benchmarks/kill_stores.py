"""What is killed in `kill.py`, part 2: the index while it is built or updated, and the server while it is written to.

Witnesses of what was committed stand outside the victim: the manifests that came to be under their final names
(LanceDB's commits, seen by the kernel), and the answers that a client of the server got.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kill_process import Ended
from kill_victims import Victim, command_line, helper, sentences

TOLERANCE = 1e-5
"""Largest difference of a component of a vector: another batch may round otherwise."""
MANIFEST = r"(?:.*/)?chunks\.lance/_versions/(\d+)\.manifest"
NEWEST = 2**64 - 1
"""Lance names version v's manifest NEWEST - v, so that the newest is listed first."""


class Index(Victim):
    """`search-r3 index`, in turn into a new folder and over an index of an older state of the documents."""

    name = "index"
    documents = 1200

    def prepare(self) -> None:
        helper("conftest").save_tiny_model(self.root / "tiny")
        texts = sentences(self.documents, 5)
        new = [{"id": f"d{i}", "text": text, "number": i} for i, text in enumerate(texts)]
        old = [row | {"text": f"Before: {row['text']}"} if i % 5 == 0 else row for i, row in enumerate(new)]
        old = old[: self.documents * 3 // 4] + [{"id": f"gone{i}", "text": f"Gone {t}"} for i, t in
                                                enumerate(texts[:60])]  # fmt: skip
        for name, rows in (("new", new), ("old", old)):
            (self.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._index("old", self.root / "old.index")

    def kind(self, kill: int) -> str:
        return "index-update" if kill // 2 % 2 else "index-build"  # both at events and at shares of the time

    def fresh(self, folder: Path, kill: int) -> None:
        if self.kind(kill) == "index-update":
            shutil.copytree(self.root / "old.index", folder / "it.index")
            (folder / "was_old").touch()

    def command(self, folder: Path) -> int:
        return self._index("new", folder / "it.index")

    def inspect(self, folder: Path, whole: Path, ended: Ended) -> tuple[str, list[str]]:
        path = folder / "it.index"
        versions = [NEWEST - int(match[1]) for match in ended.moved_in(MANIFEST)]
        before = rows_of(self.root / "old.index") if (folder / "was_old").exists() else {}
        if not has_table(path):
            wrong = ["the index that was there is lost"] if before else []
            return "no index yet", wrong + (["a committed table is lost"] if versions else [])
        rows, after = rows_of(path), rows_of(whole / "it.index")
        wrong = _not_either(rows, before, after)
        lost = sorted((set(before) & set(after)) - set(rows))
        if lost:
            wrong.append(f"{len(lost)} documents that were there are lost, {lost[0]} among them")
        if versions and version_of(path) < max(versions):
            wrong.append(f"version {max(versions)} was committed, version {version_of(path)} is read")
        new = sum(_same(rows[i], after[i]) for i in rows if i in after)
        return f"{len(rows)} chunks, {new} of {len(after)} as they shall be", wrong

    def compare(self, folder: Path, whole: Path, log: str, found: str) -> tuple[str, list[str]]:
        wrong = same_index(folder / "it.index", whole / "it.index")
        reports = re.findall(r"^\{.*?^\}", log, re.MULTILINE | re.DOTALL)
        report = json.loads(reports[-1])
        held = re.search(r", (\d+) of", found)
        if held and report["unchanged"] < int(held[1]):
            wrong.append(f"{held[1]} chunks were right already, but only {report['unchanged']} were left alone")
        return f"{report['unchanged']} kept, {report['embedded']} embedded", wrong

    def _index(self, source: str, into: Path) -> int:
        from search_r3.index.build import build_index

        build_index.COMMIT_SECONDS = (
            0.0  # commit every 256 chunks: a model of the usual size is not done within seconds
        )
        return command_line(
            "index", self.root / f"{source}.jsonl", "--into", into, "--model", self.root / "tiny", "--device", "cpu",
            "--json",
        )  # fmt: skip


class Server(Victim):
    """`search-r3 serve --writable`, to which a client adds documents, five a request, and searches for them."""

    name = "server"
    requests = 8

    def prepare(self) -> None:
        from search_r3.index import build_index
        from search_r3.index.source_document import SourceDocument
        from search_r3.model.searchr3 import SearchR3

        helper("conftest").save_tiny_model(self.root / "tiny")
        model = SearchR3.from_pretrained(self.root / "tiny", device="cpu")
        held = [SourceDocument(f"held{i}", "", text) for i, text in enumerate(sentences(30, 6))]
        build_index(self.root / "old.index", held, model, progress=False)

    def fresh(self, folder: Path, kill: int) -> None:
        shutil.copytree(self.root / "old.index", folder / "it.index")

    def command(self, folder: Path) -> int:
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends in order, then raises the signal once more
        return command_line("serve", folder / "it.index", "--writable", "--port", 0, "--model", self.root / "tiny",
                            "--device", "cpu")  # fmt: skip

    def beside(self, folder: Path, log: Path) -> Callable[[int], Callable[[], int | None]]:
        return lambda pid: lambda: self._client(folder, log, pid)

    def inspect(self, folder: Path, whole: Path, ended: Ended) -> tuple[str, list[str]]:
        rows, after = rows_of(folder / "it.index"), rows_of(whole / "it.index")
        wrong = _not_either(rows, {}, after)
        held = {row[0] for row in rows.values()}
        answered = answered_by(folder)
        lost = [name for name in answered if name not in held]
        if lost:
            wrong.append(f"{len(lost)} documents whose POST was answered are lost, {lost[0]} among them")
        if missing := [i for i in after if after[i][0] in held and i not in rows]:
            wrong.append(f"{len(missing)} chunks of a document are missing, {missing[0]} among them")
        versions = [NEWEST - int(match[1]) for match in ended.moved_in(MANIFEST)]
        if versions and version_of(folder / "it.index") < max(versions):
            wrong.append(f"version {max(versions)} was committed and is not read")
        return f"{len(answered)} documents answered, {len(held) - 30} in the index", wrong

    def compare(self, folder: Path, whole: Path, log: str, found: str) -> tuple[str, list[str]]:
        wrong = same_index(folder / "it.index", whole / "it.index")
        notes = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
        if not notes or "found" not in notes[-1]:
            return "the client did not come to its end", [*wrong, str(notes[-1:])]
        return f"{notes[-1]['found']} found after the restart, {notes[-1]['added']} added", wrong + notes[-1]["wrong"]

    def _client(self, folder: Path, log: Path, server: int) -> None:
        """Search for what was answered before; add the other documents; write down each answer as it comes."""
        try:
            port = _port(log, server)
            wrong = [f"{name} is not found after the restart" for name in answered_by(folder)
                     if name not in _search(port, f"unique{name[3:]}")]  # fmt: skip
            listed = _ask(port, "GET", "/v1/documents?limit=1000")[1]
            there = {item["id"] for item in listed["data"]}
            found, added = len(there) - 30, 0
            for batch in self._batches():
                missing = [document for document in batch if document["id"] not in there]
                if 0 < len(missing) < len(batch):
                    wrong.append("half of a request is in the index")
                if not missing:
                    continue
                status, answer = _ask(port, "POST", "/v1/documents", {"documents": missing})
                if status != 201:
                    wrong.append(f"adding was answered {status}: {answer}")
                    continue
                added += len(missing)
                _note(folder, {"answered": [item["id"] for item in answer["data"]]})
                if missing[0]["id"] not in _search(port, f"unique{missing[0]['id'][3:]}"):
                    wrong.append(f"{missing[0]['id']} was added and is not found")
                _ask(port, "POST", "/v1/search", {"query": missing[-1]["text"][:200], "reasoning": False})
            _note(folder, {"found": found, "added": added, "wrong": wrong})
            os.kill(server, signal.SIGTERM)
        except (OSError, http.client.HTTPException) as error:  # the server is dead: it was killed
            print(f"the server is gone: {type(error).__name__}: {error}")
        except Exception as error:
            _note(folder, {"found": 0, "added": 0, "wrong": [f"the client failed: {type(error).__name__}: {error}"]})
            os.kill(server, signal.SIGTERM)
            raise

    def _batches(self) -> list[list[dict[str, Any]]]:
        texts = sentences(self.requests * 5, 7)
        long = re.sub(r" unique\d+", "", " ".join(sentences(120, 8)))  # several chunks
        documents = [
            {"id": f"new{i}", "text": f"{text} {long}" if i % 7 == 3 else text, "metadata": {"number": i}}
            for i, text in enumerate(texts)
        ]
        return [documents[i : i + 5] for i in range(0, len(documents), 5)]


def _port(log: Path, server: int) -> int:
    """The port that the server says it listens on, once it says that it is ready."""
    while True:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if (url := re.search(r'"url": ?"http://127\.0\.0\.1:(\d+)', text)) and "ready" in text:
            return int(url[1])
        os.kill(server, 0)  # raises when it is gone
        if Path(f"/proc/{server}/stat").read_text().split()[2] == "Z":
            raise ConnectionError("the server has ended")
        time.sleep(0.005)


def _ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with suppress(AttributeError):
        connection.request(
            method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        )
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def _search(port: int, words: str) -> set[str]:
    answer = _ask(port, "POST", "/v1/search", {"query": words, "mode": "text", "k": 5})[1]
    return {hit["document"] for hit in answer["hits"]}


def _note(folder: Path, record: dict[str, Any]) -> None:
    with open(folder / "notes.jsonl", "a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")


def answered_by(folder: Path) -> list[str]:
    """The documents whose POST was answered 201, as the client wrote them down."""
    notes = folder / "notes.jsonl"
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    return [name for line in lines for name in json.loads(line).get("answered", [])]


# ------------------------------------------------------------------------------------------------------ reading indexes

Row = tuple[str, str, str, bytes]
"""A chunk's document, text, hash of its row, and vector."""


def has_table(path: Path) -> bool:
    from search_r3.index.backends.lance.lance_table import open_table

    return path.is_dir() and open_table(path) is not None


def version_of(path: Path) -> int:
    from search_r3.index.search_index import SearchIndex

    return int(SearchIndex.open(path).table.version)


def rows_of(path: Path) -> dict[str, Row]:
    """Every chunk by its id, read whole."""
    from search_r3.index.row_keys import CONTENT, ROW_HASH, VECTOR
    from search_r3.index.search_index import SearchIndex

    held = SearchIndex.open(path).table.to_arrow()
    size = held.schema.field(VECTOR).type.list_size
    matrix = held[VECTOR].combine_chunks().flatten().to_numpy().reshape(-1, size)
    names = held["id"].to_pylist()
    columns = [held[name].to_pylist() for name in ("document", CONTENT, ROW_HASH)]  # the last tells of all else
    found = dict(zip(names, zip(*columns, map(bytes, matrix), strict=True), strict=True))
    if len(found) != len(names):
        raise ValueError(f"{path}: {len(names) - len(found)} ids are there twice")
    return found


def _same(a: Row, b: Row) -> bool:
    import numpy as np

    vectors = [np.frombuffer(row[-1], dtype=np.float32) for row in (a, b)]
    return a[:-1] == b[:-1] and float(np.abs(vectors[0] - vectors[1]).max()) <= TOLERANCE


def _not_either(rows: dict[str, Row], before: dict[str, Row], after: dict[str, Row]) -> list[str]:
    """Rows that are neither what was there before nor what shall be there."""
    strange = [i for i in rows if not any(i in side and _same(rows[i], side[i]) for side in (before, after))]
    return [f"{len(strange)} chunks are neither old nor new, {strange[0]} among them"] if strange else []


def same_index(path: Path, whole: Path) -> list[str]:
    """How an index differs from the undisturbed one: ids, texts, vectors, completeness, and what a search by words
    finds."""
    from search_r3.index.search_index import SearchIndex

    mine, theirs = rows_of(path), rows_of(whole)
    wrong = [f"{len(set(theirs) - set(mine))} chunks are missing"] if set(theirs) - set(mine) else []
    wrong += [f"{len(set(mine) - set(theirs))} chunks are too many"] if set(mine) - set(theirs) else []
    wrong += _not_either({i: mine[i] for i in mine if i in theirs}, {}, theirs)[:1]
    index = SearchIndex.open(path)
    if not index.complete:
        wrong.append("the index is not marked as complete")
    for name in [*mine][:: max(1, len(mine) // 8)]:
        words = re.search(r"unique\d+", mine[name][1])
        hits = index.search(words[0], None, mode="text", k=5).hits if words else []
        if words and mine[name][0] not in {hit.document for hit in hits}:
            wrong.append(f"{words[0]} of {name} is not found by its words")
    return wrong
