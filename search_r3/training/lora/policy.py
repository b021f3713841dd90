"""The trainable model: one forward pass gives embeddings at the embed token and logits on the assistant's turn.

A row is what follows a conversation's shared prefix; the prefix is run once per conversation and step, with gradient.
Shape suffixes: B rows, L tokens of a row, P tokens of the prefix, T positions with logits, V vocabulary, D dimension.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from search_r3.errors import InputError
from search_r3.model.checkpoint import Checkpoint
from search_r3.training.config import LoraSettings
from search_r3.training.distributed import collectives, sharding
from search_r3.training.kernels.fused_llama import FusedDecoder, Layer, product_dtype, supports
from search_r3.training.kernels.linear_cross_entropy import linear_cross_entropy
from search_r3.training.kernels.token_ops import token_ops

NAMES = re.compile(r"\w+(,\w+)*")
"""Matches `target_modules` given as module names; other text is passed to PEFT ("all-linear", a regular expression)."""


@dataclass
class Rows:
    """Rows of one conversation, each ending with the embed token, or continued in latent steps.

    Attributes:
        prefix: token ids shared by all rows.
        rows: the token ids after the prefix, one list per row, ending with the embed token (except for latent steps).
        num_target_tokens: for each row, how many of its last tokens are training targets (including the embed token);
            the positions that predict them get logits. 0: no logits.
        latent_steps: number of soft tokens that are fed after each row; the mean of the states at them is the embedding
            (`prompts.LatentConversation`). Such rows have no targets. 0: the embedding is the state at the last token.
    """

    prefix: Sequence[int]
    rows: list[list[int]]
    num_target_tokens: list[int]
    latent_steps: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens without padding, including soft tokens; the prefix counts once."""
        return len(self.prefix) + sum(len(row) + self.latent_steps for row in self.rows)


@dataclass
class Encoded:
    """What `Policy` returns for `Rows`: unit embeddings, and logits, row by row.

    Attributes:
        embedding_BD: float32, L2-normalized.
        logits_TV: logits at the positions that predict target tokens; None if there are none.
        base_logits_TV: the base model's logits (adapter off) at the same positions, without gradient; None unless
            requested.
        target_T: the tokens to be predicted at these positions.
        token_loss_T: their cross-entropy, float32, instead of `logits_TV`; None unless requested.
    """

    embedding_BD: Tensor
    logits_TV: Tensor | None = None
    base_logits_TV: Tensor | None = None
    target_T: Tensor | None = None
    token_loss_T: Tensor | None = None


