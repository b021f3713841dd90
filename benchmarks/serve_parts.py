"""The parts of the serving benchmark: each measures its systems in turns, prints a table and notes its goals.

Documents and quality are measured in workers, everything else over HTTP at real `search-r3 serve` processes whose cache
is off; that nothing was answered out of a cache is checked.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Comparison, Table, Worker, compare, ratio_cell, ratio_figures, rounded, say
from serve_bench import Bench, Lazy, Record, seconds_of
from serve_client import Connection, Engine, ServerProcess, closed_loop

from search_r3.metrics import ndcg

MIXED = (8, 16, 32, 64)
"""Budgets of the batching part's second load, drawn for each request."""
MEAN, LONGEST = 32, 128
EXPONENTIAL = tuple(min(LONGEST, max(1, round(-MEAN * math.log(1 - (i + 0.5) / 64)))) for i in range(64))
"""Of its third: exponential, capped, as lengths are drawn where continuous batching is usually compared (Anyscale, "How
continuous batching enables 23x throughput in LLM inference", 2023)."""
TIMES_DOCUMENTS = TIMES_QUERIES = 4.0
TIMES_BATCHING = 2.0
TIMES_PEER = 5.0
NDCG_WITHIN = 0.005
ANSWER_SECONDS, FIRST_WORD_SECONDS = 2.0, 0.5

# ------------------------------------------------------------------------------------------------------ throughput


def documents(bench: Bench) -> Record:
    """Documents per second, in batches of 32, cut at `--document-tokens`."""
    texts = bench.texts["documents"]
    names = [str(engine) for engine in bench.engines]
    with ExitStack() as stack:
        workers = {str(engine): bench.worker("texts", engine, stack) for engine in bench.engines}
        records = bench.in_turns(
            "documents", names, bench.options.rounds, lambda name, _: workers[name]().ask("documents")
        )
    table = Table(
        f"{len(texts)} documents, cut at {bench.options.document_tokens} tokens",
        *("engine          ", "a second", "times (min-max)   ", "goal        "),
    )
    figures: Record = {"documents": len(texts), "rounds": bench.options.rounds}
    for name in names:
        measured = compare(seconds_of(records[name]), seconds_of(records[names[-1]]))
        rate = len(texts) / measured.ours_seconds
        figures[name] = {"documents_per_second": rounded(rate)}
        table.row(name, f"{rate:.3g}", *_ratio(bench, figures[name], "documents", measured, name, TIMES_DOCUMENTS))
    return figures


def queries(bench: Bench) -> Record:
    """Reasoned queries per second, p50 and p99, over HTTP at several numbers of clients."""
    options = bench.options
    names = [str(engine) for engine in bench.engines]
    records: dict[int, dict[str, list[Record]]] = {}
    first = 0
    with ExitStack() as stack:
        servers = {str(engine): bench.server(engine, stack, max(options.clients)) for engine in bench.engines}
        for clients in options.clients:
            count = max(options.least, options.requests * clients)

            def measure(name: str, turn: int, clients: int = clients, count: int = count, first: int = first) -> Record:
                server = servers[name]()
                return _loop(server, bench.bodies(server, first + turn * count, count, options.budget), clients)

            records[clients] = bench.in_turns(f"queries/{clients} clients", names, options.rounds, measure)
            first += options.rounds * count
    table = Table(f"reasoned queries over HTTP, at most {options.budget} tokens each", *_QUERY_HEADER)
    figures: Record = {"budget": options.budget, "rounds": options.rounds, "distinct_queries": first}
    for clients, found in records.items():
        cell = figures[f"{clients} clients"] = {}
        for name in names:
            measured = compare(seconds_of(found[name]), seconds_of(found[names[-1]]))
            cell[name] = _of_loops(found[name])
            goal = _ratio(bench, cell[name], f"queries at {clients} clients", measured, name, TIMES_QUERIES)
            table.row(str(clients), name, *_cells(cell[name]), *goal)
    return figures


