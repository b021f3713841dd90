"""A dry run of a recipe: one step of a randomly initialized model cut to two layers, and an estimate of the memory.

The step goes through the loop, the task and its loss as in a real run, on made-up texts of the recipe's maximum
lengths. It uses the code path of a GPU (transformers' own decoder) on whatever device is available; on a CPU in
float32, unless the recipe sets bf16. The memory of the whole model is computed by the formula in `memory_estimate`; for
the small step, the formula's result is reported next to the measured one.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from search_r3.data.mining.teacher import key_of
from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError
from search_r3.files import expand_user
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import VOCABULARY_MULTIPLE, Checkpoint
from search_r3.model.resolve import find_adapter
from search_r3.prompts import ReadingConversation, latent_conversation, reading_conversation, render, with_reading
from search_r3.training.config import LoraSettings, load_config
from search_r3.training.grpo.dataset import Query, RLDataset
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.grpo_task import GRPOTask
from search_r3.training.loop import run_training
from search_r3.training.lora.live_encoder import COPIED_PARAMETERS
from search_r3.training.lora.policy import add_lora
from search_r3.training.planning import memory_estimate
from search_r3.training.planning.architectures import Architecture, architecture_of, random_model
from search_r3.training.planning.memory_estimate import Conditions, Part, Shape
from search_r3.training.planning.peak_memory import peak_memory
from search_r3.training.sft.contrastive import document_key
from search_r3.training.sft.fixed_documents import FixedDocuments
from search_r3.training.sft.in_batch_lm import CONVERSATION
from search_r3.training.sft.sft_config import SFTConfig
from search_r3.training.sft.sft_task import SFTTask

Stage = Literal["sft", "grpo"]
LAYERS = 2
"""Number of layers of the model that is run."""
GPU_BYTES = 80e9
"""GPU memory that the report assumes: 80 GB."""
CPU_ROWS = 4
"""Without a GPU, the step has this many pairs (stage 1), or at most this many rollouts per query (stage 2)."""
DOCUMENTS = 32
"""Number of made-up documents in stage 2's environment."""


def dry_run(
    stage: Stage, recipe: str | Path, overrides: Sequence[str] = (), *, base: str | None = None, gpus: int = 1
) -> dict[str, Any]:
    """Check a recipe: run one step of a cut model, and estimate the memory of the whole model.

    Args:
        base: the model; by default the recipe's base (stage 1), or the base of its adapter (stage 2).
        gpus: the number of GPUs in the run.

    Returns:
        "stage", "base", "gpus"; "tokenizer" ("its own" or "a stand-in"); "parameters" {"total", "trainable", "rows" of
        the vocabulary}; "memory" in bytes per GPU, with "peak" and, for comparison, the peaks
        "with_activation_checkpointing" and "without_activation_checkpointing"; "host", bytes of host memory; "step"
        {"tokens", "rows", "rollouts"}, the maximum over all GPUs together; "trial_step" {"layers", "rows", "device",
        "seconds", "loss", "measured", "formula"}, the last two in bytes beyond the weights; "warnings".

    Raises:
        InputError: the recipe is invalid, or the architecture of its base is unknown.
    """
    config: SFTConfig | GRPOConfig
    config = load_config(recipe, SFTConfig, overrides) if stage == "sft" else load_config(recipe, GRPOConfig, overrides)
    if gpus < 1:
        raise InputError(f"--gpus must be 1 or more, got {gpus}")
    architecture = architecture_of(base or _base_of(config))
    full = random_model(architecture, None, "meta")
    shape = shape_of(full, config.lora)
    size = config.global_batch_size if isinstance(config, SFTConfig) else config.queries_per_step
    if gpus > size:
        raise InputError(f"--gpus is {gpus}, but a batch of {size} is too small for that many")
    parts, all_parts = conversations(config, full, gpus), conversations(config, full)
    conditions = conditions_of(config)
    report: dict[str, Any] = {
        "stage": stage,
        "base": architecture.name,
        "gpus": gpus,
        "tokenizer": "a stand-in" if architecture.stand_in else "its own",
        "parameters": {
            "total": shape.parameters,
            "trainable": shape.trainable,
            "rows": full.model.get_input_embeddings().weight.shape[0],
        },
    }
    memory = memory_of(config, shape, parts, conditions, gpus)
    report["host"] = memory.pop("host")
    report["memory"] = memory
    for name, enabled in (("with_activation_checkpointing", True), ("without_activation_checkpointing", False)):
        changed = replace(conditions, activation_checkpointing=enabled)
        memory[name] = memory_of(config, shape, parts, changed, gpus)["peak"]
    micro = config.loop.gradient_accumulation
    report["step"] = {
        "tokens": micro * sum(part.all_tokens for part in all_parts.values()),
        "rows": micro * sum(part.rows for part in all_parts.values()),
        "rollouts": config.queries_per_step * config.num_generations if isinstance(config, GRPOConfig) else 0,
    }
    report["warnings"] = warnings_of(config, architecture, full, parts, memory)
    report["trial_step"] = run_trial_step(config, architecture)
    return report


