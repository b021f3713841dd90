"""Commands that share models: `export`, `push` and `pull`."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import (
    Dtype,
    Json,
    load,
    print_json,
    silence_transformers,
)


class ExportFormat(StrEnum):
    """The format of an exported model."""

    safetensors = "safetensors"
    sentence_transformers = "sentence-transformers"
    int8 = "int8"
    onnx = "onnx"
    gguf = "gguf"


class OutType(StrEnum):
    """The type of a GGUF file's matrices."""

    q8_0 = "q8_0"
    f16 = "f16"
    f32 = "f32"


def export(
    model: Annotated[str, typer.Argument(help="A name from `search-r3 models`, a model folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(readable=False, help="The new folder to write.")],
    format: Annotated[
        ExportFormat,
        typer.Option(help="sentence-transformers and int8 add files for these; onnx and gguf write one file instead."),
    ] = ExportFormat.safetensors,
    outtype: Annotated[
        OutType, typer.Option(help="With gguf: the type of the matrices. q8_0 has half the size of f16.")
    ] = OutType.q8_0,
    dtype: Annotated[
        Dtype, typer.Option(help="auto is float32. bfloat16 halves the size, at a cosine distance of about 0.001.")
    ] = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Merge a model's adapter into its base and write a self-contained folder.

    The contract stays the same, so the export can search every index that the model built. Golden vectors are included.
    With --format sentence-transformers, SentenceTransformer(OUT) embeds documents and direct queries (no reasoning).
    With --format int8, OUT starts without delay with --engine int8.
    With --format onnx, model.onnx turns token ids into embeddings of documents and direct queries (float32).
    With --format gguf, llama.cpp reads OUT/NAME-Q8_0.gguf; OUT/README.md has the exact texts to send to it.

    \b
    Example:  search-r3 export search-r3-smollm2-135m-sft exported --format sentence-transformers
    Next:     search-r3 models --check exported
    """
    silence_transformers()
    from search_r3.export.merged_export import check_target, export_model

    check_target(out)  # before a model is loaded
    if format is ExportFormat.onnx:
        from search_r3.export.onnx_export import check_installed

        check_installed()
    loaded = load(model, "cpu", Dtype.float32 if dtype is Dtype.auto else dtype)
    done = export_model(loaded, out, format.value, outtype.value)
    if as_json:
        print_json({**vars(done), "folder": str(done.folder)})
    else:
        print(
            f"{done.folder}: {done.name}, {done.format}, {done.dtype}, contract {done.contract_hash[:12]}, "
            f"{len(done.files)} files, {done.bytes / 1e6:.1f} MB"
        )
        if format is ExportFormat.onnx:
            print(f"checked in onnxruntime; how to use it: {done.folder / 'README.md'}")
        elif format is ExportFormat.gguf:
            from search_r3.export.gguf_export import can_check

            checked = "checked in" if can_check() else "pip install 'search-r3[llama-cpp]' to have it checked in"
            print(f"{checked} llama.cpp; how to use it: {done.folder / 'README.md'}")
        else:
            print(f"to check it: search-r3 models --check {shlex.quote(str(done.folder))}")


def push(
    folder: Annotated[Path, typer.Argument(readable=False, help="An adapter's folder, or one that `export` wrote.")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub; created if it does not exist.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be sent.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint to the Hugging Face Hub, in one commit.

    Only safetensors, JSON and Markdown files are sent; the list is shown first. A new repository is private unless
    --public is given. The token is that of `hf auth login`, or HF_TOKEN.

    \b
    Example:  search-r3 push exported me/my-search-model --dry-run
    Next:     search-r3 pull me/my-search-model, on another machine
    """
    from search_r3.export.hub import plan_push
    from search_r3.export.hub import push as send

    plan = plan_push(folder, repo)
    if not as_json:
        for name, size in plan.files.items():
            print(f"{size / 1e6:10.2f} MB  {name}", file=sys.stderr)
        for name in plan.left_out:
            print(f" not sent      {name}", file=sys.stderr)
    address = None if dry_run else send(plan, private=not public, message=message)
    if as_json:
        sent = {"repo": repo, "kind": plan.kind, "contract_hash": plan.contract_hash, "address": address}
        print_json({**sent, "files": plan.files, "left_out": plan.left_out})
    else:
        print(f"{repo}: {'nothing sent (--dry-run)' if address is None else address}")


def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    out: Annotated[
        Path | None, typer.Argument(readable=False, help="The new folder; by default NAME in the current folder.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit; by default the newest.")] = None,
    as_json: Json = False,
) -> None:
    """Download a checkpoint from the Hugging Face Hub and check its weights against its contract.

    \b
    Example:  search-r3 pull me/my-search-model models/my-search-model
    Next:     search-r3 models --check models/my-search-model
    """
    from search_r3.export.hub import pull as fetch

    folder = fetch(repo, out, revision=revision)
    if as_json:
        print_json({"repo": repo, "folder": str(folder)})
    else:
        print(f"{folder}: to check it, search-r3 models --check {shlex.quote(str(folder))}")
