"""Exporting a model as one ONNX graph that embeds documents and direct queries: token ids and mask in, unit rows out.

torch.export traces the decoder, onnxscript writes it (https://docs.pytorch.org/docs/stable/onnx.html); onnxruntime then
runs the written graph, and the folder gets its name only if the embeddings are SearchR3's. The graph does not reason.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError, first_line
from search_r3.files import atomic_write_text
from search_r3.model.capitals import capitals_note
from search_r3.model.checkpoint import write_record
from search_r3.model.golden import GOLDEN_TEXTS
from search_r3.model.query_normalizer import query_normalizer_note
from search_r3.model.query_projection import refuse_query_projection
from search_r3.model.searchr3 import DEFAULT_DOCUMENT_TOKENS
from search_r3.model.tokenization import encode_as_text
from search_r3.prompts import EMBED_TOKEN, PromptTemplate

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""The packages of the extra `onnx`."""
GRAPH_FILE = "model.onnx"
SETTINGS_FILE = "onnx.json"
OUTPUT = "embedding"
SIDES = ("document", "query")
OPSET = 18
"""The ONNX opset of December 2022, which older servers support; the decoder needs nothing newer."""
ONE_FILE = 1_800_000_000
"""Largest weights in bytes stored in model.onnx itself; protobuf is limited to 2 GiB, so larger ones go into a separate
file."""
TOLERANCE = 1e-4
"""Largest allowed difference of a component between onnxruntime's and SearchR3's float32 unit rows."""


def check_installed() -> None:
    """Raise InputError if a package of the extra `onnx` is missing."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"an ONNX export needs the package {name}; run: pip install 'search-r3[onnx]'")


def write_onnx(folder: Path, model: Any) -> None:
    """Write graph, tokenizer, templates (`onnx.json`), configuration, contract and golden vectors to the new `folder`.

    Args:
        model: a loaded SearchR3 model, its adapter merged, in float32.

    Raises:
        InputError: a package is missing, the model is in another dtype, its tokenizer has no fast form or reads the
            templates differently, torch cannot trace its architecture, or onnxruntime gives other embeddings.
    """
    check_installed()
    if model.dtype != "float32":
        raise InputError(f"an ONNX export is float32, but the model is loaded in {model.dtype}; load it in float32")
    refuse_query_projection(model.name, model.contract, "exported as ONNX")
    folder.mkdir()
    model.checkpoint.model.config.save_pretrained(str(folder))
    model.tokenizer.save_pretrained(str(folder))
    write_record(folder, "onnx", model.contract, name=model.name)
    model.write_golden(folder)
    templates = _templates(model)
    _settle_tokenizer(folder / "tokenizer.json", model, templates)
    settings = {
        "contract_hash": model.contract_hash,
        "dimension": model.dimension,
        "max_text_tokens": DEFAULT_DOCUMENT_TOKENS,
        "templates": templates,
    }
    if model.contract.fold_capitals:
        settings["fold_capitals"] = True
    if model.checkpoint.query_normalizer is not None:
        model.checkpoint.query_normalizer.save(folder)
    atomic_write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    _write_graph(folder / GRAPH_FILE, model)
    _check_graph(folder / GRAPH_FILE, model)


def usage(model: Any) -> list[str]:
    """The lines (Markdown) of an export's README: inputs, output, pooling, the templates, and how to feed them."""
    templates = _templates(model)
    lines = [
        f"A Search-R3 model, its adapter merged into its base, as one ONNX graph (float32, {model.dimension} "
        "dimensions) for documents and direct queries; it does not reason. Contract "
        f"`{model.contract_hash[:12]}`: embeddings of any model of this contract can be compared.",
        "",
        "| | name | shape | type | what it is |",
        "|---|---|---|---|---|",
        "| input | `input_ids` | (batch, length) | int64 | prefix, text, suffix; padded on the right with any id |",
        "| input | `attention_mask` | (batch, length) | int64 | 1 at these tokens, 0 at padding |",
        f"| output | `{OUTPUT}` | (batch, {model.dimension}) | float32 | unit rows: compare them by dot product |",
        "",
        "The embedding is the last hidden state, after the final norm, at the last token of the mask: the "
        f"embed token `{EMBED_TOKEN}`, which ends the suffix. Pooling and normalization are in the graph; the "
        "templates are not:",
        "",
    ]
    for side in SIDES:
        shown = {part: templates[side][part] for part in ("prefix", "suffix")}
        lines += [f"A {side}:", "", "```json", json.dumps(shown, ensure_ascii=False), "```", ""]
    return [
        *lines,
        f"`{SETTINGS_FILE}` has them with their token ids. Tokenize the text alone, as below, and keep its first "
        f"{DEFAULT_DOCUMENT_TOKENS} tokens. Joined with the templates into one string, a text that begins with white "
        "space or spells a special token would be read as other tokens.",
        "",
        *capitals_note(model),
        *query_normalizer_note(model),
        "```python",
        *_CODE.strip().splitlines(),
        "```",
        "",
    ]


