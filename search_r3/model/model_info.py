"""Information about named models, the model that an index needs, and the check of golden vectors."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.model.checkpoint import ADAPTER_FILE, load_base, read_record
from search_r3.model.resolve import BUNDLED, DEFAULT_ADAPTER, find_adapter, known_names

GOLDEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
"""Accepted cosine distance of a golden vector from the stored one, by dtype; an engine may define its own."""


def model_of_index(name: str, source: str, index: Path | str) -> str:
    """What to load for an index that was built with the model `name`, loaded from `source`.

    Raises:
        InputError: the model is not found, so the user must give its path.
    """
    for known in (source, name, name.removesuffix("-base")):
        if known in known_names() or (known and Path(known).is_dir()) or known.count("/") == 1:
            return known
    raise InputError(f"{index} was built with {name}, which is not a known name; give its folder with --model FOLDER")


def known_models() -> list[dict[str, Any]]:
    """One record per named model: name, kind ("base", "adapter" or "query_adapter"), base, contract_hash, dimension,
    bytes, license, installed, default.

    For a base that cannot be loaded, contract_hash and dimension are None, and `problem` says why in one line.
    """
    adapters = [find_adapter(name) for name in known_names() if name not in BUNDLED]
    records = [_base(name) for name in sorted(BUNDLED)] + [_adapter(folder) for folder in adapters if folder]
    return [record | {"default": record["name"] == DEFAULT_ADAPTER} for record in records]


def check_golden(name: str, device: str | None = None, dtype: str = "float32", engine: str = "auto") -> dict[str, Any]:
    """Compare a model with its golden vectors: name, contract_hash, distance from the stored vectors, limit, ok.

    Raises:
        InputError: the model is unknown or damaged, or has no golden vectors.
    """
    from search_r3.model.searchr3 import SearchR3

    model = SearchR3.from_pretrained(name, device=device, dtype=dtype, engine=engine)
    distance = model.check_golden()
    if distance is None:
        raise InputError(f"{name} has no golden vectors to compare with; only trained checkpoints have them")
    limit = model.engine_spec.golden_tolerance or GOLDEN_TOLERANCE[model.dtype]
    return {
        "name": model.name,
        "contract_hash": model.contract_hash,
        "distance": distance,
        "limit": limit,
        "ok": distance <= limit,
    }


def as_table(records: list[dict[str, Any]]) -> str:
    """The records as a text table with aligned columns."""
    rows = [("NAME", "KIND", "SIZE", "LICENSE", "DIMENSION", "CONTRACT")]
    for r in records:
        if r["installed"]:
            size = f"{r['bytes'] / 1e6:.1f} MB"
            contract = f"cannot be loaded: {r['problem']}" if "problem" in r else r["contract_hash"][:12]
            name = f"{r['name']} (default)" if r.get("default") else r["name"]
            rows.append((name, r["kind"], size, r["license"], str(r["dimension"] or "-"), contract))
        else:
            rows.append((r["name"], r["kind"], "-", r["license"], "-", f"not installed: {r['install']}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _base(name: str) -> dict[str, Any]:
    bundled = BUNDLED[name]
    record: dict[str, Any] = {"name": name, "kind": "base", "base": None, "license": bundled.license}
    spec = importlib.util.find_spec(bundled.package)
    if spec is None or spec.origin is None:
        return record | {"installed": False, "install": bundled.install}
    import torch

    try:
        contract = load_base(name, dtype=torch.float32).contract
    except InputError as error:
        details: dict[str, Any] = {"dimension": None, "contract_hash": None, "problem": str(error)}
    else:
        details = {"dimension": contract.dimension, "contract_hash": contract.hash}
    gguf = Path(spec.origin).parent / bundled.gguf
    return record | {"installed": True, "bytes": gguf.stat().st_size if gguf.is_file() else 0} | details


def _adapter(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    assert record is not None  # known_names lists only folders that have one
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise InputError(f"{file} is missing; download or train the adapter again, or remove its folder")
    card = folder / "README.md"
    declared = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    return {
        "name": folder.name,
        "kind": record["kind"],
        "base": record["contract"]["base"],
        "license": declared.group(1) if declared else "not stated",
        "installed": True,
        "bytes": file.stat().st_size,
        "dimension": record["contract"].get("dimension"),
        "contract_hash": record.get("contract_hash", ""),
    }
