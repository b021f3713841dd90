"""No chunk is longer than the model reads, no heading is alone, and no two chunks have the same id."""

import base64
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index, update_documents
from search_r3.index.build.embedding import prepare
from search_r3.index.chunking.chunk_ids import chunk_id
from search_r3.index.chunking.chunker import chunk_document, content_of
from search_r3.index.chunking.token_limit import TokenLimit
from search_r3.index.results.query_words import composed

KINDS = ["record", "markdown", "rst", "python", "code", "text"]
WORDS = re.split(" ", "the fee for a boat of twelve meters is paid in the office at the end of the pier before noon")
PARAGRAPH = " ".join(WORDS[i % len(WORDS)] for i in range(190)) + "."


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def bytes_limit():
    """A byte is a token: the worst that a byte-level tokenizer can do."""
    return TokenLimit(64, lambda texts: [len(text.encode("utf-8", "replace")) for text in texts])


def without_space(text):
    return "".join(text.split())


def contents(chunks):
    return [content_of(chunk.title, chunk.text).strip() for chunk in chunks]


FIGURES = ",".join(f"{i * 0.4817 % 1:.4f},{12.903 + i:.3f}" for i in range(90))
FUNCTION = "def tariff(boat):\n" + "".join(
    f"    table[{i}] = boat.length_{i} * 0.{i:04d} + offsets['{i:x}'][-{i}]  # {i}\n" for i in range(40)
)
LONG_TEXTS = {
    "figures": ("record", FIGURES),
    "a table": ("markdown", "# Figures\n\n" + "\n".join(f"| {i} | 0.{i:04d} | {i * i} |" for i in range(100))),
    "a function": ("python", FUNCTION + "    return 'the harbor master signs on Thursdays'\n"),
    "chinese": ("text", "港の料金は午前中に事務所で支払う必要があります。" * 40),
    "thai": ("record", "ค่าธรรมเนียมท่าเรือต้องชำระก่อนเที่ยง" * 30),
    "base64": ("record", base64.b64encode(random.Random(0).randbytes(7500)).decode()),
    "minified": ("code", "!function(e,t){" + "".join(f"e[{i}]=t({i}<<2|{i ^ 5});" for i in range(500)) + "}(a,b);"),
    "hex dump": ("text", "\n".join(random.Random(i).randbytes(16).hex(" ") for i in range(60))),
    "one line": ("markdown", "# Data\n\n" + "x9Q" * 3400),
    "emoji": ("text", "👩‍👩‍👧‍👦🏳️‍🌈👍🏽" * 120),
    "blanks": ("text", "a" + " \t" * 2000 + "b"),
    "a long heading": ("markdown", "# " + "harbor 47 " * 300 + "\n\nThe fee is paid at noon."),
}


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("limit", [512, 128])
def test_all_of_a_long_text_is_within_what_the_model_reads(tiny, name, limit):
    kind, text = LONG_TEXTS[name]
    tokens = TokenLimit(limit, tiny.count_tokens)
    chunks = chunk_document(SourceDocument("d", "notes", text, kind=kind), tokens=tokens)
    assert len(chunks) > 1
    assert max(tiny.count_tokens(contents(chunks))) <= limit
    assert without_space("".join(chunk.text for chunk in chunks)) == without_space(text)
    assert prepare(tiny, contents(chunks), limit, 16_384, None).truncated == 0


def test_emoji_and_accents_are_not_cut_off_from_what_they_belong_to(bytes_limit):
    family, letter = "👩‍👩‍👧‍👦", "\u1eb9\u0301"
    for text, unit in ((family * 40, family), (letter * 200, letter), ("👍🏽" * 90, "👍🏽")):
        chunks = chunk_document(SourceDocument("d", "", text), tokens=bytes_limit)
        assert all(chunk.text.replace(unit, "") == "" for chunk in chunks)


def test_the_end_of_a_long_chunk_changes_an_embedding(tiny, tmp_path):
    """At f444c4d the embeddings with and without the last line were equal to the bit."""
    found = []
    for number, last in enumerate(("return 'the harbor master signs on Thursdays'", "return 'nobody knows'")):
        documents = [SourceDocument("tariff.py", "tariff.py", f"{FUNCTION}    {last}\n", kind="python")]
        report = build_index(tmp_path / str(number), documents, tiny, progress=False)
        assert report.truncated == 0
        rows = SearchIndex.open(tmp_path / str(number)).table.to_arrow().to_pylist()
        found.append({row["id"]: row["r3_vector"] for row in rows})
    last = max(found[0], key=lambda name: int(name.rsplit("#")[-1]))
    assert found[0][last] != found[1][last]


