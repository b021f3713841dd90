"""The two systems of benchmarks/sft.py, each of which runs in a worker: our stage 1 step, and sentence-transformers'.

The peer follows its documentation: https://sbert.net/docs/package_reference/sentence_transformer/losses.html
(CachedMultipleNegativesRankingLoss, after GradCache, arXiv 2101.06983) and its guide to training with PEFT adapters.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from common import give_memory_back, peak_memory

from search_r3.data.pairs import TrainingPair, read_pairs

SEED = 0


@dataclass(frozen=True)
class Spec:
    """What a worker runs; it goes to it as JSON."""

    system: str
    """"ours" or "peer"."""
    model: str
    """The base as this project names it."""
    folder: str
    """The same weights and tokenizer with the embed token, for the peer."""
    pairs: str
    """JSONL of pairs in the order in which batches are cut from it, round and round."""
    global_batch_size: int
    chunk: int
    """Rows of a backbone call: our `mini_batch_size`, the peer's `mini_batch_size`."""
    activation_checkpointing: bool
    attention: str
    device: str
    bf16: bool
    """Autocast; the weights are float32 either way."""
    query_tokens: int
    document_tokens: int
    threads: int | None


class Ours:
    """A stage 1 step: `SFTTask` with InfoNCE alone, query to document, on the direct conversation."""

    def __init__(self, spec: Spec, pairs: list[TrainingPair]) -> None:
        import torch

        from search_r3.model import checkpoint as checkpoints
        from search_r3.training.sft.sft_config import LossWeights, SFTConfig
        from search_r3.training.sft.sft_task import SFTTask

        config = SFTConfig(
            pairs=[spec.pairs],
            output="unused",
            base=spec.model,
            global_batch_size=spec.global_batch_size,
            batch_sampler="any",
            max_query_tokens=spec.query_tokens,
            max_document_tokens=spec.document_tokens,
            reasoning_ratio=0.0,
            symmetric=False,
            weights=LossWeights(sft=0.0, kl=0.0, infonce=1.0, triplet=0.0),
            activation_checkpointing=spec.activation_checkpointing,
            mini_batch_size=spec.chunk,
            dev=[],
        )
        checkpoint = checkpoints.load_base(spec.model, dtype=torch.float32)
        checkpoint.model.set_attn_implementation(spec.attention)
        torch.manual_seed(SEED)  # LoRA's first weights
        self.task = SFTTask(config, checkpoint, pairs)
        self.task.collator.sampler = InOrder(pairs, spec.global_batch_size)  # type: ignore[assignment]
        self.module = self.task.module.to(spec.device)
        self.spec, self.lora, self.loop, self.temperature = spec, config.lora, config.loop, config.temperature
        fused = getattr(self.task.policy, "_runs_fused", None)  # where the policy has a fused decoder of its own
        self.about = {"fused_decoder": bool(fused and fused(torch.device(spec.device)))}

    def loss(self, number: int) -> Any:
        """The loss of batch `number`, with its graph."""
        import torch

        batch = self.task.batch(number)
        autocast = torch.autocast(torch.device(self.spec.device).type, torch.bfloat16)
        with autocast if self.spec.bf16 else nullcontext():
            return self.task.compute_loss(self.module, batch)[0]

    def tokens(self, number: int) -> list[list[int]]:
        """The token ids of batch `number`, queries then documents, each with its prefix."""
        parts = self.task.batch(number).parts
        return [[*parts[name].prefix, *row] for name in ("query", "document") for row in parts[name].rows]