def batching(bench: Bench) -> Record:
    """Continuous against static batching of one engine: analyses as the model ends them, and of two mixes of lengths.

    A trained model's analyses are short and much alike. One that never ends by itself, and so uses up budgets that
    differ, shows what continuous batching is for. A static batch is of what waits, whatever the budgets; rows that have
    ended leave it, but their answers, and those who wait, come when all have.
    """
    options = bench.options
    names, clients = ["continuous", "static"], options.batching_clients
    engine = options.batching_engine
    count = options.batching_requests * clients
    untrained = bench.model if options.tiny else options.batching_base
    loads: dict[str, tuple[str, int | Sequence[int]]] = {
        "its own lengths": (bench.model, options.batching_budget),
        "budgets used up": (untrained, MIXED),
        "exponential lengths": (untrained, EXPONENTIAL),
    }
    records: dict[str, dict[str, list[Record]]] = {}
    for load, (model, budget) in loads.items():
        with ExitStack() as stack:
            servers = {name: bench.server(engine, stack, clients, batching=name, model=model) for name in names}

            def measure(name: str, turn: int, servers: Any = servers, budget: Any = budget) -> Record:
                server = servers[name]()
                return _loop(server, bench.bodies(server, turn * count, count, budget), clients)

            records[load] = bench.in_turns(f"batching/{load}", names, options.rounds, measure)
    table = Table(f"continuous and static batching of {engine}, {clients} clients", *_QUERY_HEADER)
    figures: Record = {"engine": str(engine), "clients": clients, "budget": options.batching_budget, "mixed": MIXED}
    figures |= {"untrained": Path(untrained).name, "exponential": EXPONENTIAL}
    for load, found in records.items():
        cell = figures[load] = {}
        for name in names:
            measured = compare(seconds_of(found[name]), seconds_of(found["static"]))
            cell[name] = _of_loops(found[name])
            goal = _ratio(bench, cell[name], f"continuous batching, {load}", measured, name, TIMES_BATCHING, "static")
            table.row(load, name, *_cells(cell[name]), *goal)
    return figures


def _ask(worker: Lazy[Worker], line: str) -> Record:
    return worker().ask(line)


_QUERY_HEADER = (
    *("clients      ", "system          ", "a second", "p50 s", "p99 s", "tokens"),
    *("times (min-max)   ", "goal        "),
)


def _loop(server: ServerProcess, bodies: Sequence[bytes], clients: int) -> Record:
    hits = server.cache_hits()
    loop = closed_loop(server, bodies, clients)
    if server.cache_hits() != hits:
        raise SystemExit("a query was answered out of the server's cache: this measures nothing")
    return {
        "seconds": loop.seconds,
        "latencies": [rounded(one) for one in loop.latencies],
        "reasoning_tokens": sum(answer["usage"]["completion_tokens"] for answer in loop.answers),
    }


def _of_loops(records: Sequence[Record]) -> Record:
    """Rate (the median round's), latencies over all rounds, tokens."""
    latencies = [one for record in records for one in record["latencies"]]
    p50, p99 = np.quantile(latencies, (0.5, 0.99))
    tokens = sum(record["reasoning_tokens"] for record in records)
    rate = statistics.median(len(record["latencies"]) / record["seconds"] for record in records)
    return {
        "queries_per_second": rounded(rate),
        "p50_seconds": rounded(float(p50)),
        "p99_seconds": rounded(float(p99)),
        "requests": len(latencies),
        "mean_reasoning_tokens": rounded(tokens / len(latencies)),
    }


def _cells(found: Record) -> list[str]:
    names = ("queries_per_second", "p50_seconds", "p99_seconds", "mean_reasoning_tokens")
    return [f"{found[name]:.3g}" for name in names]


def _ratio(
    bench: Bench, figures: Record, what: str, measured: Comparison, name: str, wanted: float, base: str | None = None
) -> list[str]:
    """Cells of ratio and goal, noted in `figures`; empty for the system that the others are held against."""
    if name == (base or str(bench.engines[-1])):
        return ["", ""]
    figures |= ratio_figures("times", measured)
    held = base is not None or name == str(bench.engines[0])
    return [ratio_cell(measured), bench.goal(f"{what}: times", measured.ratio, wanted) if held else ""]


# --------------------------------------------------------------------------------------------------------- quality


