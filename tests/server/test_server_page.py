"""The web page in a real browser: it asks, streams, shows both sides, stops, escapes, and says plainly what fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from serving_tools import Held, Running, eventually, pausing, running

from search_r3 import SearchR3
from search_r3.index.build.build_index import build_index
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.server.routes.web_page import HEADERS, PAGE, TYPES
from search_r3.server.service import Loaded

EVIL = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>"
DOCUMENTS = [
    SourceDocument("evil", f"Title {EVIL}", f"The 🚂 train says {EVIL} and leaves."),
    SourceDocument("bread", "Baking", "Bread needs flour, water and yeast. " * 12),
    SourceDocument("train", "", "The train to Vienna leaves at nine."),
]
KEY = "open-sesame"
SECONDS = 30_000


@pytest.fixture(scope="module")
def index(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    folder = tmp_path_factory.mktemp("page") / "page.index"
    build_index(folder, DOCUMENTS, tiny, progress=False)
    return SearchIndex.open(folder)


@pytest.fixture(scope="module")
def site(tiny: SearchR3, index: SearchIndex) -> Iterator[Running]:
    with running(lambda: Loaded.of(tiny, index)) as found:
        yield found


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """`open_page(server, expected=())` shows its page; at the end nothing unexpected was logged or fetched."""
    opened: list[tuple[Any, list[str]]] = []

    def show(server: Running, *, expected: str = "^$", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page, problems = context.new_page(), []
        page.set_default_timeout(SECONDS)

        def note(text: str) -> None:
            if not re.search(expected, text):
                problems.append(text)

        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("request", lambda request: request.url.startswith(server.url) or note(request.url))
        page.goto(server.url)
        opened.append((page, problems))
        return page

    yield show
    for page, problems in opened:
        assert problems == []
        assert page.evaluate("window.hurt") is None
        page.context.close()


def ask(page: Any, question: str) -> None:
    page.locator("#empty").wait_for()  # it knows what the server has
    page.fill("#question", question)
    page.keyboard.press("Enter")


def says(page: Any, place: str, words: str) -> None:
    page.locator(place, has_text=words).wait_for()


def done(page: Any) -> None:
    says(page, "#status", "with it in")


def test_a_budget_chosen_before_the_server_says_what_it_allows_stays(site: Running, browser: Any) -> None:
    page = browser.new_page()
    page.route("**/openapi.json", lambda route: (page.select_option("#budget", "8"), route.continue_()))
    page.goto(site.url)
    page.locator("#empty").wait_for()
    assert page.input_value("#budget") == "8"
    page.close()


def test_files_are_sent_with_a_policy_that_lets_nothing_else_run(site: Running) -> None:
    for path, kind in (("/", ".html"), ("/page.js", ".js"), ("/style.css", ".css"), ("/icon.svg", ".svg")):
        answer = site.ask("GET", path)
        assert answer.status == 200
        assert answer.headers["content-type"] == TYPES[kind]
        assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    html, script = ((PAGE / name).read_text() for name in ("index.html", "page.js"))
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|https?://", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://", script)


def test_a_question_is_answered_both_ways_with_what_the_server_says(open_page, site: Running) -> None:
    page = open_page(site)
    page.select_option("#budget", "8")
    ask(page, "train to Vienna")
    done(page)
    body = {"query": "train to Vienna", "k": 5}
    for side, reasoning in (("off", False), ("on", 8)):
        expected = site.post("/v1/search", body | {"reasoning": reasoning}).json
        titles = page.locator(f"#{side} .title").all_text_contents()
        assert titles == [hit["title"] or hit["id"] for hit in expected["hits"]]
        figures = page.locator(f"#{side} .figures").text_content()
        assert re.match(r"[\d.]+ m?s \(model ", figures)
        usage = expected["usage"]
        assert f"{usage['prompt_tokens']} tokens read" in figures
        assert (f"{usage['completion_tokens']} written" in figures) == (side == "on")
        marks = page.locator(f"#{side} li", has_text="Vienna").locator("mark").all_text_contents()
        assert marks == ["train", "to", "Vienna"] or marks == ["train", "Vienna"]
        if reasoning:
            assert page.locator("#reasoning-text").text_content() == expected["reasoning"]["text"]
    left, right = (page.locator(f"#{side}").bounding_box() for side in ("off", "on"))
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]
    page.set_viewport_size({"width": 390, "height": 844})
    left, right = (page.locator(f"#{side}").bounding_box() for side in ("off", "on"))
    assert left["x"] == right["x"]
    assert left["y"] < right["y"]


def test_what_a_document_says_is_text_and_marks_stand_where_they_should(open_page, site: Running) -> None:
    page = open_page(site)
    page.fill("#k", "3")
    ask(page, "train says")
    done(page)
    item = page.locator("#off li", has_text="🚂")
    assert EVIL in item.locator(".title").text_content()
    assert EVIL in item.locator(".snippet").text_content()
    assert item.locator("mark").all_text_contents() == ["train", "says"]  # after a letter of two UTF-16 units
    assert page.locator("main script, main img").count() == 0
    bread = page.locator("#off li", has_text="Baking")
    short = bread.locator(".snippet").text_content()
    bread.locator(".title").click()
    assert bread.locator(".snippet").text_content().strip() == DOCUMENTS[1].text.strip()
    assert bread.locator(".title").get_attribute("aria-expanded") == "true"
    bread.locator(".title").click()
    assert bread.locator(".snippet").text_content() == short


def held_model(tiny: SearchR3) -> Held:
    """A model that, once armed, waits behind the fifth token that it reasons (a letter may need several tokens)."""
    written = 0

    def after(token: int) -> None:
        nonlocal written
        written += held.armed
        if written == 5:
            held._hold("token", [token])

    held = pausing(tiny, after)
    return held


def test_the_reasoning_is_seen_while_it_is_written_and_escape_stops_it(open_page, tiny, index) -> None:
    held = held_model(tiny)
    with running(lambda: Loaded.of(held, index)) as server:
        page = open_page(server)
        page.locator("#empty").wait_for()
        held.encode_query = tiny.encode_query  # type: ignore[method-assign]
        held.armed = True
        ask(page, "how does the train move")
        page.locator("#reasoning-text:not(:empty)").wait_for()
        assert page.locator("#off .title").count() == 3  # there already
        assert page.locator("#on .title").count() == 0
        assert page.locator("#reasoning").get_attribute("aria-busy") == "true"
        assert page.locator("#stop").is_visible()
        page.keyboard.press("Escape")
        says(page, "#status", "Stopped.")
        assert page.locator("#go").is_visible()
        assert page.locator("#problem").text_content() == ""
        assert page.evaluate("document.activeElement.id") == "question"
        eventually(lambda: server.service.in_flight == 0)  # the server was told
        held.gate.set()
        held.armed = False
        page.keyboard.press("Enter")
        done(page)
        assert page.locator("#on .title").count() == 3


def test_the_keyboard_is_enough(open_page, site: Running) -> None:
    page = open_page(site)
    ask(page, "bread")
    done(page)

    def here() -> str:
        return page.evaluate(
            "(e => e.id || e.closest('section').id + [...e.closest('ol').children].indexOf(e.closest('li')))"
            "(document.activeElement)"
        )

    seen = []
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "End", "Home", "ArrowUp"):
        page.keyboard.press(key)
        seen.append(here())
    assert seen == ["off0", "off1", "on1", "on0", "off0", "off2", "off0", "question"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#off .title").first.get_attribute("aria-expanded") == "true"
    page.keyboard.press("/")
    assert here() == "question"
    assert page.input_value("#question") == "bread"


def test_a_key_is_asked_for_and_kept_in_the_tab_only(open_page, tiny, index) -> None:
    with running(lambda: Loaded.of(tiny, index), api_keys=(KEY,)) as server:
        page = open_page(server, expected="401")
        ask(page, "train")
        page.locator("#key-form").wait_for()
        assert "API key" in page.locator("#problem").text_content()
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        says(page, "#problem", "not known")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        done(page)
        assert page.locator("#key-form").is_hidden()
        assert page.locator("#problem").text_content() == ""
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [[KEY], [], ""]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_said_plainly_and_can_be_asked_again(open_page, site: Running, status: int) -> None:
    page = open_page(site, expected=str(status))
    body = '{"error": {"message": "256 requests are in hand; try again later", "code": "queue_full"}}'
    page.route("**/v1/search", lambda route: route.fulfill(status=status, headers={"Retry-After": "7"}, body=body))
    ask(page, "train")
    page.locator("#again").wait_for()
    assert page.locator("#problem").text_content() == (
        "256 requests are in hand; try again later (in about 7 seconds)."
    )
    page.unroute("**/v1/search")
    page.click("#again")
    done(page)
    assert page.locator("#problem").text_content() == ""
    assert page.locator("#again").is_hidden()


@pytest.mark.parametrize(
    ("answer", "said"),
    [({"body": 'event: reasoning\ndata: {"text": "a"}\n\n'}, "The connection ended before the answer came."),
     ({"body": 'event: error\ndata: {"error": {"message": "no <b>time</b>"}}\n\n'}, "No <b>time</b>."),
     ({"status": 502, "body": "<html>"}, "The server answered 502."),
     (None, "The server cannot be reached; is search-r3 serve still running?")],
)  # fmt: skip
def test_every_failure_is_one_plain_line(open_page, site: Running, answer: dict | None, said: str) -> None:
    page = open_page(site, expected="502|ERR_FAILED")
    page.route("**/v1/search", lambda route: route.fulfill(**answer) if answer else route.abort())
    ask(page, "train")
    page.locator("#again").wait_for()
    assert page.locator("#problem").text_content() == said


def test_what_cannot_be_asked_is_not_sent(open_page, site: Running) -> None:
    page = open_page(site)
    page.route("**/v1/search", lambda route: pytest.fail("it was sent"))
    ask(page, "  ")
    assert page.locator("#status").text_content() == "Type a question first."
    page.fill("#k", "0")
    page.fill("#question", "train")
    page.press("#question", "Enter")
    assert page.locator("#problem").text_content() == "Results: give a whole number from 1 to 50."


def test_budgets_are_those_that_the_server_allows(open_page, tiny, index) -> None:
    with running(lambda: Loaded.of(tiny, index), reasoning_tokens=16, max_reasoning_tokens=20) as server:
        page = open_page(server)
        page.locator("#empty").wait_for()
        assert page.locator("#budget option").all_text_contents() == ["up to 8 tokens", "up to 16 tokens"]
        assert page.input_value("#budget") == "16"


def test_a_server_without_an_index_says_how_to_start_one_with(open_page, tiny) -> None:
    with running(lambda: Loaded.of(tiny)) as server:
        page = open_page(server)
        page.locator("#no-index").wait_for()
        assert "search-r3 serve notes-index" in page.locator("#no-index pre").text_content()
        assert page.locator("#ask").is_hidden()


def test_it_is_accessible_fits_its_screen_and_keeps_the_chosen_colours(open_page, site: Running, barriers) -> None:
    page = open_page(site, color_scheme="light", bypass_csp=True)  # axe is put into the page as a script
    ask(page, "train says")
    done(page)
    page.locator("#off .title").nth(1).click()
    page.evaluate("document.getElementById('key-form').hidden = false")
    page.evaluate("document.getElementById('no-index').hidden = false")
    page.evaluate("document.getElementById('problem').textContent = 'Something is wrong.'")
    ground = "getComputedStyle(document.body).backgroundColor"
    for width in (320, 360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert barriers(page) == []
    light = page.evaluate(ground)
    page.click("#theme")
    dark = page.evaluate(ground)
    assert dark != light
    page.set_viewport_size({"width": 360, "height": 900})
    boxes = "[...document.querySelectorAll('.options > select, .options > input')].map(box => box.offsetWidth)"
    assert len(set(page.evaluate(boxes))) == 1  # on a phone the options stand under each other, all as wide
    assert barriers(page) == []
    page.reload()
    assert page.evaluate(ground) == dark
    page.click("#theme")
    page.emulate_media(color_scheme="dark")  # what a reader chooses stays, whatever the system prefers
    assert page.evaluate(ground) == light
    page.evaluate("localStorage.clear()")
    page.reload()
    assert page.evaluate(ground) == dark
