"""The average of several LoRA adapters of one base, as one adapter ("model soup", Wortsman et al., arXiv 2203.05482).

What a layer adds to its matrix is s B A, which is not linear in (B, A): averaging the factors of two runs would
multiply the directions of one with those of the other. So the products are averaged: sum_i w_i s_i B_i A_i is, exactly,
one pair of factors with all ranks concatenated, and its truncated SVD is the best pair of a smaller rank (Eckart and
Young 1936). The embed token's row is linear, and averaged as it is.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text
from search_r3.model.checkpoint import (
    ADAPTER_FILE,
    ADAPTER_KINDS,
    CONTRACT_FILE,
    find_documents,
    read_query_normalizer,
    read_record,
    save_adapter,
)
from search_r3.model.contract import Contract
from search_r3.model.query_normalizer import QueryNormalizer
from search_r3.model.query_projection import refuse_query_projection
from search_r3.model.reading import check_count
from search_r3.model.resolve import resolve, weights_sha256
from search_r3.model.searchr3 import SearchR3
from search_r3.prompts import Prompts
from search_r3.training.lora.concatenation import CONFIG_FILE, A, B, read_settings, scale_of

TOKEN_ROWS = "trainable_tokens_delta"
"""Part of the names of trained rows of the embedding matrix: PEFT saves the rows themselves, not what they add."""
OWN_FIELDS = ("base", "adapter_weights", "query_weights", "query_normalizer", "format")
"""Fields of a contract in which adapters may differ: a name, what is averaged, what the average has of its own, and the
record's version."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, checked against its contract."""

    folder: Path
    contract: Contract
    record: dict[str, Any]
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def is_for_queries(self) -> bool:
        """Whether it is a query adapter."""
        return bool(self.contract.query_weights)

    @property
    def layers(self) -> set[str]:
        """The names of the layers that it adapts."""
        return {name.removesuffix(A) for name in self.tensors if name.endswith(A)}

    @property
    def rows(self) -> set[str]:
        """The names of the tensors that are not LoRA factors: trained rows of the embedding matrix."""
        return {name for name in self.tensors if not name.endswith((A, B))}


@dataclass(frozen=True)
class Averaged:
    """What `average_adapters` made.

    Attributes:
        folder: of the new adapter.
        weights: of the adapters, with the sum 1.
        rank: of the new adapter.
        full_rank: the rank at which it would be exact.
        kept: the part of the exact average's squared norm (over all layers) that the new adapter has.
    """

    folder: Path
    weights: list[float]
    rank: int
    full_rank: int
    kept: float


def average_adapters(
    names: Sequence[str | Path],
    into: str | Path,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    query_normalizer: str | Path | None = None,
    reading_passages: int | None = None,
) -> Averaged:
    """Write the average of adapters to the new folder `into`, with its contract and golden vectors.

    The contract is that of the first adapter, or of the first query adapter among them; the others may lack some of its
    conversations, such as that of reading. With query adapters among them it is a query adapter of their documents. The
    adapter that embeds these documents may then be averaged too, which makes queries more robust outside the training
    distribution (WiSE-FT, arXiv 2109.01903).

    Args:
        names: adapters of one base, that embed by one contract; their ranks may differ.
        weights: one for each, above 0; they are divided by their sum. By default all weigh the same.
        rank: of the average; by default the largest among the adapters.
        query_normalizer: the file of the average's query normalizer (`model.query_normalizer`); by default, it has
            that of the adapter whose contract it gets. With one, a single adapter is enough, which then only gets it.
        reading_passages: how many passages a search with the average reads by default; by default as many as with the
            adapter whose contract it gets. With it, a single adapter is enough as well.

    Raises:
        InputError: fewer than two adapters; `into` exists; a weight, the rank or the number of passages is out of
            range; an adapter is damaged, is not plain LoRA, or has another base, other layers or another contract than
            the first; passages are given for adapters that do not read.
    """
    changed = query_normalizer is not None or reading_passages is not None
    into, adapters = Path(into), read_adapters(names, at_least=1 if changed else 2)
    if into.exists() or into.is_symlink():
        raise InputError(f"{into} exists already, and is not overwritten; choose a new folder")
    for adapter in adapters:
        refuse_query_projection(adapter.folder.name, adapter.contract, "averaged")
    shares = _shares(weights, len(adapters))
    ranks = [adapter.settings["r"] for adapter in adapters]
    rank = max(ranks) if rank is None else rank
    if not 1 <= rank <= sum(ranks):
        raise InputError(
            f"rank is {rank}; expected from 1 to {sum(ranks)}, the sum of the adapters' ranks, where it is exact"
        )
    first = _leading(adapters)
    if query_normalizer is None:
        normalizer = read_query_normalizer(first.folder, first.contract)
    else:
        normalizer = QueryNormalizer.load(query_normalizer)
    contract = replace(first.contract, query_normalizer="" if normalizer is None else normalizer.hash)
    if reading_passages is not None:
        contract = replace(contract, prompts=_reads(contract.prompts, reading_passages))
    resolve(first.contract.base)  # before anything is computed: the golden vectors need it
    scale = scale_of(first.settings)
    if len(adapters) == 1 and rank == first.settings["r"]:
        tensors, kept = first.tensors, 1.0  # unchanged: factors by SVD would be rounded otherwise
    else:
        tensors, kept = average_tensors(
            [adapter.tensors for adapter in adapters],
            [share * scale_of(adapter.settings) / scale for share, adapter in zip(shares, adapters, strict=True)],
            shares,
            rank,
        )
    settings = first.settings | {"r": rank, "lora_alpha": scale * rank}
    with atomic_path(into) as scratch:
        more = _record(adapters, shares)
        save_adapter(_Written(tensors, settings), contract, scratch, _documents_of(first), normalizer, **more)
        SearchR3.from_pretrained(scratch, device="cpu").write_golden(scratch)
    return Averaged(into, shares, rank, sum(ranks), kept)


