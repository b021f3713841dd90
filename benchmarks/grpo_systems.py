"""What benchmarks/grpo.py times, each in a worker: our stage 2 step as the loop takes it, and what both sides share.

Time is taken by part, with the same clock on both sides. The peer is in grpo_peer.py.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_r3.data.pairs import read_pairs

SEED = 0
PARTS = ("sample", "embed", "sync", "refresh", "reward", "forward_backward", "other")
"""Writing the rollouts; embedding them where that is not done by then; bringing the merged copy's weights up to date;
re-encoding documents; searching, relinking and rewarding; the policy's and the reference's passes; the rest."""
SHAKE = 0.01
"""Standard deviation of LoRA's B when losses are compared: at 0, where it starts, no log-probability would matter."""


@dataclass(frozen=True)
class Spec:
    """What a worker runs; it goes to it as JSON."""

    system: str
    """"ours" or "peer"."""
    recipe: str
    """A stage 2 recipe."""
    settings: list[str]
    """What is set over it, as `--set` takes it: the same for all systems but for the contrastive term."""
    adapter: str
    """Stage 1, for ours."""
    merged: str
    """The same, merged, for the peer."""
    pairs: str
    """JSONL of pairs: row i's positive is document i, which answers query i."""
    vectors: str
    """The documents' embeddings by stage 1, a .npy file."""
    device: str
    attention: str
    precision: str
    """"float32"; "autocast": bfloat16 products of float32 weights; the peer's also "bfloat16": frozen weights too."""
    peer_rows: int
    """Rollouts of one forward pass of the peer's; further ones are accumulated."""
    peer_row: bool
    """The peer trains the embed token's row too, as ours does."""
    scratch: str
    """A folder that is removed at the end."""
    batches: int
    """How many batches of queries the peer's data set holds; it starts over after them."""
    threads: int | None


