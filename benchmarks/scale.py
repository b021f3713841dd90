"""What a hundred million documents and a 7B model take: GPUs, hours, bytes and money, from formulas and parameters.

    python benchmarks/scale.py                                        # the tables of docs/scale.md
    python benchmarks/scale.py --set documents=1e9 --set model=qwen2.5-1.5b --set gpu_dollars_hour=2
    python benchmarks/scale.py --page docs/scale.md                   # write them into the page
    python benchmarks/scale.py --measure                              # what the assumptions about bytes rest on

Every number that goes in is a field of `Plan`, with what it is and whether it was measured here or is assumed. A matrix
of N parameters costs 2 N floating-point operations for each token forward (Kaplan et al. 2020, arXiv 2001.08361, 2.1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from search_r3.data.beir import refuse_unknown
from search_r3.errors import InputError
from search_r3.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "benchmarks"
BLOCK = re.compile(r"(<!-- scale: (\w+) -->\n)(.*?)(<!-- /scale -->)", re.DOTALL)
HOUR, TB, GB = 3600.0, 1e12, 1e9


@dataclass(frozen=True)
class Model:
    """A decoder's sizes, as its config.json has them."""

    layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def matrices(self) -> int:
        """N: parameters that a token is multiplied with, without embeddings and head: no logits are needed."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.width)

    @property
    def parameters(self) -> int:
        """All parameters but norms and biases."""
        return self.matrices + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def forward(self, tokens: float, length: float) -> float:
        """FLOPs of `tokens` tokens in rows of `length`: 2 N each, and attention over half of the row on average."""
        return tokens * (2 * self.matrices + 4 * self.layers * self.heads * self.head_size * length / 2)


MODELS = {
    "smollm2-135m": Model(30, 576, 1536, 9, 3, 64, 49_152, True),
    "qwen2.5-1.5b": Model(28, 1536, 8960, 12, 2, 128, 151_936, True),
    "qwen2.5-7b": Model(28, 3584, 18_944, 28, 4, 128, 152_064, False),
}


@dataclass(frozen=True)
class Plan:
    """What goes in. "Assumed": put in your own; "measured": by a benchmark of this repository."""

    model: str = "qwen2.5-7b"
    """One of MODELS."""
    documents: float = 100e6
    """How many (the question)."""
    chunks_per_document: float = 1.0
    """Assumed: records of at most 320 words stay whole; long documents give more."""
    tokens: float = 200.0
    """Of a chunk. Assumed; the mean of SciFact is 265, of CoSQA's code 74 (results/benchmarks/encode.json)."""
    prompt_tokens: float = 10.0
    """Behind each text, up to the embed token. The prefix before it is the same for all and is run once."""
    text_bytes: float = 900.0
    """Of a chunk: assumed 4.5 bytes a token."""
    gpus: int = 64
    """For encoding (the question)."""
    peak_tflops: float = 989.0
    """Of a GPU, dense bf16: NVIDIA's figure for an H100 SXM."""
    mfu: float = 0.4
    """Share of the peak that a forward pass reaches. Assumed: we have measured no GPU."""
    bandwidth_tb: float = 3.35
    """Of a GPU's memory, TB/s: NVIDIA's figure for an H100 SXM."""
    bandwidth_share: float = 0.6
    """Share of it that decoding reaches. Assumed."""
    gpu_dollars_hour: float = 3.0
    """Of one H100, rented. Assumed, November 2026."""
    storage_dollars_tb_month: float = 23.0
    """S3 Standard, list price of us-east-1. Assumed, November 2026."""
    read_documents_second: float = 10_000.0
    """That the driver reads, cuts, hashes and spools, on one core. Assumed; without the spool 22,000 were measured."""
    stored_share: float = 0.72
    """Bytes of a row beside its vector for each byte of text, which is compressed. Measured."""
    index_share: float = 0.22
    """Bytes of the full-text index for each byte of text. Measured."""
    cpu_tflops: float = 0.5
    """Of the machine that builds the approximate index, float32. Assumed: 16 cores."""
    query_tokens: float = 100.0
    """Of a query with its conversation. Assumed."""
    reasoning_tokens: float = 32.0
    """That a query's analysis may have: the default budget."""
    query_batch: int = 32
    """Queries decoded together by the server. Assumed."""
    train_gpus: int = 8
    """For both stages."""
    train_mfu: float = 0.3
    """Assumed: small matrices of LoRA and rows of unequal length cost."""
    sft_steps: int = 800
    """configs/sft/qwen2.5-7b.yaml on 8 GPUs."""
    sft_pairs: int = 512
    """Of a step, all GPUs together: the same recipe."""
    sft_pair_tokens: float = 500.0
    """Of a query, a positive and a negative, their conversations with them. Assumed."""
    grpo_steps: int = 1000
    """configs/grpo/qwen2.5-7b.yaml."""
    grpo_queries: int = 64
    """Of a step, all GPUs together: the same recipe."""
    grpo_group: int = 8
    """Rollouts of a query: the same recipe."""
    grpo_rollout_tokens: float = 150.0
    """Query, conversation and analysis. Assumed."""
    grpo_new_tokens: float = 48.0
    """Sampled: the same recipe."""
    grpo_refreshed: int = 256
    """Documents encoded again at each step: the same recipe."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise InputError(f'model is "{self.model}"; choose one of: {", ".join(MODELS)}')
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "model" and not (math.isfinite(value) and value > 0):
                raise InputError(f"{field.name} is {value}; it must be a number above 0")
        for name in ("mfu", "bandwidth_share", "train_mfu"):
            if getattr(self, name) > 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, at most 1")

    @property
    def chunks(self) -> float:
        """Rows of the table."""
        return self.documents * self.chunks_per_document

    @property
    def sizes(self) -> Model:
        """The model's."""
        return MODELS[self.model]


