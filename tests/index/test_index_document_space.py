"""An index accepts every model of its document space, and an older one the models of its contract."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from search_r3.index import SearchIndex, build_index
from search_r3.index.build.precompute_embeddings import CachedEncoder
from search_r3.index.index_handle import IndexHandle
from search_r3.index.index_info import IndexInfo, ModelMismatch, migrate
from search_r3.index.source_document import SourceDocument

SPACE = "d" * 64


@pytest.fixture
def plain(model):
    """An encoder whose queries go through the weights of its documents."""
    model.document_spaces = (SPACE, model.contract_hash)
    return model


@pytest.fixture
def queries(make_model, plain):
    """A query adapter for its documents."""
    adapter = make_model(name="queries", contract_hash="b" * 64)
    adapter.document_spaces = (SPACE, plain.contract_hash)
    return adapter


@pytest.fixture
def stranger(make_model):
    other = make_model(name="stranger", contract_hash="c" * 64)
    other.document_spaces = ("e" * 64, other.contract_hash)
    return other


@pytest.fixture
def built(path, plain):
    build_index(path, [SourceDocument("a", "", "the harbour fee"), SourceDocument("b", "", "a licence")], plain)
    return path


def test_a_query_adapter_searches_an_index_of_its_documents_and_adds_to_it(built, queries, stranger):
    assert SearchIndex.open(built).info.document_space == SPACE
    assert SearchIndex.open(built).search("harbour", queries, mode="vector").hits[0].document == "a"
    build_index(built, [SourceDocument("c", "", "an anchor")], queries)
    assert len(SearchIndex.open(built)) >= 1
    with pytest.raises(ModelMismatch, match=r"was made with fake \(contract a{12}\), but this model is stranger"):
        SearchIndex.open(built).search("harbour", stranger)


def test_an_index_of_the_query_adapter_is_searched_by_the_model_of_its_documents(path, plain, queries):
    info = IndexInfo.of(queries)
    info.check_model(plain, path)
    assert info.same_space(IndexInfo.of(plain))


def test_an_older_index_names_a_contract_and_accepts_its_model_and_query_adapters(path, plain, queries, stranger):
    old = asdict(IndexInfo.of(plain)) | {"format_version": 2}
    del old["document_space"]
    info = IndexInfo(**migrate(json.loads(json.dumps(old)), path))
    assert info.document_space == ""
    info.check_model(plain, path)
    info.check_model(queries, path)
    with pytest.raises(ModelMismatch):
        info.check_model(stranger, path)
    assert info.same_space(IndexInfo.of(plain))
    assert not info.same_space(IndexInfo.of(stranger))


def test_encoders_without_document_spaces_are_told_apart_by_their_contract(path, make_model):
    info = IndexInfo.of(make_model())
    assert info.document_space == ""
    info.check_model(make_model(), path)
    with pytest.raises(ModelMismatch):
        info.check_model(make_model(contract_hash="b" * 64), path)
    assert not info.same_space(replace(info, contract_hash="b" * 64))


def test_a_running_index_may_be_exchanged_for_one_of_the_same_space(built, tmp_path, queries, stranger):
    handle = IndexHandle(built)
    for maker, accepted in ((queries, True), (stranger, False)):
        build_index(tmp_path / maker.name, [SourceDocument("a", "", "an anchor")], maker)
        opened = SearchIndex.open(tmp_path / maker.name).info
        assert opened.same_space(handle.info) == accepted


def test_embeddings_made_ahead_keep_the_space(queries):
    assert CachedEncoder(queries, {}).document_spaces == queries.document_spaces
