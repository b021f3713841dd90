"""How fast we embed: documents against sentence-transformers, reasoned queries against generate-then-encode.

    python benchmarks/encode.py --data DATA
    python benchmarks/encode.py --data DATA --device cuda --dtype bfloat16 --limit 4096

Both sides run the same weights on the same token ids and must agree: the table shows the largest cosine distance, and
for the analyses how many are the same token for token. Ours and the peer take turns (see common.py).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Comparison, Table, side_by_side, write_report

from search_r3 import SearchR3
from search_r3.data.beir import load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.model.searchr3 import DEFAULT_DOCUMENT_TOKENS, encode_as_text, stop_ids

SEED = 0
BATCH = 32
SHORT = 16
"""A text under this many tokens is short: there the shared prompt prefix matters most."""
GOALS = {"short": 1.3, "cosqa": 1.1, "scifact": 1.0, "batch 1": 1.5, f"batch {BATCH}": 1.5}


def main() -> None:
    """Run what `--only` asks for, print the tables, write the JSON."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = SearchR3.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    figures: dict[str, Any] = {"model": model.name, "dtype": model.dtype, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "merged"
        model.save_pretrained(folder)
        if options.only in ("documents", "both"):
            figures["documents"] = documents(model, folder, options)
        if options.only in ("reasoning", "both"):
            figures["reasoning"] = reasoning(model, folder, options)
    target = write_report("encode", figures, device=options.device, seed=SEED, output=options.output)
    print(f"\nwritten to {target.name}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="bundled name, adapter, folder or hub id")
    parser.add_argument("--data", help="BEIR data root (default: SEARCH_R3_DATA, then the cache folder)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--limit", type=int, default=256, help="texts of the short set; 1/2 for cosqa, 1/4 for scifact")
    parser.add_argument("--queries", type=int, default=4, help="queries at batch 1; batch 32 runs once over 32")
    parser.add_argument("--budget", type=int, default=32, help="tokens of analysis, at most")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of timed runs")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--only", choices=["documents", "reasoning", "both"], default="both")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: results/benchmarks/encode.json)")
    return parser.parse_args()


def documents(model: SearchR3, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Documents per second against sentence-transformers: same backbone, ids, last-token pooling, batch of 32."""
    peer = sentence_transformer(model, folder, options.device)
    figures = {}
    header = ("texts", "n", "tokens", "ours/s", "peer/s", "ratio (min-max) ", "goal      ", "max cosine distance")
    table = Table("documents per second; peer: sentence-transformers", *header)
    for name, texts in document_sets(model, options).items():

        def ours(texts: list[str] = texts) -> np.ndarray:
            return model.encode_document(texts, batch_size=BATCH, show_progress_bar=False)

        def theirs(texts: list[str] = texts) -> np.ndarray:
            return peer.encode(texts, batch_size=BATCH, show_progress_bar=False)

        distance = float((1 - (ours() * theirs()).sum(1)).max())
        measured = side_by_side(ours, theirs, options.rounds, device=options.device, warmup=0)
        tokens = float(np.mean([len(ids) for ids in encode_as_text(model.tokenizer, texts)]))
        figures[name] = measured.figures() | {
            "texts": len(texts),
            "mean_tokens": round(tokens, 1),
            "ours_per_second": round(len(texts) / measured.ours_seconds, 2),
            "peer_per_second": round(len(texts) / measured.peer_seconds, 2),
            "largest_cosine_distance": distance,
            "goal": GOALS[name],
        }
        cells = speeds(measured, len(texts), GOALS[name])
        table.row(name, str(len(texts)), f"{tokens:.0f}", *cells, f"{distance:.0e}")
    return figures


def document_sets(model: SearchR3, options: argparse.Namespace) -> dict[str, list[str]]:
    """Real texts of three lengths: short queries, Python functions, abstracts."""
    cosqa = load_beir(find_dataset("cosqa", options.data))
    scifact = load_beir(find_dataset("scifact", options.data))
    queries = sorted(cosqa.queries.values())
    short = [q for q, ids in zip(queries, encode_as_text(model.tokenizer, queries), strict=True) if len(ids) < SHORT]
    pick = random.Random(SEED)
    return {
        "short": pick.sample(short, min(options.limit, len(short))),
        "cosqa": sample_documents(pick, cosqa, options.limit // 2),
        "scifact": sample_documents(pick, scifact, options.limit // 4),
    }


def sample_documents(pick: random.Random, dataset: Any, count: int) -> list[str]:
    """`count` documents (at least one batch) of a data set, in a fixed random order."""
    chosen = pick.sample(sorted(dataset.corpus), min(max(count, BATCH), len(dataset.corpus)))
    return [dataset.corpus[i].full_text for i in chosen]


def sentence_transformer(model: SearchR3, folder: Path, device: str) -> Any:
    """sentence-transformers over the merged model, its tokenising step giving the same ids as ours."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    template = model.templates["document"]

    class SameIds(Transformer):
        """Prefix + text + suffix, the embed token last; padded on the right, as sentence-transformers does."""

        def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Any]:
            texts = encode_as_text(model.tokenizer, inputs)
            rows = [[*template.prefix, *ids[:DEFAULT_DOCUMENT_TOKENS], *template.suffix] for ids in texts]
            longest = max(map(len, rows))
            return {
                "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
                "modality": "text",
            }

    backbone = SameIds(str(folder), model_kwargs={"dtype": getattr(torch, model.dtype)})
    pooling = Pooling(model.dimension, pooling_mode="lasttoken")
    return SentenceTransformer(modules=[backbone, pooling, Normalize()], device=device)


