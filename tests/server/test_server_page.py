"""The web page in a real browser: it asks, streams, shows both sides, stops, escapes, and says plainly what fails."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

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
        # Chromium may send a request past a route that was set just before it, on a busy machine: the first route
        # switches its interception on, so it is set, for an address that is never asked for, before anything is loaded.
        page.route("**/interception-on", lambda route: route.abort())
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


def test_a_field_that_is_being_filled_in_keeps_the_focus_when_the_page_is_ready(site: Running, browser: Any) -> None:
    page = browser.new_page()
    page.route("**/openapi.json", lambda route: (page.focus("#k"), route.continue_()))
    page.goto(site.url)
    page.locator("#empty").wait_for()
    assert page.evaluate("document.activeElement.id") == "k"
    page.unroute("**/openapi.json")
    page.reload()
    page.locator("#empty").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"
    page.close()


def test_files_are_sent_with_a_policy_that_lets_nothing_else_run(site: Running) -> None:
    scripts = [f"/{file.name}" for file in sorted(PAGE.glob("*.js")) if file.name != "api.js"]  # that of /docs
    assert "/page.js" in scripts
    files = [("/", ".html"), ("/style.css", ".css"), ("/icon.svg", ".svg"), *((script, ".js") for script in scripts)]
    assert sum(len(site.ask("GET", path).body) for path, _ in files) <= 45_000
    for path, kind in files:
        answer = site.ask("GET", path)
        assert answer.status == 200
        assert answer.headers["content-type"] == TYPES[kind]
        assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|https?://", (PAGE / "index.html").read_text())
    for script in scripts:
        text = (PAGE / script[1:]).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://", text)


def test_a_question_is_answered_both_ways_with_what_the_server_says(open_page, site: Running) -> None:
    page = open_page(site)
    page.select_option("#budget", "8")
    page.select_option("#view", "side")
    ask(page, "train to Vienna")
    done(page)
    body = {"query": "train to Vienna", "k": 5}
    for side, reasoning in (("off", False), ("on", 8)):
        expected = site.post("/v1/search", body | {"reasoning": reasoning}).json
        titles = page.locator(f"#{side} .title").all_text_contents()
        assert titles == [hit["title"] or hit["id"] for hit in expected["hits"]]
        figures = page.locator(f"#{side} .figures").text_content()
        assert re.match(r"[\d.]+\sm?s \(model ", figures)
        usage = expected["usage"]
        assert f"{usage['prompt_tokens']} tokens read" in figures
        assert (f"{usage['completion_tokens']} written" in figures) == (side == "on")
        marks = page.locator(f"#{side} li", has_text="Vienna").locator("mark:not(.thought)").all_text_contents()
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


def test_one_list_says_why_each_hit_is_there_and_what_reasoning_changed(open_page, site: Running) -> None:
    page = open_page(site)
    ask(page, "train to Vienna")
    done(page)
    body = {"query": "train to Vienna", "k": 5}
    off, on = (site.post("/v1/search", body | {"reasoning": reasoning}).json["hits"] for reasoning in (False, 32))
    assert page.locator("#one .title").all_text_contents() == [hit["title"] or hit["id"] for hit in on]
    assert page.locator("#columns").is_hidden()
    for hit, why in zip(on, page.locator("#one .why").all(), strict=True):
        says_meaning = f"meaning #{hit['ranks']['vector']} · cosine {hit['scores']['vector']:.2f}"
        assert why.locator(".meaning").text_content() == says_meaning
        words = why.locator(".words").all_text_contents()
        assert words == (
            [f"words #{hit['ranks']['text']} · {hit['scores']['text']:.1f}"] if "text" in hit["ranks"] else []
        )
        assert why.get_attribute("title") == f"score {hit['score']:.4f}"
    before, after = ([hit["id"] for hit in hits] for hits in (off, on))
    moved = page.locator("#one .moved").count()
    assert moved == sum(before.index(name) != rank for rank, name in enumerate(after))
    if before == after:
        assert page.locator("#verdict").text_content() == "Reasoning changed nothing in the first 3."


def hit(name: str, **ranks: int) -> dict[str, Any]:
    """A hit as the API gives it."""
    return {
        "id": name, "document": name, "title": name, "text": f"{name} text", "snippet": f"{name} text",
        "highlights": [], "snippet_line": 1, "score": 0.5, "metadata": {}, "path": f"{name}.md", "start_line": 1,
        "end_line": 1, "ranks": ranks or {"vector": 1}, "scores": dict.fromkeys(ranks or {"vector": 1}, 0.5),
    }  # fmt: skip


def give(page: Any, off: list[dict[str, Any]], on: list[dict[str, Any]], **more: Any) -> None:
    """Answer searches with these hits, directly and with reasoning."""

    def answer(route: Any) -> None:
        asked = route.request.post_data_json
        direct = asked["reasoning"] is False and not asked.get("read")
        trace = None if direct else {"text": "of trains", "num_tokens": 3, "forced": False}
        usage = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
        result = {"hits": off if direct else on, "reasoning": trace, "timings": {"reason_ms": 1, "search_ms": 1},
                  "usage": usage} | more  # fmt: skip
        route.fulfill(body=f"event: result\ndata: {json.dumps(result)}\n\n", content_type="text/event-stream")

    page.route("**/v1/search", answer)


@pytest.mark.parametrize(
    ("off", "on", "said", "moves"),
    [("abc", "abc", "Reasoning changed nothing in the first 3.", []),
     ("abc", "acb", "Reasoning: 2 moved, the first place kept.", ["▲ from 3", "▼ from 2"]),
     ("abc", "bxa", "Reasoning: 1 new, 1 gone, 2 moved, the first place changed.",
      ["▲ from 2", "new", "▼ from 1", "gone, was 3"]),
     ("abc", "abx", "Reasoning: 1 new, 1 gone, the first place kept.", ["new", "gone, was 3"])],
)  # fmt: skip
def test_the_verdict_names_what_changed(open_page, site: Running, off: str, on: str, said: str, moves: list) -> None:
    page = open_page(site)
    give(page, [hit(name) for name in off], [hit(name) for name in on])
    ask(page, "anything")
    done(page)
    assert page.locator("#verdict").text_content() == said
    assert page.locator("#one .moved").all_text_contents() == moves
    assert page.locator("#reasoning-end").text_content() == "3 tokens, finished by itself."


ABOUT = {"marks": [], "snippet_marks": [], "snippet_span": [0, 6], "weak": False, "same": []}


def explain(*hits: dict[str, Any], missing: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the API says of hits, each of which differs from `ABOUT` as given."""
    return {"hits": [ABOUT | one for one in hits], "floor": 0.6, "missing_words": list(missing)}


