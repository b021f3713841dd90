"""Training pairs for documents without queries, written by a language model and checked by a retriever.

For each document a query is written (InPars, Bonifacio et al. 2022, arXiv 2202.05144) and kept if a search with it
finds the document (Promptagator, arXiv 2209.11755), then hard negatives and a reasoning trace. Finished blocks are
saved.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from search_r3.data.mining.scorers import Report, Scorer
from search_r3.data.mining.word_overlap import normalize
from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.data.shard_checkpoints import ShardCheckpoints, differing, read_json
from search_r3.data.synthesis import instructions
from search_r3.data.synthesis.instructions import KINDS
from search_r3.data.synthesis.roundtrip import RoundTrip
from search_r3.data.synthesis.source_documents import Collection, read_collection
from search_r3.data.synthesis.synthesis_plan import (
    NO_BUDGET,
    SynthesisSettings,
    choose_documents,
    kinds_of,
    negative_prompts,
    prompts_for,
    query_prompts,
    reasoning_prompts,
    tokens_of,
)
from search_r3.data.synthesis.writers import Budget, Failure, Prompt, Reply, Usage, Writer
from search_r3.errors import InputError
from search_r3.files import atomic_write_text, sha256_of

WIDER = 1.2
"""Safety factor on a document's estimated cost near the budget."""


@dataclass(slots=True)
class _Draft:
    """One query on its way to a training pair."""

    document: int
    kind: str
    query: str = ""
    rank: int = 0
    negatives: list[str] = field(default_factory=list)
    reasoning: str | None = None