def run_trial_step(config: SFTConfig | GRPOConfig, architecture: Architecture) -> dict[str, Any]:
    """Run one optimizer step of the cut model; returns the "trial_step" of `dry_run`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.loop.seed)
    checkpoint = random_model(architecture, LAYERS, "cpu")
    checkpoint.model.set_attn_implementation(_attention(config))
    if isinstance(config, SFTConfig):
        checkpoint.model.to(getattr(torch, config.base_dtype))
    with tempfile.TemporaryDirectory(prefix="search-r3-dry-run-") as name:
        small = shrunk_recipe(config, Path(name), whole=device.type == "cuda")
        task = _sft_task(small, checkpoint) if isinstance(small, SFTConfig) else _grpo_task(small, checkpoint, name)
        task.policy.fused = False  # a GPU does not use the fused decoder
        # with random weights, all rollouts may have the same reward
        task.must_learn = False  # type: ignore[union-attr]
        losses: list[float] = []
        inner = task.training_step
        task.training_step = lambda *given: _record_loss(inner(*given), losses)  # type: ignore[method-assign]
        shape = shape_of(replace(checkpoint, model=task.policy.model), None)
        parts, conditions = conversations(small, checkpoint), conditions_of(small)
        started = time.perf_counter()
        with peak_memory(device) as peak:
            run_training(task, small.loop, Path(name) / "run", resume=False)
        seconds = time.perf_counter() - started
    formula = memory_of(small, shape, parts, conditions, 1)
    # On a GPU the loop moves the weights there within the measured block.
    moved = 0 if device.type == "cpu" else memory_estimate.weights(shape, conditions)
    return {
        "layers": shape.layers,
        "rows": sum(part.rows for part in parts.values()),
        "device": str(device),
        "seconds": seconds,
        "loss": losses[-1],
        "measured": peak.bytes - moved,
        "formula": formula["peak"] - formula["weights"],
    }


def shape_of(checkpoint: Checkpoint, lora: LoraSettings | None) -> Shape:
    """The sizes of a loaded (or "meta") model, after adding an adapter; `lora` is None if it already has one."""
    model = checkpoint.model if lora is None else add_lora(checkpoint, lora)
    plain = model.get_base_model()
    text = plain.config.get_text_config()
    trainable = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    ranks = [len(weight) for name, weight in trainable if ".lora_A." in name]
    frozen = {name: weight for name, weight in plain.named_parameters() if not weight.requires_grad}
    layers = plain.get_decoder().layers
    matrices = sum(w.numel() for w in layers.parameters() if w.dim() == 2 and not w.requires_grad)
    heads = text.num_attention_heads
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        width=text.intermediate_size,
        vocabulary=len(checkpoint.tokenizer),
        parameters=sum(weight.numel() for weight in frozen.values()),
        matrices=matrices,
        trainable=sum(weight.numel() for _, weight in trainable),
        rank=max(ranks, default=0),
    )


def conversations(config: SFTConfig | GRPOConfig, checkpoint: Checkpoint, gpus: int = 1) -> dict[str, Part]:
    """One GPU's share of a step's conversations, every row at the recipe's maximum length."""
    prompts, tokenizer = checkpoint.contract.prompts, checkpoint.tokenizer
    document = render(prompts.document, tokenizer, give_answer=True)
    query = render(prompts.query, tokenizer, give_answer=True)
    reasoning = render(prompts.reasoning, tokenizer, give_answer=False)
    if isinstance(config, GRPOConfig):
        rows = math.ceil(math.ceil(config.queries_per_step / gpus) * config.num_generations / config.num_mini_batches)
        answer = config.max_reasoning_tokens + 1
        length = config.max_query_tokens + len(reasoning.suffix) + answer
        if config.reading_ratio:
            length += _tokens_read(prompts.reading or reading_conversation(), tokenizer)
        return {"rollouts": Part(rows, length, len(reasoning.prefix), rows * answer)}
    pairs, logits = math.ceil(config.global_batch_size / gpus), bool(config.weights.sft or config.weights.kl)
    with_reasoning = math.ceil(config.reasoning_ratio * pairs)
    given = len(query.suffix) - len(render(prompts.query, tokenizer, give_answer=False).suffix)
    answer = config.max_reasoning_tokens + 1
    parts = {
        "document": Part(
            pairs * (config.positives_per_pair + config.negatives_per_pair),
            config.max_document_tokens + len(document.suffix),
            len(document.prefix),
        ),
        "query": Part(pairs, config.max_query_tokens + len(query.suffix), len(query.prefix), logits * pairs * given),
    }
    if config.documents == "fixed":
        del parts["document"]
    if with_reasoning:
        length = config.max_query_tokens + len(reasoning.suffix) + answer
        parts["reasoning"] = Part(with_reasoning, length, len(reasoning.prefix), logits * with_reasoning * answer)
    if config.weights.self_teaching:
        changed = math.ceil(min(1.0, sum(config.query_variants.values())) * pairs)
        parts["changed"] = Part(changed, config.max_query_tokens + len(query.suffix), len(query.prefix))
    if config.latent_steps:
        latent = render(latent_conversation(config.latent_steps), tokenizer, give_answer=True, embed_token=False)
        rows, length = math.ceil(config.latent_ratio * pairs), config.max_query_tokens + len(latent.suffix)
        passes = config.latent_steps + 1  # each runs the rows again; none of them is freed before the backward pass
        parts["latent"] = Part(rows * passes, length + config.latent_steps, len(latent.prefix))
    if config.reading_ratio:
        talk = reading_conversation(config.reading_passages, config.reading_passage_tokens)
        reading, read = render(talk, tokenizer, give_answer=True), _tokens_read(talk, tokenizer)
        rows = math.ceil(config.reading_ratio * pairs)
        length = config.max_query_tokens + read + len(reading.suffix)
        parts["reading"] = Part(rows, length, len(reading.prefix), logits * rows * given)
        if with_reasoning and config.reading_reasoning_ratio:
            parts["reasoning"] = replace(parts["reasoning"], tokens=parts["reasoning"].tokens + read)
    if config.weights.in_batch_lm:
        writing = render(CONVERSATION, tokenizer, give_answer=False)
        rows = math.ceil(config.in_batch_lm_queries * config.in_batch_lm_documents / gpus)
        length = config.max_document_tokens + len(writing.suffix) + config.max_query_tokens
        parts["in_batch_lm"] = Part(rows, length, len(writing.prefix), rows * config.max_query_tokens)
    return parts


