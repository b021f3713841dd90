"""The plan of a synthesis: its settings, the documents and prompts that follow from them, and their cost.

Everything here depends only on the source, the settings and the seed, so a dry run shows what a run will do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from search_r3.config import at_least, require
from search_r3.data.beir import Document, stable_order
from search_r3.data.synthesis import instructions
from search_r3.data.synthesis.instructions import KINDS
from search_r3.data.synthesis.source_documents import Collection, read_collection
from search_r3.data.synthesis.writers import Budget, Prompt, count_characters
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

NO_BUDGET = Budget()


@dataclass(frozen=True, slots=True)
class SynthesisSettings:
    """What is requested for each document, and what is kept."""

    kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds of query; a document's first kind is chosen by the seed, further ones follow in order."""
    per_document: int = 1
    """Queries requested for each document."""
    negatives: int = 1
    """Hard negatives requested for each query that is kept; 0 for none."""
    reasoning: bool = False
    """Also request a reasoning trace for each query that is kept."""
    limit: int | None = None
    """Maximum number of documents to write for, sampled by the seed; the round trip searches all documents."""
    top_k: int = 3
    """A query is kept if its own document is among the top k that the retriever finds."""
    max_chars: int = 4000
    """Characters of a document that the writer sees; 4,000 are about 1,000 tokens."""
    near: float = 0.85
    """A negative that shares this fraction of its words with the positive is a copy."""
    thinking_tokens: int = 0
    """Additional tokens allowed for models that think before they answer."""
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_unknown(self.kinds, tuple(KINDS), "kinds", what="kind of query")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise InputError(f"kinds must name at least one kind of query, each once: {', '.join(KINDS)}")
        at_least(self, per_document=1, negatives=0, limit=1, top_k=1, max_chars=100, thinking_tokens=0)
        require(0 < self.near <= 1, "near", self.near, "above 0 and at most 1")


def choose_documents(collection: Collection, settings: SynthesisSettings) -> list[int]:
    """Indices of the documents to write for, in order."""
    by_id = {document.id: number for number, document in enumerate(collection.documents)}
    return [by_id[name] for name in stable_order(by_id, settings.seed)[: settings.limit]]


def kinds_of(document: Document, settings: SynthesisSettings) -> list[str]:
    """The kinds of query requested for a document; they depend only on its id and the seed."""
    digest = hashlib.blake2b(f"{settings.seed}\tkind\t{document.id}".encode(), digest_size=8).digest()
    first = int.from_bytes(digest)
    return [settings.kinds[(first + n) % len(settings.kinds)] for n in range(settings.per_document)]


def query_prompts(document: Document, settings: SynthesisSettings) -> list[Prompt]:
    """One prompt for each of the document's `kinds_of`."""
    kinds = kinds_of(document, settings)
    return _thinking([instructions.query_prompt(document, kind, settings.max_chars) for kind in kinds], settings)


def negative_prompts(document: Document, query: str, settings: SynthesisSettings) -> list[Prompt]:
    """`negatives` prompts, each with a different angle."""
    numbers = range(settings.negatives)
    prompts = [instructions.negative_prompt(document, query, number, settings.max_chars) for number in numbers]
    return _thinking(prompts, settings)


def reasoning_prompts(document: Document, query: str, settings: SynthesisSettings) -> list[Prompt]:
    """One prompt if reasoning traces are requested, else none."""
    prompts = [instructions.reasoning_prompt(document, query, settings.max_chars)] if settings.reasoning else []
    return _thinking(prompts, settings)


def prompts_for(document: Document, settings: SynthesisSettings) -> list[Prompt]:
    """All prompts for a document if every query is kept, with placeholders for queries not yet written."""
    prompts = query_prompts(document, settings)
    for kind in kinds_of(document, settings):
        query = f"(the {kind} that was written)"
        prompts += [*negative_prompts(document, query, settings), *reasoning_prompts(document, query, settings)]
    return prompts


def plan(
    source: str | Path,
    settings: SynthesisSettings,
    budget: Budget = NO_BUDGET,
    *,
    data_root: str | Path | None = None,
    count: Callable[[str], int] | None = None,
    examples: int = 2,
) -> dict[str, Any]:
    """The maximum calls and cost of a run, if every query is kept and every reply is as long as allowed. Calls no
    model.

    Args:
        count: counts a text's tokens; by default length / 4, and the plan says so.

    Returns:
        documents, calls, tokens (input, output), counted_by, cost (None without prices), within_budget, and the full
        prompts of the first `examples` documents.
    """
    collection = read_collection(source, data_root)
    chosen = choose_documents(collection, settings)
    measure = count or count_characters
    calls = tokens_in = tokens_out = 0
    shown = []
    for number, i in enumerate(chosen):
        document = collection.documents[i]
        prompts = prompts_for(document, settings)
        if number < examples:
            shown.append({"id": document.id, "prompts": [asdict(prompt) for prompt in prompts]})
        calls += len(prompts)
        tokens_in += sum(measure(prompt.system) + measure(prompt.user) for prompt in prompts)
        tokens_out += sum(prompt.max_tokens for prompt in prompts)
    return {
        "documents": len(chosen),
        "of": len(collection.documents),
        "calls": calls,
        "tokens": {"input": tokens_in, "output": tokens_out},
        "counted_by": "tokenizer" if count else "characters / 4",
        "cost": budget.cost_of(tokens_in, tokens_out),
        "within_budget": budget.allows(tokens_in, tokens_out),
        "examples": shown,
    }


def tokens_of(prompt: Prompt) -> int:
    """The approximate number of tokens in a prompt, by its length."""
    return count_characters(prompt.system) + count_characters(prompt.user)


def _thinking(prompts: list[Prompt], settings: SynthesisSettings) -> list[Prompt]:
    return [replace(prompt, max_tokens=prompt.max_tokens + settings.thinking_tokens) for prompt in prompts]