def reasoning(model: SearchR3, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Reasoned queries per second against two passes: `generate`, then encode the text with the token appended."""
    dev = load_beir(find_dataset("cosqa", options.data), "dev")
    queries = random.Random(SEED).sample(sorted(dev.queries.values()), BATCH)
    two_pass = TwoPass(model, folder, options.device, options.budget)
    figures = {}
    header = (
        "",
        "n",
        "tokens",
        "ours/s",
        "peer/s",
        "ratio (min-max) ",
        "goal      ",
        "same text",
        "max cosine distance",
    )
    table = Table("reasoned queries per second; peer: generate, then encode again", *header)
    for size, texts in ((1, queries[: options.queries]), (BATCH, queries)):
        name = f"batch {size}"

        def ours(texts: list[str] = texts, size: int = size) -> list[Any]:
            return model.reason(texts, max_reasoning_tokens=options.budget, batch_size=size, show_progress_bar=False)

        def theirs(texts: list[str] = texts, size: int = size) -> list[tuple[list[int], np.ndarray]]:
            return two_pass(texts, size)

        own, other = ours(), theirs()
        same = [mine.token_ids == ids for mine, (ids, _) in zip(own, other, strict=True)]
        distances = [1 - float(a.embedding @ b) for a, (_, b), s in zip(own, other, same, strict=True) if s]
        measured = side_by_side(ours, theirs, options.rounds, device=options.device, warmup=0)
        figures[name] = measured.figures() | {
            "queries": len(texts),
            "mean_analysis_tokens": round(float(np.mean([r.num_tokens for r in own])), 1),
            "forced": sum(r.forced for r in own),
            "ours_per_second": round(len(texts) / measured.ours_seconds, 3),
            "peer_per_second": round(len(texts) / measured.peer_seconds, 3),
            "same_analysis": sum(same),
            "largest_cosine_distance": max(distances, default=float("nan")),
            "goal": GOALS[name],
        }
        cells = speeds(measured, len(texts), GOALS[name])
        agreement = [f"{sum(same)}/{len(same)}", f"{max(distances, default=float('nan')):.0e}"]
        table.row(name, str(len(texts)), f"{figures[name]['mean_analysis_tokens']}", *cells, *agreement)
    return figures


class TwoPass:
    """The plain way: transformers' `generate` with left padding, then a pass over prompt, analysis and token."""

    def __init__(self, model: SearchR3, folder: Path, device: str, budget: int) -> None:
        from transformers import AutoModelForCausalLM

        self.template, self.tokenizer, self.budget = model.templates["reasoning"], model.tokenizer, budget
        self.embed_id = model.contract.embed_token_id
        self.stops = {self.embed_id, *stop_ids(model.checkpoint.model, model.tokenizer)}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, model.dtype)).to(device).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str], batch_size: int) -> list[tuple[list[int], np.ndarray]]:
        """For each text: all token ids, and the unit state at the embed token."""
        prompts = [
            [*self.template.prefix, *ids, *self.template.suffix] for ids in encode_as_text(self.tokenizer, texts)
        ]
        out: dict[int, tuple[list[int], np.ndarray]] = {}
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids_BL, mask_BL = self._left_padded([prompts[i] for i in chosen])
            written_BL = self.model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                max_new_tokens=self.budget,
                do_sample=False,
                eos_token_id=sorted(self.stops),
                pad_token_id=self.tokenizer.pad_token_id or 0,
            )[:, ids_BL.shape[1] :].tolist()
            analyses = [self._analysis(written) for written in written_BL]
            rows = [[*prompts[i], *new, self.embed_id] for i, new in zip(chosen, analyses, strict=True)]
            ids_BL, mask_BL = self._left_padded(rows)
            position_BL = (mask_BL.cumsum(-1) - 1).clamp_min(0)
            hidden_BLD = self.model.model(
                input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_BL
            ).last_hidden_state
            state_BD = torch.nn.functional.normalize(hidden_BLD[:, -1].float(), dim=-1).cpu().numpy()
            out.update(zip(chosen, zip(rows, state_BD, strict=True), strict=True))
        return [out[i] for i in range(len(prompts))]

    def _analysis(self, written: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(written) if token in self.stops), len(written))
        return written[:end]

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest, device = max(map(len, rows)), self.model.device
        ids_BL = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        mask_BL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids_BL, mask_BL


def speeds(measured: Comparison, count: int, goal: float) -> list[str]:
    """Cells of a row: ours, peer, ratio with its range, goal."""
    ours, peer = count / measured.ours_seconds, count / measured.peer_seconds
    ratio = f"{measured.ratio:.2f} ({measured.ratio_min:.2f}-{measured.ratio_max:.2f})"
    return [f"{ours:.2f}", f"{peer:.2f}", ratio, f"{goal:.1f} {'met' if measured.ratio >= goal else 'missed'}"]


if __name__ == "__main__":
    main()