def encoding(plan: Plan) -> dict[str, float]:
    """FLOPs, GPU-hours, hours and dollars of embedding the corpus, and what reading it takes."""
    length = plan.tokens + plan.prompt_tokens
    flops = plan.sizes.forward(plan.chunks * length, length)
    gpu_hours = flops / (plan.peak_tflops * 1e12 * plan.mfu) / HOUR
    return {
        "flops": flops,
        "gpu_hours": gpu_hours,
        "hours": gpu_hours / plan.gpus,
        "dollars": gpu_hours * plan.gpu_dollars_hour,
        "chunks_per_gpu_second": plan.chunks / (gpu_hours * HOUR),
        "read_hours": plan.documents / plan.read_documents_second / HOUR,
    }


def vectors(plan: Plan) -> dict[str, float]:
    """Bytes of all vectors, by how they are kept."""
    dimension = plan.sizes.hidden
    each = {
        "float32": 4 * dimension,
        "bfloat16": 2 * dimension,
        "int8": dimension + 4,  # and a scale
        "PQ, one byte for 8 dimensions": dimension / 8,
        "RaBitQ, one bit a dimension": dimension / 8 + 8,  # and two float32 factors
    }
    return {name: size * plan.chunks for name, size in each.items()}


def table(plan: Plan) -> dict[str, float]:
    """Bytes of the LanceDB table and what they cost a month. The table keeps float32."""
    parts = {
        "vectors, float32": vectors(plan)["float32"],
        "text, ids, hashes": plan.stored_share * plan.text_bytes * plan.chunks,
        "full-text index": plan.index_share * plan.text_bytes * plan.chunks,
        "approximate index": vectors(plan)["RaBitQ, one bit a dimension"],
    }
    total = sum(parts.values())
    return parts | {"total": total, "dollars_month": total / TB * plan.storage_dollars_tb_month}


def approximate(plan: Plan) -> dict[str, float]:
    """The approximate index: sqrt(rows) partitions, each row compared with every centre once, in 2 D FLOPs."""
    partitions = round(math.sqrt(plan.chunks))
    flops = plan.chunks * partitions * 2 * plan.sizes.hidden
    return {"partitions": partitions, "flops": flops, "hours": flops / (plan.cpu_tflops * 1e12) / HOUR}