def _tokens_read(conversation: ReadingConversation, tokenizer: Any) -> int:
    """The tokens that passages add to a query, at most."""
    marker = len(tokenizer.encode(conversation.marker_of(1), add_special_tokens=False))
    return conversation.passages * (conversation.passage_tokens + marker)


def conditions_of(config: SFTConfig | GRPOConfig) -> Conditions:
    """How a GPU computes the recipe's step."""
    stored = isinstance(config, GRPOConfig) and config.steps_per_generation > 1  # see `log_probs.store_log_probs`
    base = config.weights.kl > 0 if isinstance(config, SFTConfig) else config.beta > 0 and not stored
    return Conditions(
        chunk=config.mini_batch_size,
        activation_checkpointing=config.activation_checkpointing,
        autocast=config.loop.mixed_precision != "no",
        eager=_attention(config) == "eager",
        stage="sft" if isinstance(config, SFTConfig) else "grpo",
        base=base,
        weight=2 if isinstance(config, SFTConfig) and config.base_dtype == "bfloat16" else 4,
    )


def memory_of(
    config: SFTConfig | GRPOConfig, shape: Shape, parts: dict[str, Part], conditions: Conditions, gpus: int
) -> dict[str, int]:
    """Bytes by purpose for one GPU; "host" is the host's memory.

    "peak" is what stays allocated, plus the largest of three phases that never overlap: the step, the sampling, and
    merging the copy. Logits and the tensors of the backward pass do not overlap either, so the entries add up to more
    than the peak.
    """
    rows = list(parts.values())
    kept = memory_estimate.activations(shape, rows, conditions)
    out = {
        "weights": memory_estimate.weights(shape, conditions),
        "gradients": memory_estimate.gradients(shape, gpus),
        "optimizer": memory_estimate.optimizer(shape, config.loop.ema > 0),
        "activations": kept["layers"] + kept["backward"],
        "casts": kept["casts"],
        "logits": memory_estimate.logits(shape, rows, conditions),
        "live_copy": 0,
        "cache": 0,
        "environment": 0,
        "host": 0,
    }
    making = 0
    if isinstance(config, GRPOConfig) or config.dev or config.self_reasoning_ratio:
        out["live_copy"], making = memory_estimate.live_copy(shape, conditions, COPIED_PARAMETERS)
    value = conditions.operand if out["live_copy"] else conditions.weight
    if isinstance(config, GRPOConfig):
        part = parts["rollouts"]
        together = min(config.generation_batch_size, config.queries_per_step * config.num_generations)
        out["cache"] = memory_estimate.cache(shape, together, part.prefix + part.tokens, value)
        out["environment"], out["host"] = memory_estimate.environment(
            config.max_documents or DOCUMENTS,
            shape.hidden,
            4 if config.corpus_dtype == "float32" else 2,
            config.environment.graph_width,
        )
    elif config.self_reasoning_ratio and "reasoning" in parts:
        out["cache"] = memory_estimate.cache(shape, 64, parts["reasoning"].prefix + parts["reasoning"].tokens, value)
    stays = sum(out[name] for name in ("weights", "optimizer", "live_copy", "environment"))
    forward = kept["layers"] + kept["casts"] - kept["again"]
    step = out["gradients"] + forward + max(out["logits"], kept["again"] + kept["backward"])
    out["peak"] = stays + max(step, out["cache"], making - out["live_copy"])
    return out


