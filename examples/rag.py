"""Retrieval and answers with citations by one LLM: with the adapter it embeds, without the adapter it answers.

    python examples/rag.py notes-index "which license did we choose"

Does reasoning before retrieval improve the answers? With a data set, this measures the share of answers that contain
the correct answer, with reasoning off and on (with the same number of passages; decoding is greedy, so deterministic):

    python examples/rag.py --dataset hotpotqa --answers answers.jsonl --limit 20 --documents 500

The file for `--answers` has lines {"_id": "...", "answer": "..."}. It is not needed if the lines of queries.jsonl have
"metadata": {"answer": "..."}.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_r3 import InputError
from search_r3.integrations.index_searcher import IndexSearcher
from search_r3.prompts import Conversation, render

SYSTEM = (
    "Answer the question in one short sentence, from the numbered passages alone. Put the number of the passage that "
    "says so behind it, like this: [2]. If no passage answers it, say: I do not know."
)
PASSAGE_TOKENS = 160
"""Tokens kept of each passage, so that a small model can attend to five passages and the question."""


@dataclass(frozen=True)
class Answer:
    """The model's answer; `cited` are the numbers (from 1) of existing passages that it cites."""

    text: str
    cited: list[int]


class Chat:
    """The base model's own chat, without the adapter.

    Args:
        name: the base model, as for `search_r3.model.checkpoint.load_base`.
    """

    def __init__(self, name: str, *, device: str = "cpu") -> None:
        import torch

        from search_r3.model.checkpoint import load_base
        from search_r3.model.searchr3 import stop_ids

        loaded = load_base(name, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
        self.model, self.tokenizer = loaded.model.to(device).eval(), loaded.tokenizer
        self.frame = render(Conversation(SYSTEM), self.tokenizer, give_answer=False)
        self.stop = stop_ids(self.model, self.tokenizer)

    def answer(self, question: str, passages: Sequence[str], max_new_tokens: int = 48) -> Answer:
        """Answer `question` from `passages`, greedily. Special tokens in texts are read as plain characters."""
        import torch

        from search_r3.model.tokenization import encode_as_text

        token_ids = encode_as_text(self.tokenizer, list(passages))
        truncated = [self.tokenizer.decode(ids[:PASSAGE_TOKENS]) for ids in token_ids]
        numbered = "\n".join(f"[{number}] {' '.join(text.split())}" for number, text in enumerate(truncated, start=1))
        (middle,) = encode_as_text(self.tokenizer, [f"{numbered}\n\nQuestion: {question}"])
        ids = torch.tensor([[*self.frame.prefix, *middle, *self.frame.suffix]], device=self.model.device)
        with torch.inference_mode():
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.stop,
                pad_token_id=self.stop[0],
            )
        text = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
        return Answer(text, citations(text, len(passages)))


def citations(text: str, passages: int) -> list[int]:
    """The passage numbers that `text` cites, [1] to [passages], without duplicates or invented numbers."""
    numbers = [int(number) for number in re.findall(r"\[(\d{1,4})\]", text)]
    return list(dict.fromkeys(number for number in numbers if 1 <= number <= passages))