def test_what_fits_badly_is_said_and_equal_passages_are_one_hit(open_page, site: Running) -> None:
    page = open_page(site)
    places = [{"id": f"{name}#1", "document": name, "path": f"{name}.md", "start_line": 3} for name in "xyzw"]
    both = explain({"weak": True, "same": places}, {"weak": True}, missing=("zxqv", "wvut"))
    give(page, [hit("a"), hit("b")], [hit("a"), hit("b")], explanation=both)
    ask(page, "zxqv wvut a")
    done(page)
    assert page.locator("#absent").text_content() == "Nothing here matches well. In no document: zxqv, wvut."
    assert page.locator("#one li.weak").count() == 2
    assert page.locator("#one .same summary").text_content() == "+4 documents with the same text"
    page.click("#one .same summary")
    assert page.locator("#one .same .place").all_text_contents() == ["x.md:3", "y.md:3", "z.md:3", "w.md:3"]
    page.unroute("**/v1/search")
    ask_again(page, "train")
    done(page)
    assert page.locator("#absent").text_content() == ""


@pytest.mark.parametrize(
    ("normalized", "said"),
    [("what is the train", "Searched by meaning as: what is the train"), ("Waht is the trian", ""), (None, "")],
)
def test_a_question_whose_typos_were_corrected_is_shown_as_it_was_embedded(
    open_page, site: Running, normalized: str | None, said: str
) -> None:
    page = open_page(site)
    give(page, [hit("a")], [hit("a")], query="waht is the trian", normalized_query=normalized)
    ask(page, "waht is the trian")
    done(page)
    assert page.locator("#searched").text_content() == said
    assert page.locator("#searched").is_visible() == bool(said)
    assert page.title() == "waht is the trian · Search-R3"


