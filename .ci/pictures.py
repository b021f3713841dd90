"""`make pictures`: the pictures of the docs, taken by a headless Chromium of the pages as they are.

The search page is shown with the question of QUESTIONS that it answers best: the expected file must come first with
reasoning, else nothing is written. The index is of docs/, by the default adapter.

    make pictures                                 # docs/images/{server,api,report}-{desktop,phone}-{light,dark}.png
    .venv/bin/python .ci/pictures.py --index INDEX --report docs/report.html
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SCREENS = {"desktop": (1280, 800), "phone": (390, 844)}
SCHEMES = ("light", "dark")
QUESTIONS = {
    "why are rows refreshed while the model trains": "stage2.md",
    "how do I give the server an API key": "server.md",
    "what ties a vector to the model that made it": "python.md",
    "how much memory does a corpus of a hundred million documents need": "scale.md",
    "how do I write a reward of my own": "write-your-own/reward.md",
    "which files are skipped when a folder is indexed": "indexing.md",
    "run the model faster on a CPU": "engines.md",
    "use it as a retriever in LangChain": "integrations.md",
}
"""Questions about docs/, and the file that answers each."""
SECONDS = 300


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=ROOT / "build" / "pictures.index", help="made if it is not there")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "report.html")
    parser.add_argument("--images", type=Path, default=IMAGES)
    given = parser.parse_args()
    program = [str(Path(sys.executable).with_name("search-r3"))]
    only = ["--include", "*.md", "--prune"]  # without the report, which is a page of figures
    subprocess.run([*program, "index", str(ROOT / "docs"), "--into", str(given.index), *only], check=True)
    with chromium() as browser, served([*program, "serve", str(given.index), "--port", "0", "--cache", "0"]) as url:
        question = best_question(url)
        print(f"asking: {question}")
        written = search_pictures(browser, url, question, given.images)
        written += page_pictures(browser, f"{url}/docs#search", "api", given.images)
        if given.report.is_file():
            written += page_pictures(browser, given.report.resolve().as_uri(), "report", given.images)
    print("\n".join(str(path) for path in written))


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium: $CHROMIUM, one on the path, or Playwright's own."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        sys.exit("error: no Playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    place = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        except Error as error:
            sys.exit(f"error: no browser: apt install chromium, or playwright install chromium ({str(error)[:80]})")
        yield browser
        browser.close()


@contextmanager
def served(command: list[str]) -> Iterator[str]:
    """The address of a server, once it is ready."""
    with subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(filter(None, map(listening, server.stderr)), None)
            threading.Thread(target=server.stderr.read, daemon=True).start()  # else the pipe would fill
            if url is None:
                sys.exit("error: the server did not start; its log is above")
            end = time.monotonic() + SECONDS
            while not ready(url):
                if time.monotonic() > end or server.poll() is not None:
                    sys.exit(f"error: the server was not ready within {SECONDS} seconds")
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()


def listening(line: str) -> str | None:
    """The address in a line of a server's log, if it is there."""
    try:
        return str(json.loads(line)["url"])
    except (ValueError, KeyError, TypeError):
        return None


def ready(url: str) -> bool:
    """Whether a server answers queries."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def best_question(url: str) -> str:
    """The question whose expected file is first with reasoning and was furthest below it without; exits if none is."""
    places = {question: [rank(url, question, reasoning) for reasoning in (False, True)] for question in QUESTIONS}
    answered = {question: off for question, (off, on) in places.items() if on == 1}
    if not answered:
        sys.exit(f"error: no question finds its file first with reasoning: {places}")
    return max(answered, key=lambda question: answered[question])


def rank(url: str, question: str, reasoning: bool) -> int:
    """The rank of the expected file among ten hits; 11 if it is not among them."""
    body = json.dumps({"query": question, "k": 10, "reasoning": reasoning}).encode()
    request = urllib.request.Request(f"{url}/v1/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        hits = json.load(answer)["hits"]
    return next((place for place, hit in enumerate(hits, 1) if hit["path"] == QUESTIONS[question]), len(hits) + 1)


def search_pictures(browser: Any, url: str, question: str, folder: Path) -> list[Path]:
    """The search page with the answer to `question`."""

    def ask(page: Any) -> None:
        page.locator("#empty").wait_for()
        page.fill("#question", question)
        page.keyboard.press("Enter")
        page.locator("#status", has_text="with it in").wait_for()
        page.evaluate("document.activeElement.blur()")

    return page_pictures(browser, url, "server", folder, ask)


def page_pictures(browser: Any, url: str, name: str, folder: Path, prepare: Any = None) -> list[Path]:
    """NAME-SCREEN-SCHEME.png of the first screen of a page, after `prepare(page)`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for screen, (width, height) in SCREENS.items():
        for scheme in SCHEMES:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_default_timeout(SECONDS * 1e3)
            page.goto(url)
            if prepare is not None:
                prepare(page)
            written.append(folder / f"{name}-{screen}-{scheme}.png")
            page.screenshot(path=written[-1], animations="disabled")
            page.close()
    return written


if __name__ == "__main__":
    main()
