"""An export is one folder that keeps the contract: SearchR3 and sentence-transformers embed as the adapter does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search_r3 import InputError, SearchR3
from search_r3.cli import main
from search_r3.export.merged_export import export_model

TEXTS = [
    "Bread needs flour, water and yeast.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Der Zug nach Wien fährt um neun.",
    "x",
    "A long text about trains. " * 300,
]


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_adapter, device="cpu")


@pytest.fixture(scope="module")
def exported(adapter: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "for-sentence-transformers"
    export_model(adapter, out, "sentence-transformers")
    return out


def test_sentence_transformers_gives_the_same_embeddings(exported: Path, adapter: SearchR3, tiny_model: Path):
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(exported), device="cpu")
    documents = loaded.encode_document(TEXTS)
    assert np.abs(documents - adapter.encode_document(TEXTS)).max() < 1e-4
    assert np.abs(loaded.encode(TEXTS) - documents).max() < 1e-6
    queries = loaded.encode_query(TEXTS[:4])
    assert np.abs(queries - adapter.encode_query(TEXTS[:4], reasoning=False)).max() < 1e-4
    assert np.abs(queries - documents[:4]).max() > 1e-2
    base = SearchR3.from_pretrained(tiny_model, device="cpu")
    assert np.abs(documents - base.encode_document(TEXTS)).max() > 1e-2, "the adapter must be in it"
    assert loaded.get_embedding_dimension() == 32
    assert np.allclose(np.asarray(loaded.similarity(queries, documents)), queries @ documents.T, atol=1e-5)


@pytest.mark.parametrize("format", ["safetensors", "sentence-transformers"])
def test_searchr3_loads_it_with_the_contract_of_the_adapter(
    format: str, exported: Path, tiny_adapter: Path, adapter: SearchR3, tmp_path: Path, capsys
):
    out = exported
    if format == "safetensors":
        out = tmp_path / "plain"
        assert main(["export", str(tiny_adapter), str(out), "--json"]) == 0
        reported = json.loads(capsys.readouterr().out)
        assert reported["contract_hash"] == adapter.contract_hash
        assert reported["files"] == sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
        assert not (out / "modules.json").exists()
    again = SearchR3.from_pretrained(out, device="cpu")
    assert (again.name, again.contract_hash) == (adapter.name, adapter.contract_hash)
    assert again.check_golden() < 1e-5
    assert np.abs(again.encode_document(TEXTS) - adapter.encode_document(TEXTS)).max() < 1e-5
    (ours,), (theirs,) = (
        again.reason(["a train"], max_reasoning_tokens=4),
        adapter.reason(["a train"], max_reasoning_tokens=4),
    )
    assert ours.token_ids == theirs.token_ids
    assert np.abs(ours.embedding - theirs.embedding).max() < 1e-5


def test_it_is_safetensors_json_and_markdown_and_names_no_place_of_this_machine(exported: Path, tiny_model: Path):
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    for path in files:
        assert str(tiny_model.parent).encode() not in path.read_bytes(), path.name


def test_its_card_says_that_sentence_transformers_does_not_fold_capitals_where_the_contract_does(
    tiny_adapter: Path, tmp_path: Path, exported: Path
):
    assert "capitals" not in (exported / "README.md").read_text(encoding="utf-8")
    model = SearchR3.from_pretrained(tiny_adapter, device="cpu")
    model.contract = replace(model.contract, fold_capitals=True)
    export_model(model, tmp_path / "folds", "sentence-transformers")
    assert "folds texts that are all in capitals" in (tmp_path / "folds" / "README.md").read_text(encoding="utf-8")
    assert SearchR3.from_pretrained(tmp_path / "folds", device="cpu").contract.fold_capitals


def test_its_card_keeps_the_licence_and_the_card_of_the_adapter(exported: Path):
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0\nbase_model: someone/tiny\n" in card
    assert "library_name: sentence-transformers\n" in card
    assert "\n## tiny-adapter\n" in card
    assert "\n# a comment\n" in card
    assert "\n### Use\n" in card


def test_a_folder_that_is_there_is_not_replaced(tiny_adapter: Path, tmp_path: Path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["export", str(tiny_adapter), str(tmp_path)]) == 2
    assert f"{tmp_path} exists already; give a new folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_tokenizer_that_joins_texts_in_its_own_way_is_refused(adapter: SearchR3, tmp_path: Path, monkeypatch):
    """A prompt cannot repeat what was tokenised otherwise; better no export than a wrong one."""
    from search_r3.prompts import PromptTemplate

    template = adapter.templates["query"]
    wrong = PromptTemplate(prefix=(*template.prefix, template.prefix[-1], 5, 5), suffix=template.suffix)
    monkeypatch.setitem(
        adapter.templates, "query", PromptTemplate(prefix=template.prefix, suffix=(*template.suffix, 5))
    )
    with pytest.raises(InputError, match="end differently"):
        export_model(adapter, tmp_path / "a", "sentence-transformers")
    monkeypatch.setitem(adapter.templates, "query", wrong)
    monkeypatch.setattr(type(adapter.tokenizer), "decode", lambda *_, **__: "something else")
    with pytest.raises(InputError, match="joins the document prompt and a text differently"):
        export_model(adapter, tmp_path / "a", "sentence-transformers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "push", "pull", "mcp"])
def test_the_help_teaches(command: str, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example:  search-r3 {command} " in text
    assert "Next:" in text