def test_a_heading_that_the_title_repeats_is_no_gap_and_begins_a_line(open_page, site: Running) -> None:
    page = open_page(site)
    text, shown = "# Minutes\n\nIt was set aside.\n2 June\nsoon", "It was set aside.\n2 June\nsoon"
    found = [hit(name) | {"title": title, "text": text, "snippet": shown} for name, title in
             (("a", "Notes > Minutes"), ("b", "Notes"))]  # fmt: skip
    about = {"snippet_span": [text.index("It"), len(text)]}
    give(page, found, found, explanation=explain(about, about))
    ask(page, "anything")
    done(page)
    snippets = page.locator("#one .snippet").all_text_contents()
    assert snippets == ["It was set aside.\n2 June soon", "… It was set aside.\n2 June soon"]


def test_a_hit_of_a_file_with_pages_shows_its_page(open_page, site: Running) -> None:
    page = open_page(site)
    paged = {"path": "report.pdf", "start_line": 0, "end_line": 0, "snippet_line": 0, "metadata": {"page": 12}}
    found = [hit("a") | paged, hit("b") | paged | {"path": "corpus.jsonl"}]
    give(page, found, found, explanation=explain({}, {}))
    ask(page, "a")
    done(page)
    first, second = page.locator("#one li").all_text_contents()
    assert "report.pdf, page 12" in first
    assert "corpus.jsonl" in second
    assert "page 12" not in second


def test_marks_tell_the_words_of_the_question_from_those_of_the_reasoning(open_page, site: Running) -> None:
    page = open_page(site)
    found = hit("a") | {"text": "Before. 🚂 trains and rails. After.", "snippet": "🚂 trains and rails."}
    marks = [[2, 8, "question"], [13, 18, "reasoning"]]
    about = {"snippet_marks": marks, "marks": [[a + 8, b + 8, kind] for a, b, kind in marks], "snippet_span": [8, 27]}
    give(page, [found], [found], explanation=explain(about))
    ask(page, "trains")
    done(page)
    snippet = page.locator("#one .snippet")
    assert snippet.text_content() == "… 🚂 trains and rails. …"
    for _ in range(2):  # in the snippet, and in the whole passage
        assert page.locator("#one mark:not(.thought)").all_text_contents() == ["trains"]
        assert page.locator("#one mark.thought").all_text_contents() == ["rails"]
        page.click("#one .title")
    page.click("#one .title")
    assert page.locator("#one .snippet").text_content() == found["text"]


def test_an_opened_passage_shows_how_its_neighbors_end_and_begin(open_page, tiny, tmp_path) -> None:
    text = "".join(f"# The {word}\n\n{f'Some {word} is here. ' * 21}\n\n" for word in ("flour", "yeast", "oven"))
    document = SourceDocument("baker's", "Baking", text, path="baking.md", kind="markdown", line=1)
    build_index(tmp_path / "bread.index", [document], tiny, progress=False)
    with running(lambda: Loaded.of(tiny, SearchIndex.open(tmp_path / "bread.index"))) as server:
        page = open_page(server)
        page.select_option("#mode", "text")
        ask(page, "yeast")
        page.click("#one .title")
        before, after = page.locator("#one .beside").all()
        eventually(lambda: before.text_content() and after.text_content())
        assert before.text_content().startswith("… ")
        assert before.text_content().strip().endswith("Some flour is here.")
        assert len(before.text_content()) <= 242
        assert after.text_content().startswith("# The oven")
        assert after.text_content().endswith(" …")


def test_a_question_of_which_only_a_part_was_read_says_so(open_page, site: Running) -> None:
    page = open_page(site)
    usage = {"prompt_tokens": 200, "completion_tokens": 3, "total_tokens": 203, "truncated_texts": 1}
    give(page, [hit("a")], [hit("a")], usage=usage)
    ask(page, "anything")
    done(page)
    assert page.locator("#status").text_content().endswith("Only the first 200 tokens of the question were read.")