def synthesize(
    source: str | Path,
    output: str | Path,
    writer: Writer,
    scorer: Scorer,
    settings: SynthesisSettings | None = None,
    *,
    budget: Budget = NO_BUDGET,
    data_root: str | Path | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Write training pairs for the documents of `source` to `output`, and a manifest to OUTPUT.manifest.json.

    An interrupted run leaves the folder OUTPUT.partial, from which the same call resumes. A run that reaches its budget
    writes the pairs so far and can be resumed with a larger budget. A finished run is not paid for twice: the same call
    returns its manifest.

    Args:
        source: see `read_collection`.
        budget: no request is made that might exceed it, estimated from the cost of previous documents.

    Returns:
        The manifest.

    Raises:
        InputError: `source` cannot be read, `output` exists with other settings or cannot be written, OUTPUT.partial
            belongs to another run, the writer is not available, the budget is too small for one document, or no pair is
            kept.
    """
    settings = settings or SynthesisSettings()
    collection = read_collection(source, data_root)
    chosen = choose_documents(collection, settings)
    record = {
        "documents_sha256": collection.sha256,
        "prompts_sha256": instructions.prompts_sha256(),
        "writer": dict(writer.identity),
        "retriever": {"name": scorer.name, **scorer.identity},
        "settings": json.loads(json.dumps(asdict(settings))),
    }
    output, folder = Path(output), Path(f"{output}.partial")
    finished = _check_output(output, folder, record)
    if finished is not None:
        return finished
    checkpoints = ShardCheckpoints(folder, record)
    try:
        work = _Work(collection, chosen, writer, scorer, settings, checkpoints, report)
        stopped = work.run(budget)
        manifest = _write(output, work, record, budget, stopped)
        if not stopped:
            checkpoints.remove()
    finally:
        checkpoints.close()
    return manifest


class _Work:
    """The documents of one run, block by block."""

    def __init__(
        self,
        collection: Collection,
        chosen: list[int],
        writer: Writer,
        scorer: Scorer,
        settings: SynthesisSettings,
        checkpoints: ShardCheckpoints,
        report: Report | None,
    ) -> None:
        self.collection, self.chosen, self.writer, self.settings = collection, chosen, writer, settings
        self.checkpoints, self.report = checkpoints, report
        texts = [document.full_text for document in collection.documents]
        self.trip = RoundTrip(scorer, texts, checkpoints.folder / "retriever", report)
        self.lines = checkpoints.finished([collection.documents[i].id for i in chosen])
        self.seen = {normalize(pair["query"]) for line in self.lines for pair in line["pairs"]}
        self.writer.usage = Usage(**checkpoints.spent())
        self.dropped: list[Counter[str]] = []

    def run(self, budget: Budget) -> str:
        """Process blocks until all documents are done or the budget is used up; returns the reason for stopping, or
        ""."""
        while len(self.lines) < len(self.chosen):
            start = len(self.lines)
            block = self.chosen[start : start + self.writer.batch]
            affordable = self._affordable(block, budget)
            if not affordable:
                return "budget"
            self._finish(block[:affordable])
            if self.report:
                self.report("documents done", len(self.lines), len(self.chosen))
            if affordable < len(block):
                return "budget"
        return ""

    def _affordable(self, block: Sequence[int], budget: Budget) -> int:
        """How many documents of the block fit into the budget in any case.

        The estimate from the prompts' lengths is corrected by the actual usage of the documents so far.
        """
        if budget.tokens is None and budget.cost is None:
            return len(block)
        used = self.writer.usage
        suggested = sum(line["estimate"] for line in self.lines)
        measured = WIDER * max(1.0, used.input / suggested if suggested else 1.0)
        tokens_in, tokens_out = used.input, used.output
        for count, i in enumerate(block):
            for prompt in prompts_for(self.collection.documents[i], self.settings):
                tokens_in += round(measured * tokens_of(prompt))
                tokens_out += prompt.max_tokens
            if not budget.allows(tokens_in, tokens_out):
                return count
        return len(block)

    def _finish(self, block: Sequence[int]) -> None:
        self.dropped = [Counter() for _ in block]
        self.asked = [0] * len(block)
        documents = self.collection.documents
        drafts = [_Draft(i, kind) for i in block for kind in kinds_of(documents[i], self.settings)]
        self.place = {i: place for place, i in enumerate(block)}
        drafts = self._queries(drafts)
        if self.settings.negatives:
            self._negatives(drafts)
        if self.settings.reasoning:
            self._reasoning(drafts)
        lines = []
        for place, i in enumerate(block):
            pairs = [
                {"kind": d.kind, "query": d.query, "rank": d.rank, "negatives": d.negatives, "reasoning": d.reasoning}
                for d in drafts
                if d.document == i
            ]
            dropped = dict(sorted(self.dropped[place].items()))
            lines.append({"id": documents[i].id, "pairs": pairs, "dropped": dropped, "estimate": self.asked[place]})
        self.checkpoints.add_block(lines)
        self.lines += lines

    def _queries(self, drafts: list[_Draft]) -> list[_Draft]:
        """The drafts whose query is well formed, new, and retrieves its document."""
        documents = self.collection.documents
        prompts = [prompt for i in self.place for prompt in query_prompts(documents[i], self.settings)]
        read = []
        for draft, reply in zip(drafts, self._ask(drafts, prompts), strict=True):
            draft.query, reason = (
                ("", reply.reason)
                if isinstance(reply, Failure)
                else instructions.read_query(reply, documents[draft.document], draft.kind)
            )
            if not reason and normalize(draft.query) in self.collection.queries:
                reason = "the source has it"
            if self._keep(draft, "query", reason):
                read.append(draft)
        kept = []
        ranks = self.trip.ranks([d.query for d in read], [d.document for d in read])
        for draft, rank in zip(read, ranks, strict=True):
            reason = "written before" if normalize(draft.query) in self.seen else ""
            if rank is None or rank > self.settings.top_k:
                reason = "does not find its document"
            if self._keep(draft, "query", reason):
                draft.rank = rank or 0
                self.seen.add(normalize(draft.query))
                kept.append(draft)
        return kept

    def _negatives(self, drafts: list[_Draft]) -> None:
        documents = self.collection.documents
        asked = [draft for draft in drafts for _ in range(self.settings.negatives)]
        prompts = [p for d in drafts for p in negative_prompts(documents[d.document], d.query, self.settings)]
        read: list[tuple[_Draft, str]] = []
        for draft, reply in zip(asked, self._ask(asked, prompts), strict=True):
            passage, reason = (
                ("", reply.reason)
                if isinstance(reply, Failure)
                else instructions.read_negative(reply, documents[draft.document], draft.query, self.settings.near)
            )
            if self._keep(draft, "negative", reason):
                read.append((draft, passage))
        faults = self.trip.faults([d.query for d, _ in read], [d.document for d, _ in read], [text for _, text in read])
        for (draft, passage), fault in zip(read, faults, strict=True):
            if not fault and passage in draft.negatives:
                fault = "written twice"
            if self._keep(draft, "negative", fault):
                draft.negatives.append(passage)

    def _reasoning(self, drafts: list[_Draft]) -> None:
        documents = self.collection.documents
        prompts = [p for d in drafts for p in reasoning_prompts(documents[d.document], d.query, self.settings)]
        read: list[tuple[_Draft, str]] = []
        for draft, reply in zip(drafts, self._ask(drafts, prompts), strict=True):
            reasoning, reason = (
                ("", reply.reason)
                if isinstance(reply, Failure)
                else instructions.read_reasoning(reply, documents[draft.document], draft.query)
            )
            if self._keep(draft, "reasoning", reason):
                read.append((draft, reasoning))
        ranks = self.trip.ranks([f"{d.query} {text}" for d, text in read], [d.document for d, _ in read])
        for (draft, reasoning), rank in zip(read, ranks, strict=True):
            if self._keep(draft, "reasoning", "" if rank and rank <= draft.rank else "leads away from its document"):
                draft.reasoning = reasoning

    def _ask(self, drafts: Sequence[_Draft], prompts: Sequence[Prompt]) -> list[Reply | Failure]:
        if not prompts:
            return []
        try:
            replies = self.writer.write(prompts)
        finally:
            self.checkpoints.spend(asdict(self.writer.usage))
        for draft, prompt in zip(drafts, prompts, strict=True):
            self.asked[self.place[draft.document]] += tokens_of(prompt)
        return replies

    def _keep(self, draft: _Draft, what: str, reason: str) -> bool:
        if reason:
            self.dropped[self.place[draft.document]][f"{what}: {reason}"] += 1
        return not reason


def _check_output(output: Path, folder: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest if `output` is the finished result of the same run; InputError if it is something else."""
    if output.is_dir():
        raise InputError(f"{output} is a folder; name a file such as pairs.jsonl")
    if not os.path.lexists(output) or (folder / "run.json").is_file():
        return None
    manifest = read_json(Path(f"{output}.manifest.json"))
    other = differing(manifest, record) if isinstance(manifest, dict) else ["its manifest"]
    if other:
        raise InputError(
            f"{output} already exists and was made with other settings ({', '.join(other)} differ); generated "
            "pairs can be expensive, so they are not overwritten: remove the file or name another one"
        )
    return manifest


def _write(output: Path, work: _Work, record: dict[str, Any], budget: Budget, stopped: str) -> dict[str, Any]:
    """Write the pairs, then the manifest."""
    dropped: Counter[str] = Counter()
    pairs: list[TrainingPair] = []
    kinds: Counter[str] = Counter()
    asked = 0
    documents = {document.id: document for document in work.collection.documents}
    for line in work.lines:
        dropped.update(line["dropped"])
        asked += work.settings.per_document
        for number, written in enumerate(line["pairs"]):
            pair = TrainingPair(
                f"synthetic:{work.collection.name}:{line['id']}:{number}",
                written["query"],
                documents[line["id"]].full_text,
                tuple(written["negatives"]),
                written["reasoning"],
                f"synthetic:{work.collection.name}/{written['kind']}",
            )
            pairs.append(pair)
            kinds[written["kind"]] += 1
    if stopped and not work.lines:
        raise InputError("the budget is too small for a single document; see the cost with --dry-run, and raise it")
    if not pairs:
        raise InputError(
            f"no query of {asked} was kept ({', '.join(f'{n} {reason}' for reason, n in dropped.most_common(4))}); use "
            f"a stronger model or a larger --top-k, and remove {work.checkpoints.folder}"
        )
    write_pairs(output, pairs)
    used = work.writer.usage
    cost = budget.cost_of(used.input, used.output)
    manifest = {
        "output": output.name,
        "sha256": sha256_of(output),
        "source": work.collection.name,
        "pairs": len(pairs),
        "by_kind": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "negatives": sum(len(pair.negatives) for pair in pairs),
        "with_reasoning": sum(1 for pair in pairs if pair.reasoning),
        "documents": len(work.lines),
        "documents_asked_for": len(work.chosen),
        "documents_in_source": len(work.collection.documents),
        "skipped_empty_or_twice": work.collection.skipped,
        "queries_asked": asked,
        "dropped": dict(sorted(dropped.items())),
        "stopped": stopped or None,
        "usage": asdict(used),
        "cost": None if cost is None else round(cost, 6),
        "prices_per_million": None if cost is None else {"input": budget.price_in, "output": budget.price_out},
        **record,
    }
    atomic_write_text(f"{output}.manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest
