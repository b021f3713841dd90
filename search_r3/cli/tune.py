"""`tune`: how the hybrid searches of an index fuse their lists, chosen on judged queries."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3.cli.index_maintenance import Index
from search_r3.cli.options import (
    AUTO,
    Budget,
    DataRoot,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    Json,
    Reasoning,
    ReasoningOption,
    load,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.data.judged_queries import JudgedQuery
    from search_r3.evaluation.fusion_tuning import FusionTuning, QueryLists
    from search_r3.index.search_index import SearchIndex


def tune(
    index: Index,
    queries: Annotated[
        str | None,
        typer.Argument(
            help="Judged queries, as `search-r3 adapt` takes them: a BEIR folder or data set, or JSONL with query and "
            "relevant (ids of documents, or id and grade), or query and clicked (ids)."
        ),
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Go back to the default; needs no queries and no model.")
    ] = False,
    split: Annotated[str, typer.Option(help="The split of a BEIR folder to choose on.")] = "train",
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="More queries (BEIR folder or JSONL) whose near copies are left out. Those of a BEIR folder's other "
            "splits always are."
        ),
    ] = None,
    hold_out: Annotated[
        int, typer.Option(min=2, help="Every N-th query, by its id's CRC-32, is held out to compare before and after.")
    ] = 4,
    reasoning: ReasoningOption = Reasoning.on,
    budget: Budget = 32,
    model: Annotated[str | None, typer.Option(help="The index's model, if its name is unknown here.")] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    data: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Choose how hybrid searches of an index fuse meaning and words, and store it with the index.

    Tried are the methods linear, dbsf, rsf and rrf, all weights, a weight by query, and the words of the reasoning. The
    choice is stored only if it is better than before on the held-out queries. Searches with this model then use it
    unless they ask for a weight or a fusion; tune with the reasoning that you search with.

    \b
    Example:  search-r3 tune notes-index clicks.jsonl
    Before:   search-r3 index PATH --into notes-index
    Next:     search-r3 search notes-index "a query"
    """
    silence_transformers()
    from search_r3.index.maintenance import keep_fusion
    from search_r3.index.search_index import SearchIndex

    if forget == (queries is not None):
        raise InputError("give judged queries to tune on, or --forget to go back to the default")
    if queries is None:
        keep_fusion(index, None)
        print_json({"index": index, "fusion": None}) if as_json else print(f"{index}: the default fusion again")
        return
    from search_r3.data.judged_queries import read_excluded_queries, read_judged_queries, split_queries
    from search_r3.evaluation.fusion_tuning import candidates, tune_fusion
    from search_r3.hybrid_fusion import DEFAULT_FUSION
    from search_r3.index.run_search import choose_fusion
    from search_r3.model.model_info import model_of_index
    from search_r3.progress import progress_bar

    opened = SearchIndex.open(index, follow=False)
    opened.backend.require("records", "a tuned fusion")
    opened.backend.check_text()
    excluded = read_excluded_queries(queries, split, exclude or (), data)
    judged = read_judged_queries(queries, split, data)
    parts = split_queries(judged, {name for name, _, _ in opened.backend.listed()}, hold_out, excluded)
    print_progress(parts.describe("to choose on"))
    reader = load(
        model or model_of_index(opened.info.model_name, opened.info.model_source, index), device, dtype, engine
    )
    opened.check_model(reader)
    before = choose_fusion(opened.backend, reader, None, None)
    document_of: dict[str, str] = {}
    how = {"reasoning": reasoning.chosen(reader), "max_reasoning_tokens": budget}
    with progress_bar("searching", len(parts.train) + len(parts.held_out)) as advance:
        lists = [
            [search_lists(opened, reader, one, how, document_of, advance) for one in some]
            for some in (parts.train, parts.held_out)
        ]
    with progress_bar("choosing", candidates(lists[0])) as advance:
        found = tune_fusion(lists[0], lists[1], document_of, before, advance)
    if found.gain <= 0:
        after = (
            f"; {found.fusion}: {found.held_out['after']['ndcg@10']:.4f}" if str(found.fusion) != str(before) else ""
        )
        raise InputError(
            f"nothing is better on the {len(parts.held_out)} held-out queries than {before} (nDCG@10 "
            f"{found.held_out['before']['ndcg@10']:.4f}{after}), so nothing is saved; give more queries, or keep it"
        )
    about: dict[str, Any] = {
        "queries": queries,
        "split": split,
        "reasoning": reasoning.value,
        "held_out": found.held_out,
    }
    about |= {"train_queries": len(parts.train), "held_out_queries": len(parts.held_out), "train": found.train}
    fusion = replace(found.fusion, contract_hash=reader.contract_hash, about=about)
    keep_fusion(index, fusion)
    if as_json:
        print_json({"index": index, **asdict(fusion), "better": found.better, "worse": found.worse}
                   | {"before": asdict(replace(before, about={}))})  # fmt: skip
        return
    print("\n".join(table(found)))
    print(f"{found.better:,} of {len(parts.held_out):,} held-out queries are better off, {found.worse:,} worse")
    print(f"before: {before}{' (the default)' if before == DEFAULT_FUSION else ''}")
    print(f"after:  {fusion}")
    print(f"stored with {index}; to go back: search-r3 tune {shlex.quote(index)} --forget")


def search_lists(
    opened: SearchIndex,
    reader: Any,
    query: JudgedQuery,
    how: dict[str, Any],
    document_of: dict[str, str],
    advance: Any,
) -> QueryLists:
    """The lists of one query, as a hybrid search fuses them; adds their chunks to `document_of`."""
    from search_r3.evaluation.fusion_tuning import QueryLists
    from search_r3.rank_fusion import DEPTH

    def scores(text: str, model: Any, **options: Any) -> tuple[dict[str, float], Any]:
        found = opened.search(text, model, k=DEPTH, chunks=True, **options)
        document_of.update({hit.id: hit.document for hit in found.hits})
        return {hit.id: hit.score for hit in found.hits}, found.reasoning

    cosines, trace = scores(query.text, reader, mode="vector", **how)
    bm25, _ = scores(query.text, None, mode="text")
    with_reasoning = None
    if trace is not None and trace.text.strip():
        with_reasoning, _ = scores(f"{query.text} {trace.text}", None, mode="text")
    advance(1)
    return QueryLists(query.id, query.text, cosines, bm25, with_reasoning, query.relevant)


def table(found: FusionTuning) -> list[str]:
    """The measures of the held-out queries, in Markdown."""
    lines = ["| held-out queries | nDCG@10 | recall@10 |", "|---|---|---|"]
    names = {"vectors": "by meaning alone", "words": "by words alone", "before": "before", "after": "after"}
    lines += [
        f"| {names[name]} | {values['ndcg@10']:.4f} | {values['recall@10']:.4f} |"
        for name, values in found.held_out.items()
    ]
    return lines