def quality(bench: Bench) -> Record:
    """nDCG@10 off and on of every engine on the pool, and how near its vectors are to the last engine's."""
    pool = bench.texts["pool"]
    place = {document: i for i, document in enumerate(pool["document_ids"])}
    relevance_QN = np.zeros((len(pool["queries"]), len(place)))
    for i, judged in enumerate(pool["qrels"]):
        for document, grade in judged.items():
            relevance_QN[i, place[document]] = grade
    vectors: dict[str, dict[str, np.ndarray]] = {}
    analyses: dict[str, list[list[int]]] = {}
    with ExitStack() as stack:
        for engine in bench.engines:
            name, folder = str(engine), bench.work / "quality" / str(engine).replace(":", "-")
            worker = bench.worker("texts", engine, stack)
            found = bench.kept.measure(f"quality/{name}", partial(_ask, worker, f"quality {folder}"))
            worker.close()
            analyses[name] = found["analyses"]
            vectors[name] = {part: np.load(folder / f"{part}.npy") for part in ("documents", "off", "on")}
    base = str(bench.engines[-1])
    header = ("engine          ", "off", "on", "off, distance", "on, distance", "goal        ", "same analyses")
    table = Table(f"nDCG@10 of {len(pool['queries'])} queries over {len(place)} documents", *header)
    figures: Record = {"queries": len(pool["queries"]), "documents": len(place), "budget": bench.options.budget}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name in reversed([str(engine) for engine in bench.engines]):
        own = vectors[name]
        scores[name] = {mode: ndcg(own[mode] @ own["documents"].T, relevance_QN) for mode in ("off", "on")}
        cell = figures[name] = {
            "ndcg_off": rounded(scores[name]["off"].mean()),
            "ndcg_on": rounded(scores[name]["on"].mean()),
        }
        cells = ["", "", "", ""]
        if name != base:
            distance = {m: float(scores[name][m].mean() - scores[base][m].mean()) for m in ("off", "on")}
            same = sum(a == b for a, b in zip(analyses[name], analyses[base], strict=True))
            cosine = {part: float((own[part] * vectors[base][part]).sum(1).mean()) for part in own}
            cell |= {f"distance_{m}": rounded(d) for m, d in distance.items()} | {"same_analyses": same}
            cell |= {f"mean_cosine_{part}": rounded(value) for part, value in cosine.items()}
            goal = ""
            if name == str(bench.engines[0]):
                goals = [
                    bench.goal(f"nDCG@10 {m}: distance", abs(d), NDCG_WITHIN, at_most=True) for m, d in distance.items()
                ]
                goal = goals[0] if len(set(goals)) == 1 else f"{NDCG_WITHIN:g} missed"
            cells = [f"{distance['off']:+.4f}", f"{distance['on']:+.4f}", goal, f"{same}/{len(pool['queries'])}"]
        table.row(name, f"{cell['ndcg_off']:.4f}", f"{cell['ndcg_on']:.4f}", *cells)
    return figures


# ---------------------------------------------------------------------------------------------------------- answer


