"""Loads models (a base, a base with its adapter, a merged model) and saves adapters, each with its embedding contract.

A query adapter is an adapter of the same base for queries alone; the model that embeds the documents is loaded on first
use.

The contract is defined in `search_r3.model.contract`; `search_r3.model.golden` tests every engine against it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search_r3.errors import InputError, first_line
from search_r3.files import atomic_path, atomic_write_text, expand_user, sha256_of
from search_r3.model.capitals import fold_capitals
from search_r3.model.complete_weights import check_adapter, load_causal_lm
from search_r3.model.contract import Contract
from search_r3.model.query_normalizer import QUERY_NORMALIZER_FILE, QueryNormalizer, before_folding
from search_r3.model.query_projection import QUERY_PROJECTION_FILE, QueryProjection, refuse_query_projection
from search_r3.model.quiet_loading import quiet_transformers
from search_r3.model.resolve import check_name, find_adapter, resolve, weights_sha256
from search_r3.prompts import EMBED_TOKEN

CONTRACT_FILE = "search_r3.json"
ADAPTER_KINDS = ("adapter", "query_adapter")
"""The kinds of checkpoint that are a LoRA adapter of a base."""
FOR_OTHER_RUNTIMES = {"onnx": "an ONNX", "gguf": "a GGUF"}
"""The kinds that are not loaded here, and what they are called."""
ADAPTER_FILE = "adapter_model.safetensors"
VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, because GPUs are slower otherwise and vLLM's weight sync can fail."""


class DocumentCheckpoint:
    """What embeds the documents of a query adapter. Its weights are loaded when they are first needed: a search needs
    none of them, and they take as much memory as the query adapter's.

    Args:
        name, source: its name, and the name or path that it is loaded by.
        contract: its contract.
        load: loads it; called once.
    """

    def __init__(self, name: str, source: str, contract: Contract, load: Callable[[], Checkpoint]) -> None:
        self.name, self.source, self.contract = name, source, contract
        self._load, self._lock = load, threading.Lock()
        self._checkpoint: Checkpoint | None = None
        self._place: dict[str, Any] = {}

    @property
    def checkpoint(self) -> Checkpoint:
        """The loaded checkpoint.

        Raises:
            InputError: see `load`; or its document space is not that of the contract.
        """
        with self._lock:
            if self._checkpoint is None:
                found = self._load()
                if self._place:
                    found.model = found.model.to(**self._place)
                self._checkpoint = found
            return self._checkpoint

    def to(self, device: Any, dtype: Any) -> None:
        """Move the weights to a device and dtype, now or when they are loaded."""
        with self._lock:
            self._place = {"device": device, "dtype": dtype}
            if self._checkpoint is not None:
                self._checkpoint.model = self._checkpoint.model.to(**self._place)


