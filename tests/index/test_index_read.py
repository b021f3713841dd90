"""A search that reads: the first hits of a direct search are embedded with the query, which is then searched again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.model.reading import what_is_read
from search_r3.prompts import reading_conversation

DOCUMENTS = [
    SourceDocument("saturn", "Saturn", "Saturn has rings of ice and a moon called Titan."),
    SourceDocument("titan", "Titan", "Titan was discovered by Huygens."),
    SourceDocument("huygens", "Huygens", "Christiaan Huygens was born in Den Haag."),
    SourceDocument("haag", "Den Haag", "A city of the Netherlands."),
    SourceDocument("bread", "Bread", "Flour, water and yeast."),
]


@pytest.fixture
def reader(model):
    """The deterministic encoder, which embeds a query's words with those of its passages, and remembers both."""
    asked = []

    def joined(texts, passages):
        asked.append(passages)
        return [" ".join([text, *(passages or [[]] * len(texts))[i]]) for i, text in enumerate(texts)]

    def encode_query(texts, *, reasoning=True, max_reasoning_tokens=32, passages=None):
        return model._bags(joined(texts, passages))

    def reason(texts, *, max_reasoning_tokens=32, passages=None):
        rows = model._bags(joined(texts, passages))
        return [SimpleNamespace(text="about", embedding=row, num_tokens=1, forced=False) for row in rows]

    model.encode_query, model.reason, model.reading, model.asked = encode_query, reason, object(), asked
    return model


@pytest.fixture
def index(tmp_path, model):
    build_index(tmp_path / "index", DOCUMENTS, model)
    return SearchIndex.open(tmp_path / "index")


def ids(hits):
    return [hit.id for hit in hits]


@pytest.mark.parametrize("mode", ["hybrid", "vector"])
def test_it_reads_the_first_hits_of_the_direct_search_in_their_order(index, reader, mode):
    direct = index.search("rings of ice", reader, mode=mode, reasoning=False, k=2)
    found = index.search("rings of ice", reader, mode=mode, reasoning=False, read=2)
    assert ids(found.read) == ids(direct.hits)
    texts = [f"{hit.title} {hit.text}" for hit in direct.hits]
    assert reader.asked[-2:] == [None, [texts]]
    assert [(passage.text, passage.hop) for passage in found.read] == [(text, 1) for text in texts]
    assert direct.read == []
    json.dumps(found.to_dict())


def test_the_hits_are_those_of_the_embedding_with_the_passages(index, reader):
    found = index.search("rings", reader, mode="vector", reasoning=False, read=1)
    vector = reader._bags([f"rings {found.read[0].text}"])[0]
    cosines = dict(zip(ids(DOCUMENTS), reader._bags([f"{d.title} {d.text}" for d in DOCUMENTS]) @ vector, strict=True))
    assert {hit.id: hit.score for hit in found.hits} == pytest.approx(cosines, abs=1e-5)


def test_a_text_that_two_documents_have_is_read_once(tmp_path, reader):
    copies = [SourceDocument(f"copy{i}", "Saturn", DOCUMENTS[0].text) for i in range(3)]
    build_index(tmp_path / "copies", [*copies, *DOCUMENTS], reader)
    found = SearchIndex.open(tmp_path / "copies").search("rings of ice", reader, reasoning=False, read=3)
    assert len({passage.text for passage in found.read}) == 3


def test_the_words_are_searched_once(index, reader, monkeypatch):
    asked, search_text = [], type(index.backend).search_text

    def counted(backend, *given):
        asked.append(given)
        return search_text(backend, *given)

    monkeypatch.setattr(type(index.backend), "search_text", counted)
    index.search("rings of ice", reader, reasoning=False, read=2, hops=2)
    assert len(asked) == 1


def test_a_second_hop_reads_what_the_first_found_and_only_the_last_reasons(index, reader):
    one = index.search("rings", reader, mode="vector", reasoning=False, read=2, k=2)
    two = index.search("rings", reader, mode="vector", reasoning=True, read=2, hops=2)
    assert ids(two.read) == [*ids(one.read), *ids(one.hits)]
    assert [passage.hop for passage in two.read] == [1, 1, 2, 2]
    assert two.reasoning.text == "about"
    assert one.reasoning is None
    assert [None if passages is None else len(passages[0]) for passages in reader.asked[-3:]] == [None, 2, 2]