def normalized(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as normalized for SQuAD (Rajpurkar et al. 2016)."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def contains(text: str, answer: str) -> bool:
    """Whether `text` contains the words of `answer` in sequence, after normalization."""
    words, wanted = normalized(text), normalized(answer)
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def ask(
    searcher: IndexSearcher, chat: Chat, question: str, *, reasoning: bool, budget: int, k: int
) -> tuple[Answer, Any]:
    """Search, then answer from the hits; returns the answer and the search result."""
    result = searcher.search(question, k=k, reasoning=reasoning, max_reasoning_tokens=budget)
    return chat.answer(question, [f"{hit.title}: {hit.text}" if hit.title else hit.text for hit in result.hits]), result


def read_answers(folder: Path, file: Path | None) -> dict[str, str]:
    """Query id -> correct answer, from `file`, or else from the metadata in the data set's queries.jsonl."""
    source = file or folder / "queries.jsonl"
    try:
        lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        records = {str(line["_id"]): line if file else line.get("metadata") or {} for line in lines}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{source} cannot be read ({error}); expected lines {{"_id": ..., "answer": ...}}') from error
    answers = {key: str(value["answer"]) for key, value in records.items() if value.get("answer")}
    if not answers:
        raise InputError(f'{source} has no answers; give --answers FILE with lines {{"_id": ..., "answer": ...}}')
    return answers


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure answer containment on a data set's queries, with reasoning off and on."""
    from search_r3 import SearchR3
    from search_r3.data.beir import load_beir
    from search_r3.data.io.find_dataset import find_dataset
    from search_r3.index import SourceDocument, build_index
    from search_r3.model.resolve import default_model

    folder = find_dataset(options.dataset, options.data)
    answers = read_answers(folder, options.answers)
    dataset = load_beir(folder, options.split)
    queries = [key for key in dataset.qrels if key in dataset.queries and key in answers][: options.limit]
    if not queries:
        raise InputError(f"no query of {options.dataset} {options.split} has an answer; check the ids in --answers")
    judged = [doc for query in queries for doc in dataset.qrels[query]]
    chosen = list(dict.fromkeys([*judged, *dataset.corpus]))[: max(options.documents, len(set(judged)))]
    model = SearchR3.from_pretrained(options.model or default_model(), device=options.device)
    documents = [dataset.corpus[key] for key in chosen if key in dataset.corpus]
    index = options.index or Path(f"{options.dataset}-rag.index")
    build_index(index, [SourceDocument(id=d.id, title=d.title, text=d.text) for d in documents], model)
    searcher, chat = IndexSearcher(index, model), Chat(options.chat or model.contract.base, device=options.device)
    result: dict[str, Any] = {
        "dataset": options.dataset,
        "split": options.split,
        "queries": len(queries),
        "documents": len(documents),
        "model": model.name,
        "contract_hash": model.contract_hash,
        "k": options.k,
        "budget": options.budget,
    }
    for name, reasoning in (("off", False), ("on", True)):
        rows = []
        for number, key in enumerate(queries, start=1):
            answer, search = ask(
                searcher, chat, dataset.queries[key], reasoning=reasoning, budget=options.budget, k=options.k
            )
            passages = [f"{hit.title} {hit.text}" for hit in search.hits]
            rows.append(
                {
                    "query": key,
                    "answer": answer.text,
                    "cited": [search.hits[cited - 1].document for cited in answer.cited],
                    "contained": contains(answer.text, answers[key]),
                    "retrieved": any(contains(passage, answers[key]) for passage in passages),
                }
            )
            print(f"\rreasoning {name}: {number} of {len(queries)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        mean = {what: sum(row[what] for row in rows) / len(rows) for what in ("contained", "retrieved")}
        result[name] = {**mean, "with_citation": sum(bool(row["cited"]) for row in rows) / len(rows), "rows": rows}
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="?", help="an index; with --dataset, the path of the index to build")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--model", help="by default the index's own; with --dataset, the default adapter")
    parser.add_argument("--chat", help="the LLM that answers; by default the base of the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-k", type=int, default=5, help="passages per answer")
    parser.add_argument("--budget", type=int, default=32, help="maximum number of reasoning tokens")
    parser.add_argument("--no-reasoning", action="store_true")
    parser.add_argument("--dataset", help="measure on this data set")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--data", type=Path, help="the folder of data sets")
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--limit", type=int, default=20, help="number of queries")
    parser.add_argument("--documents", type=int, default=500, help="number of documents")
    parser.add_argument("--json", type=Path, help="also write the result, with all answers, to this file")
    options = parser.parse_args(arguments)
    try:
        if options.dataset:
            result = measure(options)
            print(f"{'reasoning':10} {'answer contained':>17} {'answer retrieved':>17} {'cites a passage':>16}")
            for name in ("off", "on"):
                row = result[name]
                print(f"{name:10} {row['contained']:17.3f} {row['retrieved']:17.3f} {row['with_citation']:16.3f}")
            if options.json:
                options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif options.index and options.question:
            searcher = IndexSearcher(options.index, options.model, device=options.device)
            chat = Chat(options.chat or searcher.load().contract.base, device=options.device)
            answer, result = ask(
                searcher, chat, options.question, reasoning=not options.no_reasoning, budget=options.budget, k=options.k
            )
            print(answer.text)
            for number in answer.cited:
                hit = result.hits[number - 1]
                print(f"[{number}] {hit.title or hit.document}  {hit.path}:{hit.start_line}")
            if not answer.cited:
                print("no passage was cited; the answer may be invented")
        else:
            parser.error("give an index and a question, or --dataset")
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