def test_max_length_makes_the_chunks_shorter(tiny, tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps({"id": "a", "title": "Fees", "text": PARAGRAPH}) + "\n")
    for limit in (512, 64):
        build_index(tmp_path / str(limit), [SourceDocument("a", "Fees", PARAGRAPH)], tiny, max_length=limit)
    counts = {
        limit: tiny.count_tokens(SearchIndex.open(tmp_path / str(limit)).table.to_arrow()["r3_content"].to_pylist())
        for limit in (512, 64)
    }
    assert max(counts[64]) <= 64
    assert len(counts[64]) > len(counts[512])


def test_a_long_title_leaves_room_for_the_text_and_loses_nothing(bytes_limit):
    title = "a title of many words about the fees of the harbor " * 3
    for text in ("", "short", PARAGRAPH):
        chunks = chunk_document(SourceDocument("d", title, text), tokens=bytes_limit)
        assert all(len(chunk.title) <= 32 for chunk in chunks)
        assert max(len(content) for content in contents(chunks)) <= 64
        assert without_space(chunks[0].title + "".join(c.text for c in chunks)) == without_space(title + text)
    path = "archive/2023/harbor office/minutes/of the meeting/fees.md"
    chunks = chunk_document(SourceDocument("d", path, PARAGRAPH, kind="text"), tokens=bytes_limit)
    assert {chunk.title for chunk in chunks} == {"…/of the meeting/fees.md"}


def test_a_title_that_fits_with_its_text_is_left_alone(bytes_limit):
    (chunk,) = chunk_document(SourceDocument("d", "t" * 50, "short"), tokens=bytes_limit)
    assert (chunk.id, chunk.title, chunk.text) == ("d", "t" * 50, "short")


MARKUP = ["# A", "## B ##", "Title", "=====", "---", "```", "def f():", "    return x", "# ----", "}", "</div>", ""]
TEXTS = ["  ", "a line of words here.", "word " * 30, "x" * 200, "東京は大きい。人口も多い。", "0.4817,12.903," * 20]
LINES = st.sampled_from([*MARKUP, *TEXTS, "👩‍👩‍👧‍👦" * 9, "\ufdfa" * 9])
TITLES = st.sampled_from(["", "T", "A > B " * 9])


@settings(max_examples=250, deadline=None)
@given(st.lists(LINES | st.text(max_size=40), max_size=25), st.sampled_from(KINDS), TITLES)
def test_whatever_the_document_all_of_it_is_within_the_limit(bytes_limit, fragments, kind, title):
    text = "\n".join(fragments)
    document = SourceDocument("d", title, text, kind=kind)
    chunks = chunk_document(document, target_words=20, max_words=40, tokens=bytes_limit)
    whole = (title if kind == "record" else "") + composed(text)
    kept = (chunks[0].title if kind == "record" else "") + "".join(chunk.text for chunk in chunks)
    assert without_space(kept) == without_space(whole)
    assert max(len(content.encode("utf-8", "replace")) for content in contents(chunks)) <= 64


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(LINES).map("\n".join))
def test_the_quick_answer_never_says_that_too_much_fits(tiny_count, text):
    assert TokenLimit(32, tiny_count).exceeded([text]) == [tiny_count([text])[0] > 32]


@pytest.fixture(scope="module")
def tiny_count(tiny):
    return tiny.count_tokens


def test_ordinary_texts_are_not_tokenized_to_be_measured(tiny):
    asked = []

    def count(texts):
        asked.extend(texts)
        return tiny.count_tokens(texts)

    tokens = TokenLimit(900, count)
    assert tokens.exceeded([PARAGRAPH]) == [False]
    assert all(len(text) < 30 for text in asked)
    asked.clear()
    assert tokens.exceeded([PARAGRAPH.replace("pier", "quay")] * 50) == [False] * 50
    assert len(asked) <= 2


def test_a_model_that_cannot_count_is_estimated_and_what_it_cuts_is_reported(model, tmp_path, capsys, monkeypatch):
    report = build_index(tmp_path / "a", [SourceDocument("a", "", FIGURES * 3)], model, progress=False)
    assert report.truncated == 0
    monkeypatch.setattr("search_r3.index.build.build_run.token_limit", lambda *_: None)
    report = build_index(tmp_path / "b", [SourceDocument("a", "", FIGURES * 2)], model, progress=False)
    assert report.truncated == report.embedded > 0


def test_the_command_warns_of_what_was_cut(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("search_r3.index.build.build_run.token_limit", lambda *_: None)
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps({"id": "a", "text": FIGURES}) + "\n")
    into = str(tmp_path / "index")
    assert main(["index", str(path), "--into", into, "--model", str(tiny_model)]) == 0
    assert "warning: 1 chunk is" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- headings