def test_auto_decides_by_the_direct_search_whether_reasoning_follows_the_passages(index, reader):
    for reasons in (True, False):
        reader.adaptive_rule = SimpleNamespace(depth=3, decide=lambda scores_QK, reasons=reasons: np.array([reasons]))
        found = index.search("rings", reader, reasoning="auto", read=2)
        assert (found.reasoning is not None) == reasons
        assert len(found.read) == 2


def test_where_nothing_is_found_nothing_is_read(index, reader):
    found = index.search("rings", reader, where="title = 'nothing'", read=2)
    assert (found.hits, found.read) == ([], [])
    assert index.search("rings", None, mode="text", read=2).read == []
    assert len(index.search("rings", reader, reasoning=False, read=10).read) == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read": 11}, "read is 11; give a whole number from 0 to 10"),
        ({"read": -1}, "read is -1"),
        ({"read": True}, "read is True"),
        ({"read": 1, "hops": 3}, "hops is 3; give 1 or 2"),
        ({"hops": 2}, "hops is 2, but nothing is read; set read"),
        ({"read": 1, "reasoning": "latent"}, 'reasoning="latent" reads no passages'),
    ],
)
def test_options_that_cannot_be_are_refused(index, reader, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        index.search("rings", reader, **options)


def test_a_model_that_was_not_trained_to_read_is_refused_in_a_line(index, model):
    with pytest.raises(InputError, match="fake has no reading mode: it was not trained with reading_ratio"):
        index.search("rings", model, read=2)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A saved tiny model with a reading conversation."""
    prompts = replace(tiny.contract.prompts, reading=reading_conversation(2, 6))
    model = SearchR3(replace(tiny.checkpoint, contract=replace(tiny.contract, prompts=prompts)))
    folder = tmp_path_factory.mktemp("models") / "reader"
    model.save_pretrained(folder)
    return SearchR3.from_pretrained(folder, device="cpu")


def test_the_result_shows_the_part_that_the_model_read(trained, tmp_path):
    build_index(tmp_path / "x", DOCUMENTS, trained, progress=False)
    found = SearchIndex.open(tmp_path / "x").search("rings", trained, mode="vector", reasoning=False, read=2)
    texts = {f"{document.title} {document.text}" for document in DOCUMENTS}
    for passage in found.read:
        (whole,) = [text for text in texts if text.startswith(passage.text)]
        assert what_is_read(trained, [whole]) == [passage.text]
        assert len(passage.text) < len(whole)


def test_given_reasoning_follows_the_passages(trained, tmp_path):
    build_index(tmp_path / "x", DOCUMENTS, trained, progress=False)
    index = SearchIndex.open(tmp_path / "x")
    found = index.search("rings", trained, mode="vector", reasoning_text="of Saturn", read=2, k=1)
    direct = index.search("rings", trained, mode="vector", reasoning=False, k=2)
    passages = [[f"{hit.title} {hit.text}" for hit in direct.hits]]
    vector = trained.encode_query(["rings"], passages=passages, reasoning_text=["of Saturn"])[0]
    assert found.hits[0].score == pytest.approx(float(index.vectors([found.hits[0].id])[0] @ vector), abs=1e-5)
    assert ids(found.read) == ids(direct.hits)
    assert found.reasoning.text == "of Saturn"


def test_the_command_shows_what_was_read(trained, tmp_path, capsys):
    build_index(tmp_path / "x", DOCUMENTS, trained, progress=False)
    command = ["search", str(tmp_path / "x"), "rings", "--model", trained.source, "--budget", "2", "--device", "cpu"]
    assert main([*command, "--read", "2", "--hops", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [passage["hop"] for passage in shown["read"]] == [1, 1, 2, 2]
    assert main([*command, "--read", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("read: ")
    assert "reasoning: " in out
    assert main([*command, "--hops", "2"]) == 2
    assert "error: hops is 2, but nothing is read" in capsys.readouterr().err