def serving(plan: Plan) -> dict[str, float]:
    """One GPU that reasons about queries: a prefill bound by FLOPs, then a step a token, bound by reading weights."""
    model, batch = plan.sizes, plan.query_batch
    prefill = model.forward(batch * plan.query_tokens, plan.query_tokens) / (plan.peak_tflops * 1e12 * plan.mfu)
    step = 2 * (model.parameters) / (plan.bandwidth_tb * 1e12 * plan.bandwidth_share)
    direct, reasoned = prefill + step, prefill + (plan.reasoning_tokens + 1) * step
    return {
        "weights_bytes": 2 * model.parameters,
        "direct_seconds": direct,
        "reasoned_seconds": reasoned,
        "direct_per_second": batch / direct,
        "reasoned_per_second": batch / reasoned,
        "dollars_per_million_reasoned": 1e6 / (batch / reasoned) / HOUR * plan.gpu_dollars_hour,
    }


SFT_PASSES = 4
"""Forward passes' worth of a step's tokens: once without gradients (the cache), once with, once back through the frozen
matrices (they need no gradients of their own), and once of the base for the KL."""
GRPO_PASSES = 3
"""The rollouts' forward pass, the one back, and the reference's."""


def training(plan: Plan) -> dict[str, dict[str, float]]:
    """Both stages: FLOPs of a step, hours and dollars. What is not FLOPs (loading, checkpoints, dev sets) is not in."""
    model, rate = plan.sizes, plan.peak_tflops * 1e12 * plan.train_mfu * plan.train_gpus
    pair = plan.sft_pair_tokens / 3
    sft = SFT_PASSES * model.forward(plan.sft_pairs * plan.sft_pair_tokens, pair)
    rollouts = plan.grpo_queries * plan.grpo_group
    judged = GRPO_PASSES * model.forward(rollouts * plan.grpo_rollout_tokens, plan.grpo_rollout_tokens)
    length = plan.tokens + plan.prompt_tokens
    refreshed = model.forward(plan.grpo_refreshed * length, length)
    sampling = plan.grpo_new_tokens * 2 * model.parameters / (plan.bandwidth_tb * 1e12 * plan.bandwidth_share)
    out = {
        "stage 1": {"flops": sft, "step_seconds": sft / rate, "steps": plan.sft_steps},
        "stage 2": {
            "flops": judged + refreshed,
            "step_seconds": (judged + refreshed) / rate + sampling,
            "steps": plan.grpo_steps,
        },
    }
    for stage in out.values():
        stage["hours"] = stage["step_seconds"] * stage["steps"] / HOUR
        stage["dollars"] = stage["hours"] * plan.train_gpus * plan.gpu_dollars_hour
    return out


@dataclass(frozen=True)
class Measured:
    """A benchmark of this repository, on two CPU cores, in FLOPs of the same formulas."""

    what: str
    precision: str
    flops: float
    seconds: float

    @property
    def tflops(self) -> float:
        """FLOPs a second, in 10^12: equal for equal precision, if the formulas count the right thing."""
        return self.flops / self.seconds / 1e12


def measured(results: Path = RESULTS) -> list[Measured]:
    """What encode.json, sft.json and grpo.json say; benchmarks that are not there are left out."""
    model, out = MODELS["smollm2-135m"], []
    if figures := _figures(results / "encode.json"):
        for name, held in figures["documents"].items():
            length = held["mean_tokens"] + Plan.prompt_tokens
            flops = model.forward(held["texts"] * length, length)
            what = f"encode.json, {name}: {held['mean_tokens']:.0f} tokens a text"
            out.append(Measured(what, figures["dtype"], flops, held["ours_seconds"]))
    if figures := _figures(results / "sft.json"):
        held = figures["speed"]["ours_plain"]
        tokens = held["first_tokens"]
        flops = (SFT_PASSES - 1) * model.forward(tokens, tokens / (3 * held["pairs_per_step"]))  # without the cache
        what = f"sft.json: a step of {held['pairs_per_step']} pairs, {tokens:,} tokens"
        out.append(Measured(what, figures["precision"], flops, held["seconds_per_step"]))
    if figures := _figures(results / "grpo.json"):
        job, parts = figures["job"], figures["ours"]["parts"]
        tokens = figures["agreement"]["ours"]["tokens"]
        rollouts = job["queries"] * job["group_size"]
        flops = GRPO_PASSES * model.forward(tokens, tokens / rollouts)
        what = f"grpo.json: loss of {rollouts} rollouts, {tokens:,} tokens"
        out.append(Measured(what, figures["precision"], flops, parts["forward_backward"]["median"]))
    return out


