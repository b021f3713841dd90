"""What a hundred million documents and a 7B model take: GPUs, hours, bytes and money, from formulas and parameters.

    python benchmarks/scale.py                                        # the tables of docs/scale.md
    python benchmarks/scale.py --set documents=1e9 --set model=qwen2.5-1.5b --set gpu_dollars_hour=2
    python benchmarks/scale.py --page docs/scale.md                   # write them into the page
    python benchmarks/scale.py --measure                              # what the assumptions about bytes rest on

The formulas and what goes into them are in `scale_plan`, those of searching in `scale_search`, which `capacity.py`
measures; here are the tables, and what they are checked against.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import scale_plan
import scale_search
from scale_plan import (
    GRPO_PASSES,
    MODELS,
    SFT_PASSES,
    Plan,
    approximate,
    encoding,
    serving,
    table,
    training,
    vectors,
)
from scale_search import SearchPlan, fitted
from scale_search_tables import bytes_text, markdown, search_blocks

from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.hints import refuse_unknown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "benchmarks"
BLOCK = re.compile(r"(<!-- scale: (\w+) -->\n)(.*?)(<!-- /scale -->)", re.DOTALL)


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
        flops = (SFT_PASSES - 1) * model.forward(tokens, tokens / (3 * held["global_batch_size"]))  # without the cache
        what = f"sft.json: a step of {held['global_batch_size']} pairs, {tokens:,} tokens"
        out.append(Measured(what, figures["precision"], flops, held["seconds_per_step"]))
    if figures := _figures(results / "grpo.json"):
        job, parts = figures["job"], figures["ours"]["parts"]
        tokens = figures["agreement"]["ours"]["tokens"]
        rollouts = job["queries"] * job["num_generations"]
        flops = GRPO_PASSES * model.forward(tokens, tokens / rollouts)
        what = f"grpo.json: loss of {rollouts} rollouts, {tokens:,} tokens"
        out.append(Measured(what, figures["precision"], flops, parts["forward_backward"]["median"]))
    return out


# ------------------------------------------------------------------------------------------------------------ tables


def blocks(plan: Plan, results: Path = RESULTS, search: Mapping[str, float] | None = None) -> dict[str, str]:
    """The tables of docs/scale.md by name, as Markdown.

    Args:
        search: parameters of `SearchPlan` that are given rather than measured or assumed.
    """
    measured_searches = _figures(results / "capacity.json")
    searching = fitted(measured_searches) if measured_searches else SearchPlan()
    told = _docstrings(scale_search, SearchPlan)
    return {
        "encoding": _encoding_table(plan),
        "storage": _storage_table(plan),
        "serving": _serving_table(plan),
        "training": _training_table(plan),
        "measured": _measured_table(results),
        "assumptions": _assumptions_table(plan),
        **search_blocks(plan, replace(searching, **(search or {})), told, measured_searches),
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
    return markdown(head, rows)


def _storage_table(plan: Plan) -> str:
    got, near = table(plan), approximate(plan)
    kinds = [(f"vectors as {name}", bytes_text(size), "") for name, size in vectors(plan).items()]
    parts = [
        (f"table: {name}", bytes_text(size), "") for name, size in got.items() if name not in ("total", "dollars_month")
    ]
    total = (
        "**the table**",
        f"**{bytes_text(got['total'])}**",
        f"${got['dollars_month']:,.0f} a month on object storage",
    )
    what = f"{near['partitions']:,.0f} partitions, {near['flops']:.2g} FLOPs: about {near['hours']:,.1f} hours of CPU"
    return markdown(("what", "bytes", ""), [*kinds, *parts, total, ("building the approximate index", "", what)])


def _serving_table(plan: Plan) -> str:
    rows = []
    for name in MODELS:
        got = serving(replace(plan, model=name))
        rows.append(
            (
                name,
                bytes_text(got["weights_bytes"]),
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
    return markdown(head, rows)


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
    return markdown(head, rows)


def _measured_table(results: Path) -> str:
    rows = [
        (item.what, item.precision, f"{item.flops:.2g}", f"{item.seconds:.1f} s", f"{item.tflops:.3f}")
        for item in measured(results)
    ]
    return markdown(("measured", "precision", "FLOPs by the formula", "seconds", "TFLOP/s"), rows)


def _assumptions_table(plan: Plan) -> str:
    told = _docstrings()
    rows = [(f"`{field.name}`", _plain(getattr(plan, field.name)), told[field.name]) for field in fields(plan)]
    return markdown(("parameter", "value", "what it is"), rows)


def _docstrings(module: Any = scale_plan, of: type = Plan) -> dict[str, str]:
    """Field -> the docstring under it."""
    source = Path(module.__file__).read_text(encoding="utf-8").partition(f"class {of.__name__}:")[2]
    body = source[: source.index("    def __post_init__")]
    found = re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', body, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


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
        raise InputError(f"the page's blocks and the tables differ in {', '.join(sorted(wrong))}; fix the page")
    return BLOCK.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[4]}", page)


def plans_of(settings: Iterable[str]) -> tuple[Plan, dict[str, float]]:
    """`Plan` with `key=value` settings, and those of `SearchPlan`.

    Raises:
        InputError: an unknown key, or a value that is no number.
    """
    given: dict[str, Any] = {}
    kinds: dict[str, Any] = {field.name: type(field.default) for field in (*fields(Plan), *fields(SearchPlan))}
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
    searching = {key: given.pop(key) for key in _docstrings(scale_search, SearchPlan) if key in given}
    SearchPlan(**searching)
    return Plan(**given), searching


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
    from search_r3.index.backends.lance.table_columns import table_schema
    from search_r3.index.build.index_diff import IndexDiff
    from search_r3.index.search_index import SearchIndex

    class Random:
        name, contract_hash, dimension, source = "random", "0" * 64, 576, "random"

        def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
            drawn = np.random.default_rng(len(texts)).normal(size=(len(texts), self.dimension))
            return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)

    functions = itertools.islice(read_functions(find_package(STDLIB), STDLIB), rows)
    documents = [SourceDocument(held.id, held.name, held.documented) for held in functions]
    begun = time.process_time()
    diff = IndexDiff(None, table_schema(576), None)
    chunks = sum(len(batch.rows) for batch in diff.batches(documents, 256))
    seconds = time.process_time() - begun
    diff.close()
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
        plan, searching = plans_of(given.settings)
        tables = blocks(plan, search=searching)
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