def read_adapters(names: Sequence[str | Path], at_least: int = 2) -> list[Adapter]:
    """The adapters by these names, if they can be averaged.

    Raises:
        InputError: see `average_adapters`.
    """
    folders = [resolve(name) for name in names]
    if len(folders) < at_least:
        raise InputError("an average needs at least two adapters; name another one")
    for number, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise InputError(f"{names[number]} is given twice; to let it count more, use --weights")
    adapters = [_read(folder) for folder in folders]
    first = _leading(adapters)
    for adapter in adapters:
        if adapter is not first:
            _check_fits(first, adapter)
    return adapters


def average_tensors(
    parts: Sequence[dict[str, Tensor]], product_weights: Sequence[float], row_weights: Sequence[float], rank: int
) -> tuple[dict[str, Tensor], float]:
    """The average of adapters' tensors by PEFT's names, float32, and the part of its squared norm that is kept.

    Args:
        parts: each with the same names: `*.lora_A.weight` (r, in), `*.lora_B.weight` (out, r), trained rows.
        product_weights: of the products B A, the adapters' own scales included.
        row_weights: of all other tensors.
    """
    out: dict[str, Tensor] = {}
    kept = whole = 0.0
    for name in sorted(parts[0]):
        if name.endswith(A):
            layer = name.removesuffix(A)
            b, a, squares = average_products([(p[layer + B], p[name]) for p in parts], product_weights, rank)
            out[layer + B], out[name] = b.float().contiguous(), a.float().contiguous()
            kept, whole = kept + float(squares[:rank].sum()), whole + float(squares.sum())
        elif not name.endswith(B):
            rows = sum(weight * part[name].double() for weight, part in zip(row_weights, parts, strict=True))
            out[name] = torch.as_tensor(rows).float().contiguous()
    return out, kept / whole if whole else 1.0