class Peer:
    """sentence-transformers as its documentation trains a LoRA: `add_adapter`, cached loss; autocast on the forward."""

    def __init__(self, spec: Spec, pairs: list[TrainingPair]) -> None:
        import torch
        from peft import LoraConfig, TaskType
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        from search_r3.prompts import Prompts, render
        from search_r3.training.sft.sft_config import SFTConfig

        defaults = SFTConfig(pairs=[spec.pairs], output="unused")
        self.spec, self.lora, self.loop, self.temperature = spec, defaults.lora, defaults.loop, defaults.temperature
        options = {"dtype": torch.float32, "attn_implementation": spec.attention}
        backbone = Transformer(spec.folder, model_kwargs=options)
        backbone.model.config.use_cache = False  # keys and values are not used
        pooling = Pooling(backbone.model.config.hidden_size, pooling_mode="lasttoken")
        self.module = SentenceTransformer(modules=[backbone, pooling, Normalize()], device="cpu")
        torch.manual_seed(SEED)  # LoRA's first weights, the same as ours
        self.module.add_adapter(
            LoraConfig(
                r=self.lora.rank,
                lora_alpha=self.lora.alpha,
                lora_dropout=self.lora.dropout,
                target_modules=self.lora.target_modules,
                task_type=TaskType.FEATURE_EXTRACTION,
            )
        )
        self.module.to(spec.device)
        if spec.bf16:  # as accelerate wraps it for the trainer: the second forward runs inside the backward pass
            autocast = torch.autocast(torch.device(spec.device).type, torch.bfloat16)
            self.module.forward = autocast(self.module.forward)  # type: ignore[method-assign]
        self.criterion = CachedMultipleNegativesRankingLoss(
            self.module, scale=1 / self.temperature, mini_batch_size=spec.chunk
        )
        self.tokenizer, self.batches = backbone.tokenizer, InOrder(pairs, spec.global_batch_size)
        prompts = Prompts()
        self.about: dict[str, Any] = {}
        self.templates = [render(c, self.tokenizer, give_answer=True) for c in (prompts.query, prompts.document)]

    def columns(self, number: int) -> list[list[list[int]]]:
        """Token ids of the queries and of the documents of batch `number`: the whole conversations."""
        from search_r3.model.searchr3 import encode_as_text

        pairs = self.batches.batch(number)
        texts = [[pair.query for pair in pairs], [pair.positive for pair in pairs]]
        limits = (self.spec.query_tokens, self.spec.document_tokens)
        return [
            [[*template.prefix, *ids[:limit], *template.suffix] for ids in encode_as_text(self.tokenizer, column)]
            for template, column, limit in zip(self.templates, texts, limits, strict=True)
        ]

    def loss(self, number: int) -> Any:
        """The loss of batch `number`; its backward pass runs the cached one."""
        import torch

        features = []
        for rows in self.columns(number):
            longest = max(map(len, rows))
            padded = {
                "input_ids": [row + [0] * (longest - len(row)) for row in rows],
                "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
            }
            features.append({key: torch.tensor(value).to(self.spec.device) for key, value in padded.items()})
        return self.criterion(features, torch.empty(0))

    def tokens(self, number: int) -> list[list[int]]:
        """The token ids of batch `number`, queries then documents."""
        return [row for column in self.columns(number) for row in column]


class InOrder:
    """In the place of stage 1's sampler: batches as the file has them, so that all sizes see the same texts."""

    def __init__(self, pairs: list[TrainingPair], size: int) -> None:
        self.batches = [pairs[i : i + size] for i in range(0, len(pairs) - size + 1, size)]

    def batch(self, number: int) -> list[TrainingPair]:
        """The pairs of batch `number`; after the last comes the first."""
        return self.batches[number % len(self.batches)]


def load(spec: Spec) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """Load a system; returns what it says of itself, and the function that answers "first N", "step N", "peak"."""
    import torch

    if spec.threads:
        torch.set_num_threads(spec.threads)
    pairs = read_pairs(spec.pairs)
    system: Ours | Peer = Ours(spec, pairs) if spec.system == "ours" else Peer(spec, pairs)
    system.module.train()
    trained = {name: p for name, p in system.module.named_parameters() if p.requires_grad}
    parameters, lora = list(trained.values()), [p for name, p in trained.items() if "lora_" in name]
    loop = system.loop
    optimizer = torch.optim.AdamW(parameters, lr=loop.learning_rate, betas=loop.betas, weight_decay=loop.weight_decay)
    on_gpu = spec.device.startswith("cuda")

    def step(number: int, looking: bool) -> dict[str, Any]:
        """From texts to new weights, as the training loop does it; `looking` measures the gradient before clipping."""
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = system.loss(number)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in lora if p.grad is not None]).norm().item() if looking else None
        torch.nn.utils.clip_grad_norm_(parameters, loop.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if on_gpu:
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "loss": value, "gradient_norm": norm}

    def answer(line: str) -> dict[str, Any]:
        command, _, number = line.partition(" ")
        if command == "peak":
            return {"peak_bytes": peak_memory(spec.device)}
        found = step(int(number), looking=command == "first")
        give_memory_back(spec.device)
        if command == "first":
            rows = system.tokens(int(number))
            found["tokens"] = sum(map(len, rows))
            found["tokens_sha256"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return found

    about = system.about | {
        "activation_checkpointing": spec.activation_checkpointing,
        "lora_parameters": sum(p.numel() for p in lora),
        "other_parameters": sum(p.numel() for p in parameters) - sum(p.numel() for p in lora),
        "threads": torch.get_num_threads(),
        "loaded_peak_bytes": peak_memory(spec.device),
    }
    return about, answer