@dataclass
class Checkpoint:
    """A loaded causal LM (its adapter merged, or a PEFT adapter), with its tokenizer and contract.

    `documents` is what embeds documents; None if this checkpoint does, as it does for all but query adapters.
    `source` is the name or path that it was loaded by. `query_normalizer` is what queries go through; None if
    they stay as they are. `query_projection` is what their embeddings go through; None if they stay as they are.
    """

    name: str
    model: Any
    tokenizer: Any
    contract: Contract
    path: Path
    documents: DocumentCheckpoint | None = None
    source: str = ""
    query_normalizer: QueryNormalizer | None = None
    query_projection: QueryProjection | None = None

    def normalizer(self, *, queries: bool) -> Callable[[str], str] | None:
        """What texts go through before they are tokenized; None if they stay as they are."""
        fold = fold_capitals if self.contract.fold_capitals else None
        return before_folding(fold, self.query_normalizer) if queries else fold

    def with_query_normalizer(self, normalizer: QueryNormalizer) -> Checkpoint:
        """A copy with another query normalizer, which its contract names."""
        contract = replace(self.contract, query_normalizer=normalizer.hash)
        return replace(self, query_normalizer=normalizer, contract=contract)


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
    """Load a base, an adapter or a query adapter on its base, or a merged model.

    Args:
        name_or_path: see `resolve.resolve`.
        dtype: the torch dtype of the weights.
        device: where the model is put.
        merge: merge the adapter into the base (inference), or keep it as a PEFT adapter (training). What embeds the
            documents of a query adapter is always merged.

    Raises:
        InputError: the name is unknown, the folder is damaged or an export for other runtimes, the base does not have
            the weights that the adapter was trained on, the model of a query adapter's documents is not found, or
            one with a query projection is not merged.
    """
    folder = resolve(name_or_path)
    record = read_record(folder)
    if not merge and record is not None:
        contract = Contract.from_dict(record["contract"], str(folder / CONTRACT_FILE))
        refuse_query_projection(folder.name, contract, "trained further", record.get("adapted_from", ""))
    with _one_thread():
        if record is None:
            checkpoint = load_base(name_or_path, dtype=dtype)
        elif record["kind"] in FOR_OTHER_RUNTIMES:
            what = FOR_OTHER_RUNTIMES[record["kind"]]
            raise InputError(f"{folder} is {what} export, see the README.md there; give the model it was made from")
        elif record["kind"] == "merged":
            checkpoint = _load_merged(folder, record, dtype)
        else:
            checkpoint = _load_adapter(folder, record, dtype, merge)
        checkpoint.model.to(device).eval()
    if record is not None and checkpoint.contract.query_weights:
        checkpoint.documents = _documents_of(folder, record, checkpoint.contract, dtype, device)
    checkpoint.source = str(name_or_path)
    checkpoint.query_normalizer = read_query_normalizer(folder, checkpoint.contract)
    checkpoint.query_projection = read_query_projection(folder, checkpoint.contract)
    return checkpoint


def read_query_normalizer(folder: Path, contract: Contract) -> QueryNormalizer | None:
    """The query normalizer of the checkpoint in `folder`, or None if its contract names none.

    Raises:
        InputError: it is missing, damaged, or another one than the contract's.
    """
    if not contract.query_normalizer:
        return None
    normalizer = QueryNormalizer.load(folder)
    file = folder / QUERY_NORMALIZER_FILE
    if sha256_of(file) != contract.query_normalizer:
        raise InputError(f"{file} does not match the contract; download or train the model again")
    return normalizer


def read_query_projection(folder: Path, contract: Contract) -> QueryProjection | None:
    """The query projection of the checkpoint in `folder`, or None if its contract names none.

    Raises:
        InputError: it is missing, damaged, or another one than the contract's.
    """
    if not contract.query_projection:
        return None
    projection = QueryProjection.load(folder)
    if projection.hash != contract.query_projection or len(projection.weight_DD) != contract.dimension:
        raise InputError(f"{folder / QUERY_PROJECTION_FILE} does not match the contract; make the adapter again")
    return projection