# ------------------------------------------------------------------------------------------------------------ tables


def blocks(plan: Plan, results: Path = RESULTS) -> dict[str, str]:
    """The tables of docs/scale.md by name, as Markdown."""
    return {
        "encoding": _encoding_table(plan),
        "storage": _storage_table(plan),
        "serving": _serving_table(plan),
        "training": _training_table(plan),
        "measured": _measured_table(results),
        "assumptions": _assumptions_table(plan),
    }


def _encoding_table(plan: Plan) -> str:
    rows = []
    for name in MODELS:
        got = encoding(replace(plan, model=name))
        rows.append(
            (
                name,
                f"{MODELS[name].matrices / 1e9:.3g} B",
                f"{got['flops']:.2g}",
                f"{got['chunks_per_gpu_second']:,.0f}",
                f"{got['gpu_hours']:,.1f}",
                f"{got['hours']:,.2f}",
                f"${got['dollars']:,.0f}",
            )
        )
    head = ("model", "N", "FLOPs", "chunks a second, one GPU", "GPU-hours", f"hours on {plan.gpus} GPUs", "money")
    return _markdown(head, rows)


def _storage_table(plan: Plan) -> str:
    got, near = table(plan), approximate(plan)
    kinds = [(f"vectors as {name}", _bytes(size), "") for name, size in vectors(plan).items()]
    parts = [
        (f"table: {name}", _bytes(size), "") for name, size in got.items() if name not in ("total", "dollars_month")
    ]
    total = ("**the table**", f"**{_bytes(got['total'])}**", f"${got['dollars_month']:,.0f} a month on object storage")
    what = f"{near['partitions']:,.0f} partitions, {near['flops']:.2g} FLOPs: about {near['hours']:,.1f} hours of CPU"
    return _markdown(("what", "bytes", ""), [*kinds, *parts, total, ("building the approximate index", "", what)])


def _serving_table(plan: Plan) -> str:
    rows = []
    for name in MODELS:
        got = serving(replace(plan, model=name))
        rows.append(
            (
                name,
                _bytes(got["weights_bytes"]),
                f"{got['direct_seconds'] * 1e3:,.0f} ms",
                f"{got['reasoned_seconds'] * 1e3:,.0f} ms",
                f"{got['reasoned_per_second']:,.0f}",
                f"${got['dollars_per_million_reasoned']:,.2f}",
            )
        )
    batch = f"a batch of {plan.query_batch}"
    head = (
        "model",
        "weights, bf16",
        f"{batch}, direct",
        f"{batch}, reasoned",
        "reasoned a second",
        "a million of them",
    )
    return _markdown(head, rows)


def _training_table(plan: Plan) -> str:
    rows = [
        (
            stage,
            f"{got['steps']:,.0f}",
            f"{got['flops']:.2g}",
            f"{got['step_seconds']:,.1f} s",
            f"{got['hours']:,.1f}",
            f"${got['dollars']:,.0f}",
        )
        for stage, got in training(plan).items()
    ]
    head = (plan.model, "steps", "FLOPs a step", "a step", f"hours on {plan.train_gpus} GPUs", "money")
    return _markdown(head, rows)


def _measured_table(results: Path) -> str:
    rows = [
        (item.what, item.precision, f"{item.flops:.2g}", f"{item.seconds:.1f} s", f"{item.tflops:.3f}")
        for item in measured(results)
    ]
    return _markdown(("measured", "precision", "FLOPs by the formula", "seconds", "TFLOP/s"), rows)


def _assumptions_table(plan: Plan) -> str:
    told = _docstrings()
    rows = [(f"`{field.name}`", _plain(getattr(plan, field.name)), told[field.name]) for field in fields(plan)]
    return _markdown(("parameter", "value", "what it is"), rows)


