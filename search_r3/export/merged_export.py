"""Exports: a checkpoint's adapter merged into its base, as one self-contained folder.

`safetensors` is what `SearchR3.from_pretrained` and transformers read; `sentence-transformers` adds what that library
needs, `int8` the int8 engine's matrices; `onnx` is a graph for onnxruntime instead of the weights, `gguf` a file for
llama.cpp. All keep the contract, so an index of the adapter accepts the export's embeddings.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from search_r3.errors import InputError
from search_r3.export import gguf_export
from search_r3.export.gguf_export import OutType, write_gguf_folder
from search_r3.files import atomic_path, atomic_write_text, expand_user
from search_r3.model.capitals import capitals_note
from search_r3.model.query_normalizer import query_normalizer_note
from search_r3.model.searchr3 import DOCUMENTS

Format = Literal["safetensors", "sentence-transformers", "int8", "onnx", "gguf"]


@dataclass(frozen=True)
class Export:
    """The exported files: `files` are relative to `folder`, `bytes` is their total size."""

    folder: Path
    format: Format
    name: str
    contract_hash: str
    dtype: str
    files: list[str]
    bytes: int


def export_model(model: Any, out: str | Path, format: Format = "safetensors", outtype: OutType = "q8_0") -> Export:
    """Write a loaded SearchR3 model, merged, to the new folder `out`, atomically.

    The folder contains safetensors and the tokenizer (or model.onnx, or a GGUF file), the contract, golden vectors and
    a model card.

    Args:
        outtype: the type of a GGUF file's matrices.

    Raises:
        InputError: `out` is not empty, the format is unknown, the disk is full, sentence-transformers' prompts cannot
            express the model's conversations, the int8 engine does not run this model, the model is a query adapter
            and the format has one model only, or see `write_onnx` and `write_gguf_folder`.
    """
    if format not in get_args(Format):
        raise InputError(f"format is {format!r}; choose one of: {', '.join(get_args(Format))}")
    if len(sides(model)) > 1 and format in ("sentence-transformers", "onnx"):
        raise InputError(
            f"{model.name} is a query adapter, whose documents go through another model, and {format} has one model "
            "for both; export safetensors, int8 or gguf"
        )
    out = Path(out)
    check_target(out)
    with atomic_path(out) as scratch:
        kept = {side: side.contract for side in sides(model).values()}
        try:
            for side, contract in kept.items():
                side.contract = replace(contract, base=_public(contract.base))
            if format == "onnx":
                from search_r3.export.onnx_export import write_onnx

                write_onnx(scratch, model)
            elif format == "gguf":
                write_gguf_folder(scratch, model, outtype)
            else:
                model.save_pretrained(scratch)
        finally:
            for side, contract in kept.items():
                side.contract = contract
        for inside in sides(model):
            _chat_template_into_json(scratch / inside)
        if format == "sentence-transformers":
            from search_r3.export.sentence_transformers_export import write_modules

            write_modules(scratch, model)
        if format == "int8":
            from search_r3.model.engines.int8.calibration import calibration_rows
            from search_r3.model.engines.int8.int8_weights import INT8_FILE, quantize_causal_lm, save_int8

            for inside, side in sides(model).items():
                rows = calibration_rows(side.templates, side.tokenizer, side.contract.embed_token_id)
                tensors = quantize_causal_lm(side.checkpoint.model, rows)
                save_int8(tensors, scratch / inside / INT8_FILE, side.contract.states_hash)
        atomic_write_text(scratch / "README.md", card(model, format, outtype))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return Export(
        out,
        format,
        model.name,
        model.contract_hash,
        outtype if format == "gguf" else model.dtype,
        [path.relative_to(out).as_posix() for path in files],
        sum(path.stat().st_size for path in files),
    )


def sides(model: Any) -> dict[str, Any]:
    """The models that a SearchR3 consists of by their folder inside an export: itself, and what embeds documents."""
    return {"": model, DOCUMENTS: model.documents} if model.is_query_adapter else {"": model}


def check_target(out: Path) -> None:
    """Raise InputError if `out` exists, unless it is an empty folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} exists already; give a new folder, or remove it first")