def warnings_of(
    config: SFTConfig | GRPOConfig,
    architecture: Architecture,
    full: Checkpoint,
    parts: dict[str, Part],
    memory: dict[str, int],
) -> list[str]:
    """What to check before starting the run."""
    text, out = architecture.config.get_text_config(), []
    rows = full.model.get_input_embeddings().weight.shape[0]
    if text.vocab_size % VOCABULARY_MULTIPLE:
        out.append(
            f"the vocabulary of {text.vocab_size:,} rows is not a multiple of {VOCABULARY_MULTIPLE}; it is padded to "
            f"{rows:,}, also in a merged model"
        )
    longest = getattr(text, "max_position_embeddings", None) or math.inf
    for name, part in parts.items():
        if part.prefix + part.tokens > longest:
            out.append(
                f"a {name} row can have {part.prefix + part.tokens:,} tokens, but the model's context is "
                f"{longest:,}: lower the recipe's max_..._tokens"
            )
    if isinstance(config, GRPOConfig) and config.max_documents is None:
        out.append("max_documents is not set: the environment's memory depends on the corpus and is not counted")
    if memory["peak"] > GPU_BYTES:
        advice = "a smaller batch, shorter texts or a smaller base"
        if not config.activation_checkpointing and memory["with_activation_checkpointing"] <= GPU_BYTES:
            advice = "activation_checkpointing: true"
        gigabytes = f"about {memory['peak'] / 1e9:.0f} GB per GPU, more than {GPU_BYTES / 1e9:.0f} GB"
        out.append(f"{gigabytes}: try {advice}")
    return out


