"""Records what a corpus's embeddings were at a run's checkpoints: the folder that `environment.py` replays.

A stage 2 run, its own documents, queries and batches (train it with `loop.checkpoint_every=4
loop.keep_checkpoints=1000`, which change no weight: by default a run keeps its last two checkpoints):

    python benchmarks/environment_record.py build/recording --recipe configs/grpo/cpu.yaml --documents 3000

A stage 1 run, or adapters in the order given, over a BEIR set; which queries were trained on when is then not known:

    python benchmarks/environment_record.py build/recording --recipe configs/sft/cpu.yaml --beir scifact --split train
    python benchmarks/environment_record.py build/recording --adapters runs/a runs/b runs/c --beir scifact

One pass over the documents for each checkpoint; a killed recording goes on where it stopped with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from common import say
from environment_recording import FACTS, begin, frame_path, write

from search_r3 import SearchR3
from search_r3.data.dev_pools import dev_pool
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.training.config import load_config
from search_r3.training.grpo.dataset import Query, QueryOrder, RLDataset, load_rl_dataset
from search_r3.training.grpo.grpo_config import GRPOConfig, QuerySet, Source
from search_r3.training.grpo.grpo_task import load_stage_one
from search_r3.training.grpo.rollout_engines import EngineRollouts
from search_r3.training.lora.live_encoder import LiveEncoder
from search_r3.training.lora.policy import Policy, add_lora
from search_r3.training.precision import resolve_mixed_precision
from search_r3.training.run_checkpoint import list_checkpoints, read_checkpoint, restore, trainable
from search_r3.training.sft.sft_config import SFTConfig

DEV = 64
"""Queries that are never trained on; the environment's staleness evaluation has as many."""


def main(argv: list[str] | None = None) -> None:
    """Record what is not recorded yet."""
    options = parse(argv)
    try:
        record(options)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the recording's folder")
    parser.add_argument("--recipe", help="of the run, of stage 1 or 2")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="section.key=value, as the run had")
    parser.add_argument("--adapters", nargs="+", help="adapters, oldest first, instead of a run's checkpoints")
    parser.add_argument("--beir", help="documents and queries: a BEIR set (a stage 2 run has its own)")
    parser.add_argument("--split", default="train", help="its queries")
    parser.add_argument("--data", help="BEIR data root (default: SEARCH_R3_DATA, then the cache folder)")
    parser.add_argument("--documents", type=int, help="at most; all positives are among them")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens kept of a document; a recipe says its own")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th checkpoint")
    parser.add_argument("--queries", type=int, default=32, help="of each stretch between two checkpoints, at most")
    parser.add_argument("--rollouts", type=int, default=0, help="sampled for each of them; 0: its direct embedding")
    parser.add_argument("--budget", type=int, default=24, help="tokens of a rollout's reasoning; a recipe has its own")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def record(options: argparse.Namespace) -> None:
    """Encode documents and queries at every checkpoint that has no file yet."""
    config = read_recipe(options)
    if config is None and not options.adapters:
        raise InputError("say what was trained: give --recipe or --adapters")
    dataset = dataset_of(config, options)
    encoders = adapters(options) if options.adapters else run_checkpoints(config, options)
    if isinstance(config, GRPOConfig) and not options.adapters and not options.beir:
        dataset = trained_on(dataset, Path(config.output))
    steps, open_at = encoders
    if len(steps) < 2:
        raise InputError(f"found {len(steps)} checkpoint(s) to record, 2 or more are needed")
    batches = batches_of(config, dataset, steps, options)
    used = sorted({number for batch in batches for number in batch})
    queries: list[Query] = [dataset.train[number] for number in used] + dataset.held_out[:DEV]
    place = {number: i for i, number in enumerate(used)}
    max_tokens = getattr(config, "max_document_tokens", options.max_tokens)
    names = [options.beir] if options.beir else [source.name for source in getattr(config, "corpus", [])]
    facts = {
        "source": Path(options.recipe).stem if options.recipe else "adapters",
        "steps": steps,
        "corpus": [Path(name).name for name in names],
        "dataset_sha256": dataset.sha256,
        "known_batches": isinstance(config, GRPOConfig),
        "rollouts_per_query": options.rollouts,
        "max_document_tokens": max_tokens,
    }
    dev = range(len(used), len(queries))
    begin(options.output, documents=len(dataset.documents), grades=[q.grades for q in queries], dev=dev, **facts)
    say(f"{len(dataset.documents):,} documents, {len(queries)} queries, {len(steps)} checkpoints")
    for number, step in enumerate(steps):
        if frame_path(options.output, step).exists():
            continue
        begun = time.perf_counter()
        encoder = open_at(step)
        loaded = time.perf_counter()
        documents = encoder.encode_document(
            dataset.documents, max_length=max_tokens, batch_size=64, show_progress_bar=False
        )
        per_second = len(documents) / (time.perf_counter() - loaded)
        direct = encoder.encode_query([q.text for q in queries], reasoning=False, show_progress_bar=False)
        batch = [place[i] for i in batches[number]]
        tensors = {
            "documents": torch.from_numpy(documents),
            "queries": torch.from_numpy(direct),
            "batch": torch.tensor(batch, dtype=torch.int64),
            "documents_per_second": torch.tensor(per_second),
        }
        if options.rollouts and batch:
            tensors |= rollouts_of(encoder, queries, batch, config, options, step)
        write(options.output, step, tensors)
        say(f"step {step} ({number + 1} of {len(steps)}): {time.perf_counter() - begun:.0f} s")
    say(f"{len(steps)} checkpoints recorded in {options.output / FACTS}")


