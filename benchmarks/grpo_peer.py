"""The peer of benchmarks/grpo.py: TRL's GRPOTrainer doing stage 2's job, one step at a time.

It follows TRL's documentation (https://huggingface.co/docs/trl/grpo_trainer): a PEFT adapter, the reference with it
switched off, a reward function. What is overridden measures time, and gives prompts as token ids so that they are ours.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
from grpo_systems import (
    SEED,
    Parts,
    Spec,
    batches_of,
    config_of,
    dataset_of,
    environment_of,
    fingerprint,
    gradient_norms,
    lengths_of,
    shaken,
)


class Peer:
    """GRPOTrainer in a thread that takes a step when it is asked to."""

    def __init__(self, spec: Spec) -> None:
        import torch
        import trl
        from datasets import Dataset
        from peft import LoraConfig
        from transformers.utils import logging

        from search_r3.model import checkpoint as checkpoints
        from search_r3.model.searchr3 import stop_ids
        from search_r3.prompts import render
        from search_r3.training.lora.live_encoder import LiveEncoder
        from search_r3.training.lora.policy import Policy

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.spec, self.config, self.parts = spec, config_of(spec), Parts(spec.device)
        config = self.config
        dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
        checkpoint = checkpoints.load(spec.merged, dtype=dtype)
        model, tokenizer, contract = checkpoint.model, checkpoint.tokenizer, checkpoint.contract
        model.set_attn_implementation(spec.attention)
        self.embed_id = contract.embed_token_id
        self.template = render(contract.prompts.reasoning, tokenizer, give_answer=False)
        self.dataset, self.environment = dataset_of(spec.pairs), environment_of(spec, config)
        self.environment.score = self.parts.scoring(self.environment.score)  # type: ignore[method-assign]
        if len(tokenizer) < model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))  # ours never samples padding ids, nor counts them
        # Every one of these ends a completion; TRL takes them from here.
        model.generation_config.eos_token_id = [*stop_ids(model, tokenizer), self.embed_id]
        tied, rows = model.config.get_text_config().tie_word_embeddings, [self.embed_id]
        trained = rows if tied else {"embed_tokens": rows, "lm_head": rows}
        lora = LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            trainable_token_indices=trained if spec.peer_row else None,
            task_type="CAUSAL_LM",
        )
        order = batches_of(config, len(self.dataset.train), spec.batches)
        self.data = [{"prompt": self.dataset.train[row].text, "row": row} for row in order]
        self.turns = _turns(self.parts)
        self.trainer: Any = _trainer_class(self)(
            model=model,
            reward_funcs=self.reward,
            args=trl.GRPOConfig(**self._settings()),
            train_dataset=Dataset.from_list(self.data),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[self.turns],
        )
        self.model = self.trainer.model
        head = self.model.get_base_model().get_output_embeddings()
        if spec.peer_row and not hasattr(head, "bias"):
            head.bias = None  # TRL asks for it, and PEFT's wrapper of a head with trained rows has none: it would fail
        # The reward function encodes with what our stage 2 encodes with: a merged copy, the prefix run once.
        copied = Policy(self.model, self.embed_id, vocab_size=len(tokenizer), fused=False)
        self.live = LiveEncoder(copied, checkpoint, torch.float32 if spec.precision == "float32" else torch.bfloat16)
        self.encoder: Any = None
        self.given: tuple[list[list[int]], list[float]] | None = None
        self.written: list[list[int]] = []
        self._thread: threading.Thread | None = None
        self.about = {"trl": trl.__version__, "optimizer": self.trainer.args.optim.value}

    def _settings(self) -> dict[str, Any]:
        """GRPOConfig's, from the recipe: one generation for all rollouts of a step, nothing written or reported."""
        config, spec = self.config, self.spec
        loop, rollouts = config.loop, config.queries_per_step * config.num_generations
        return {
            "output_dir": str(Path(spec.scratch) / "peer"),
            "use_cpu": spec.device == "cpu",
            "bf16": spec.precision != "float32",
            "per_device_train_batch_size": spec.peer_rows,
            "gradient_accumulation_steps": rollouts // spec.peer_rows,
            "steps_per_generation": rollouts // spec.peer_rows,
            "num_generations": config.num_generations,
            "num_iterations": 1,
            "max_completion_length": config.max_reasoning_tokens + 1,
            "temperature": config.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "loss_type": config.loss_type,
            "scale_rewards": "group",
            "epsilon": config.epsilon_low,
            "epsilon_high": config.epsilon_high,
            "beta": config.beta,
            "disable_dropout": True,
            "shuffle_dataset": False,
            "gradient_checkpointing": False,
            "learning_rate": loop.learning_rate,
            "lr_scheduler_type": "constant",
            "adam_beta1": loop.betas[0],
            "adam_beta2": loop.betas[1],
            "weight_decay": loop.weight_decay,
            "max_grad_norm": loop.max_grad_norm,
            "max_steps": 1_000_000,
            "seed": SEED,
            "report_to": [],
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }

    def prompt(self, text: str) -> list[int]:
        """The reasoning conversation up to where the assistant begins to write, as ours has it."""
        from search_r3.model.searchr3 import encode_as_text

        ids = encode_as_text(self.trainer.processing_class, [text])[0][: self.config.max_query_tokens]
        return [*self.template.prefix, *ids, *self.template.suffix]

    def finished(self, completion: list[int]) -> tuple[list[int], bool]:
        """The reasoning in a completion, and whether the embed token ended it; else it is cut at the budget."""
        stops = self.trainer.eos_token_ids
        ids = completion[:-1] if completion and completion[-1] in stops else completion
        return ids[: self.config.max_reasoning_tokens], bool(completion) and completion[-1] == self.embed_id

    def embed(self, prompts: list[str], completions: list[list[int]]) -> np.ndarray:
        """The state at the embed token after each finished rollout: one prefill."""
        with self.parts("sync"):
            self.encoder = self.live.sync()
        with self.parts("embed"):
            start = len(self.template.prefix)
            rows = [
                [*self.prompt(text)[start:], *self.finished(completion)[0], self.embed_id]
                for text, completion in zip(prompts, completions, strict=True)
            ]
            return self.encoder.engine.embed(self.template.prefix, rows, 64)

    def reward(self, prompts: Any, completion_ids: Any, row: Any, trainer_state: Any, **_: Any) -> list[float]:
        """The reward function: encode the rollouts, refresh the corpus where they look, score them."""
        import torch

        from search_r3.training.lora.live_encoder import encode_rows

        if self.given is not None:
            return self.given[1]
        config, size = self.config, self.config.num_generations
        embeddings = self.embed(prompts, completion_ids)
        traces = [self.finished(ids) for ids in completion_ids]
        self.written = [ids for ids, _ in traces]
        scores = self.environment.score(
            embeddings,
            torch.arange(len(prompts)) // size,
            [self.dataset.train[number].grades for number in row[::size]],
            encode_rows(self.encoder, self.dataset.documents, config.max_document_tokens),
            trainer_state.global_step,
            emitted_R=torch.tensor([emitted for _, emitted in traces]),
            token_ids=[ids for ids, _ in traces],
            token_budget=config.max_reasoning_tokens,
        )
        return scores.rewards_R.cpu().tolist()

    def compare(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """TRL's loss on our rollouts and rewards, by its own way from a batch of prompts to the gradient."""
        import torch
        from trl.trainer.utils import split_tensor_dict

        assert given is not None
        trainer, size = self.trainer, self.config.queries_per_step * self.config.num_generations
        inputs = [self.data[i // self.config.num_generations] for i in range(size)]
        texts = [line["prompt"] for line in inputs]
        theirs = np.array(given["embeddings"])
        cosine = float((self.embed(texts, given["completions"]) * theirs).sum(1).min())
        self.given = given["completions"], given["rewards"]
        pieces = size // self.spec.peer_rows
        trainer.current_gradient_accumulation_steps = pieces
        trainer.model.train()
        loss, tokens = 0.0, []
        with shaken(self.model):
            whole = trainer._generate_and_score_completions([dict(line) for line in inputs])
            trainer._metrics["train"].clear()
            for piece in split_tensor_dict(whole, pieces):
                part = trainer._compute_loss(self.model, piece)
                part.backward()
                loss += part.item()
                tokens.append(float(piece["completion_mask"].sum()))
            norms = gradient_norms(self.model)
        named = ("entropy", *(["kl"] if self.config.beta else []))
        figures = {name: np.average(trainer._metrics["train"][name], weights=tokens) for name in named}
        self.given = None
        trainer._metrics["train"].clear()
        torch.manual_seed(SEED)
        return {
            "loss": loss,
            "kl": 0.0,
            **{name: float(value) for name, value in figures.items()},
            **norms,
            "least_cosine": cosine,
            **fingerprint([self.prompt(text) for text in texts], given["completions"]),
        }

    def step(self, number: int) -> dict[str, Any]:
        """Let the trainer take its next step, which must be `number`. What went wrong in it is raised here."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, daemon=True)
            self._thread.start()
        assert number == self.trainer.state.global_step, "steps are taken in their order"
        self.turns.leave.put(None)
        taken = self.turns.taken.get()
        if isinstance(taken, BaseException):
            raise taken
        return taken | lengths_of(self.written)

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self.turns.taken.put(error)


def _turns(parts: Parts) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """Holds the trainer at the beginning of each step until it has leave to take it."""

        def __init__(self) -> None:
            self.leave: queue.Queue[None] = queue.Queue()
            self.taken: queue.Queue[Any] = queue.Queue()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.leave.get()
            parts.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.taken.put(parts.end())

    return Turns()


def _trainer_class(peer: Peer) -> Any:
    """GRPOTrainer whose parts are timed. Without its own tokenising of prompts: theirs must be our tokens."""
    import torch
    from trl import GRPOTrainer

    parts = peer.parts

    class Timed(GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [peer.prompt(text) for text in prompts], None, {}

        def _generate_single_turn(self, *args: Any, **more: Any) -> Any:
            if peer.given is not None:
                return peer.given[0], None
            with parts("sample"):
                return super()._generate_single_turn(*args, **more)

        def _get_per_token_logps_and_entropies(self, *args: Any, **more: Any) -> Any:
            if torch.is_grad_enabled():  # inside of training_step, which counts it
                return super()._get_per_token_logps_and_entropies(*args, **more)
            with parts("forward_backward"):  # the reference
                return super()._get_per_token_logps_and_entropies(*args, **more)

        def _prepare_inputs(self, *args: Any, **more: Any) -> Any:
            start = parts.now()
            prepared = super()._prepare_inputs(*args, **more)
            parts.seconds["forward_backward"] -= parts.now() - start  # it is part of training_step
            return prepared

        def training_step(self, *args: Any, **more: Any) -> Any:
            with parts("forward_backward"):
                return super().training_step(*args, **more)

    return Timed