_CODE = f'''
import json, numpy as np, onnxruntime
from pathlib import Path
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("{GRAPH_FILE}")
settings = json.loads(Path("{SETTINGS_FILE}").read_text("utf-8"))
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.encode_special_tokens = True  # a special token's name in a text is plain characters

def embed(texts, side):  # "document" or "query"
    template, limit = settings["templates"][side], settings["max_text_tokens"]
    rows = [tokenizer.encode(text, add_special_tokens=False).ids[:limit] for text in texts]
    rows = [template["prefix_ids"] + row + template["suffix_ids"] for row in rows]
    longest = max(len(row) for row in rows)
    ids = np.array([row + [0] * (longest - len(row)) for row in rows], dtype=np.int64)
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=np.int64)
    return session.run(["{OUTPUT}"], {{"input_ids": ids, "attention_mask": mask}})[0]

documents = embed(["shutil.rmtree: delete a directory tree", "os.listdir: the names in a folder"], "document")
print(embed(["how do I delete a folder"], "query") @ documents.T)
'''


def _templates(model: Any) -> dict[str, dict[str, Any]]:
    """The conversations around a text, as text and as token ids."""
    templates: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        template: PromptTemplate = model.templates[side]
        parts = {"prefix": list(template.prefix), "suffix": list(template.suffix)}
        spelt = {name: model.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for name, ids in parts.items()}
        templates[side] = {**spelt, **{f"{name}_ids": ids for name, ids in parts.items()}}
    return templates


def _settle_tokenizer(file: Path, model: Any, templates: dict[str, dict[str, Any]]) -> None:
    """Remove padding and truncation from `tokenizer.json`, and check that `tokenizers` reads our ids with it."""
    from tokenizers import Tokenizer

    if not file.is_file():
        raise InputError("this model's tokenizer has no fast form (tokenizer.json); export with --format safetensors")
    backend = Tokenizer.from_file(str(file))
    backend.no_padding()
    backend.no_truncation()
    atomic_write_text(file, backend.to_str(pretty=True))
    same = all(
        backend.encode(template[part], add_special_tokens=False).ids == template[f"{part}_ids"]
        for template in templates.values()
        for part in ("prefix", "suffix")
    )
    backend.encode_special_tokens = True
    texts = [*GOLDEN_TEXTS, f"a text that spells {EMBED_TOKEN}"]
    read = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    if not same or read != encode_as_text(model.tokenizer, texts):
        raise InputError(
            "tokenizer.json reads the conversations or a text differently from SearchR3, so the graph would be "
            "given other tokens; export with --format safetensors"
        )