def test_a_question_in_japanese_is_marked_in_whole_words(open_page, tiny, tmp_path) -> None:
    document = SourceDocument("memo", "メモ", "検索エンジンは文書を探します。", path="メモ.md", kind="markdown", line=1)
    build_index(tmp_path / "memos", [document], tiny, progress=False)
    with running(lambda: Loaded.of(tiny, SearchIndex.open(tmp_path / "memos"))) as server:
        page = open_page(server)
        ask(page, "検索エンジンの使い方")
        done(page)
        assert page.locator("#one .snippet").text_content() == document.text
        assert page.locator("#one mark:not(.thought)").all_text_contents() == ["検索エンジン"]
        assert address(page) == {"q": "検索エンジンの使い方"}


def test_a_thousand_hits_are_one_list_that_the_keyboard_goes_through(open_page, site: Running) -> None:
    page = open_page(site)
    hits = [hit(f"h{number}") for number in range(1000)]
    give(page, hits, hits)
    page.fill("#k", "1000")
    ask(page, "anything")
    done(page)
    assert page.locator("#one .title").count() == 1000
    assert page.locator("#more").is_hidden()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "h999"


def test_the_nearest_sentence_is_tinted(open_page, site: Running) -> None:
    page = open_page(site)
    found = hit("a") | {"text": "One fish. Two birds! Three", "snippet": "One fish. Two birds! Three"}
    give(page, [found], [found], explanation=explain({}))
    asked: list[Any] = []

    def embed(route: Any) -> None:
        body = route.request.post_data_json
        asked.append(body["input"])
        vectors = [[0.0, 1.0]] if body.get("input_type") else [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]
        data = [{"embedding": base64.b64encode(struct.pack("<2f", *vector)).decode()} for vector in vectors]
        route.fulfill(json={"data": data})

    page.route("**/v1/embeddings", embed)
    ask(page, "birds")
    page.locator("#one .near").wait_for()
    assert asked == ["birds", ["One fish. ", "Two birds! ", "Three"]]
    assert page.locator("#one .near").text_content() == "Two birds! "


def test_own_words_are_read_in_place_of_the_reasoning(open_page, site: Running) -> None:
    page = open_page(site)
    page.locator("#empty").wait_for()
    assert page.locator("#given").is_hidden()
    page.select_option("#budget", "given")
    ask(page, "train")
    assert page.locator("#problem").text_content() == "Write your own reasoning, or choose another kind."
    page.fill("#given", "railways, Austria")
    page.keyboard.press("Enter")
    done(page)
    assert address(page) == {"q": "train", "budget": "given", "given": "railways, Austria"}
    assert page.locator("#reasoning-title").text_content() == "Your reasoning"
    assert page.locator("#reasoning-text").text_content() == "railways, Austria"
    assert page.locator("#reasoning-end").text_content().endswith("given by you.")
    page.reload()
    done(page)
    assert page.locator("#given").is_visible()
    assert page.locator("#reasoning-text").text_content() == "railways, Austria"


def test_what_was_read_is_shown(open_page, site: Running) -> None:
    page = open_page(site)
    titled = {"id": "a#1", "document": "a", "title": "Railways", "text": "Railways\n\nTrains run on rails."}
    untitled = {"id": "b", "document": "b", "title": "", "text": "Rails are long. " * 12}
    give(page, [hit("a"), hit("b")], [hit("b"), hit("c")], reasoning=None, read=[titled, untitled])
    offer(page, "read")
    page.select_option("#view", "side")
    ask(page, "anything")
    says(page, "#status", "with it in")
    first, second = page.locator("#read li").all_text_contents()
    assert first == "Railways Trains run on rails."  # its title once, and no ellipsis
    assert second == "b " + untitled["text"][:120] + "…"
    assert page.locator("#reasoning-title").text_content() == "Passages read"
    assert page.locator("#reasoning-text").bounding_box()["height"] == 0
    assert page.locator("#verdict").text_content() == "Reading: 1 new, 1 gone, 1 moved, the first place changed."
    assert page.locator("#columns h2").all_text_contents() == ["Without reading", "With reading"]
    assert page.locator("#status").text_content().startswith("2 results without reading in ")


