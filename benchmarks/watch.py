"""How long until a change on disk is searchable: `search-r3 index FOLDER --watch` on a folder of many files.

    python benchmarks/watch.py                          # 10,000 files of three sentences
    python benchmarks/watch.py --filled                 # the same, without the hour in which the model embeds them all
    python benchmarks/watch.py --files 20 --tiny        # random weights: the program's own share

After the first run, each round makes four changes in turn and waits for each until the newest version of the index
shows it: one file is changed, one is renamed, one is deleted, and a folder of 20 files is moved in. The seconds are
from the change until it is seen; they include the tenth of a second in which changes are joined. With `--filled` the
index is made before, with random vectors in place of the model's, so that the command's first run finds everything as
it was; what is changed then is embedded by the model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Table, finish, rounded, say
from serve_bench import tiny_model

from search_r3.index.build.build_index import build_index
from search_r3.index.readers.path_source import open_source
from search_r3.index.search_index import SearchIndex
from search_r3.model.resolve import default_model
from search_r3.model.searchr3 import SearchR3

SEED = 0
MOVED = 20
POLL = 0.02
ROOT = Path(__file__).resolve().parents[1]
TOPICS = ("bread needs flour, water and yeast", "a train to Vienna leaves at nine", "a list is sorted in place")


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--model", help="bundled name, adapter or folder (default: the default adapter)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=7200.0, help="seconds that the first run may take")
    parser.add_argument("--filled", action="store_true", help="make the index before, with random vectors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a random two-layer model")
    parser.add_argument(
        "--json", dest="output", type=Path, help="where to write (default: results/benchmarks/watch.json)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = str(options.model or default_model())
        model = str(tiny_model(model, Path(scratch) / "tiny")) if options.tiny else model
        figures = measure(Path(scratch), model, options)
    finish("watch", figures | {"files": options.files, "model": Path(model).name}, options, SEED)


def measure(scratch: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Watch a folder, change it, and return the seconds until each change was searchable."""
    folder, outside, index = scratch / "folder", scratch / "outside", scratch / "folder.index"
    for number in range(options.files):
        write(folder / f"{number // 100}/{number}.md", number)
    for turn in range(options.rounds):
        for number in range(MOVED):
            write(outside / str(turn) / f"moved{turn}x{number}.md", number)
    if options.filled:
        begun = time.perf_counter()
        fill(index, folder, model, options.device)
        say(f"the index was filled in {time.perf_counter() - begun:.0f} s")
    command = [sys.executable, "-m", "search_r3", "index", str(folder), "--into", str(index), "--watch", "--json"]
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [*command, "--model", model, "--device", options.device], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    ready = threading.Event()
    try:
        begun = time.perf_counter()
        threading.Thread(target=listen, args=(process, ready), daemon=True).start()
        if not ready.wait(options.patience) or process.poll() is not None:
            raise SystemExit("the first run did not end in time, or failed")
        first = time.perf_counter() - begun
        seconds: dict[str, list[float]] = {}
        for turn in range(options.rounds):
            say(f"round {turn + 1} of {options.rounds}")
            for what, change, shown in changes(folder, outside, index, turn):
                seconds.setdefault(what, []).append(timed(change, shown))
    finally:
        process.terminate()
        process.wait(60)
    table = Table(f"Seconds until searchable, of {options.rounds} each", "what", "median", "longest")
    for what, found in seconds.items():
        table.row(what, f"{statistics.median(found):.2f}", f"{max(found):.2f}")
    figures = {
        what: {"median": rounded(statistics.median(of)), "longest": rounded(max(of))} for what, of in seconds.items()
    }
    about = {"rounds": options.rounds, "filled": options.filled, "load_average": os.getloadavg()[0]}
    return {"seconds": figures, "first_run_seconds": rounded(first)} | about


class RandomDocuments:
    """The model, but documents get random unit vectors at once."""

    def __init__(self, model: SearchR3) -> None:
        self._model = model
        self._rng = np.random.default_rng(SEED)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
        rows = self._rng.standard_normal((len(texts), self._model.dimension), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fill(index: Path, folder: Path, model: str, device: str) -> None:
    """Index the folder with random vectors."""
    loaded = SearchR3.from_pretrained(model, device=device)
    build_index(str(index), open_source(str(folder)), RandomDocuments(loaded), progress=False)


def changes(
    folder: Path, outside: Path, index: Path, turn: int
) -> list[tuple[str, Callable[[], Any], Callable[[], bool]]]:
    """What is done in a round: (what, the change, whether a search shows it)."""
    changed, renamed, gone = (folder / f"0/{3 * turn + number}.md" for number in range(3))
    word, new = f"changedword{turn}", folder / f"renamed{turn}.md"
    moved = f"moved{turn}x"
    return [
        ("a file is changed", lambda: changed.write_text(f"{word} {TOPICS[0]}"), lambda: found(index, word) == 1),
        ("a file is renamed", lambda: renamed.rename(new), lambda: count(index, new) > count(index, renamed)),
        ("a file is deleted", gone.unlink, lambda: not count(index, gone)),
        (f"a folder of {MOVED} files is moved in", lambda: (outside / str(turn)).rename(folder / moved),
         lambda: count(index, folder / moved) == MOVED),
    ]  # fmt: skip


def write(file: Path, number: int) -> None:
    """A note that no other one equals."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = " ".join(f"Note {number}, line {line}: {TOPICS[(number + line) % len(TOPICS)]}." for line in range(3))
    file.write_text(text)


def listen(process: subprocess.Popen[str], ready: threading.Event) -> None:
    """Set `ready` when the process says that it watches, or ends."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("watching "):
            ready.set()
    ready.set()


def timed(change: Callable[[], Any], shown: Callable[[], bool]) -> float:
    """Seconds from the change to the search that shows it."""
    begun = time.perf_counter()
    change()
    while not shown():
        if time.perf_counter() - begun > 60:
            raise SystemExit("a change was not searchable within a minute")
        time.sleep(POLL)
    return time.perf_counter() - begun


def found(index: Path, word: str) -> int:
    """The number of documents with this word in the newest version of the index."""
    return len(SearchIndex.open_snapshot(index).search(word, None, mode="text").hits)


def count(index: Path, path: Path) -> int:
    """The number of chunks of the file, or of the folder's files, in the newest version of the index."""
    name = path.name if path.parent.name == "folder" else f"{path.parent.name}/{path.name}"
    table = SearchIndex.open(index).backend.table
    return int(table.count_rows(f"document = '{name}' OR starts_with(document, '{name}/')"))


if __name__ == "__main__":
    main()
