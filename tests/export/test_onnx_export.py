"""An ONNX export's graph, fed as its own README says, embeds as the model does that it was made from."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3 import InputError, SearchR3
from search_r3.cli import main
from search_r3.export import onnx_export as exporter
from search_r3.export.merged_export import export_model
from search_r3.model.query_normalizer import QUERY_NORMALIZER_FILE, QueryNormalizer

pytestmark = pytest.mark.skipif(  # not imported here, which takes two seconds in each of `make test`'s processes
    not all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime"))),
    reason="the extra onnx is not installed: pip install 'search-r3[onnx]'",
)
TEXTS = [
    "Bread needs flour, water and yeast.",
    "def mean(values):\n    return sum(values) / len(values)",
    "  Der Zug nach Wien fährt um neun.\n",
    "x",
    "what does <|embed_token|> do, and <|im_end|>",
    "A long text about trains. " * 300,
]


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> SearchR3:
    """With weights that ask for a gradient, as those of a base do."""
    model = SearchR3.from_pretrained(tiny_adapter, device="cpu")
    model.checkpoint.model.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def exported(adapter: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "graph"
    done = export_model(adapter, out, "onnx")
    assert done.contract_hash == adapter.contract_hash
    assert done.files == sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return out


@pytest.fixture
def readme(exported: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the lines of the README define, run in the folder."""
    return run_readme(exported, monkeypatch)


def run_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    assert "search_r3" not in code
    defined: dict[str, Any] = {}
    exec(code, defined)
    return defined