def offer(page: Any, kind: str) -> None:
    """Choose a kind of reasoning that the tiny model does not have."""
    page.locator("#empty").wait_for()
    page.evaluate(f"document.getElementById('budget').add(new Option('{kind}', '{kind}'))")
    page.select_option("#budget", kind)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("latent", "In steps that have no words."), ("auto", "The model's rule did not expect reasoning to help here.")],
)
def test_reasoning_without_words_says_why_none_is_shown(open_page, site: Running, kind: str, said: str) -> None:
    page = open_page(site)
    give(page, [hit("a")], [hit("a")], reasoning=None)
    offer(page, kind)
    ask(page, "anything")
    done(page)
    assert page.locator("#reasoning-end").text_content() == said
    assert page.locator("#reasoning-text").bounding_box()["height"] == 0
    verdict = page.locator("#verdict").text_content()
    assert verdict == ("" if kind == "auto" else "Reasoning changed nothing in the first 1.")


def test_a_search_that_finds_nothing_says_so_in_one_line_and_what_to_try(open_page, site: Running) -> None:
    page = open_page(site)
    page.select_option("#mode", "text")
    ask(page, "zxqv")
    says(page, "#status", "0 results in")
    nothing = page.locator("#one .none")
    assert nothing.text_content() == "Nothing was found. No passage has these words: search by meaning."
    assert nothing.bounding_box()["height"] < 60
    give(page, [], [])
    page.evaluate("document.getElementById('folder').add(new Option('away/', 'away/'))")
    page.evaluate("document.getElementById('folder').value = 'away/'")
    page.select_option("#mode", "hybrid")
    done(page)
    assert nothing.text_content() == "Nothing was found. Search all folders and kinds of files."


def test_remembered_reasoning_says_what_it_once_took(open_page, site: Running) -> None:
    page = open_page(site)
    give(page, [hit("a")], [hit("a")], remembered_ms=2345.6)
    ask(page, "anything")
    done(page)
    assert page.locator("#reasoning-end").text_content() == (
        "3 tokens, finished by itself. Remembered from an earlier question: writing it took 2.3\xa0s."
    )
    assert page.locator("#status").text_content().endswith(" (remembered).")


def address(page: Any) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(page.url).query))


def test_the_address_holds_the_question_so_that_back_and_reload_work(open_page, site: Running) -> None:
    page = open_page(site)
    page.fill("#k", "2")
    page.select_option("#mode", "vector")
    ask(page, "train to Vienna")
    done(page)
    assert address(page) == {"q": "train to Vienna", "k": "2", "mode": "vector"}
    assert page.title() == "train to Vienna · Search-R3"
    ask_again(page, "bread")
    assert page.title() == "bread · Search-R3"
    page.go_back()
    eventually(lambda: page.title().startswith("train"))
    done(page)
    assert page.input_value("#question") == "train to Vienna"
    page.reload()
    done(page)
    assert page.locator("#one .title").count() >= 2
    assert (page.input_value("#k"), page.input_value("#mode")) == ("2", "vector")
    page.go_back()
    page.locator("#empty").wait_for()
    assert page.input_value("#question") == ""
    assert page.title() == "Search-R3"


def ask_again(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.keyboard.press("Enter")
    eventually(lambda: page.title().startswith(question))
    page.locator("#go:visible").wait_for()


def test_a_search_by_words_only_reasons_nothing(open_page, site: Running) -> None:
    page = open_page(site)
    page.select_option("#mode", "text")
    ask(page, "flour")
    says(page, "#status", "1 result in")
    assert page.locator("#reasoning").is_hidden()
    assert page.locator("#verdict").is_hidden()
    assert page.locator("#one .title").all_text_contents() == ["Baking"]


def test_the_empty_page_says_what_is_indexed_and_offers_questions(open_page, tiny, tmp_path) -> None:
    documents = [
        SourceDocument(f"{folder}/{name}", title, f"Text about {name}.", path=f"{folder}/{name}")
        for folder, name, title in [
            ("docs", "a.md", "Guide > How to bake bread"), ("docs", "b.md", "Guide > Trains to other countries"),
            ("src", "c.py", "c.py main"), ("src", "d.md", "What the license says"),
        ]
    ]  # fmt: skip
    build_index(tmp_path / "notes.index", documents, tiny, progress=False)
    with running(lambda: Loaded.of(tiny, SearchIndex.open(tmp_path / "notes.index"))) as server:
        page = open_page(server)
        page.locator("#examples button").first.wait_for()
        assert page.locator("#indexed").text_content().startswith("notes.index: 4 documents in 4 passages, made on ")
        questions = page.locator("#examples button").all_text_contents()
        assert sorted(questions) == ["How to bake bread", "Trains to other countries", "What the license says"]
        assert page.locator("#folder option").all_text_contents() == ["all folders", "docs/ (2)", "src/ (2)"]
        page.locator("#examples button", has_text="bake bread").click()
        done(page)
        assert address(page) == {"q": "How to bake bread"}
        page.select_option("#folder", "src/")
        page.wait_for_url("**folder=src*")
        done(page)
        eventually(lambda: page.locator("#one .title").count() == 2)
        page.select_option("#type", ".py")
        eventually(lambda: page.locator("#one .title").count() == 1)
        assert address(page) == {"q": "How to bake bread", "folder": "src/", "type": ".py"}


def test_one_of_several_indexes_is_chosen_on_the_page_and_in_the_address(open_page, tiny, index, tmp_path) -> None:
    paths = ["docs/a.md", "src/b.md"]
    documents = [SourceDocument(path, "Where the boats go", f"Boats of {path}.", path=path) for path in paths]
    build_index(tmp_path / "boats", documents, tiny, progress=False)
    indexes = {"trains": index, "boats": SearchIndex.open(tmp_path / "boats")}
    with running(lambda: Loaded.of(tiny, indexes)) as server:
        page = open_page(server)
        page.locator("#empty").wait_for()
        assert page.locator("#index option").all_text_contents() == ["trains", "boats"]
        says(page, "#indexed", "trains: 3 documents")
        page.select_option("#index", "boats")
        says(page, "#indexed", "boats: 2 documents")
        assert page.locator("#examples button").all_text_contents() == ["Where the boats go"]
        assert address(page) == {"index": "boats"}
        ask(page, "who needs flour")
        done(page)
        assert sorted(page.locator("#one .place").all_text_contents()) == ["docs/a.md:1", "src/b.md:1"]
        page.select_option("#folder", "src/")
        eventually(lambda: page.locator("#one .title").count() == 1)
        page.reload()
        done(page)
        assert address(page) == {"q": "who needs flour", "index": "boats", "folder": "src/"}
        page.select_option("#index", "trains")
        eventually(lambda: page.locator("#one .title").count() == 3)
        assert address(page) == {"q": "who needs flour"}  # the folder belonged to the other index
        page.locator("#folder").wait_for(state="hidden")
        page.go_back()
        eventually(lambda: page.locator("#one .title").count() == 1)
        assert page.input_value("#index") == "boats"


def test_the_picker_of_indexes_is_shown_only_where_there_are_several(open_page, site: Running) -> None:
    page = open_page(site)
    ask(page, "train")
    done(page)
    assert page.locator("#index").is_hidden()
    assert address(page) == {"q": "train"}


def test_results_stay_while_the_server_is_away(open_page, site: Running) -> None:
    page = open_page(site)
    ask(page, "train")
    done(page)
    page.evaluate("() => { window.usual = fetch; window.fetch = async () => { throw new TypeError('no answer'); }; }")
    for press in (lambda: page.keyboard.press("Enter"), lambda: page.click("#again")):
        press()
        page.locator("#again").wait_for()
        assert page.locator("#one .title").count() == 3
        assert "stale" in page.locator("#results").get_attribute("class")
    page.evaluate("() => { window.fetch = window.usual; }")
    page.click("#again")
    done(page)
    assert page.locator("#results").get_attribute("class") == ""


def test_more_results_are_a_click_away(open_page, site: Running) -> None:
    page = open_page(site)
    page.fill("#k", "2")
    ask(page, "train")
    done(page)
    assert page.locator("#more").text_content() == "Show 5 more"
    page.click("#more")
    eventually(lambda: page.locator("#one .title").count() >= 3)
    assert address(page)["k"] == "7"
    page.locator("#more").wait_for(state="hidden")


def test_a_phone_shows_the_first_hit_without_scrolling(open_page, site: Running) -> None:
    page = open_page(site, viewport={"width": 390, "height": 844})
    ask(page, "train")
    done(page)
    assert page.locator("#budget").is_hidden()
    assert page.locator("#one .title").first.bounding_box()["y"] < 500
    page.click("summary")
    assert page.locator("#budget").is_visible()


def test_what_a_document_says_is_text_and_marks_stand_where_they_should(open_page, site: Running) -> None:
    page = open_page(site)
    page.fill("#k", "3")
    ask(page, "train says")
    done(page)
    item = page.locator("#one li", has_text="🚂")
    assert EVIL in item.locator(".title").text_content()
    assert EVIL in item.locator(".snippet").text_content()
    assert item.locator("mark:not(.thought)").all_text_contents() == [
        "train",
        "says",
    ]  # after a letter of two UTF-16 units
    assert page.locator("main script, main img").count() == 0
    bread = page.locator("#one li", has_text="Baking")
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
        assert page.locator("#one .title").count() == 3  # there already
        assert page.locator("#verdict").is_hidden()
        assert page.locator("#reasoning").get_attribute("aria-busy") == "true"
        assert page.locator("#stop").is_visible()
        page.keyboard.press("Escape")
        says(page, "#status", "Stopped. The results are without reasoning.")
        assert page.locator("#go").is_visible()
        assert page.locator("#problem").text_content() == ""
        assert page.evaluate("document.activeElement.id") == "question"
        eventually(lambda: server.service.in_flight == 0)  # the server was told
        held.gate.set()
        held.armed = False
        page.keyboard.press("Enter")
        done(page)
        assert page.locator("#verdict").is_visible()


def test_the_keyboard_is_enough(open_page, site: Running) -> None:
    page = open_page(site)
    page.select_option("#view", "side")
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
        assert page.locator("#problem").text_content() == "This server wants a key: paste it below."
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
    assert page.locator("#problem").text_content() == "Results: give a whole number from 1 to 1,000."


def test_budgets_are_those_that_the_server_allows(open_page, tiny, index) -> None:
    with running(lambda: Loaded.of(tiny, index), reasoning_tokens=16, max_reasoning_tokens=20) as server:
        page = open_page(server)
        page.locator("#empty").wait_for()
        assert page.locator("#budget option").all_text_contents() == [
            "up to 8 tokens",
            "up to 16 tokens",
            "my own words",
            "none",
        ]
        assert page.input_value("#budget") == "16"


def test_a_server_without_an_index_says_how_to_start_one_with(open_page, tiny) -> None:
    with running(lambda: Loaded.of(tiny)) as server:
        page = open_page(server)
        page.locator("#no-index").wait_for()
        assert "search-r3 serve notes-index" in page.locator("#no-index pre").text_content()
        assert page.locator("#ask").is_hidden()
        page.set_viewport_size({"width": 390, "height": 844})
        clipped = "(e => e.scrollWidth > e.clientWidth)(document.querySelector('#no-index pre'))"
        assert not page.evaluate(clipped)


def test_it_is_accessible_fits_its_screen_and_keeps_the_chosen_colours(open_page, site: Running, barriers) -> None:
    page = open_page(site, color_scheme="light", bypass_csp=True)  # axe is put into the page as a script
    ask(page, "train says")
    done(page)
    page.locator("#one .title").nth(1).click()
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
    page.click("summary")
    shown = "[...document.querySelectorAll('.options select, .options input')].map(box => box.offsetWidth)"
    boxes = f"{shown}.filter(width => width > 0)"
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
