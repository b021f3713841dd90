"""llama.cpp gives SearchR3's embeddings from an exported GGUF file, asked as the export's README says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search_r3 import InputError, SearchR3
from search_r3.cli import main
from search_r3.export import gguf_export
from search_r3.export.merged_export import export_model
from search_r3.model.query_normalizer import QUERY_NORMALIZER_FILE, QueryNormalizer

TEXTS = [
    "Bread needs flour, water and yeast.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Der Zug nach Wien fährt um neun.",
    "x",
    "what does <|embed_token|> do, and <|im_end|>",
    "In 2024 there were 12345 trains; a long text about them. " * 12,
    *(f"Text {number} of a batch of many texts" for number in range(10)),
]
SPECIAL = 4
"""The text that spells special tokens."""
NEAR = 0.01
"""The accepted cosine distance, as of int8."""


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_adapter, device="cpu")


@pytest.fixture(scope="module")
def exported(adapter: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "for-llama-cpp"
    done = export_model(adapter, out, "gguf")
    assert (done.contract_hash, done.dtype) == (adapter.contract_hash, "q8_0")
    names = {"README.md", "golden.safetensors", "search_r3.json", "tiny-adapter-Q8_0.gguf"}
    assert {path.name for path in out.iterdir()} == set(done.files) == names
    return out


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[object]:
    """llama.cpp's server on the exported file."""
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install 'search-r3[llama-cpp]'")
    from search_r3.model.engines.llama_cpp.llama_server import LlamaServer

    running = LlamaServer(exported / "tiny-adapter-Q8_0.gguf", sequences=4, context=1024, threads=1)
    yield running
    running.close()


def templates_of(readme: str) -> dict[str, tuple[str, str]]:
    """What goes around TEXT, by what the README shows."""
    shown = re.findall(r"^A (document|query)[:\w ].*?\n\n```\n(.*?)TEXT(.*?)\n```", readme, re.S | re.M)
    return {side: (prefix, suffix) for side, prefix, suffix in reversed(shown)}


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return 1 - (one * other).sum(1)


def test_every_text_of_a_batch_has_the_embedding_of_the_model(
    server: object, exported: Path, adapter: SearchR3, tiny_model: Path
) -> None:
    """All in one call, of which some bindings answer only the first rightly; by ids, so no text is a special token."""
    template = adapter.templates["document"]
    rows = [[*template.prefix, *row, *template.suffix] for row in adapter.token_rows(TEXTS, 512)]
    found, expected = server.embed(rows), adapter.encode_document(TEXTS)
    assert found.dtype == np.float32
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert distances(found, expected).max() < NEAR
    alone = np.concatenate([server.embed([row]) for row in rows])
    assert distances(found, alone).max() < NEAR
    base = SearchR3.from_pretrained(tiny_model, device="cpu")
    assert distances(found, base.encode_document(TEXTS)).min() > NEAR, "the adapter must be in it"


def test_the_texts_of_the_readme_give_the_same(server: object, exported: Path, adapter: SearchR3) -> None:
    """llama.cpp tokenizes them as we do, unless a text spells a special token."""
    shown = templates_of((exported / "README.md").read_text(encoding="utf-8"))
    for side, expected in (
        ("document", adapter.encode_document(TEXTS)),
        ("query", adapter.encode_query(TEXTS, reasoning=False)),
    ):
        prefix, suffix = shown[side]
        with server._post("/v1/embeddings", {"input": [prefix + text + suffix for text in TEXTS]}) as response:
            answered = json.loads(response.read())["data"]
        found = distances(np.array([one["embedding"] for one in answered]), expected)
        assert np.delete(found, SPECIAL).max() < NEAR < found[SPECIAL]
    ids = [server.tokenize(text) for text in TEXTS]
    assert ids == adapter.token_rows(TEXTS), "the ids of a text alone, whatever it spells"
    embed = [adapter.contract.embed_token_id]
    assert server.tokenize("is<|embed_token|>", special=True)[-1:] == embed
    assert server.tokenize("<|embed_token|>")[-1:] != embed


def test_the_card_and_the_record_say_what_it_is(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert "library_name: gguf\n" in text
    assert "license: apache-2.0\n" in text
    assert "llama-server -m tiny-adapter-Q8_0.gguf --embeddings\n" in text
    assert "from_pretrained" not in text.split("## tiny-adapter")[0]
    record = json.loads((exported / "search_r3.json").read_text(encoding="utf-8"))
    assert (record["kind"], record["outtype"], record["sides"]) == ("gguf", "q8_0", ["document", "query", "reasoning"])
    assert main(["models", "--check", str(exported)]) == 2
    assert f"error: {exported} is a GGUF export, see the README.md there" in capsys.readouterr().err


def test_a_query_adapter_has_a_file_for_each_side(
    tiny_adapter: Path,
    save_query_adapter: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gguf import GGUFReader

    query_adapter, out = save_query_adapter(tiny_adapter, tmp_path / "tiny-queries"), tmp_path / "out"
    assert main(["export", str(query_adapter), str(out), "--format", "gguf", "--outtype", "f16"]) == 0
    assert "tiny-queries, gguf, f16, contract " in capsys.readouterr().out
    files = {"query": out / "tiny-queries-F16.gguf", "document": out / "documents" / "tiny-adapter-F16.gguf"}
    model = SearchR3.from_pretrained(query_adapter, device="cpu")
    for side, (file, of) in zip(files, zip(files.values(), (model, model.documents), strict=True), strict=True):
        fields = GGUFReader(file).fields
        assert fields["search_r3.contract_hash"].contents() == of.contract_hash
        assert fields["search_r3.document_space"].contents() == model.contract.document_space
        assert ("search_r3.document.prefix" in fields) == (side == "document")
        assert ("search_r3.query.prefix" in fields) == (side == "query")
    said = (out / "README.md").read_text(encoding="utf-8")
    assert "this file is for queries alone" in said
    assert "`documents/tiny-adapter-F16.gguf`" in said


def test_a_file_that_embeds_otherwise_is_not_kept(
    adapter: SearchR3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install 'search-r3[llama-cpp]'")
    with monkeypatch.context() as patched:
        patched.setattr(adapter, "engine_spec", replace(adapter.engine_spec, name="int8", precision="int8"))
        with pytest.raises(InputError, match=r"^a model on the int8 engine cannot be exported as GGUF; load it with "):
            export_model(adapter, tmp_path / "out", "gguf")
    monkeypatch.setitem(gguf_export.TOLERANCE, "q8_0", 1e-9)
    with pytest.raises(InputError, match=r"^llama.cpp's embeddings are up to [\d.e-]+ from tiny-adapter's, over 1e-09"):
        export_model(adapter, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_without_llama_cpp_it_is_written_and_not_checked(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf_export, "can_check", lambda: False)
    assert main(["export", str(tiny_adapter), str(tmp_path / "out"), "--format", "gguf"]) == 0
    assert "pip install 'search-r3[llama-cpp]' to have it checked in llama.cpp" in capsys.readouterr().out
    assert (tmp_path / "out" / "tiny-adapter-Q8_0.gguf").is_file()


def test_the_query_normalizer_is_exported_too(normalizing: SearchR3, tmp_path: Path) -> None:
    export_model(normalizing, tmp_path / "out", "gguf")
    assert QueryNormalizer.load(tmp_path / "out").hash == normalizing.contract.query_normalizer
    assert QUERY_NORMALIZER_FILE in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