def average_products(
    factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the best approximation of rank `rank` to sum_i weights[i] B_i A_i, by Frobenius' norm, float64.

    The SVD is that of a matrix as small as the ranks together: Q_B (R_B R_A') Q_A' with the QR decompositions of the
    concatenated factors.

    Args:
        factors: pairs of B (out, r_i) and A (r_i, in).

    Returns:
        B (out, rank) and A (rank, in), which share the singular values equally, and all squared singular values.
    """
    b_OR = torch.cat([weight * b.double() for weight, (b, _) in zip(weights, factors, strict=True)], dim=1)
    a_RI = torch.cat([a.double() for _, a in factors])
    qb_OK, rb_KR = torch.linalg.qr(b_OR)
    qa_IK, ra_KR = torch.linalg.qr(a_RI.T)
    u_KS, s_S, vh_SK = torch.linalg.svd(rb_KR @ ra_KR.T, full_matrices=False)
    root_S = s_S[:rank].sqrt()
    b, a = (qb_OK @ u_KS[:, :rank]) * root_S, root_S[:, None] * (vh_SK[:rank] @ qa_IK.T)
    missing = rank - len(root_S)  # a layer narrower than the rank
    if missing > 0:
        b = torch.cat([b, b.new_zeros(len(b), missing)], dim=1)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
    return b, a, s_S.square()


class _Written:
    """Stands in for the PEFT model that `save_adapter` takes."""

    def __init__(self, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        self.tensors, self.settings = tensors, settings

    def save_pretrained(self, folder: str, **_: Any) -> None:
        from safetensors.torch import save_file

        save_file(self.tensors, Path(folder) / ADAPTER_FILE, {"format": "pt"})
        atomic_write_text(Path(folder) / CONFIG_FILE, json.dumps(self.settings, indent=2, sort_keys=True) + "\n")


def _read(folder: Path) -> Adapter:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = read_record(folder)
    if record is None:
        raise InputError(f"{folder} has no contract ({CONTRACT_FILE}), so it is not a Search-R3 adapter")
    if record["kind"] not in ADAPTER_KINDS:
        raise InputError(f"{folder} is a model of kind {record['kind']}; give the adapter that it was made from")
    contract = Contract.from_dict(record["contract"], str(folder / CONTRACT_FILE))
    settings = read_settings(folder, "averaged")
    if weights_sha256(folder, ADAPTER_FILE) != (contract.query_weights or contract.adapter_weights):
        raise InputError(f"{folder}: the adapter's weights do not match the contract; download or train it again")
    try:
        tensors = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / ADAPTER_FILE} cannot be read ({error}); download or train it again") from error
    adapter = Adapter(folder, contract, record, settings, tensors)
    for name in adapter.rows:
        if TOKEN_ROWS not in name:
            raise InputError(f"{folder} also trained {name}; only plain LoRA with trained token rows can be averaged")
    if any(layer + B not in tensors or len(tensors[layer + A]) != settings["r"] for layer in adapter.layers):
        raise InputError(f"{folder}: {CONFIG_FILE} and {ADAPTER_FILE} do not belong together; download it again")
    return adapter


def _leading(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter whose contract the average gets: the first query adapter, or the first adapter."""
    return next((adapter for adapter in adapters if adapter.is_for_queries), adapters[0])


def _documents_of(adapter: Adapter) -> tuple[str, str] | None:
    """Name and place of the model that embeds a query adapter's documents; None for another adapter."""
    if not adapter.is_for_queries:
        return None
    return adapter.record["documents"]["name"], str(find_documents(adapter.folder, adapter.record))


def _check_fits(first: Adapter, other: Adapter) -> None:
    """Raise InputError unless both can be averaged."""
    if other.contract.base_weights != first.contract.base_weights:
        bases = [f"{one.contract.base}, weights {one.contract.base_weights[:12]}" for one in (other, first)]
        raise InputError(
            f"{other.folder} has another base ({bases[0]}) than {first.folder} ({bases[1]}); only adapters of one base "
            "can be averaged"
        )
    if first.is_for_queries and other.contract.document_space != first.contract.document_space:
        raise InputError(
            f"{other.folder} belongs to other documents than the query adapter {first.folder}; only query adapters of "
            "one document space, and the adapter that embeds its documents, can be averaged"
        )
    mine, theirs = (one.contract.to_dict() for one in (first, other))
    # The adapter of a query adapter's documents has no part in its queries' conversations.
    compared = mine.keys() | theirs.keys() if first.is_for_queries == other.is_for_queries else ()
    for name in sorted(compared):
        fits = _conversations_fit if name == "prompts" else operator.eq
        if name not in OWN_FIELDS and not fits(mine.get(name), theirs.get(name)):
            raise InputError(
                f"{other.folder} embeds with another {name} than {first.folder}, so their weights do not belong "
                "together; only adapters with one contract can be averaged"
            )
    for what, one, two in (
        ("adapts other layers", first.layers, other.layers),
        ("trained other rows", first.rows, other.rows),
    ):
        if one != two:
            raise InputError(
                f"{other.folder} {what} than {first.folder} ({len(one ^ two)} differ, such as {min(one ^ two)}); train "
                "them with the same lora.target_modules"
            )


def _conversations_fit(first: Any, other: Any) -> bool:
    """Whether the first adapter, whose contract is kept, has every conversation of the other in the same words."""
    return all(first.get(name) == conversation for name, conversation in other.items())


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} adapters; give one for each")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"a weight is {weight}; expected a number above 0")
    return [weight / sum(weights) for weight in weights]


def _reads(prompts: Prompts, passages: int) -> Prompts:
    """`prompts` with so many passages in the reading conversation. Raises InputError if they have none."""
    check_count(passages, "reading_passages")
    if prompts.reading is None or passages == 0:
        raise InputError("reading_passages is for adapters that read passages, and at least 1; leave it out")
    return replace(prompts, reading=replace(prompts.reading, passages=passages))


def _record(adapters: Sequence[Adapter], shares: Sequence[float]) -> dict[str, Any]:
    """What stands beside the contract: the origin, and the dimensions at which all may be truncated.

    A single adapter, whose weights stay, keeps its origin.
    """
    if len(adapters) == 1 and "average_of" in adapters[0].record:
        return {name: adapters[0].record[name] for name in ("average_of", "dimensions") if name in adapters[0].record}
    common = set.intersection(*(set(adapter.record.get("dimensions", [])) for adapter in adapters))
    origin = [
        {"name": adapter.folder.resolve().name, "contract_hash": adapter.contract.hash, "weight": share}
        for adapter, share in zip(adapters, shares, strict=True)
    ]
    return {"average_of": origin} | ({"dimensions": sorted(common)} if common else {})