SECTIONS = f"# Harbor\n\n## Paying the fee\n\n{PARAGRAPH}\n\n{PARAGRAPH}\n\n## Empty\n"


def bare(text):
    """Whether there are only headings, rules, fences and closing marks."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    under = [bool(line) and set(line) <= set("=-~") for line in [*lines[1:], ""]]
    return all(
        line.startswith(("#", "</", "```")) or not any(c.isalnum() for c in line) or underlined
        for line, underlined in zip(lines, under, strict=True)
    )


BANNER = (
    f"    return '''{PARAGRAPH} {PARAGRAPH}'''\n\n\n# -----\n# Fees\n# -----\n\n\ndef g():\n    '''{PARAGRAPH}'''\n"
)
HEADED = {
    "one paragraph": ("markdown", f"# Paying the harbour fee\n\n{PARAGRAPH}\n"),
    "setext": ("markdown", f"Paying the harbour fee\n======================\n\n{PARAGRAPH}\n"),
    "rst": ("rst", f"=======\n Fees\n=======\n\nPaying\n------\n\n{PARAGRAPH}\n\nMore\n----\n\n{PARAGRAPH}\n"),
    "nested": ("markdown", f"# A\n\n## B\n\n### C\n\n{PARAGRAPH}\n"),
    "at the end": ("markdown", f"# A\n\n{PARAGRAPH}\n\n## See also\n"),
    "two at the end": ("markdown", f"# A\n\n{PARAGRAPH}\n\n## See also\n\n### Links\n\n---\n"),
    "empty between": ("markdown", f"# A\n\n{PARAGRAPH}\n\n## To do\n\n## Done\n\n{PARAGRAPH}\n"),
    "a rule below": ("markdown", f"# A\n\n---\n\n{PARAGRAPH}\n\n***\n\n# B\n\n```\n{PARAGRAPH}\n```\n"),
    "a huge line": ("markdown", f"# A\n{'x' * 9000}\n"),
    "a huge fence": ("markdown", f"# A\n\n```js\n{'x' * 9000}\n```\n"),
    "a banner": ("python", f"def f():\n{BANNER}"),
    "html": ("code", f"<div>\n<p>{PARAGRAPH}</p>\n\n<p>{PARAGRAPH}</p>\n\n</div>\n\n</body>\n"),
    "plain": ("text", f"Paying the harbour fee\n\n{PARAGRAPH}\n\nOPENING HOURS\n\n{PARAGRAPH}\n"),
    "a record": ("record", f"Paying the harbour fee\n\n{PARAGRAPH}\n\nHow do I pay?\n\n{PARAGRAPH}\n"),
}


@pytest.mark.parametrize("name", HEADED)
def test_a_heading_goes_with_the_text_below_it(tiny, name):
    kind, text = HEADED[name]
    for tokens in (None, TokenLimit(512, tiny.count_tokens), TokenLimit(96, tiny.count_tokens)):
        chunks = chunk_document(SourceDocument("d", "doc.md", text, kind=kind), tokens=tokens)
        assert not [chunk.text for chunk in chunks if bare(chunk.text)]
        assert not [chunk.text for chunk in chunks if len(chunk.text) < 30 and len(chunk.text.split("\n")) < 3]
        assert without_space("".join(chunk.text for chunk in chunks)) == without_space(text)
        lines = text.split("\n")
        for chunk in chunks if kind != "record" else ():
            assert chunk.text.split("\n")[0] in lines[chunk.start_line - 1]
            assert chunk.text.split("\n")[-1] in lines[chunk.end_line - 1]


def test_a_heading_with_one_paragraph_is_one_chunk():
    chunks = chunk_document(SourceDocument("d", "doc.md", HEADED["one paragraph"][1], kind="markdown"))
    assert [(c.id, c.title) for c in chunks] == [("d", "Paying the harbour fee")]


def test_every_chunk_of_a_section_knows_its_headings():
    chunks = chunk_document(SourceDocument("d", "doc.md", SECTIONS, kind="markdown"))
    assert [c.title for c in chunks] == ["Harbor > Paying the fee"] * 2
    assert chunks[0].text.startswith("# Harbor\n\n## Paying the fee\n\n")
    assert chunks[1].text.endswith("## Empty")


def test_a_document_of_headings_is_a_few_chunks():
    text = "".join(f"{'#' * (1 + i % 3)} Heading number {i}\n\n" for i in range(300))
    chunks = chunk_document(SourceDocument("d", "doc.md", text, kind="markdown"))
    assert len(chunks) <= 10
    assert min(len(chunk.text.split()) for chunk in chunks) > 80


def test_a_python_banner_goes_with_what_it_announces():
    kind, text = HEADED["a banner"]
    chunks = chunk_document(SourceDocument("d", "m.py", text, kind=kind))
    assert next(chunk.title for chunk in chunks if "# Fees" in chunk.text) == "m.py g"


def test_closing_marks_are_not_alone():
    text = (
        "function f() {\n" + "".join(f"  step({i}, 'words of the program here');\n" for i in range(80)) + "\n}\n\n});\n"
    )
    chunks = chunk_document(SourceDocument("d", "a.js", text, kind="code"))
    assert len(chunks) > 1
    assert "step" in chunks[-1].text
    assert "});" in chunks[-1].text


def test_no_chunk_of_markdown_has_only_headings_and_closing_tags():
    part = f"<details>\n<summary>More</summary>\n\n{PARAGRAPH}\n\n</details>\n\n"
    text = "".join(f"# Part {i}\n\n## Rooms\n\n{PARAGRAPH * (1 + i)}\n\n{part}" for i in range(6))
    chunks = chunk_document(SourceDocument("d", "d.md", f"{text}## What crosses the rooms\n", kind="markdown"))
    assert len(chunks) > 6
    for chunk in chunks:
        assert any(line and not line.startswith(("#", "<")) for line in chunk.text.splitlines()), chunk.text


# ---------------------------------------------------------------------------------------------------------------- ids


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(alphabet="p#10\n٣", max_size=6), st.integers(1, 12), max_size=30))
def test_ids_of_chunks_are_unique_for_any_ids_of_documents(counts):
    made = [chunk_id(name, number, count) for name, count in counts.items() for number in range(1, count + 1)]
    assert len(set(made)) == len(made)


def test_documents_may_be_called_like_chunks(model, tmp_path):
    texts = {"p": [PARAGRAPH] * 5, "p#1": ["an office at noon"], "p#1#1": ["a pier"], "p#2": [PARAGRAPH] * 3}
    documents = [SourceDocument(name, "", "\n\n".join(parts)) for name, parts in texts.items()]
    for order in (documents, documents[::-1]):
        path = tmp_path / order[0].id.replace("#", "-")
        report = build_index(path, order, model, progress=False)
        assert (report.documents, report.chunks) == (4, 10)
        index = SearchIndex.open(path)
        assert index.describe()["duplicate_ids"] == 0
        hit = index.search("office noon", model, mode="vector", k=1).hits[0]
        assert (hit.document, hit.text) == ("p#1", "an office at noon")
        assert update_documents(path, order[1:], model, source="documents").unchanged == report.chunks - (
            5 if order[0].id == "p" else 3
        )


@pytest.mark.parametrize("other", ["x", PARAGRAPH + "\n\n" + PARAGRAPH], ids=["short", "long"])
@pytest.mark.parametrize("commit_every", [None, 1])
def test_only_an_id_that_comes_twice_is_reported(model, tmp_path, other, commit_every):
    documents = [SourceDocument("p", "", "x"), SourceDocument("q", "", "y"), SourceDocument("p", "", other)]
    with pytest.raises(InputError, match='the id "p" is used twice'):
        build_index(tmp_path / "index", documents, model, progress=False, commit_every=commit_every)


def test_rows_of_an_older_index_get_ids_that_no_chunk_can_replace(model, tmp_path):
    """Older versions gave the document "p#1" the row "p#1"; a later document "p" of several chunks would replace it."""
    path = tmp_path / "index"
    kept = [SourceDocument("p#1", "", "an office"), SourceDocument("q", "", "a pier"), SourceDocument("r#0", "", "a")]
    build_index(path, kept, model, progress=False)
    table = SearchIndex.open(path).table
    table.update(where="document = 'p#1'", values={"id": "p#1"})
    model.encoded.clear()
    update_documents(
        path, [SourceDocument("p", "", "\n\n".join([PARAGRAPH, PARAGRAPH + " x"]))], model, source="documents"
    )
    rows = SearchIndex.open(path).table.to_arrow().select(["id", "document"]).to_pylist()
    assert sorted((row["document"], row["id"]) for row in rows) == [
        ("p", "p#1"), ("p", "p#2"), ("p#1", "p#1#1"), ("q", "q"), ("r#0", "r#0")]  # fmt: skip
    assert len(model.encoded) == 2
    model.encoded.clear()
    assert build_index(path, kept, model, progress=False).removed == 2
    assert model.encoded == []
    assert SearchIndex.open(path).complete