def _write_graph(file: Path, model: Any) -> None:
    """Trace the decoder with its pooling, and write it without paths of this machine."""
    import torch

    from search_r3.model.engines.torch_engine import decoder_of

    decoder = decoder_of(model.checkpoint.model)
    device = next(decoder.parameters()).device
    # Two rows of unequal length, since sizes of 0 and 1 are treated as constants. It is traced here, and not by
    # torch.onnx.export, because that one would trace twice.
    example = (torch.ones(2, 5, dtype=torch.long, device=device), torch.tensor([[1] * 5, [1] * 3 + [0] * 2]).to(device))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        with _traceable(decoder), _quiet():
            traced = torch.export.export(_embedder(decoder), example, dynamic_shapes=(axes, axes), strict=False)
            program: Any = torch.onnx.export(
                traced,
                input_names=["input_ids", "attention_mask"],
                output_names=[OUTPUT],
                dynamic_shapes=(axes, axes),  # only for the names of the sizes
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the tracer raises many types
        kind = type(model.checkpoint.model).__name__
        raise InputError(
            f"torch cannot write {kind} as ONNX ({first_line(error)}); export with --format safetensors"
        ) from error
    _tidy(program.model)
    size = sum(weight.numel() * weight.element_size() for weight in decoder.parameters())
    program.save(str(file), external_data=size > ONE_FILE)


def _embedder(decoder: Any) -> Any:
    """`decoder` followed by the pooling: (input_ids, attention_mask), (B, L) each, to unit rows (B, D)."""
    import torch
    from torch import Tensor

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            rows, columns = (torch.arange(size, device=input_ids.device) for size in input_ids.shape)
            states_BLD = self.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(1) - 1).clamp_min(0),
                use_cache=False,
            ).last_hidden_state
            last_B = (attention_mask * columns).amax(1)  # independent of the padding side
            return torch.nn.functional.normalize(states_BLD[rows, last_B].float(), dim=-1)

    return Embedder().eval()


@contextmanager
def _traceable(decoder: Any) -> Iterator[None]:
    """Attention as plain products and a softmax, which every runtime supports, and weights without gradients.

    Weights that an engine rearranged in inference mode cannot be traced with gradients.
    """
    import torch

    attention = decoder.config._attn_implementation
    trained = [weight for weight in decoder.parameters() if weight.requires_grad]
    decoder.set_attn_implementation("eager")
    try:
        for weight in trained:
            weight.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        decoder.set_attn_implementation(attention)
        with torch.inference_mode():
            for weight in trained:
                weight.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log lines, which users cannot act on."""
    logger = logging.getLogger("torch.onnx")
    kept = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(kept)


def _tidy(graph_model: Any) -> None:
    """Remove the exporter's notes (they contain this machine's paths), and keep the output's name for the output."""
    graph = graph_model.graph
    parts = [graph_model, graph, *graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        parts += [node, *node.outputs]
        for value in node.outputs:
            if value.name == OUTPUT and value not in graph.outputs:  # torch names a value after the table it comes from
                value.name = f"token_{OUTPUT}"
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None


def _check_graph(file: Path, model: Any) -> None:
    """Run the golden texts through the written graph, as a batch and one alone; raise InputError if they differ."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    expected = model.golden()
    batches: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
    for side in SIDES:
        template = model.templates[side]
        rows = model.token_rows(GOLDEN_TEXTS, DEFAULT_DOCUMENT_TOKENS, queries=side != "document")
        whole = [[*template.prefix, *row, *template.suffix] for row in rows]
        batches += [(_padded(batch), expected[side][: len(batch)]) for batch in (whole, whole[:1])]
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        outputs = [session.run([OUTPUT], feed)[0] for feed, _ in batches]
    except Exception as error:  # onnxruntime's errors have no common base class
        raise InputError(f"onnxruntime cannot run the graph of {model.name} ({first_line(error)})") from error
    differences = [np.abs(ours - wanted).max() for ours, (_, wanted) in zip(outputs, batches, strict=True)]
    worst = float(np.nan_to_num(differences, nan=np.inf).max())
    if worst > TOLERANCE:
        raise InputError(
            f"onnxruntime's embeddings differ from {model.name}'s by up to {worst:.1g}, over {TOLERANCE:g}, so nothing "
            "was kept; export with --format safetensors"
        )


def _padded(rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Rows of token ids as the graph takes them, padded on the right."""
    longest = max(map(len, rows))
    return {
        "input_ids": np.array([row + [0] * (longest - len(row)) for row in rows], dtype=np.int64),
        "attention_mask": np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=np.int64),
    }