def answer(bench: Bench) -> Record:
    """A reasoned search on the demo's index, streamed: seconds to the first word that is shown, and to the result."""
    names = [str(engine) for engine in bench.engines]
    with ExitStack() as stack:
        # The last engine makes the index; the others search it if they keep the same contract, else each its own.
        folders: dict[str, str] = {}
        for engine in reversed(bench.engines):
            worker = bench.worker("texts", engine, stack)
            made = bench.kept.measure(f"answer/index/{engine}", partial(_ask, worker, f"index {bench.work}"))
            worker.close()
            folders[str(engine)] = made["folder"]

        def start(engine: Engine) -> ServerProcess:
            options = {"model": bench.model, "engine": engine.name, "dtype": engine.dtype, "cache": 0}
            place = Path(folders[str(engine)])
            server = ServerProcess(place, threads=bench.options.threads, device=bench.options.device, **options).ready()
            say(f"server of {engine} on the demo's index is ready; warming up")
            for query in bench.queries(-3, 3):
                _streamed(server, query, bench.options.budget)
            return server

        servers: dict[str, Lazy[ServerProcess]] = {}
        for engine in bench.engines:
            lazy = servers[str(engine)] = Lazy(partial(start, engine), ServerProcess.stop)
            stack.callback(lazy.close)
        records = bench.in_turns(
            "answer",
            names,
            bench.options.answer_queries,
            lambda name, turn: _streamed(servers[name](), bench.queries(turn, 1)[0], bench.options.budget),
        )
    header = ("engine          ", "first p50", "first p95", "goal        ", "answer p50", "answer p95", "goal        ")
    table = Table(f"a reasoned search on the demo's index, {bench.options.budget} tokens; seconds", *header)
    figures: Record = {"queries": bench.options.answer_queries, "budget": bench.options.budget}
    for name in names:
        words = [record["first_word"] for record in records[name] if record["first_word"] is not None]
        whole = seconds_of(records[name])
        first = np.quantile(words, (0.5, 0.95)) if words else np.full(2, np.inf)
        last = np.quantile(whole, (0.5, 0.95))
        tokens = statistics.mean(record["reasoning_tokens"] for record in records[name])
        figures[name] = {
            "first_word_p50_seconds": rounded(first[0]) if words else None,
            "first_word_p95_seconds": rounded(first[1]) if words else None,
            "answer_p50_seconds": rounded(last[0]),
            "answer_p95_seconds": rounded(last[1]),
            "wrote_nothing": len(whole) - len(words),
            "mean_reasoning_tokens": rounded(tokens),
        }
        goals = ["", ""]
        if name == names[0]:
            early = first[1] if words else 1e9  # a number that JSON has
            goals = [
                bench.goal("first streamed word, p95 seconds", early, FIRST_WORD_SECONDS, at_most=True),
                bench.goal("reasoned answer, p95 seconds", last[1], ANSWER_SECONDS, at_most=True),
            ]
        table.row(name, *(f"{x:.3g}" for x in first), goals[0], *(f"{x:.3g}" for x in last), goals[1])
    return figures


def _streamed(server: ServerProcess, query: str, budget: int) -> Record:
    """One search through server-sent events. The first word is there when a visible character is."""
    body = json.dumps({"query": query, "reasoning": budget, "stream": True}).encode()
    first = result = None
    seconds = 0.0
    with Connection(server) as connection:
        for event, data, since in connection.events("/v1/search", body):
            if event == "reasoning" and first is None and data["text"].strip():
                first = since
            elif event == "result":
                result, seconds = data, since
            elif event == "error":
                raise SystemExit(f"the search failed: {data}")
    if result is None or not result["hits"]:
        raise SystemExit("the search ended without a result")
    return {"seconds": seconds, "first_word": first, "reasoning_tokens": result["usage"]["completion_tokens"]}


# ------------------------------------------------------------------------------------------------------------ peer


def peer(bench: Bench) -> Record:
    """Reasoned queries per second in batches against transformers' `generate`, then encode (encode.py's `TwoPass`)."""
    options = bench.options
    engine, names = bench.engines[0], ["ours", "generate, then encode"]
    figures: Record = {"engine": str(engine), "budget": options.peer_budget, "rounds": options.rounds}
    table = Table(
        f"reasoned queries by {engine}, at most {options.peer_budget} tokens; peer: generate, then encode",
        *("batch    ", "ours/s", "peer/s", "times (min-max)   ", "goal        ", "same analyses"),
    )
    with ExitStack() as stack:
        worker = bench.worker("peer", engine, stack, options.peer_budget)
        for size in options.peer_sizes:
            count = max(size, 4)
            agreed = bench.kept.measure(f"peer/agree/{size}", partial(_ask, worker, f"agree {size}"))

            def measure(name: str, turn: int, size: int = size, count: int = count) -> Record:
                system = "ours" if name == "ours" else "peer"
                return worker().ask(f"{system} {size} {(turn * count) % (len(bench.texts['queries']) - count)} {count}")

            records = bench.in_turns(f"peer/batch {size}", names, options.rounds, measure)
            measured = compare(*(seconds_of(records[name]) for name in names))
            rates = [count / measured.ours_seconds, count / measured.peer_seconds]
            cell = figures[f"batch {size}"] = {
                "ours_per_second": rounded(rates[0]),
                "peer_per_second": rounded(rates[1]),
                **agreed,
            }
            cell |= ratio_figures("times", measured)
            goal = bench.goal(f"against generate, then encode, batch {size}: times", measured.ratio, TIMES_PEER)
            same = f"{agreed['same_analysis']}/{agreed['queries']}"
            table.row(str(size), *(f"{rate:.3g}" for rate in rates), ratio_cell(measured), goal, same)
    return figures