class Policy(nn.Module):
    """A PEFT causal LM used both as an embedder and as a language model.

    One call of `forward` computes everything that a step needs, as DDP and FSDP require.
    """

    def __init__(
        self,
        model: Any,
        embed_id: int,
        vocab_size: int,
        mini_batch_size: int = 32,
        activation_checkpointing: bool = False,
        fused: bool | None = None,
    ) -> None:
        """Wrap `model`.

        Args:
            model: the PEFT model.
            embed_id: id of the embed token.
            vocab_size: ids from this one on are padding rows, which get no logits.
            mini_batch_size: rows per forward pass of the backbone.
            activation_checkpointing: keep only each mini-batch's embeddings and each prefix's keys and values, and
                recompute activations in the backward pass: memory for one mini-batch instead of all, at a third more
                computation (as in GradCache, arXiv 2101.06983). Gradients are the same, even with dropout.
            fused: run the decoder with `kernels.fused_llama`, which is several times faster on a CPU but needs a copy
                of the frozen weights in the dtype of the products. None: on a CPU, if the model is supported.

        Raises:
            InputError: `fused` is True, but the architecture or the adapter is not supported.
        """
        super().__init__()
        self.model = model
        self.embed_id = embed_id
        self.tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
        self.vocab_size = vocab_size
        self.mini_batch_size = mini_batch_size
        self.activation_checkpointing = activation_checkpointing
        self.fused = fused
        if fused and not supports(model):
            raise InputError(
                f"fused: {type(model.get_base_model()).__name__} with this adapter cannot run fused; that needs "
                "Llama or Qwen2 with plain LoRA without dropout. Leave fused unset"
            )
        self._decoder = FusedDecoder(model)
        self._placeholder: list[Any] = []  # in a list, so that its weights are not registered in this module

    def forward(
        self, parts: dict[str, Rows], return_base_logits: Sequence[str] = (), return_token_losses: Sequence[str] = ()
    ) -> dict[str, Encoded]:
        """Encode each part.

        Args:
            return_base_logits: parts that also get the base model's logits.
            return_token_losses: parts that get the cross-entropy of each target instead of logits, which takes much
                less time and memory.
        """
        out = {}
        layers = self._fused_layers()
        shared = self._fused_prefixes(list(parts.values()), layers)
        for (name, rows), before in zip(parts.items(), shared, strict=True):
            embedding_BD, hidden_TD, target_T = self._encode(rows, layers, before)
            out[name] = Encoded(embedding_BD, target_T=target_T)
            if hidden_TD is not None and target_T is not None:
                if name in return_token_losses:
                    out[name].token_loss_T = self._token_losses(hidden_TD, target_T)
                else:
                    out[name].logits_TV = self._logits(hidden_TD)
            if name in return_base_logits and (
                hidden_TD is not None or self._placeholder
            ):  # if sharded, all processes must take part
                with torch.no_grad(), self.model.disable_adapter():
                    base_TD = self._encode(rows, layers, *self._fused_prefixes([rows], layers))[1]
                    out[name].base_logits_TV = None if base_TD is None else self._logits(base_TD)
        return out

    def pre_shard_hook(self) -> list[nn.Module]:
        """The units that FSDP gathers one at a time. Afterwards, `unsharded_model` returns a separate model."""
        self._placeholder = [sharding.copy_without_weights(self.model)]
        return list(self.causal_lm.get_decoder().layers)

    def unsharded_model(self) -> Any:
        """The PEFT model with unsharded trainable weights, for saving or merging. A collective if the model is sharded.

        For a sharded model it is a placeholder with frozen weights on "meta", updated by each call.
        """
        if not self._placeholder:
            return self.model
        sharding.reshard(self)
        now = dict(self.model.named_parameters())
        for name, weight in self._placeholder[0].named_parameters():
            if not weight.is_meta:
                weight.data = sharding.full_tensor(now[name].detach()).clone()
        return self._placeholder[0]

    @property
    def saved_model(self) -> Any:
        """The last result of `unsharded_model`, without a collective, for the process that saves it."""
        return self._placeholder[0] if self._placeholder else self.model

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside the PEFT model, including its adapters."""
        return self.model.get_base_model()

    def _trained_row(self, layer: Any) -> Tensor | None:
        """The embed token's trained row of `layer`, (1, D); None if there is none, or while the adapter is off.

        PEFT writes the row into a copy of the whole matrix at every call, and so computes a gradient for the whole
        matrix, which takes most of a small model's step. Here the frozen matrix is used as it is, and only the row is
        replaced.
        """
        if not hasattr(layer, "token_adapter"):
            return None
        adapter = layer.token_adapter
        if layer.disable_adapters or adapter.disable_adapters:
            return None
        return adapter.trainable_tokens_delta[adapter.active_adapters[0]]

    def _inputs(self, ids_BL: Tensor) -> Tensor:
        """Token embeddings in float32 or wider: the dtype of the residual stream, whatever the base's dtype."""
        layer = self.causal_lm.get_input_embeddings()
        rows_BLD = nn.functional.embedding(ids_BL, _frozen(layer))
        rows_BLD = rows_BLD.to(torch.promote_types(rows_BLD.dtype, torch.float32))
        row_1D = self._trained_row(layer)
        if row_1D is None:
            return rows_BLD
        return torch.where((ids_BL == self.embed_id)[..., None], row_1D[0].to(rows_BLD.dtype), rows_BLD)

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        layer = self.causal_lm.get_output_embeddings()
        logits_TV = nn.functional.linear(hidden_TD, _frozen(layer)[: self.vocab_size])
        row_1D = self._trained_row(self.causal_lm.get_input_embeddings() if self.tied else layer)
        if row_1D is None:
            return logits_TV
        own_T1 = nn.functional.linear(hidden_TD, row_1D).to(logits_TV.dtype)
        return logits_TV.index_copy(1, torch.tensor([self.embed_id], device=logits_TV.device), own_T1)

    def _token_losses(self, hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        layer = self.causal_lm.get_output_embeddings()
        matrix_VD = _frozen(layer)[: self.vocab_size]
        dtype = product_dtype(matrix_VD)
        ops = token_ops(matrix_VD.device, dtype, torch.promote_types(dtype, torch.float32))
        row_1D = self._trained_row(self.causal_lm.get_input_embeddings() if self.tied else layer)
        return linear_cross_entropy(hidden_TD, matrix_VD.to(dtype), row_1D, self.embed_id, target_T, ops)

    def _runs_fused(self, device: torch.device) -> bool:
        wanted = (device.type == "cpu" if self.fused is None else self.fused) and not self._placeholder
        return wanted and supports(self.model)  # checked each time, as adapters can change

    def _fused_layers(self) -> list[Layer] | None:
        return self._decoder.layers() if self._runs_fused(next(self.model.parameters()).device) else None

    def _fused_prefixes(self, parts: Sequence[Rows], layers: list[Layer] | None) -> list[list[Tensor] | None]:
        """Keys and values of each part's prefix, layer by layer; None where transformers computes them later.

        The prefixes are short: together they need one pass over the weights.
        """
        if layers is None or not parts:
            return [None] * len(parts)
        ids = [list(part.prefix) for part in parts]
        together = self._checkpointed(self._decoder.prefixes, self._inputs, ids, layers)
        return [[tensor_SKPE[index, :, : len(prefix)] for tensor_SKPE in together] for index, prefix in enumerate(ids)]

    def _encode(
        self, part: Rows, layers: list[Layer] | None, shared: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        device = next(self.model.parameters()).device
        if shared is None:
            shared = self._checkpointed(self._prefix, part.prefix, device)
        first = _first_equal(part) if layers is not None else list(range(len(part.rows)))
        order = sorted(set(first), key=lambda i: (-len(part.rows[i]), i))
        compute = partial(self._latent_mini_batch, part.latent_steps) if part.latent_steps else self._mini_batch
        calls = -(-len(order) // self.mini_batch_size)
        # If sharded, all processes must make the same number of calls, because each call gathers the weights.
        idle = collectives.all_reduce_max(calls, device) - calls if self._placeholder else 0
        embedding: list[Tensor] = [torch.empty(0)] * len(first)
        hidden: list[Tensor] = [torch.empty(0)] * len(first)
        for start in range(0, len(order), self.mini_batch_size):
            chosen = order[start : start + self.mini_batch_size]
            rows, counts = [part.rows[i] for i in chosen], [part.num_target_tokens[i] for i in chosen]
            state_BD, target_TD = self._checkpointed(compute, rows, counts, layers, *shared)
            for i, state_D, states_TD in zip(chosen, state_BD, target_TD.split(counts), strict=True):
                embedding[i], hidden[i] = state_D, states_TD
        embedding, hidden = [embedding[i] for i in first], [hidden[i] for i in first]
        if order:
            embedding_BD = nn.functional.normalize(torch.stack(embedding).float(), dim=-1)
        else:
            embedding_BD = torch.zeros(0, self.causal_lm.config.get_text_config().hidden_size, device=device)
        for _ in range(idle):
            idle_1D, _ = self._checkpointed(compute, [[self.embed_id]], [0], layers, *shared)
            embedding_BD = embedding_BD + 0.0 * idle_1D.sum()
        if not any(part.num_target_tokens):
            return embedding_BD, None, None
        lengths = zip(part.rows, part.num_target_tokens, strict=True)
        target = [token for row, n in lengths for token in row[len(row) - n :]]
        return embedding_BD, torch.cat(hidden), torch.tensor(target, device=device)

    def _checkpointed(self, compute: Any, *inputs: Any) -> Any:
        """`compute(*inputs)`, recomputed in the backward pass if activation checkpointing is on."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(compute, *inputs, use_reentrant=False)
        return compute(*inputs)

    def _prefix(self, ids: Sequence[int], device: torch.device) -> list[Tensor]:
        """Keys and values of the shared prefix for each layer, from transformers' own forward pass."""
        cache: Any = DynamicCache()
        ids_1P = torch.tensor([list(ids)], device=device)
        self.causal_lm.get_decoder()(inputs_embeds=self._inputs(ids_1P), past_key_values=cache, use_cache=True)
        shared = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        if self._placeholder:
            # Their gradients come from the rows, but FSDP gathers a layer's weights only when its output gets a
            # gradient.
            for index, tensor in enumerate(shared):
                if tensor.requires_grad:
                    tensor.register_hook(partial(_gather_layer, self.causal_lm.get_decoder().layers[index // 2]))
        return shared

    def _latent_mini_batch(
        self,
        steps: int,
        rows: list[list[int]],
        num_target_tokens: list[int],
        layers: list[Layer] | None,
        *shared: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The mean of the states at `steps` soft tokens after each row, (B, D), and no targets, (0, D).

        Each step processes the rows again with the soft tokens so far, so that both decoders and their backward passes
        can be used unchanged. Rows of queries are short, so that costs little.
        """
        state_BD, _ = self._mini_batch(rows, num_target_tokens, layers, *shared)
        soft: list[Tensor] = []
        for step in range(1, steps + 1):
            soft.append(self._soft_token(state_BD))
            longer = [[*row, *[0] * step] for row in rows]
            earlier = steps - 1 if step == steps else 0  # in the last pass, the states at all soft tokens
            state_BD, earlier_TD = self._mini_batch(longer, [earlier] * len(rows), layers, *shared, soft=soft)
        every_BSD = torch.cat([earlier_TD.unflatten(0, (len(rows), steps - 1)), state_BD[:, None]], 1)
        return _wide(every_BSD).mean(1), state_BD[:0]

    def _soft_token(self, state_BD: Tensor) -> Tensor:
        """The vocabulary's input embeddings weighted by the softmax of the logits (B, D)."""
        share_BV = torch.softmax(_wide(self._logits(state_BD)), -1)
        layer = self.causal_lm.get_input_embeddings()
        table_VD = _frozen(layer)[: self.vocab_size]
        soft_BD = share_BV.to(table_VD.dtype) @ table_VD
        row_1D = self._trained_row(layer)
        if row_1D is None:
            return soft_BD
        return soft_BD + share_BV[:, self.embed_id, None] * (row_1D - table_VD[self.embed_id])

    def _mini_batch(
        self,
        rows: list[list[int]],
        num_target_tokens: list[int],
        layers: list[Layer] | None,
        *shared: Tensor,
        soft: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Hidden states at the rows' last tokens, (B, D), and at the positions that predict their targets, (T, D).

        `soft`: input embeddings (B, D) that replace those of each row's last tokens.
        """
        if layers is not None:
            plan = self._decoder.plan(rows, shared[0].shape[1], layers, [n + 1 for n in num_target_tokens])
            inputs_ND = _with_soft_tokens(self._inputs(plan.ids_N), rows, plan.starts, soft)
            hidden_ND = self._decoder.final_norm(self._decoder.rows(inputs_ND, plan, layers, shared))
            ends = [tail + n for tail, n in zip(plan.tails, num_target_tokens, strict=True)]
        else:
            longest = max(map(len, rows))
            starts = [longest * row for row in range(len(rows))]
            hidden_ND = self._plain(rows, starts, soft, shared)
            ends = [start + len(row) - 1 for start, row in zip(starts, rows, strict=True)]
        predicting = [end - back for end, n in zip(ends, num_target_tokens, strict=True) for back in range(n, 0, -1)]
        picked_TD = hidden_ND[torch.tensor(ends + predicting, device=hidden_ND.device)]
        return picked_TD[: len(ends)], picked_TD[len(ends) :]

    def _plain(
        self, rows: list[list[int]], starts: list[int], soft: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Tensor:
        """Hidden states (B * L, D) of rows padded to one length, from transformers' own forward pass."""
        device, longest = shared[0].device, max(map(len, rows))
        ids_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        cache = DynamicCache()
        for index in range(len(shared) // 2):
            keys, values = (shared[2 * index + side].expand(len(rows), -1, -1, -1) for side in (0, 1))
            cache.update(keys, values, index)
        position_BL = (shared[0].shape[2] + torch.arange(longest, device=device))[None].expand_as(ids_BL)
        # Padding is on the right, where causality keeps real positions from attending to it: no mask is needed.
        backbone = self.causal_lm.get_decoder()
        inputs_ND = _with_soft_tokens(self._inputs(ids_BL).flatten(0, 1), rows, starts, soft)
        hidden_BLD = backbone(
            inputs_embeds=inputs_ND.unflatten(0, ids_BL.shape),
            position_ids=position_BL,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_BLD.flatten(0, 1)


def _with_soft_tokens(
    inputs_ND: Tensor, rows: Sequence[Sequence[int]], starts: Sequence[int], soft: Sequence[Tensor]
) -> Tensor:
    """`inputs_ND` with the last `len(soft)` tokens of each row, which begins at its start, replaced by soft ones."""
    if not soft:
        return inputs_ND
    ends = [start + len(row) for start, row in zip(starts, rows, strict=True)]
    places = [end - back for back in range(len(soft), 0, -1) for end in ends]
    return inputs_ND.index_copy(0, torch.tensor(places, device=inputs_ND.device), torch.cat(list(soft)).to(inputs_ND))


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _first_equal(part: Rows) -> list[int]:
    """For each row the first that is the same: duplicates in a batch are encoded once (there is no dropout)."""
    seen: dict[tuple[int, ...], int] = {}
    return [
        seen.setdefault((n, *row), i) for i, (row, n) in enumerate(zip(part.rows, part.num_target_tokens, strict=True))
    ]


def _gather_layer(layer: Any, _: Tensor) -> None:
    layer.unshard()


def _frozen(layer: Any) -> Tensor:
    """The frozen matrix of an embedding or output layer inside PEFT's wrappers."""
    while hasattr(layer, "token_adapter"):
        layer = layer.original_module
    return layer.weight


def add_lora(loaded: Checkpoint, lora: LoraSettings) -> Any:
    """Add a LoRA adapter that also trains the embed token's row to the loaded causal LM; returns the PEFT model.

    Raises:
        InputError: the model does not have the target modules.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules
    tied = getattr(loaded.model.config.get_text_config(), "tie_word_embeddings", False)
    rows = [loaded.contract.embed_token_id]
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.dropout,
        target_modules=targets.split(",") if isinstance(targets, str) and NAMES.fullmatch(targets) else targets,
        trainable_token_indices=rows if tied else {"embed_tokens": rows, "lm_head": rows},
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(loaded.model, settings)
    except (ValueError, re.error) as error:
        raise InputError(
            f"lora.target_modules {targets!r} does not fit this model: {str(error).splitlines()[0]}"
        ) from error


def freeze_lowest_layers(model: Any, count: int) -> None:
    """Stop training the adapter's weights in the `count` lowest layers, and the embed token's row below them.

    Raises:
        InputError: no layer would be left.
    """
    if not count:
        return
    layers = model.get_base_model().config.get_text_config().num_hidden_layers
    if count >= layers:
        raise InputError(f"lora.frozen_layers is {count}, but the model has {layers} layers: none would be trained")
    for name, weight in model.named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if (layer is not None and int(layer[1]) < count) or "trainable_tokens_delta" in name:
            weight.requires_grad_(False)


@contextlib.contextmanager
def evaluating(module: nn.Module):
    """A context with the module in evaluation mode and without gradients; the mode is restored afterwards."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