def read_recipe(options: argparse.Namespace) -> GRPOConfig | SFTConfig | None:
    """The run's recipe, of whichever stage it is."""
    if not options.recipe:
        return None
    try:
        keys = yaml.safe_load(Path(options.recipe).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{options.recipe} cannot be read as a recipe ({error})") from error
    kind: Any = GRPOConfig if "adapter" in keys else SFTConfig
    return load_config(options.recipe, kind, options.overrides)


def dataset_of(config: Any, options: argparse.Namespace) -> RLDataset:
    """Documents and queries: the stage 2 run's own, or those of a BEIR set, every eighth query being dev."""
    if isinstance(config, GRPOConfig) and not options.beir:
        root = options.data or config.data_root
        limits = [n for n in (config.max_documents, options.documents) if n is not None]
        pools = [dev_pool(name, root, config.dev_queries, config.dev_documents, 0) for name in config.dev]
        config = dataclasses.replace(config, max_documents=min(limits, default=None), data_root=root)
        return load_rl_dataset(config, {text for pool in pools for text in pool.queries.values()})
    if not options.beir:
        raise InputError("a stage 1 run has no corpus to search: say which with --beir")
    return load_rl_dataset(
        GRPOConfig(
            adapter="",
            queries=[QuerySet(beir=options.beir, split=options.split, hold_out_modulus=8)],
            corpus=[Source(beir=options.beir)],
            output="",
            max_documents=options.documents,
            data_root=options.data,
        )
    )


def trained_on(dataset: RLDataset, output: Path) -> RLDataset:
    """The dataset with the queries that a run of stage 2 trains on: a recipe may leave out those at other ranks."""
    kept = read_checkpoint(list_checkpoints(output)[0][1]).task.get("kept")
    return dataset if kept is None else dataclasses.replace(dataset, train=[dataset.train[i] for i in kept])


def batches_of(config: Any, dataset: RLDataset, steps: list[int], options: argparse.Namespace) -> list[list[int]]:
    """For each checkpoint queries trained on from there to the next: the run's own, or any where they are not known.

    The last checkpoint's are those of a stretch as long as the one before.
    """
    found = []
    own = isinstance(config, GRPOConfig) and not options.beir
    size = config.queries_per_step if own else min(8, len(dataset.train))
    order = QueryOrder(len(dataset.train), size, config.loop.seed if own else 0)
    for number, step in enumerate(steps):
        after = steps[number + 1] if number + 1 < len(steps) else 2 * step - steps[number - 1]
        stride = config.steps_per_generation if own else 1
        rounds = range(step // stride, max(step // stride + 1, after // stride)) if own else range(number, number + 1)
        chosen = list(dict.fromkeys(query for r in rounds for query in order.batch(r)))
        keep = torch.linspace(0, len(chosen) - 1, min(len(chosen), options.queries)).long().tolist()
        found.append([chosen[i] for i in keep])
    return found


def adapters(options: argparse.Namespace) -> tuple[list[int], Any]:
    """(0, 1, ... for the adapters, a function that loads one)."""
    folders = options.adapters[:: options.every]

    def open_at(step: int) -> SearchR3:
        return SearchR3.from_pretrained(folders[step], device=options.device)

    return list(range(len(folders))), open_at


def run_checkpoints(config: Any, options: argparse.Namespace) -> tuple[list[int], Any]:
    """(0 and the steps of the run's checkpoints, a function that gives the model of one)."""
    output = Path(config.output)
    paths = dict(list_checkpoints(output)[options.every - 1 :: options.every])
    if not paths:
        raise InputError(f"{output} has no checkpoints; train with loop.checkpoint_every and loop.keep_checkpoints")
    models = _models(config, paths, options.device)
    next(models)
    return [0, *(step for step in paths if step > 0)], models.send


def _models(config: Any, paths: dict[int, Path], device: str) -> Iterator[Any]:
    """A coroutine: sent a step, it yields the model with that checkpoint's weights (before training for step 0)."""
    step = yield None
    if isinstance(config, GRPOConfig):
        loaded = load_stage_one(config.adapter)[0]
    elif config.init_adapter:
        loaded = checkpoints.load(config.init_adapter, dtype=torch.float32, merge=False)
    else:
        loaded = checkpoints.load_base(config.base, dtype=torch.float32)
    torch.manual_seed(config.loop.seed)  # as the trainers do, before the adapter's own initialization
    model = loaded.model if hasattr(loaded.model, "peft_config") else add_lora(loaded, config.lora)
    policy = Policy(model, loaded.contract.embed_token_id, vocab_size=len(loaded.tokenizer)).to(device)
    bf16 = resolve_mixed_precision(config.loop.mixed_precision, torch.device(device)) == "bf16"
    live = LiveEncoder(policy, loaded, torch.bfloat16 if bf16 else torch.float32)
    untrained = {name: p.detach().clone() for name, p in trainable(policy).items()}
    while True:
        if step in paths:
            state = read_checkpoint(paths[step])
            parameters = trainable(policy)
            restore(parameters, torch.optim.AdamW(parameters.values()), state)
        else:
            with torch.no_grad():
                for name, parameter in trainable(policy).items():
                    parameter.copy_(untrained[name])
        step = yield live.sync()


def rollouts_of(
    encoder: SearchR3, queries: list[Query], batch: list[int], config: Any, options: argparse.Namespace, step: int
) -> dict[str, torch.Tensor]:
    """Embeddings of sampled reasoning traces of each query of the batch."""
    engine = EngineRollouts()
    engine.sync(encoder)
    sampled = engine.sample(
        [queries[i].text for i in batch],
        options.rollouts,
        max_tokens=getattr(config, "max_reasoning_tokens", options.budget),
        max_query_tokens=getattr(config, "max_query_tokens", 48),
        temperature=config.temperature if isinstance(config, GRPOConfig) else 1.0,
        seed=step,
    )
    return {
        "rollouts": torch.stack([torch.from_numpy(rollout.embedding).float() for rollout in sampled]),
        "rollout_queries": torch.tensor(batch).repeat_interleave(options.rollouts),
    }


if __name__ == "__main__":
    main()