def card(model: Any, format: Format, outtype: OutType = "q8_0") -> str:
    """The export's model card (Markdown): how to load it, its contract, and below that its checkpoint's card."""
    source = Path(model.checkpoint.path) / "README.md"
    kept, body = _split_card(source.read_text(encoding="utf-8") if source.is_file() else "")
    library = format if format in ("sentence-transformers", "onnx", "gguf") else "transformers"
    tags = ["search-r3", "sentence-transformers", "information-retrieval", "embeddings", "reasoning"]
    head: dict[str, str] = {key: kept[key] for key in ("license", "base_model", "language") if key in kept}
    head |= {"library_name": library, "pipeline_tag": "feature-extraction"}
    head["tags"] = f"[{', '.join(tag for tag in tags if tag != 'sentence-transformers' or tag == library)}]"
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "---", "", f"# {model.name}", ""]
    if format == "onnx":
        from search_r3.export.onnx_export import usage

        lines += usage(model)
    elif format == "gguf":
        lines += gguf_export.usage(model, outtype)
    else:
        lines += _loading(model, format)
    if body:
        lines += ["The card of the checkpoint it was made from follows.", "", body]
    return "\n".join(lines).rstrip() + "\n"


def _loading(model: Any, format: Format) -> list[str]:
    """The section of a card on loading safetensors."""
    lines = [
        f"A Search-R3 model, its adapter merged into its base ({model.dtype}, {model.dimension} dimensions). Contract "
        f"`{model.contract_hash[:12]}`: embeddings of any model of this contract can be compared.",
        "",
        "```python",
        "from search_r3 import SearchR3",
        "",
        'model = SearchR3.from_pretrained("FOLDER_OR_HUB_ID")',
        'documents = model.encode_document(["shutil.rmtree: delete a directory tree"])',
        'queries = model.encode_query(["how do I delete a folder"], reasoning=True)',
        "```",
        "",
    ]
    if format == "int8":
        lines += [
            'On a CPU, `SearchR3.from_pretrained("FOLDER_OR_HUB_ID", engine="int8")` is several times as fast; its '
            "matrices are in `int8.safetensors`.",
            "",
        ]
    if format == "sentence-transformers":
        lines += [
            "Without reasoning, sentence-transformers gives the same embeddings:",
            "",
            "```python",
            "from sentence_transformers import SentenceTransformer",
            "",
            'model = SentenceTransformer("FOLDER_OR_HUB_ID")',
            'documents = model.encode_document(["shutil.rmtree: delete a directory tree"])',
            'queries = model.encode_query(["how do I delete a folder"])',
            "```",
            "",
            *capitals_note(model),
            *query_normalizer_note(model),
        ]
    return lines


def _public(base: str) -> str:
    """The base's name without a local path. It is informational and not hashed."""
    return Path(base).name if expand_user(base).is_dir() else base


def _chat_template_into_json(folder: Path) -> None:
    """Put the tokenizer's chat template into its JSON, so that the export is only safetensors, JSON and Markdown."""
    jinja, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.is_file():
        record = json.loads(settings.read_text(encoding="utf-8"))
        record["chat_template"] = jinja.read_text(encoding="utf-8")
        atomic_write_text(settings, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        jinja.unlink()


def _split_card(text: str) -> tuple[dict[str, str], str]:
    """A card's front matter as single lines, and its body with headings one level down."""
    kept: dict[str, str] = {}
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        head, text = text[4:].split("\n---\n", 1)
        kept = dict(re.findall(r"^(\w+):[ \t]+(\S.*)$", head, re.M))
    fenced, lines = False, []
    for line in text.strip().splitlines():
        fenced ^= line.startswith("```")
        lines.append(f"#{line}" if line.startswith("#") and not fenced else line)
    return kept, "\n".join(lines)
