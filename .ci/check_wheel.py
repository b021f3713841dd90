"""Tests the wheel as a user would (`make test-wheel`), with the Python of an environment that contains only the wheel.

It checks that the package comes from that environment and not from the checkout, that the files that are not Python
are in it, and that the default adapter works in a folder elsewhere: in Python, and to make, search, serve an index.
"""

from __future__ import annotations

import importlib.metadata
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import search_r3
from search_r3.model.resolve import DEFAULT_ADAPTER, PACKAGED

PACKAGE = Path(search_r3.__file__).parent
FILES = (
    *(f"adapters/{name}/adapter_model.safetensors" for name in PACKAGED),
    f"adapters/{DEFAULT_ADAPTER}/query_normalizer.json",
    "py.typed",
    "model/engines/int8/calibration.txt",
    "server/page/index.html",
    "evaluation/report/templates/page.css.j2",
)
COMMAND = Path(sys.executable).with_name("search-r3")
SECONDS = 600
"""Limit of a command; the first one reads and converts the weights."""


def run(*arguments: str, folder: str) -> str:
    """The command's standard output; it must end with exit code 0."""
    done = subprocess.run(
        [COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=False
    )
    if done.returncode != 0:
        sys.exit(f"error: search-r3 {' '.join(arguments)} ended with exit code {done.returncode}")
    return done.stdout


PYTHON = """
from search_r3 import SearchR3

model = SearchR3.from_pretrained()
assert model.check_golden() < 1e-4, "golden vectors"
documents = model.encode_document(["shutil.rmtree: delete a directory tree", "os.remove: remove one file"])
scores = model.similarity(model.encode_query(["how do I delete a folder"], reasoning=True), documents)
assert scores[0, 0] > scores[0, 1], scores
"""


def serve(folder: str) -> None:
    """`search-r3 serve` answers a search over HTTP, then ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([COMMAND, "serve", "notes.index", "--port", str(port)], cwd=folder)
    try:
        body = json.dumps({"query": "what makes bread rise", "reasoning": False}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/search", body, {"Content-Type": "application/json"}
        )
        for _ in range(SECONDS):
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                    found = json.load(answer)
                break
            except OSError:  # it does not listen yet, or still loads the model
                if server.poll() is not None:
                    sys.exit(f"error: search-r3 serve ended with exit code {server.returncode}")
                time.sleep(1)
        else:
            sys.exit("error: search-r3 serve does not answer")
        if not json.dumps(found).count("bread.md"):
            sys.exit(f"error: the server answered {found}")
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    if not PACKAGE.is_relative_to(sys.prefix):
        sys.exit(f"error: search_r3 was imported from {PACKAGE}, not from the environment {sys.prefix}")
    if missing := [name for name in FILES if not (PACKAGE / name).is_file()]:
        sys.exit(f"error: the wheel lacks {', '.join(missing)}; name them in pyproject.toml's package-data")
    if (found := importlib.metadata.version("search-r3")) != search_r3.__version__:
        sys.exit(f"error: the wheel's version is {found}, the package's {search_r3.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "notes").mkdir()
        (Path(folder) / "notes" / "tides.md").write_text("# Tides\n\nThe moon moves the sea.\n", encoding="utf-8")
        (Path(folder) / "notes" / "bread.md").write_text("# Bread\n\nYeast makes dough rise.\n", encoding="utf-8")
        run("--version", folder=folder)
        names = run("models", folder=folder)
        if f"{DEFAULT_ADAPTER} (default)" not in names:
            sys.exit(f"error: search-r3 models does not list the default adapter:\n{names}")
        if subprocess.run([sys.executable, "-c", PYTHON], cwd=folder, timeout=SECONDS, check=False).returncode:
            sys.exit("error: SearchR3.from_pretrained() does not give the default adapter's embeddings")
        run("index", "notes", "--into", "notes.index", folder=folder)
        question = ("search", "notes.index", "what makes bread rise", "--reasoning", "off", "--json")
        answer = json.loads(run(*question, folder=folder))
        if not answer["hits"][0]["path"].endswith("bread.md"):
            sys.exit(f"error: the question about bread found {answer['hits'][0]['path']} first")
        serve(folder)
    print(f"search_r3 {found}: installed from its wheel, embeds, indexes, searches and serves from another folder")


if __name__ == "__main__":
    main()