@contextmanager
def _one_thread() -> Iterator[None]:
    """A context in which torch uses one thread: loading consists of many small, memory-bound operations.

    More threads only spin, which on a loaded machine took eight times as long as loading itself (LOG.md).
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

    The token's row is initialized to the mean of the vocabulary's rows (equal on every machine); padding rows are zero.
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
    """Rows of the embedding matrix after adding the embed token and padding, if the base has `rows`."""
    return -(-max(rows, embed_id + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _read_model(folder: Path, dtype: Any) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        # Explicit, whatever the defaults are: no code from the folder is run, and no pickle is read.
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            return tokenizer, load_causal_lm(folder, dtype, use_safetensors=True)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        message = f"{folder} is not a causal language model that transformers can read: {first_line(error)}"
        raise InputError(message) from error


def add_embed_token(tokenizer: Any) -> int:
    """Add `EMBED_TOKEN` to `tokenizer` and return its id. White space before the token is part of it."""
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
            f"{folder.name} was trained on {contract.base} with weights {contract.base_weights[:12]}, but the base "
            f"here has weights {base.contract.base_weights[:12]}; get the base that it was trained on"
        )
    for what in ("embed_token_id", "chat_template", "dimension"):
        trained, present = getattr(contract, what), getattr(base.contract, what)
        if trained != present:
            raise InputError(
                f"{folder.name} was trained with {what} {str(trained)[:12]}, but the tokenizer and configuration of "
                f"{contract.base} now give {str(present)[:12]}; get the base that it was trained on"
            )
    if weights_sha256(folder, ADAPTER_FILE) != (contract.query_weights or contract.adapter_weights):
        raise InputError(f"{folder}: the adapter's weights do not match the contract; download or train it again")
    try:
        with quiet_transformers():
            model: Any = PeftModel.from_pretrained(base.model, str(folder), is_trainable=not merge)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder} is not an adapter that peft can read: {first_line(error)}") from error
    check_adapter(model, folder / ADAPTER_FILE)
    if merge:
        _own_memory(base.model)
        model = model.merge_and_unload()
        if hasattr(model, "peft_config"):  # peft 0.18 does not remove it
            del model.peft_config
    return Checkpoint(folder.resolve().name, model, base.tokenizer, contract, folder)


def _own_memory(model: Any) -> None:
    """Give each weight memory of its own.

    safetensors maps a whole file, and merging an adapter changes almost all of it in place: the operating system would
    keep a copy of each changed page until no weight is part of the mapping, even of weights that are replaced.
    """
    for weight in model.parameters():
        weight.data = weight.data.clone()


def _load_merged(folder: Path, record: dict[str, Any], dtype: Any) -> Checkpoint:
    contract = Contract.from_dict(record["contract"], str(folder / CONTRACT_FILE))
    if weights_sha256(folder) != record.get("weights"):
        raise InputError(f"{folder}: the weights do not match its contract; download or save it again")
    tokenizer, model = _read_model(folder, dtype)
    embed_id = tokenizer.convert_tokens_to_ids(EMBED_TOKEN)
    if embed_id != contract.embed_token_id:
        raise InputError(f"{folder}: {EMBED_TOKEN} is token {embed_id}, but {contract.embed_token_id} in its contract")
    return Checkpoint(record.get("name", folder.resolve().name), model, tokenizer, contract, folder)


def _documents_of(
    folder: Path, record: dict[str, Any], contract: Contract, dtype: Any, device: Any
) -> DocumentCheckpoint:
    """What embeds the documents of the query adapter in `folder`; a base model without a contract is loaded at once."""
    place = find_documents(folder, record)
    documents_folder = resolve(place)
    found = read_record(documents_folder)
    if found is not None and found["contract"].get("query_weights"):
        raise InputError(f"{folder / CONTRACT_FILE} names {place} for documents, itself a query adapter; it is damaged")
    if found is None:
        base = load(place, dtype=dtype, device=device)
        documents = DocumentCheckpoint(base.name, base.source, base.contract, lambda: base)
    else:
        own = Contract.from_dict(found["contract"], str(documents_folder / CONTRACT_FILE))
        name = found.get("name", documents_folder.resolve().name)
        documents = DocumentCheckpoint(name, str(place), own, lambda: load(place, dtype=dtype, device=device))
    if documents.contract.document_space != contract.document_space:
        raise InputError(
            f"{folder.name} embeds queries for the document space {contract.document_space[:12]}, but {place} has "
            f"{documents.contract.document_space[:12]}; get the {record['documents']['name']} that it was trained with"
        )
    return documents


def find_documents(folder: Path, record: dict[str, Any]) -> str | Path:
    """What to load for the documents of the query adapter in `folder`: a folder as recorded or beside it, or a name.

    Raises:
        InputError: its record does not name it, or it is not found.
    """
    try:
        name, source = (str(record["documents"][key]) for key in ("name", "source"))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / CONTRACT_FILE} does not say what embeds the documents; download or train it again"
        ) from error
    for place in (folder / source, folder.resolve().parent / name):
        if (place / CONTRACT_FILE).is_file() or (place / "config.json").is_file():
            return place
    if find_adapter(name) is not None:
        return name
    try:
        check_name(source)
    except InputError as error:
        raise InputError(
            f"{folder.name} embeds queries alone, and {name}, which embeds its documents, is not found at {source}; "
            f"put the folder {name} beside it"
        ) from error
    return source


def save_adapter(
    model: Any,
    contract: Contract,
    folder: Path,
    documents: tuple[str, str] | None = None,
    normalizer: QueryNormalizer | None = None,
    **more: Any,
) -> Contract:
    """Write a PEFT model's adapter and its contract into `folder`; returns the contract with the adapter's hash.

    The adapter is saved in bfloat16 and without the tied embeddings, which would add 113 MB; only the embed token's row
    is saved. Golden vectors are written by `SearchR3.write_golden`, after loading the saved adapter.

    Args:
        model: the PEFT model.
        contract: the contract, whose `adapter_weights` are filled in.
        folder: created if it does not exist.
        documents: writes a query adapter instead, see `save_query_adapter`.
        normalizer: the one that the contract names, if any.
        more: entries for the record that are not part of the contract, so they are not hashed.
    """
    if normalizer is not None:
        folder.mkdir(parents=True, exist_ok=True)
        normalizer.save(folder)
    if documents is not None:
        return save_query_adapter(model, contract, documents, folder, **more)
    written = replace(contract, adapter_weights=_write_adapter(model, contract.base, folder))
    write_record(folder, "adapter", written, **more)
    return written


def save_query_adapter(
    model: Any, contract: Contract, documents: tuple[str, str], folder: Path, **more: Any
) -> Contract:
    """Write a PEFT model's adapter as a query adapter into `folder`, see `save_adapter`.

    Args:
        contract: its conversations for queries, and all that its documents are embedded with; `query_weights` are
            filled in.
        documents: the name of the checkpoint that embeds the documents, and the name or path by which it is loaded.
    """
    name, source = documents
    written = replace(contract, query_weights=_write_adapter(model, contract.base, folder))
    write_record(folder, "query_adapter", written, documents={"name": name, "source": _source_of(source)}, **more)
    return written


def _source_of(source: str) -> str:
    """What a record says of where the documents' model is loaded from: a known name, the path of a folder, or a name
    of the hub."""
    if not expand_user(source).is_dir():
        return source
    path = expand_user(source).resolve()
    known = find_adapter(path.name)
    return path.name if known is not None and known.resolve() == path else str(path)


def save_projected(source: Path, projection: QueryProjection, folder: Path) -> None:
    """Write the adapter or query adapter in `source` with a query projection, as a query adapter, into `folder`.

    Its golden vectors are still to be written, by `SearchR3.write_golden`.

    Raises:
        InputError: `source` is neither.
    """
    record = read_record(source)
    if record is None or record["kind"] not in ADAPTER_KINDS:
        kind = "a base model" if record is None else f"a {record['kind']} model"
        raise InputError(f"{source.name} is {kind}; give an adapter, or the one that it was made from")
    contract = Contract.from_dict(record["contract"], str(source / CONTRACT_FILE))
    place = find_documents(source, record) if contract.query_weights else source
    name = record["documents"]["name"] if contract.query_weights else source.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (ADAPTER_FILE, "adapter_config.json", QUERY_NORMALIZER_FILE):
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    projection.save(folder)
    weights = contract.query_weights or contract.adapter_weights
    contract = replace(contract, query_weights=weights, query_projection=projection.hash)
    documents = {"name": name, "source": _source_of(str(place))}
    write_record(folder, "query_adapter", contract, documents=documents, adapted_from=source.resolve().name)


def _write_adapter(model: Any, base: str, folder: Path) -> str:
    """Write a PEFT model's adapter into `folder`; returns the SHA-256 of its tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(str(folder), save_embedding_layers=False, safe_serialization=True)
    file = folder / ADAPTER_FILE
    with atomic_path(file) as scratch:  # a scratch file, because the tensors may still be mapped to `file`
        save_file({k: v.to(torch.bfloat16).contiguous() for k, v in load_file(file).items()}, scratch, {"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)  # a stub by peft; the model card is written elsewhere
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base  # peft writes the local path of the base
    atomic_write_text(folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return weights_sha256(folder, ADAPTER_FILE)


def write_record(folder: Path, kind: str, contract: Contract, **more: Any) -> None:
    """Write the contract file of `folder`: `kind` is one of `ADAPTER_KINDS` and `FOR_OTHER_RUNTIMES`, or "merged"."""
    hashes = {"contract_hash": contract.hash, "document_space": contract.document_space}
    record = {"kind": kind, "contract": contract.to_dict(), **hashes, **more}
    atomic_write_text(folder / CONTRACT_FILE, json.dumps(record, indent=2, sort_keys=True) + "\n")
