"""Every word can be found and is highlighted, whatever its language, length or meaning; older indexes are rebuilt.

`data/index-f444c4d.tar.gz` is an index of OLD_DOCUMENTS that commit f444c4d made with `FakeEncoder(dimension=16)`.
"""

import json
import tarfile
import unicodedata
from pathlib import Path

import pytest

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.maintenance import compact_index, maintain_index
from search_r3.index.results.query_words import WORD, composed, without_stop_words
from search_r3.index.results.snippets import make_snippet
from search_r3.index.row_keys import CONTENT

HASH = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
CLASS = "AbstractSingletonProxyFactoryBean" * 6 + "Of"  # 200 characters
TEXTS = {  # word: a text that holds it
    "war": "The Great War began in 1914.",
    "man": "One man, one vote",
    "hat": "a red hat lay there",
    "bin": "look into /usr/bin for it",
    "die": "Old habits die hard.",
    "mines": "salt mines of Wieliczka",
    "where not in": "SELECT x FROM t WHERE y NOT IN (SELECT z)",
    "to be or not to be": "To be, or not to be",
    "C": "The C language has pointers.",
    "C++": "Objects in C++ have destructors.",
    "F#": "Functions in F# are curried.",
    HASH: f"commit {HASH} adds the empty tree",
    "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855": (
        "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    ),
    CLASS: f"class {CLASS} extends Object",
    "достопримечательность": "Главная достопримечательность города",
    "превысокомногорассмотрительствующий": "превысокомногорассмотрительствующий взгляд",
    "Donaudampfschifffahrtsgesellschaftskapitän": "der Donaudampfschifffahrtsgesellschaftskapitän kam",
    "Größe": "Die Größe zählt.",
    "naive": "a naïve idea",
    "οδός": "Η οδός Αθηνάς",
    "北京": "我喜欢北京大学的图书馆",
    "东京都": "日本的首都是东京都。",
    "電車": "東京では電車も多い。",
    "データ": "大きなデータを読む",
    "สวยงาม": "ภาษาไทยเป็นภาษาที่สวยงาม",
    "हिन्दी": "यह हिन्दी में है",
    "한국어": "한국어 문장",
    "العربية": "تعلم العربية هنا",
    "parse_user_name": "def parse_user_name(self): ...",
    "nick": "def set_nick_of(self): ...",
    "v2": "api v2 is out",
}
OLD_DOCUMENTS = [
    SourceDocument("war", "", "The Great War began in 1914.", {"year": 1914}),
    SourceDocument("hash", "", f"commit {HASH} adds the empty tree", {"year": 2005}),
    SourceDocument("c", "Languages", "The C language has pointers.", {"year": 1972}),
]


@pytest.fixture(scope="module")
def words_index(tmp_path_factory, shared_model):
    path = tmp_path_factory.mktemp("words") / "index"
    build_index(path, [SourceDocument(f"{i:02d}", "", text) for i, text in enumerate(TEXTS.values())], shared_model)
    return SearchIndex.open(path)


@pytest.fixture
def old_index(tmp_path):
    with tarfile.open(Path(__file__).parents[1] / "data" / "index-f444c4d.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "index"


@pytest.fixture
def old_model(make_model):
    return make_model(dimension=16)


def found(index, query):
    return [hit.document for hit in index.search(query, None, mode="text").hits]


@pytest.mark.parametrize(("place", "word"), list(enumerate(TEXTS)), ids=lambda value: str(value)[:20])
def test_every_word_is_found_and_highlighted(words_index, place, word):
    hits = words_index.search(word, None, mode="text").hits
    hit = next((hit for hit in hits if hit.document == f"{place:02d}"), None)
    assert hit is not None, f"{word} finds {[hit.text for hit in hits]}"
    marked = {part for a, b in hit.highlights for part in WORD.findall(folded(hit.snippet[a:b]))}
    assert marked == set(WORD.findall(folded(word)))


def folded(text):
    """Without case and European accents; the marks of Hindi and Thai are letters."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not "\u0300" <= c <= "\u036f")


def test_words_of_rows_that_are_not_in_the_full_text_index_yet_are_found(tmp_path, model):
    build_index(tmp_path / "i", [SourceDocument("a", "", "nothing here")], model)
    index = SearchIndex.open(tmp_path / "i")
    row = index.table.search().to_list()[0]
    index.table.add([row | {"id": "b", "document": "b", CONTENT: f"the war of {HASH}"}])
    assert found(index, "war") == found(index, HASH) == ["b"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("query_form", ["NFC", "NFD"])
def test_decomposed_letters_and_soft_hyphens_are_found_and_highlighted(tmp_path, model, form, query_form):
    text = unicodedata.normalize(form, "Zürich im März, क़लम, der Donau\u00addampfer")
    build_index(tmp_path / "i", [SourceDocument("a", unicodedata.normalize(form, "Málaga"), text)], model)
    index = SearchIndex.open(tmp_path / "i")
    for word in ("Zürich", "zurich", "MÄRZ", "क़लम", "malaga", "Málaga", "Donaudampfer", "donau\u00addampfer"):
        (hit,) = index.search(unicodedata.normalize(query_form, word), None, mode="text").hits
        assert hit.title == "Málaga"
        assert hit.text.startswith("Zürich im März")
        assert len(hit.highlights) == (0 if "laga" in word else 1)
    assert found(index, "rich") == []


def test_text_that_is_composed_and_soft_hyphens_between_words_are_kept():
    for text in ("plain", "Zürich", "x² ﬁn ß İ", "Donau\u00ad\ndampf", "\ud800"):
        assert composed(text) == text


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Η Αθήνα", "Αθηνα"),
        ("Η Αθήνα", "ΑΘΗΝΑ"),
        ("ёлка", "елка"),
        ("שָׁלוֹם", "שלום"),
        ("مُحَمَّد", "محمد"),
        ("σίσυφος", "ΣΊΣΥΦΟΣ"),
        ("İstanbul", "istanbul"),
        ("Straße", "STRASSE"),
        ("ﬁnancial", "financial"),
        ("H₂O", "H2O"),
    ],
)
def test_what_the_documentation_says_is_not_found(tmp_path, model, text, query):
    build_index(tmp_path / "i", [SourceDocument("a", "", text)], model)
    index = SearchIndex.open(tmp_path / "i")
    assert (found(index, text), found(index, query)) == (["a"], [])


@pytest.mark.parametrize(
    ("query", "looked_for"),
    [
        ("how do I open a file", ["open", "file"]),
        ("where not in", ["where", "not", "in"]),
        ("The Who", ["The", "Who"]),
        ("WHO guidelines for it", ["WHO", "guidelines"]),
        ("the IT department", ["IT", "department"]),
        ("HOW DO I OPEN IT", ["OPEN"]),
        ("what is C++", ["C"]),
        ("is war a crime?", ["war", "crime"]),
        ("???", []),
    ],
)
def test_stop_words_of_a_query_count_only_where_there_are_no_others(query, looked_for):
    assert WORD.findall(without_stop_words(query)) == looked_for


def test_highlights_reach_into_scripts_without_spaces_and_words_longer_than_the_snippet():
    def marked(text, query):
        snippet = make_snippet(text, query)
        return [snippet.text[a:b] for a, b in snippet.highlights]

    assert marked("データベースを作る", "データベース") == ["データベース"]
    assert marked("Pythonを使う", "python") == ["Python"]
    assert marked(unicodedata.normalize("NFD", "mon résumé"), "résumé") == [unicodedata.normalize("NFD", "résumé")]
    assert len(marked("a " + "x" * 500, "x" * 500)[0]) > 200


def test_an_older_index_is_searched_as_before_and_says_what_it_lacks(old_index, old_model, capsys):
    index = SearchIndex.open(old_index)
    assert (index.full_text, index.describe()["full_text"]) == ("outdated", "outdated")
    assert (found(index, "1914"), found(index, "war"), found(index, HASH)) == (["war"], [], [])
    assert main(["index", "--info", str(old_index)]) == 0
    assert "words:    stop words and words of 40 bytes or more cannot be found" in capsys.readouterr().out


@pytest.mark.parametrize("documents", [OLD_DOCUMENTS, [*OLD_DOCUMENTS, SourceDocument("new", "", "men and hat")]])
def test_a_build_rebuilds_an_older_full_text_index_and_reports_it(old_index, old_model, documents):
    reader = SearchIndex.open(old_index)
    report = build_index(old_index, documents, old_model)
    assert report.full_text_rebuilt
    assert not build_index(old_index, documents, old_model).full_text_rebuilt
    index = SearchIndex.open(old_index)
    assert (index.full_text, index.complete) == ("current", True)
    assert (found(index, "war"), found(index, HASH), found(index, "C")) == (["war"], ["hash"], ["c"])
    reader.table.checkout_latest()
    assert found(reader, "war") == ["war"]


def test_a_rebuild_that_fails_leaves_the_index_as_it_was_and_comes_again(old_index, old_model, monkeypatch):
    class Crash(Exception):
        pass

    def crash(*args, **kwargs):
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr("lancedb.table.LanceTable.create_index", crash)
        with pytest.raises(Crash):
            build_index(old_index, OLD_DOCUMENTS, old_model)
    assert found(SearchIndex.open(old_index), "1914") == ["war"]
    assert build_index(old_index, OLD_DOCUMENTS, old_model).full_text_rebuilt
    assert SearchIndex.open(old_index).complete


def test_a_compaction_rebuilds_it_too(old_index, capsys, monkeypatch):
    monkeypatch.setattr("search_r3.cli.index_maintenance.WORTH_A_LINE", 0)  # old versions are spoken of too
    assert main(["compact", str(old_index)]) == 0
    said = capsys.readouterr().out
    assert said.count("full text: rebuilt") == 1
    assert "kept for 2 minutes" in said
    assert found(SearchIndex.open(old_index), "war") == ["war"]
    assert not compact_index(old_index).full_text_rebuilt


@pytest.mark.parametrize("what", [["c"], ["--source", "unknown"]])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_deletion_rebuilds_it_and_says_so(old_index, capsys, what, as_json):
    assert main(["delete", str(old_index), *what, *["--json"] * as_json]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["full_text_rebuilt"] if as_json else "full text: rebuilt" in out
    assert SearchIndex.open(old_index).full_text == "current"
    assert not maintain_index(old_index)


def test_maintenance_that_a_server_does_rebuilds_it_and_says_so(old_index):
    assert maintain_index(old_index)
    assert not maintain_index(old_index)


@pytest.mark.parametrize("mode", ["text", "hybrid"])
def test_without_a_full_text_index_words_are_refused_in_one_line(old_index, old_model, mode, capsys):
    index = SearchIndex.open(old_index)
    index.table.drop_index(index.table.list_indices()[0].name)
    assert index.full_text == "missing"
    with pytest.raises(InputError, match="has no full-text index"):
        index.search("1914", old_model, mode=mode)
    assert index.search("1914", old_model, mode="vector").hits
    assert main(["index", "--info", "--json", str(old_index)]) == 0
    assert json.loads(capsys.readouterr().out)["full_text"] == "missing"
    build_index(old_index, OLD_DOCUMENTS, old_model)
    assert found(SearchIndex.open(old_index), "war") == ["war"]
