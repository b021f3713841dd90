"""What frameworks copy, pickle and send to other processes comes back with its settings and the same model."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from haystack import Document
from nightly import nightly
from processes import run

from search_r3 import InputError, SearchR3
from search_r3.index import SourceDocument, build_index
from search_r3.index.storage.location import Remote
from search_r3.integrations.haystack import SearchR3DocumentEmbedder, SearchR3TextEmbedder
from search_r3.integrations.index_searcher import IndexSearcher
from search_r3.integrations.langchain import SearchR3Embeddings, SearchR3Retriever
from search_r3.integrations.llama_index import SearchR3Embedding

TEXT = "The train to Vienna leaves at nine."


def embedded(made: Any) -> list[float]:
    """TEXT as a document, by whichever class."""
    if isinstance(made, SearchR3Embeddings):
        return made.embed_documents([TEXT])[0]
    if isinstance(made, SearchR3Embedding):
        return made.get_text_embedding(TEXT)
    return made.run([Document(content=TEXT)])["documents"][0].embedding


def langchain(model: Any, **settings: Any) -> Any:
    return SearchR3Embeddings(model, **settings)


def llama_index(model: Any, **settings: Any) -> Any:
    return SearchR3Embedding(model, **settings)


def haystack(model: Any, **settings: Any) -> Any:
    return SearchR3DocumentEmbedder(str(model), **settings)


def through_pickle(made: Any) -> Any:
    return pickle.loads(pickle.dumps(made))


def encoder_of(made: Any) -> Any:
    return made._encoder if isinstance(made, SearchR3Embedding) else made.encoder


@pytest.mark.parametrize("used", [True, *nightly(False)])
@pytest.mark.parametrize("again", [through_pickle, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("make", [langchain, llama_index, haystack])
def test_it_comes_back_with_its_settings_and_gives_the_same(
    tiny: SearchR3, tiny_model: Path, make: Callable[..., Any], again: Callable[[Any], Any], used: bool
) -> None:
    made = make(tiny_model, max_length=5, device="cpu", dtype="bfloat16")
    expected = embedded(made) if used else None
    back = again(made)
    assert type(back) is type(made)
    assert encoder_of(back).config == encoder_of(made).config
    if again is through_pickle:
        assert encoder_of(back)._model is None  # settings travel, weights do not
    assert embedded(back) == (expected or embedded(made))
    short = tiny.encode_document([TEXT], max_length=5)[0]
    assert np.allclose(embedded(back), short, atol=0.1)
    assert not np.allclose(embedded(back), tiny.encode_document([TEXT])[0], atol=0.1)


@pytest.mark.parametrize("make", [langchain, llama_index])
def test_a_model_that_was_given_loaded_is_found_again_as_it_was(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    loaded = SearchR3.from_pretrained(tiny_model.name, device="cpu", dtype="bfloat16")
    made = make(loaded, reasoning=False)
    assert copy.deepcopy(made) is not None
    assert encoder_of(copy.deepcopy(made)).model is loaded  # a copy does not double the weights
    kept = pickle.dumps(made)
    monkeypatch.chdir(tmp_path)  # another process may work elsewhere
    back = pickle.loads(kept)
    assert encoder_of(back).model.dtype == "bfloat16"
    assert embedded(back) == embedded(made)
    assert encoder_of(back).config.reasoning is False


DEFAULTS = [SearchR3Embeddings, SearchR3Embedding, SearchR3DocumentEmbedder, SearchR3TextEmbedder]


@pytest.mark.parametrize("again", [through_pickle, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("make", DEFAULTS)
def test_without_a_model_it_stays_the_default_one(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], again: Callable[[Any], Any]
) -> None:
    back = again(make())
    assert encoder_of(back).config.model == ""
    monkeypatch.setattr("search_r3.model.resolve.default_model", lambda: str(tiny_model))
    assert encoder_of(back).model.source == str(tiny_model)
    assert encoder_of(again(back)).config.model == ""
    assert encoder_of(again(back)).model.contract_hash == encoder_of(back).model.contract_hash


def test_a_model_that_was_exchanged_meanwhile_is_refused(
    tiny_model: Path, make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "model")
    made = SearchR3Embeddings(folder, device="cpu")
    embedded(made)
    kept = pickle.dumps(made)
    make_tiny_model(folder, seed=5)
    with pytest.raises(InputError, match=r"is another model here \(contract .*\) than where it was pickled"):
        embedded(pickle.loads(kept))


def test_a_model_that_does_not_say_where_it_is_from_is_refused() -> None:
    class Made:
        dtype = "float32"
        encode_query = encode_document = contract_hash = None

    with pytest.raises(InputError, match="cannot be pickled; give its name"):
        pickle.dumps(SearchR3Embeddings(Made()))


@pytest.mark.parametrize("again", [through_pickle, copy.deepcopy])
def test_a_retriever_comes_back_with_its_index(tiny_index: Path, tiny: SearchR3, again: Callable[[Any], Any]) -> None:
    for model in (None, tiny):
        made = SearchR3Retriever(index=tiny_index, model=model, k=2, reasoning=False, device="cpu")
        expected = [(hit.id, hit.metadata["score"]) for hit in made.invoke("train to Vienna")]
        back = again(made)
        assert back.k == 2
        assert [(hit.id, hit.metadata["score"]) for hit in back.invoke("train to Vienna")] == expected


def test_a_retriever_of_an_index_on_object_storage_comes_back(
    s3_server: str, s3: pytest.MonkeyPatch, tiny: SearchR3
) -> None:
    place = "s3://bucket/pickled/index"
    build_index(place, [SourceDocument("train", "", "The train to Vienna leaves at nine.")], tiny, progress=False)
    made = SearchR3Retriever(index=place, mode="text")
    assert [hit.id for hit in through_pickle(made).invoke("Vienna")] == ["train"]
    assert through_pickle(IndexSearcher(Path(place))).path == place  # a Path keeps one slash of the two
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        s3.delenv(name)
    options = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "aws_endpoint": s3_server}
    made = SearchR3Retriever(index=Remote(place, options), mode="text")
    assert [hit.id for hit in through_pickle(made).invoke("Vienna")] == ["train"]


def test_a_searcher_finds_index_and_model_from_another_folder(
    tiny_index: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "index").symlink_to(tiny_index)
    monkeypatch.chdir(tmp_path)
    kept = pickle.dumps(IndexSearcher("index", "model", device="cpu"))
    monkeypatch.chdir(tiny_index)
    assert pickle.loads(kept).search("train to Vienna", k=1, reasoning=False).hits


def test_haystacks_query_embedder_can_be_copied_and_written_to_a_dictionary(tiny_model: Path) -> None:
    made = SearchR3TextEmbedder(str(tiny_model), reasoning=False, device="cpu")
    expected = made.run("train")["embedding"]
    for back in (through_pickle(made), copy.deepcopy(made), SearchR3TextEmbedder.from_dict(made.to_dict())):
        assert back.run("train")["embedding"] == expected


SPAWNED = """
import multiprocessing, sys
from search_r3.integrations.langchain import SearchR3Embeddings
if __name__ == "__main__":
    embeddings = SearchR3Embeddings(sys.argv[1], reasoning=False, device="cpu", max_reasoning_tokens=1)
    here = embeddings.embed_query("train")  # the lock and the model are there when it is sent away
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply_async(embeddings.embed_query, ["train"]).get(timeout=90)
    print("same" if here == there else "different")
"""


def test_it_works_in_a_process_that_is_spawned(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "spawned.py").write_text(SPAWNED)
    assert run([sys.executable, tmp_path / "spawned.py", tiny_model]).stdout.splitlines()[-1] == "same"