def shrunk_recipe(config: Any, folder: Path, whole: bool) -> Any:
    """The recipe reduced to one step in `folder`, which reads no data and writes only its final checkpoint.

    Args:
        whole: keep the batch size (on a GPU) instead of reducing it to `CPU_ROWS`.
    """
    precision = config.loop.mixed_precision
    if precision == "auto":
        precision = "bf16" if whole else "no"  # most CPUs emulate bf16
    loop = replace(
        config.loop, steps=1, evaluate_every=0, checkpoint_every=0, patience=0, time_limit_minutes=None,
        report_to="none",
        mixed_precision=precision, warmup_steps=0, gradient_accumulation=1,
    )  # fmt: skip
    common: dict[str, Any] = {"output": str(folder / "run"), "dev": [], "loop": loop}
    chunk = config.mini_batch_size if whole else min(config.mini_batch_size, CPU_ROWS)
    if isinstance(config, SFTConfig):
        pairs = config.global_batch_size if whole else min(config.global_batch_size, CPU_ROWS)
        teacher = str(folder / "made-up.rows.safetensors") if config.teacher else None
        return replace(
            config, **common, mini_batch_size=chunk, global_batch_size=pairs, teacher=teacher,
            batch_sampler="any", source_weights={}, self_reasoning_ratio=0.0, length_bucket=1,
        )  # fmt: skip
    queries, group = config.queries_per_step, config.num_generations
    if not whole:
        queries, group = min(queries, 2), min(group, CPU_ROWS)
    refresh = config.environment.refresh
    budget = {"budget": DOCUMENTS // 4} if "budget" in refresh else {}
    environment = replace(config.environment, refresh=refresh | budget)
    return replace(
        config, **common, mini_batch_size=chunk, queries_per_step=queries, num_generations=group,
        staleness_eval_every=0, log_completions_every=0, engine="torch", zero_variance="keep", environment=environment,
        max_documents=DOCUMENTS,
        num_mini_batches=min(config.num_mini_batches, queries * group), min_positive_rank=1, max_positive_rank=None,
    )  # fmt: skip


def _sft_task(config: SFTConfig, checkpoint: Checkpoint) -> SFTTask:
    with_reasoning = math.ceil(config.reasoning_ratio * config.global_batch_size)
    further = config.positives_per_pair - 1
    read = config.reading_passages if config.reading_ratio else 0
    pairs = [
        TrainingPair(
            f"p{i}",
            _text(i, config.max_query_tokens),
            _text(2000 + i, config.max_document_tokens),
            tuple(_text(40_000 + 7 * i + n, config.max_document_tokens) for n in range(config.negatives_per_pair)),
            _text(20_000 + i, config.max_reasoning_tokens) if i < with_reasoning else None,
            "made-up",
            tuple((_text(80_000 + 7 * i + n, config.max_document_tokens), 1.0) for n in range(further)),
            passages=tuple(_text(160_000 + 11 * i + n, config.reading_passage_tokens) for n in range(read)),
        )
        for i in range(config.global_batch_size)
    ]
    if config.teacher:
        _write_teacher(Path(config.teacher), pairs)
    fixed = _made_up_documents(pairs, checkpoint.contract.dimension) if config.documents == "fixed" else None
    return SFTTask(replace(config, reasoning_ratio=1.0 if with_reasoning else 0.0), checkpoint, pairs, fixed)


def _made_up_documents(pairs: Sequence[TrainingPair], dimension: int) -> FixedDocuments:
    """Random vectors for the pairs' documents, where those are fixed."""
    texts = list(dict.fromkeys(text for pair in pairs for text in (*pair.relevant, *pair.negatives)))
    vector_ND = np.random.default_rng(0).normal(size=(len(texts), dimension)).astype(np.float32)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    keys = np.array([document_key(text) for text in texts], dtype=np.int64)
    return FixedDocuments(vector_ND, keys, ("made-up", "made-up"))


def _grpo_task(config: GRPOConfig, checkpoint: Checkpoint, folder: str) -> GRPOTask:
    first = Path(folder) / "stage1"
    if config.reading_ratio and checkpoint.contract.prompts.reading is None:
        usual = reading_conversation()
        prompts = with_reading(checkpoint.contract.prompts, usual.passages, usual.passage_tokens)
        checkpoint = replace(checkpoint, contract=replace(checkpoint.contract, prompts=prompts))
    adapted = add_lora(checkpoint, config.lora)
    checkpoints.save_adapter(adapted, checkpoint.contract, first)
    checkpoint.model = adapted.merge_and_unload()
    documents = [_text(2000 + i, config.max_document_tokens) for i in range(DOCUMENTS)]
    queries = [
        Query(f"q{i}", _text(i, config.max_query_tokens), {i % DOCUMENTS: 1.0}) for i in range(config.queries_per_step)
    ]
    return GRPOTask(config, checkpoint, first, RLDataset(documents, queries, []))


def _text(number: int, tokens: int) -> str:
    """A made-up text of at least `tokens` tokens, different for each number."""
    return " ".join(f"t{1000 + number if i == 0 else (number * 31 + i) % 900}" for i in range(tokens))


def _write_teacher(path: Path, pairs: Sequence[TrainingPair]) -> None:
    from safetensors.numpy import save_file

    keys = [key_of("query", pair.query) for pair in pairs]
    keys += [key_of("document", text) for pair in pairs for text in (*pair.relevant, *pair.negatives)]
    rows = np.random.default_rng(0).normal(size=(len(keys), 16)).astype(np.float16)
    save_file({"rows": rows, "keys": np.array(keys, dtype=np.int64)}, path, {"record": '{"teacher": "made up"}'})


def _base_of(config: SFTConfig | GRPOConfig) -> str:
    if isinstance(config, SFTConfig):
        return config.init_adapter if config.init_adapter and Path(config.init_adapter).is_dir() else config.base
    folder = expand_user(config.adapter)
    for candidate in (folder, find_adapter(config.adapter)):
        if candidate is not None and (candidate / checkpoints.CONTRACT_FILE).is_file():
            return str(candidate)
    raise InputError(f"the adapter {config.adapter} does not exist yet, so its base is unknown; name it: --base NAME")


def _attention(config: SFTConfig | GRPOConfig) -> str:
    return "sdpa" if config.attention == "auto" else config.attention


def _record_loss(result: Any, losses: list[float]) -> Any:
    losses.append(float(result[0].detach()))
    return result