def _docstrings() -> dict[str, str]:
    """Field -> the docstring under it."""
    source = Path(__file__).read_text(encoding="utf-8")
    body = source[source.index("class Plan:") : source.index("    def __post_init__")]
    found = re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', body, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bytes(size: float) -> str:
    return f"{size / TB:,.2f} TB" if size >= TB else f"{size / GB:,.1f} GB"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.10g}"


def _figures(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else None


def filled(page: str, tables: dict[str, str]) -> str:
    """`page` with each block `<!-- scale: NAME -->` ... `<!-- /scale -->` made again.

    Raises:
        InputError: a block has no table of its name, or a table has no block.
    """
    names = [found[2] for found in BLOCK.finditer(page)]
    if wrong := set(names) ^ tables.keys():
        raise InputError(f"the page's blocks and the tables differ in {', '.join(sorted(wrong))}; mend the page")
    return BLOCK.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[4]}", page)


def plan_of(settings: Iterable[str]) -> Plan:
    """`Plan` with `key=value` settings.

    Raises:
        InputError: an unknown key, or a value that is no number.
    """
    given: dict[str, Any] = {}
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(Plan)}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise InputError(f'"{setting}" is no setting; write --set key=value')
        given[key] = text
    refuse_unknown(given, list(kinds), "scale")
    for key, text in given.items():
        try:
            given[key] = text if kinds[key] is str else kinds[key](float(text))
        except ValueError as error:
            raise InputError(f'{key} is "{text}"; give a number') from error
    return Plan(**given)


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(rows: int = 4_000) -> dict[str, float]:
    """Bytes and seconds of a real table: functions of the standard library, and vectors drawn at random.

    Returns:
        rows, text_bytes, stored_share and index_share as `Plan` means them, and read_documents_second without the
        spool, in seconds of one core, not of the clock.
    """
    import numpy as np

    from search_r3.data.sources.docstrings import STDLIB, find_package, read_functions
    from search_r3.index import SourceDocument, build_index
    from search_r3.index.changes import Changes
    from search_r3.index.table import SearchIndex, table_schema

    class Random:
        name, contract_hash, dimension, source = "random", "0" * 64, 576, "random"

        def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
            drawn = np.random.default_rng(len(texts)).normal(size=(len(texts), self.dimension))
            return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)

    functions = itertools.islice(read_functions(find_package(STDLIB), STDLIB), rows)
    documents = [SourceDocument(held.id, held.name, held.documented) for held in functions]
    begun = time.process_time()
    changes = Changes(None, table_schema(576), None)
    chunks = sum(len(window.rows) for window in changes.windows(documents, 256))
    seconds = time.process_time() - begun
    changes.close()
    with tempfile.TemporaryDirectory() as folder:
        build_index(Path(folder, "index"), documents, Random(), progress=False)
        held = SearchIndex.open(Path(folder, "index")).table
        texts = held.search().select(["r3_content"]).to_arrow()["r3_content"].to_pylist()
        content = sum(len(text.encode()) for text in texts)
        data = _size(Path(folder, "index", "chunks.lance", "data"))
        words = _size(Path(folder, "index", "chunks.lance", "_indices"))
    return {
        "rows": chunks,
        "text_bytes": content / chunks,
        "stored_share": (data - 4 * 576 * chunks) / content,
        "index_share": words / content,
        "read_documents_second": len(documents) / seconds,
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--page", type=Path, help="write the tables into this page's blocks")
    parser.add_argument("--measure", action="store_true", help="measure bytes and reading, and keep them in scale.json")
    given = parser.parse_args(arguments)
    show: Callable[[str], None] = print
    try:
        if given.measure:
            from common import write_report

            write_report("scale", measure(), device="cpu", seed=0)
        tables = blocks(plan_of(given.settings))
        if given.page:
            page = given.page.read_text(encoding="utf-8")
            atomic_write_text(given.page, filled(page, tables))
        else:
            for name, text in tables.items():
                show(f"\n{name}\n{text}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
