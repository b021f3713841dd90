"""How models are loaded (a base, a base with its adapter, a merged model) and saved, each with its embedding contract.

The contract itself is `search_r3.model.contract`; golden vectors test every engine against it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError, first_line
from search_r3.files import atomic_path, atomic_write_text
from search_r3.model.complete_weights import check_adapter, load_causal_lm
from search_r3.model.contract import Contract
from search_r3.model.quiet_loading import quiet_transformers
from search_r3.model.resolve import resolve, weights_sha256
from search_r3.prompts import EMBED_TOKEN

CONTRACT_FILE = "search_r3.json"
GOLDEN_FILE = "golden.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this: GPUs are slower otherwise, and vLLM's weight sync has broken."""

GOLDEN_TEXTS = (
    "How do I read a file line by line in Python?",
    "Aspirin lowers the risk of heart attack in middle-aged men.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Die Hauptstadt von Frankreich ist Paris.",
    "x",
    "A rocket's thrust is the reaction to the momentum of the gas that it throws away. " * 8,
)


@dataclass
class Checkpoint:
    """A loaded model with its tokenizer and contract. `model` is a causal LM, its adapter merged or still PEFT's."""

    name: str
    model: Any
    tokenizer: Any
    contract: Contract
    path: Path


def read_record(folder: Path) -> dict[str, Any] | None:
    """The contract file of `folder` as a dictionary, or None for a plain base model. Raises InputError if broken."""
    file = folder / CONTRACT_FILE
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        record["kind"], record["contract"]["base_weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); the checkpoint is damaged, download it again") from error
    return record


