"""Exporting a model as GGUF for llama.cpp, Ollama, LM Studio and the like: one file for each side, and how to ask it.

`search_r3.model.gguf_file` writes the file. Where xllamacpp is installed, llama.cpp then embeds the golden texts with
it, and the folder gets its name only if the embeddings are SearchR3's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.model.capitals import capitals_note
from search_r3.model.checkpoint import write_record
from search_r3.model.gguf_file import SIDES, OutType, write_gguf
from search_r3.model.golden import GOLDEN_TEXTS
from search_r3.model.query_normalizer import query_normalizer_note
from search_r3.model.query_projection import refuse_query_projection
from search_r3.model.searchr3 import DEFAULT_DOCUMENT_TOKENS, DOCUMENTS, stop_ids

TOLERANCE: dict[OutType, float] = {"q8_0": 1e-2, "f16": 1e-3, "f32": 1e-3}
"""Largest accepted cosine distance from SearchR3's float32; llama.cpp keeps keys and values in float16."""


def write_gguf_folder(folder: Path, model: Any, outtype: OutType) -> None:
    """Write GGUF file, contract, query normalizer and golden vectors to the new `folder`; those of documents into a
    folder inside it, if they go through another model.

    Args:
        model: a loaded SearchR3 model.

    Raises:
        InputError: see `write_gguf`; the engine has another precision than the weights; or llama.cpp gives other
            embeddings.
    """
    if model.engine_spec.precision is not None:  # the golden vectors would have that precision
        raise InputError(
            f"a model on the {model.engine_spec.name} engine cannot be exported as GGUF; load it with engine torch"
        )
    refuse_query_projection(model.name, model.contract, "exported as GGUF")
    own = not model.is_query_adapter
    _write(folder, model, outtype, SIDES if own else SIDES[1:])
    if not own:
        _write(folder / DOCUMENTS, model.documents, outtype, SIDES[:1])


def file_name(model: Any, outtype: OutType) -> str:
    """The file's name, as llama.cpp's converter writes it: the model, then the type of its matrices."""
    return f"{model.name}-{outtype.upper()}.gguf"


def can_check() -> bool:
    """Whether llama.cpp is installed, so that an export is compared with SearchR3."""
    return importlib.util.find_spec("xllamacpp") is not None


def usage(model: Any, outtype: OutType) -> list[str]:
    """The lines (Markdown) of an export's README: what the file computes, and what to send to llama-server."""
    own = not model.is_query_adapter
    embeds = "documents, direct queries and queries with reasoning" if own else "queries, direct and with reasoning"
    lines = [
        f"A Search-R3 model, its adapter merged into its base, as GGUF ({outtype.upper()}, {model.dimension} "
        f"dimensions), for {embeds}. Contract `{model.contract_hash[:12]}`: embeddings of any model of this contract "
        "can be compared.",
        "",
        *([] if own else [_two_files(model, outtype), ""]),
        "```sh",
        f"llama-server -m {file_name(model, outtype)} --embeddings",
        "```",
        "",
        "The embedding is the state at the last token, after the final norm (the file names the pooling, LAST), of a "
        "text that ends with the embed token. llama-server's `/v1/embeddings` makes it a unit vector; with llama.cpp "
        "as a library, divide by its length. The exact texts to send, with TEXT in the middle:",
        "",
    ]
    sides = {"document": model.documents, "query": model}
    for side, of in sides.items():
        template, tokenizer = of.templates[side], of.tokenizer
        prefix, suffix = (tokenizer.decode(list(ids)) for ids in (template.prefix, template.suffix))
        lines += [f"A {side}:", "", "```", f"{prefix}TEXT{suffix}", "```", ""]
    template = model.templates["reasoning"]
    prefix, suffix = (model.tokenizer.decode(list(ids)) for ids in (template.prefix, template.suffix))
    return [
        *lines,
        "A query with reasoning, first to `/completion` with `temperature` 0 and `n_predict` 32; it ends at the embed "
        "token. Then all of it, with what was written and `<|embed_token|>` at its end, to `/v1/embeddings`:",
        "",
        "```",
        f"{prefix}TEXT{suffix}",
        "```",
        "",
        "The same are in the file's metadata, `search_r3.document.prefix`, `search_r3.document.suffix_ids` and so on. "
        "Note: there is no space before the embed token.",
        "",
        "llama-server reads `<|im_end|>` and the like in TEXT as special tokens, and white space at its beginning as "
        "part of the prompt's; SearchR3 does not, and reads the first "
        f"{DEFAULT_DOCUMENT_TOKENS} tokens of a text. To do the same, ask `/tokenize` for the ids of TEXT alone, with "
        "`parse_special` false, and send `[prefix_ids + ids + suffix_ids]` in place of a text.",
        "",
        *capitals_note(model),
        *query_normalizer_note(model),
    ]


def _two_files(model: Any, outtype: OutType) -> str:
    return (
        "It is a query adapter: this file is for queries alone. The documents' file, whose vectors these queries "
        f"search, is `{DOCUMENTS}/{file_name(model.documents, outtype)}`."
    )


def _write(folder: Path, model: Any, outtype: OutType, sides: tuple[str, ...]) -> None:
    folder.mkdir()
    file = folder / file_name(model, outtype)
    stops = stop_ids(model.checkpoint.model, model.tokenizer)
    write_gguf(file, model.checkpoint, model.templates, outtype, sides=sides, stop_ids=tuple(stops))
    write_record(folder, "gguf", model.contract, name=model.name, outtype=outtype, sides=list(sides))
    if model.checkpoint.query_normalizer is not None:
        model.checkpoint.query_normalizer.save(folder)
    model.write_golden(folder)
    if can_check():
        _check(file, model, outtype)


def _check(file: Path, model: Any, outtype: OutType) -> None:
    """Embed the golden texts with llama.cpp, all in one call; raise InputError if one of them differs too much."""
    from search_r3.model.engines.llama_cpp.llama_server import LlamaServer

    template = model.templates["document"]
    rows = [
        [*template.prefix, *row, *template.suffix]
        for row in model.token_rows(list(GOLDEN_TEXTS), DEFAULT_DOCUMENT_TOKENS)
    ]
    server = LlamaServer(file, sequences=4, context=1 + max(map(len, rows)), threads=1)
    try:
        found = server.embed(rows)
    finally:
        server.close()
    expected = model.engine.embed(template.prefix, [row[len(template.prefix) :] for row in rows], len(rows))
    worst = float(np.nan_to_num(1 - (found * expected).sum(1), nan=np.inf).max())
    if worst > TOLERANCE[outtype]:
        raise InputError(
            f"llama.cpp's embeddings are up to {worst:.1g} from {model.name}'s, over {TOLERANCE[outtype]:g}, so "
            "nothing was kept; export with --format safetensors"
        )