def feed(rows: list[list[int]], *, left: bool = False) -> dict[str, np.ndarray]:
    longest = max(map(len, rows))
    ids, mask = (np.zeros((len(rows), longest), dtype=np.int64) for _ in range(2))
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def test_the_lines_of_the_readme_give_the_embeddings_of_the_model(
    readme: dict[str, Any], adapter: SearchR3, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents, queries = (readme["embed"](TEXTS, side) for side in ("document", "query"))
    assert documents.dtype == np.float32
    assert np.abs(np.linalg.norm(documents, axis=1) - 1).max() < 1e-5
    assert np.abs(documents - adapter.encode_document(TEXTS)).max() < 1e-4
    assert np.abs(queries - adapter.encode_query(TEXTS, reasoning=False)).max() < 1e-4
    assert np.abs(queries - documents).max() > 1e-2
    base = SearchR3.from_pretrained(tiny_model, device="cpu")
    assert np.abs(documents - base.encode_document(TEXTS)).max() > 1e-2, "the adapter must be in it"


def test_an_embedding_depends_on_no_other_row_and_on_no_padding(readme: dict[str, Any], adapter: SearchR3) -> None:
    together = readme["embed"](TEXTS, "document")
    alone = np.concatenate([readme["embed"]([text], "document") for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5
    session, template = readme["session"], adapter.templates["document"]
    rows = [[*template.prefix, *range(40, 40 + size), *template.suffix] for size in (1, 7, 30)]
    right, left = (session.run(["embedding"], feed(rows, left=left))[0] for left in (False, True))
    assert np.abs(right - left).max() < 1e-5
    given = feed(rows)
    given["input_ids"][given["attention_mask"] == 0] = 77
    assert np.abs(session.run(None, given)[0] - right).max() < 1e-6


def test_the_graph_says_its_names_types_and_free_sizes(readme: dict[str, Any]) -> None:
    session = readme["session"]
    reported = [(value.name, value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
    assert reported == [
        ("input_ids", "tensor(int64)", ["batch", "length"]),
        ("attention_mask", "tensor(int64)", ["batch", "length"]),
        ("embedding", "tensor(float)", ["batch", 32]),
    ]


def test_the_readme_shows_the_templates_of_the_contract(exported: Path, adapter: SearchR3) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    shown = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S)]
    assert len(shown) == 2
    settings = json.loads((exported / "onnx.json").read_text(encoding="utf-8"))
    assert settings["contract_hash"] == adapter.contract_hash
    for side, block in zip(("document", "query"), shown, strict=True):
        talk, template = getattr(adapter.contract.prompts, side), adapter.templates[side]
        assert talk.system in block["prefix"]
        assert block["suffix"].endswith(talk.answer.rstrip() + "<|embed_token|>")
        for part in ("prefix", "suffix"):
            assert tuple(adapter.tokenizer.encode(block[part], add_special_tokens=False)) == getattr(template, part)
            assert block[part] == settings["templates"][side][part]
            assert tuple(settings["templates"][side][f"{part}_ids"]) == getattr(template, part)
    assert "library_name: onnx\n" in text
    assert "license: apache-2.0\n" in text
    assert "from_pretrained" not in text.split("## tiny-adapter")[0]


def test_it_names_no_place_of_this_machine(exported: Path, tiny_model: Path) -> None:
    package = Path(exporter.__file__).parents[2]
    for path in exported.rglob("*"):
        for place in (tiny_model.parent, exported.parent, package, Path(np.__file__).parents[1]):
            assert str(place).encode() not in path.read_bytes(), (path.name, place)
    names = {"README.md", "config.json", "golden.safetensors", "model.onnx", "onnx.json", "search_r3.json"}
    assert {path.name for path in exported.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}


def test_who_loads_it_as_a_model_is_told_what_it_is(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--check", str(exported)]) == 2
    assert f"error: {exported} is an ONNX export" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_sliding_window_and_weights_beside_the_graph(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another architecture, whose far tokens are masked; and weights too large for one file."""
    from transformers import AutoConfig, MistralConfig, MistralForCausalLM

    folder = tmp_path / "tiny-mistral"
    shutil.copytree(tiny_model, folder)
    like = AutoConfig.from_pretrained(tiny_model).to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: like[name] for name in (*kept, "num_hidden_layers", "initializer_range")}
    MistralForCausalLM(MistralConfig(**sizes, sliding_window=16, tie_word_embeddings=True)).save_pretrained(folder)
    monkeypatch.setattr(exporter, "ONE_FILE", 0)
    out = tmp_path / "graph"
    assert main(["export", str(folder), str(out), "--format", "onnx"]) == 0
    assert f"how to use it: {out / 'README.md'}" in capsys.readouterr().out
    assert (out / "model.onnx.data").stat().st_size > (out / "model.onnx").stat().st_size
    out = out.rename(tmp_path / "moved")
    model = SearchR3.from_pretrained(folder, device="cpu")
    found = run_readme(out, monkeypatch)["embed"](TEXTS, "query")
    assert np.abs(found - model.encode_query(TEXTS, reasoning=False)).max() < 1e-4


def test_a_graph_that_embeds_otherwise_is_not_kept(
    exported: Path, tiny: SearchR3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_write_graph", lambda file, _: shutil.copy(exported / "model.onnx", file))
    with pytest.raises(InputError, match=r"^onnxruntime's embeddings differ from tiny-llama-base's by up to [\d.]+, "):
        export_model(tiny, tmp_path / "out", "onnx")
    monkeypatch.setattr(exporter, "_write_graph", lambda file, _: file.write_bytes(b"no graph"))
    with pytest.raises(InputError, match=r"^onnxruntime cannot run the graph of tiny-llama-base \(.*\)$"):
        export_model(tiny, tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_cannot_be_traced_is_one_line(
    tiny: SearchR3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is then as it was."""
    import torch

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Could not guard on data-dependent expression\nand a page more")

    monkeypatch.setattr(torch.export, "export", fail)
    model = tiny.checkpoint.model
    kept, trained = model.config._attn_implementation, [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(
        InputError, match=r"^torch cannot write LlamaForCausalLM as ONNX \(Could not guard on [\w -]+\);"
    ):
        export_model(tiny, tmp_path / "out", "onnx")
    assert model.config._attn_implementation == kept != "eager"
    assert [weight.requires_grad for weight in model.parameters()] == trained
    assert any(trained)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_another_dtype_and_another_tokenizer_are_one_line(
    tiny_adapter: Path,
    tiny: SearchR3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["export", str(tiny_adapter), str(tmp_path / "out"), "--format", "onnx"]
    assert main([*command, "--dtype", "bfloat16"]) == 2
    assert "an ONNX export is float32, but the model is loaded in bfloat16" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(exporter, "encode_as_text", lambda _, texts: [[1, 2]] * len(texts))
        with pytest.raises(InputError, match=r"tokenizer.json reads the conversations or a text differently"):
            export_model(tiny, tmp_path / "out", "onnx")
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said == "error: an ONNX export needs the package onnxscript; run: pip install 'search-r3[onnx]'\n"
    assert list(tmp_path.iterdir()) == []


def test_the_query_normalizer_is_exported_too(normalizing: SearchR3, tmp_path: Path) -> None:
    export_model(normalizing, tmp_path / "out", "onnx")
    assert QueryNormalizer.load(tmp_path / "out").hash == normalizing.contract.query_normalizer
    assert QUERY_NORMALIZER_FILE in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