def load(name_or_path: str | Path, *, dtype: Any, device: Any = "cpu", merge: bool = True) -> Checkpoint:
    """Load a base, an adapter on its base, or a merged model.

    Args:
        name_or_path: see `resolve.resolve`.
        dtype: the torch dtype of the weights.
        merge: fold the adapter into the base (inference); otherwise keep it as a PEFT adapter (training).

    Raises:
        InputError: unknown name, broken folder, an ONNX export, or an adapter whose base has other weights than it was
            trained on.
    """
    folder = resolve(name_or_path)
    record = read_record(folder)
    with _one_thread():
        if record is None:
            checkpoint = load_base(name_or_path, dtype=dtype)
        elif record["kind"] == "onnx":
            raise InputError(f"{folder} is an ONNX export, see the README.md there; give the model it was made from")
        elif record["kind"] == "merged":
            checkpoint = _load_merged(folder, record, dtype)
        else:
            checkpoint = _load_adapter(folder, record, dtype, merge)
        checkpoint.model.to(device).eval()
    return checkpoint


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: loading is many small operations, bound by memory.

    More threads only add time spent spinning, on a loaded machine eight times that of loading itself (LOG.md).
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_base(name_or_path: str | Path, *, dtype: Any) -> Checkpoint:
    """Load an instruction-tuned base model and add the embed token to its tokenizer.

    The token's row starts as the mean of the vocabulary's rows (the same on every machine); padding rows are zero.
    """
    import torch

    folder = resolve(name_or_path)
    tokenizer, model = _read_model(folder, dtype)
    embed_id = add_embed_token(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    padded = padded_rows(rows, embed_id)
    if padded != rows:
        with quiet_transformers():
            model.resize_token_embeddings(padded, mean_resizing=False)
    with torch.no_grad():
        tied = model.get_output_embeddings() is not None and (
            model.get_output_embeddings().weight is model.get_input_embeddings().weight
        )
        matrices = [model.get_input_embeddings().weight]
        if not tied and model.get_output_embeddings() is not None:
            matrices.append(model.get_output_embeddings().weight)
        for weight in matrices:
            weight[rows:] = 0
            weight[embed_id] = weight[: min(embed_id, rows)].float().mean(0).to(weight.dtype)
    name = Path(str(name_or_path)).name
    contract = Contract(
        base=str(name_or_path),
        base_weights=weights_sha256(folder),
        adapter_weights="",
        embed_token_id=embed_id,
        dimension=model.config.get_text_config().hidden_size,
        chat_template=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    )
    return Checkpoint(f"{name}-base", model, tokenizer, contract, folder)


def padded_rows(rows: int, embed_id: int) -> int:
    """Rows of the embedding matrix once the embed token is in it, from the base's `rows`."""
    return -(-max(rows, embed_id + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _read_model(folder: Path, dtype: Any) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        # Explicitly, whatever the defaults: no code of the folder is run, and no pickle is read.
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            return tokenizer, load_causal_lm(folder, dtype, use_safetensors=True)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        message = f"{folder} is not a causal language model that transformers can read: {first_line(error)}"
        raise InputError(message) from error


def add_embed_token(tokenizer: Any) -> int:
    """Add `EMBED_TOKEN` to `tokenizer` (white space before it belongs to it) and return its id."""
    from transformers import AddedToken

    token = AddedToken(EMBED_TOKEN, lstrip=True, rstrip=False, normalized=False, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return int(tokenizer.convert_tokens_to_ids(EMBED_TOKEN))


def _load_adapter(folder: Path, record: dict[str, Any], dtype: Any, merge: bool) -> Checkpoint:
    from peft import PeftModel
    from safetensors import SafetensorError

    contract = Contract.from_dict(record["contract"], str(folder / CONTRACT_FILE))
    try:
        base = load_base(contract.base, dtype=dtype)
    except InputError as error:
        raise InputError(f"the base of adapter {folder.name}: {error}") from error
    if base.contract.base_weights != contract.base_weights:
        raise InputError(
            f"{folder.name} was trained on {contract.base} with weights {contract.base_weights[:12]}, but the weights "
            f"found are {base.contract.base_weights[:12]}; embeddings would be wrong. Get the base it was trained on"
        )
    for what in ("embed_token_id", "chat_template", "dimension"):
        trained, found = getattr(contract, what), getattr(base.contract, what)
        if trained != found:
            raise InputError(
                f"{folder.name} was trained with {what} {str(trained)[:12]}, but the tokenizer and configuration of "
                f"{contract.base} now give {str(found)[:12]}; get the base it was trained on"
            )
    if weights_sha256(folder, ADAPTER_FILE) != contract.adapter_weights:
        raise InputError(f"{folder}: the adapter's weights do not match the contract; download or train it again")
    try:
        with quiet_transformers():
            model: Any = PeftModel.from_pretrained(base.model, str(folder), is_trainable=not merge)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder} is not an adapter that peft can read: {first_line(error)}") from error
    check_adapter(model, folder / ADAPTER_FILE)
    if merge:
        model = model.merge_and_unload()
        if hasattr(model, "peft_config"):  # peft 0.18 leaves it
            del model.peft_config
    return Checkpoint(folder.resolve().name, model, base.tokenizer, contract, folder)


def _load_merged(folder: Path, record: dict[str, Any], dtype: Any) -> Checkpoint:
    contract = Contract.from_dict(record["contract"], str(folder / CONTRACT_FILE))
    if weights_sha256(folder) != record.get("weights"):
        raise InputError(f"{folder}: the weights are not those saved with its contract; fetch or save it again")
    tokenizer, model = _read_model(folder, dtype)
    found = tokenizer.convert_tokens_to_ids(EMBED_TOKEN)
    if found != contract.embed_token_id:
        raise InputError(f"{folder}: {EMBED_TOKEN} is token {found}, but {contract.embed_token_id} in its contract")
    return Checkpoint(record.get("name", folder.resolve().name), model, tokenizer, contract, folder)


def save_adapter(model: Any, contract: Contract, folder: Path, **more: Any) -> Contract:
    """Write a PEFT model's adapter and its contract into the existing `folder`; returns the contract with its hash.

    `more` goes into the record beside the contract and is not hashed: what two vectors need not have in common.

    Saved in bfloat16 and without the tied embeddings (only the embed token's row), which would add 113 MB.
    Golden vectors are written by `SearchR3.write_golden`, which needs the saved adapter loaded again.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(str(folder), save_embedding_layers=False, safe_serialization=True)
    file = folder / ADAPTER_FILE
    with atomic_path(file) as scratch:  # to a scratch file: the tensors read from `file` may still be mapped to it
        save_file({k: v.to(torch.bfloat16).contiguous() for k, v in load_file(file).items()}, scratch, {"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)  # peft's stub; we write the card
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = contract.base  # peft writes the base's path on this machine
    atomic_write_text(folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    written = Contract(**contract.__dict__ | {"adapter_weights": weights_sha256(folder, ADAPTER_FILE)})
    write_record(folder, "adapter", written, **more)
    return written


def write_record(folder: Path, kind: str, contract: Contract, **more: Any) -> None:
    """Write the contract file of `folder`: `kind` is "adapter" or "merged"."""
    record = {"kind": kind, "contract": contract.to_dict(), "contract_hash": contract.hash, **more}
    atomic_write_text(folder / CONTRACT_FILE, json.dumps(record, indent=2, sort_keys=True) + "\n")


def read_golden(folder: Path) -> dict[str, np.ndarray] | None:
    """Golden vectors of a checkpoint: float32 (len(GOLDEN_TEXTS), dim) under "document" and "query"; None if absent."""
    from safetensors.numpy import load_file

    file = folder / GOLDEN_FILE
    return load_file(file) if file.is_file() else None