class Parts:
    """Seconds of a step by part. A GPU is waited for at every border."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._begun = 0.0

    def now(self) -> float:
        """The clock, when the device has done all it was asked."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        """A step begins."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._begun = self.now()

    def end(self) -> dict[str, Any]:
        """The step is over: its seconds, and those of each part."""
        total = self.now() - self._begun
        self.seconds["other"] = total - sum(seconds for part, seconds in self.seconds.items() if part != "other")
        return {"seconds": total, "parts": dict(self.seconds)}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[part] += self.now() - start

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `part`."""

        def run(*args: Any, **more: Any) -> Any:
            with self(part):
                return function(*args, **more)

        return run

    def scoring(self, score: Callable[..., Any]) -> Callable[..., Any]:
        """`RetrievalEnvironment.score`, what it re-encodes counted apart from the rest."""

        def run(*args: Any, **more: Any) -> Any:
            with self("reward"):
                found = score(*args, **more)
            self.seconds["reward"] -= found.seconds["encode"]
            self.seconds["refresh"] += found.seconds["encode"]
            return found

        return run


class Ours:
    """`GRPOTask` and around it a step of `run_training` in one process: seeds, rate, clipping, optimizer."""

    def __init__(self, spec: Spec) -> None:
        import torch

        from search_r3.training.grpo.grpo_task import GRPOTask, load_stage_one

        config = config_of(spec)
        checkpoint, first = load_stage_one(spec.adapter)
        checkpoint.model.set_attn_implementation(spec.attention)
        torch.manual_seed(SEED)
        self.task = GRPOTask(config, checkpoint, first, dataset_of(spec.pairs))
        self.model, self.module = self.task.policy.model, self.task.module.to(spec.device)
        self.spec, self.config, self.parts = spec, config, Parts(spec.device)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        loop = config.loop
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=loop.learning_rate, betas=loop.betas, weight_decay=loop.weight_decay
        )
        environment = environment_of(spec, config)
        environment.score = self.parts.scoring(environment.score)  # type: ignore[method-assign]
        self.task.live.environment = environment
        engine, live = self.task.engine, self.task.live.encoder
        self.rollouts: list[Any] = []
        sample = self.parts.timed("sample", engine.sample)

        def kept(*args: Any, **more: Any) -> Any:
            self.rollouts = sample(*args, **more)
            return self.rollouts

        engine.sample = kept  # type: ignore[method-assign]
        live.sync = self.parts.timed("sync", live.sync)  # type: ignore[method-assign]
        self.about = {"fused_decoder": bool(self.task.policy._runs_fused(torch.device(spec.device)))}

    def training_step(self, number: int, learn: bool = True) -> tuple[Any, dict[str, float]]:
        """The loss of a step and its figures; with its gradients if it is to `learn`."""
        import torch

        device = torch.device(self.spec.device).type

        def backward(loss: Any) -> None:
            if learn:
                with torch.autocast(device, enabled=False):
                    loss.backward()

        autocast = torch.autocast(device, torch.bfloat16)
        with autocast if self.spec.precision != "float32" else nullcontext():
            return self.task.training_step(self.module, number, backward)

    def step(self, number: int) -> dict[str, Any]:
        """From the step's number to new weights, as `run_training` does it."""
        import torch

        from search_r3.training.schedule import learning_rate_at, seed_step

        loop = self.config.loop
        self.parts.begin()
        seed_step(loop.seed, number, 0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(number, loop)
        self.module.train()
        begun: list[float] = []  # the forward pass comes after sampling and scoring
        hook = self.module.register_forward_pre_hook(lambda *_: begun.append(self.parts.now()))
        loss, _ = self.training_step(number)
        hook.remove()
        self.parts.seconds["forward_backward"] += self.parts.now() - begun[0]
        torch.nn.utils.clip_grad_norm_(self.trained, loop.max_grad_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        taken = self.parts.end()
        return taken | {"loss": value, **lengths_of(r.token_ids for r in self.rollouts)}

    def compare(self, _: dict[str, Any] | None) -> dict[str, Any]:
        """Sample the first batch, and what our loss is on it with drawn rewards and shaken weights."""
        import torch

        from search_r3.training.grpo.policy_gradient import advantages

        config, embed = self.config, self.task.checkpoint.contract.embed_token_id
        self.module.train()
        self.training_step(0, learn=False)
        rollouts = self.task.rollouts.rollouts
        rewards = np.random.default_rng(SEED).normal(size=len(rollouts)).round(4)
        groups = torch.arange(len(rewards)) // config.num_generations
        drawn = advantages(rewards, groups, config.advantage_estimator, config.scale_rewards)
        completions = []
        for rollout, advantage in zip(rollouts, drawn.tolist(), strict=True):
            rollout.advantage = advantage
            ids, sampled = rollout.sampled_ids(embed)
            completions.append([token for token, one in zip(ids, sampled, strict=True) if one])
        with shaken(self.model):
            loss, figures = self.training_step(0)  # of the same rollouts
            norms = gradient_norms(self.model)
        return {
            "loss": loss.item(),
            "kl": figures["kl_reference"],
            "entropy": figures["entropy"],
            **norms,
            "emitted": sum(not rollout.forced for rollout in rollouts),
            **fingerprint([[*self.task.prefix, *r.prompt_ids] for r in rollouts], completions),
            "given": {
                "completions": completions,
                "rewards": rewards.tolist(),
                "embeddings": [r.embedding.astype(float).round(6).tolist() for r in rollouts],
            },
        }


def config_of(spec: Spec) -> Any:
    """The recipe with its settings."""
    from search_r3.training.config import load_config
    from search_r3.training.grpo.grpo_config import GRPOConfig

    return load_config(spec.recipe, GRPOConfig, spec.settings)


def dataset_of(path: str) -> Any:
    """Queries and documents of a file of pairs: document i answers query i."""
    from search_r3.training.grpo.dataset import Query, RLDataset

    pairs = list(read_pairs(path))
    queries = [Query(pair.id, pair.query, {row: 1.0}) for row, pair in enumerate(pairs)]
    return RLDataset([pair.positive for pair in pairs], queries, [])


def batches_of(config: Any, queries: int, count: int) -> list[int]:
    """The queries of the first `count` batches, as stage 2 shuffles them."""
    from search_r3.training.grpo.dataset import QueryOrder

    order = QueryOrder(queries, config.queries_per_step, config.loop.seed)
    return [row for number in range(count) for row in order.batch(number)]


def environment_of(spec: Spec, config: Any) -> Any:
    """The environment around vectors that stage 1 has made; its own graph."""
    import torch

    from search_r3.environment.live_corpus import LiveCorpus
    from search_r3.environment.retrieval import RetrievalEnvironment

    vectors = np.load(spec.vectors)
    dtype = torch.bfloat16 if spec.device.startswith("cuda") else torch.float32
    corpus = LiveCorpus(len(vectors), vectors.shape[1], dtype=dtype, device=spec.device)
    corpus.update(np.arange(len(vectors)), vectors, 0)
    return RetrievalEnvironment(corpus, config.environment, seed=config.loop.seed)


@contextmanager
def shaken(model: Any) -> Iterator[None]:
    """LoRA weights of a PEFT model that are no longer 0, the same in every worker; as they were afterwards."""
    import torch

    lora = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad and "lora_" in name)
    before = [p.detach().clone() for _, p in lora]
    draws = torch.Generator().manual_seed(SEED)
    try:
        with torch.no_grad():
            for name, p in lora:
                scale = SHAKE if "lora_B" in name else p.shape[1] ** -0.5
                p.copy_(scale * torch.randn(p.shape, generator=draws))
        yield
    finally:
        with torch.no_grad():
            for (_, p), old in zip(lora, before, strict=True):
                p.copy_(old)
        for p in model.parameters():
            p.grad = None


def gradient_norms(model: Any) -> dict[str, float]:
    """Of LoRA's weights, and of the embed token's row."""
    import torch

    norms: dict[str, list[Any]] = {"gradient_norm": [], "row_gradient_norm": []}
    for name, p in model.named_parameters():
        if p.grad is not None:
            norms["gradient_norm" if "lora_" in name else "row_gradient_norm"].append(p.grad.norm())
    return {name: torch.stack(found).norm().item() if found else 0.0 for name, found in norms.items()}


def fingerprint(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Any]:
    """The token ids of prompts and completions, in short."""
    rows = [*prompts, *completions]
    return {
        "tokens": sum(map(len, rows)),
        "tokens_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def lengths_of(traces: Any) -> dict[str, int]:
    """How many rollouts a step had, and how many tokens they have together, the embed token left out."""
    lengths = [len(ids) for ids in traces]
    return {"rollouts": len(lengths), "rollout_tokens": sum(lengths)}
