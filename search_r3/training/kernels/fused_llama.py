"""The Llama decoder with LoRA, fused into a few large operations with a hand-written backward pass.

LoRA (arXiv 2106.09685) is concatenated with the frozen matrix: y = [x, xA'] [W, sB]' is one product, and so is its
gradient. Projections of the same input are one matrix. A layer is one node of the autograd graph and recomputes what
is cheap. Frozen weights are stored once, in the dtype of the matrix products; the residual stream stays float32.

Letters in shapes: N tokens of all rows, B rows, L tokens of a row with padding, P of the shared prefix, T keys (P + L
and padding), D dimension, H heads, K key-value heads, G = H / K, E dimension of a head, F width of the MLP, R LoRA
ranks of one projection together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search_r3.training.kernels.merged_linear import Projection
from search_r3.training.kernels.thread_parts import run_parts
from search_r3.training.kernels.token_ops import Group, Rotary, TokenOps, token_ops

FAMILY = ("LlamaForCausalLM", "Qwen2ForCausalLM")
"""Architectures that the tests compare with transformers; for inference, `llama_forward.FAMILY` also has Mistral."""
ROWS_TOGETHER = 8
"""Rows of similar length that are padded to the same length: fewer rows need less padding, more need fewer calls."""
KEYS_MULTIPLE = 32
"""The number of keys is padded to a multiple of this: matrix products of whole tiles are faster."""
TOKENS_A_PART = 128
"""Minimum number of tokens per thread."""


class Layer:
    """One decoder layer: its projections and norms."""

    def __init__(self, layer: Any, config: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.out = Projection([attention.o_proj], dtype)
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = Projection([mlp.down_proj], dtype)
        self.projections = (self.qkv, self.out, self.gate_up, self.down)
        self.norm_attention, self.norm_mlp = (
            norm.weight.detach().to(torch.promote_types(norm.weight.dtype, torch.float32))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.kv_heads = config.num_key_value_heads
        self.groups = config.num_attention_heads // self.kv_heads
        self.head_dim = self.out.inputs // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.eps = config.rms_norm_eps

    def parameters(self) -> list[nn.Parameter]:
        """Every LoRA weight of the layer."""
        return [weight for projection in self.projections for weight in projection.parameters()]


@dataclass
class _Part:
    """The rows of one thread, whose tokens are adjacent. `start_B` of its groups counts from the part's first token.

    Attributes:
        tails: slice of the output that holds the part's output tokens.
        tail_M: indices of these tokens within the part.
    """

    tokens: slice
    groups: list[Group]
    tails: slice
    tail_M: Tensor


@dataclass
class Plan:
    """How rows are packed into N consecutive tokens, for one pass through all layers.

    Attributes:
        ids_N: token ids.
        starts: index of each row's first token.
        tails: for each row, the offset of its first output token in the output.
        prefix: length of the shared prefix before every row, in tokens.
    """

    ids_N: Tensor
    starts: list[int]
    tails: list[int]
    prefix: int
    parts: list[_Part]
    rotary: Rotary
    ops: TokenOps
    adapted: bool
    """False while the adapter is off."""


class FusedDecoder:
    """Runs a PEFT causal LM's decoder layers on packed tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_base_model().get_decoder()
        self.config = model.get_base_model().config.get_text_config()
        self._key: Any = None
        self._layers: list[Layer] = []

    def layers(self) -> list[Layer]:
        """The layers with the adapters' current weights, in autocast's dtype if it is enabled, else in the model's."""
        weights = [weight for weight in self.decoder.parameters() if not weight.requires_grad]
        dtype = product_dtype(weights[0])
        lora = [weight for weight in self.decoder.parameters() if weight.requires_grad]
        key = (dtype, [(w.data_ptr(), w._version) for w in weights], [id(w) for w in lora])
        if self._key != key:
            self._layers = []  # frees the memory of the old layers first
            self._layers = [Layer(layer, self.config, dtype) for layer in self.decoder.layers]
            self._key = key
        with torch.no_grad():
            for layer in self._layers:
                for projection in layer.projections:
                    projection.refresh()
        return self._layers

    def plan(
        self,
        rows: Sequence[Sequence[int]],
        prefix: int,
        layers: list[Layer],
        wanted: Sequence[int],
        together: int | None = None,
    ) -> Plan:
        """Pack `rows` (sorted by length, so that attention needs little padding) after a prefix of `prefix` tokens.

        Args:
            wanted: for each row, how many of its last tokens are output tokens, whose hidden states are returned.
            together: rows per group, all computed in one thread; None chooses groups and threads automatically.
        """
        matrix = layers[0].qkv.matrix
        in_threads = together is None and matrix.device.type == "cpu"
        most = min(len(rows), sum(map(len, rows)) // TOKENS_A_PART)
        shares = _alternating(len(rows), max(1, min(torch.get_num_threads(), most) if in_threads else 1))
        together = together or (ROWS_TOGETHER if in_threads else len(rows))
        ids: list[int] = []
        starts, tails = [0] * len(rows), [0] * len(rows)
        parts: list[_Part] = []
        kept = 0
        for share in shares:
            length_B = np.array([len(rows[row]) for row in share], dtype=np.int64)
            start_B = length_B.cumsum() - length_B
            tail: list[int] = []
            for row, end in zip(share, (start_B + length_B).tolist(), strict=True):
                starts[row] = len(ids) + end - len(rows[row])
                tails[row] = kept + len(tail)
                tail += range(end - wanted[row], end)
            groups = []
            for first in range(0, len(share), together):
                some = slice(first, first + together)
                longest = int(length_B[some].max())
                keys = -(-(prefix + longest) // KEYS_MULTIPLE) * KEYS_MULTIPLE
                groups.append(Group(start_B[some], length_B[some], longest, keys))
            begin = len(ids)
            ids += [token for row in share for token in rows[row]]
            tail_M = torch.tensor(tail, dtype=torch.long, device=matrix.device)
            parts.append(_Part(slice(begin, len(ids)), groups, slice(kept, kept + len(tail)), tail_M))
            kept += len(tail)
        rotary = self._rotary(range(prefix, prefix + max(map(len, rows))), matrix)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        ops = token_ops(matrix.device, matrix.dtype, wide)
        return Plan(
            torch.tensor(ids, device=matrix.device), starts, tails, prefix, parts, rotary, ops, adapter_on(self.decoder)
        )

    def _rotary(self, positions: range, like: Tensor) -> Rotary:
        position_1L = torch.tensor([positions], device=like.device)
        wide = torch.empty(0, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        cos_1LE, sin_1LE = self.decoder.rotary_emb(wide, position_1L)
        half = cos_1LE.shape[-1] // 2
        return Rotary(cos_1LE[0].contiguous(), torch.cat([-sin_1LE[0, :, :half], sin_1LE[0, :, half:]], -1))

    def prefixes(self, embed: Callable[[Tensor], Tensor], ids: list[list[int]], layers: list[Layer]) -> list[Tensor]:
        """Keys and values (S, K, P, E) of each layer for S conversation prefixes, padded to the longest.

        Args:
            embed: maps token ids (N,) to the first layer's input (N, D).
        """
        plan = self.plan(ids, 0, layers, [1] * len(ids), together=len(ids))
        hidden_ND = embed(plan.ids_N)
        shared = []
        for layer in layers:
            last = layer is layers[-1]
            hidden_ND, keys_SKPE, values_SKPE = self._layer(layer, plan, hidden_ND, None, None, last)
            shared += [keys_SKPE, values_SKPE]
        return shared

    def rows(self, hidden_ND: Tensor, plan: Plan, layers: list[Layer], shared: Sequence[Tensor]) -> Tensor:
        """Hidden states of the output tokens (M, D) after the last layer, before the final norm."""
        for index, layer in enumerate(layers):
            last = layer is layers[-1]
            hidden_ND = self._layer(layer, plan, hidden_ND, shared[2 * index], shared[2 * index + 1], last)[0]
        return hidden_ND

    def final_norm(self, hidden_TD: Tensor) -> Tensor:
        """The decoder's final norm."""
        return self.decoder.norm(hidden_TD)

    def _layer(
        self, layer: Layer, plan: Plan, hidden: Tensor, keys: Tensor | None, values: Tensor | None, last: bool
    ) -> Any:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return _LayerFunction.apply(hidden.to(wide), keys, values, layer, plan, last, *layer.parameters())


class _LayerFunction(torch.autograd.Function):
    """One layer on N tokens. Returns hidden states (N, D), and the rows' keys and values if they have no prefix.

    After attention, the last layer computes the output tokens only, (M, D).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, keys: Any, values: Any, layer: Layer, plan: Plan, last: bool, *lora: Tensor
    ) -> Any:
        with _no_autocast(hidden_ND):
            dtype = layer.qkv.matrix.dtype
            if keys is None:
                before_2KPE = hidden_ND.new_empty(2, layer.kv_heads, 0, layer.head_dim, dtype=dtype)
            else:
                before_2KPE = torch.stack([keys, values]).to(dtype)
            hidden_ND = hidden_ND.contiguous()
            out_ND = hidden_ND.new_empty(plan.parts[-1].tails.stop if last else len(hidden_ND), hidden_ND.shape[1])

            def one(part: _Part) -> list[Tensor]:
                out = out_ND[part.tails if last else part.tokens]
                return _forward(layer, plan, part, hidden_ND[part.tokens], before_2KPE, out, last)

            states = run_parts(one, plan.parts)
            # Saving the LoRA weights makes it an error to change them before the backward pass, as in PyTorch.
            ctx.save_for_backward(hidden_ND, *(tensor for state in states for tensor in state), *lora)
            ctx.layer, ctx.plan, ctx.last, ctx.has_prefix = layer, plan, last, keys is not None
            if keys is not None:
                return out_ND, None, None
            longest = plan.parts[0].groups[0].longest
            keys, values = (side[:, :, :longest].to(hidden_ND.dtype) for side in states[0][-3:-1])
            return out_ND, keys, values

    @staticmethod
    def backward(ctx: Any, dout_ND: Tensor, dkeys: Any, dvalues: Any) -> Any:
        layer, plan = ctx.layer, ctx.plan
        if not plan.adapted:
            raise RuntimeError("no gradient is computed while the adapter is off")
        with _no_autocast(dout_ND):
            hidden_ND, *rest = ctx.saved_tensors
            dout_ND, dhidden_ND = dout_ND.contiguous(), torch.empty_like(hidden_ND)
            jobs = []
            for part in plan.parts:
                count = SAVED + SAVED_A_GROUP * len(part.groups)
                jobs.append((part, rest[:count]))
                rest = rest[count:]

            def one(job: tuple[_Part, list[Tensor]]) -> tuple[list[Tensor], Tensor]:
                part, state = job
                hidden, dhidden = hidden_ND[part.tokens], dhidden_ND[part.tokens]
                dout = dout_ND[part.tails if ctx.last else part.tokens]
                return _backward(layer, plan, part, state, hidden, dout, (dkeys, dvalues), dhidden, ctx.last)

            found, dbefore = zip(*run_parts(one, jobs), strict=True)
            gradients = [sum(parts[1:], start=parts[0]) for parts in zip(*found, strict=True)]
            dk, dv = sum(dbefore[1:], start=dbefore[0]) if ctx.has_prefix else (None, None)
            return dhidden_ND, dk, dv, None, None, None, *gradients


SAVED, SAVED_A_GROUP = 6, 4
"""How many tensors `_forward` returns for a part, and for each of its groups."""


def _forward(
    layer: Layer, plan: Plan, part: _Part, hidden: Tensor, before: Tensor, out: Tensor, last: bool
) -> list[Tensor]:
    """Compute one layer for a part and write it to `out`; returns the tensors that the backward pass needs."""
    ops, adapted = plan.ops, plan.adapted
    x1 = layer.qkv.empty_inputs(len(hidden))
    ops.norm(hidden, layer.norm_attention, layer.eps, x1)
    qkv = layer.qkv.forward(x1, adapted)
    x2 = layer.out.empty_inputs(len(hidden))
    attended = []
    for group in part.groups:
        attended += _attend(layer, plan, group, qkv, before, x2)
    if last:
        hidden, x2 = hidden[part.tail_M], x2[part.tail_M]
    tokens = len(hidden)
    x3, middle = layer.gate_up.empty_inputs(tokens), torch.empty_like(hidden)
    ops.add_norm(hidden, layer.out.forward(x2, adapted), layer.norm_mlp, layer.eps, middle, x3)
    gate_up = layer.gate_up.forward(x3, adapted)
    x4 = layer.down.empty_inputs(tokens)
    ops.swiglu(gate_up, x4)
    ops.add(middle, layer.down.forward(x4, adapted), out)
    return [x1, x2, middle, x3, gate_up, layer.down.ranks_of(x4), *attended]


def _backward(
    layer: Layer, plan: Plan, part: _Part, state: list[Tensor], hidden: Tensor, dout: Tensor, dkeys_values: Any,
    dhidden: Tensor, last: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Write a part's gradient to `dhidden`; returns those of the LoRA weights and of the prefix's keys and values."""
    x1, x2, middle, x3, gate_up, h4, *rest = state
    ops, dtype = plan.ops, x1.dtype
    dy4 = ops.convert(dout, dtype)
    dact, low = layer.down.backward(dy4)
    dy3, act = ops.swiglu_backward(dact, low, gate_up)
    found4 = layer.down.gradients(act, h4, dy4, dact)
    del act, low, dy4, dact
    dx3, low = layer.gate_up.backward(dy3)
    found3 = layer.gate_up.gradients(x3, layer.gate_up.ranks_of(x3), dy3, dx3)
    dmiddle = torch.empty_like(middle)
    ops.norm_backward(dx3, low, middle, layer.norm_mlp, layer.eps, dout, dmiddle)
    del dy3, dx3, low
    dy2 = ops.convert(dmiddle, dtype)
    dx2, low = layer.out.backward(dy2)
    found2 = layer.out.gradients(x2, layer.out.ranks_of(x2), dy2, dx2)
    if last:
        dmiddle, dx2, low = (_spread(tensor, part.tail_M, len(hidden)) for tensor in (dmiddle, dx2, low))
    dy1 = x1.new_empty(len(hidden), layer.qkv.outputs)
    dbefore = hidden.new_zeros(2, layer.kv_heads, plan.prefix, layer.head_dim)
    for index, group in enumerate(part.groups):
        saved = rest[SAVED_A_GROUP * index : SAVED_A_GROUP * (index + 1)]
        _attend_backward(layer, plan, group, saved, dx2, low, dkeys_values, dy1, dbefore)
    dx1, low = layer.qkv.backward(dy1)
    found1 = layer.qkv.gradients(x1, layer.qkv.ranks_of(x1), dy1, dx1)
    ops.norm_backward(dx1, low, hidden, layer.norm_attention, layer.eps, dmiddle, dhidden)
    return [*found1, *found2, *found3, *found4], dbefore


def _spread(x_MC: Any, place_M: Tensor, tokens: int) -> Any:
    """Scatter the rows of `x` to the indices `place` of a zero tensor (tokens, C); None stays None."""
    return None if x_MC is None else x_MC.new_zeros(tokens, x_MC.shape[1]).index_copy_(0, place_M, x_MC)


def _attend(layer: Layer, plan: Plan, group: Group, qkv: Tensor, before: Tensor, out: Tensor) -> list[Tensor]:
    """Compute one group's attention and write it to `out`; returns queries, keys, values and probabilities."""
    query, key, value = plan.ops.pack_heads(qkv, plan.rotary, before, group, layer.groups)
    flat = query.flatten(0, 1).flatten(1, 2)
    share = torch.bmm(flat, key.flatten(0, 1).transpose(1, 2)).view(*query.shape[:-1], -1)
    plan.ops.softmax_(share, group, plan.prefix, layer.scale)
    attended = torch.bmm(share.flatten(0, 1).flatten(1, 2), value.flatten(0, 1))
    plan.ops.unpack_heads(attended.view(query.shape), group, out)
    return [query, key, value, share]


def _attend_backward(
    layer: Layer, plan: Plan, group: Group, saved: Sequence[Tensor], dx: Tensor, low: Tensor | None,
    dkeys_values: Any, dqkv: Tensor, dbefore: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of the group's queries, keys and values, and add to those of the prefix."""
    query, key, value, share = saved
    dattended = plan.ops.pack_gradient(dx, low, group, query).flatten(0, 1).flatten(1, 2)
    dvalue = torch.bmm(share.flatten(0, 1).flatten(1, 2).transpose(1, 2), dattended).view(value.shape)
    dshare = torch.bmm(dattended, value.flatten(0, 1).transpose(1, 2)).view(share.shape)
    plan.ops.softmax_backward_(dshare, share, group, plan.prefix, layer.scale)
    dscores = dshare.flatten(0, 1).flatten(1, 2)
    dquery = torch.bmm(dscores, key.flatten(0, 1)).view(query.shape)
    dkey = torch.bmm(dscores.transpose(1, 2), query.flatten(0, 1).flatten(1, 2)).view(key.shape)
    for gradient, further in zip((dkey, dvalue), dkeys_values, strict=True):
        if further is not None:  # for prefixes, whose keys and values are also used by the rows that follow
            gradient[:, :, : group.longest] += further.to(gradient.dtype)
    plan.ops.unpack_gradient(dquery, dkey, dvalue, plan.rotary, group, dqkv, dbefore)


def supports(model: Any) -> bool:
    """Whether `FusedDecoder` supports this PEFT causal LM: one of `FAMILY`, plain LoRA, other weights frozen."""
    base = model.get_base_model()
    if type(base).__name__ not in FAMILY:
        return False
    config = base.config.get_text_config()
    if config.hidden_act != "silu" or getattr(config, "use_sliding_window", False):
        return False
    decoder = base.get_decoder()
    trained = {id(weight) for weight in decoder.layers.parameters() if weight.requires_grad}
    trained |= {id(weight) for weight in decoder.norm.parameters() if weight.requires_grad}
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q_k_v, gate_up = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        for group in (q_k_v, [attention.o_proj], gate_up, [mlp.down_proj]):
            if not all(_is_plain(linear) for linear in group):
                return False
            if len({getattr(linear, "base_layer", linear).bias is None for linear in group}) > 1:
                return False
            for linear in group:
                if linear is not getattr(linear, "base_layer", linear):
                    name = linear.active_adapters[0]
                    trained -= {id(linear.lora_A[name].weight), id(linear.lora_B[name].weight)}
    return not trained


def adapter_on(decoder: Any) -> bool:
    """False inside PEFT's `disable_adapter()`."""
    return not any(getattr(module, "disable_adapters", False) for module in decoder.layers[0].modules())


def _is_plain(linear: Any) -> bool:
    if type(linear) is nn.Linear:
        return True
    from peft.tuners.lora import Linear

    if type(linear) is not Linear or type(linear.base_layer) is not nn.Linear or linear.merged:
        return False
    if len(linear.active_adapters) != 1 or linear.fan_in_fan_out:
        return False
    name = linear.active_adapters[0]
    if name not in linear.lora_A or getattr(linear, "lora_variant", {}).get(name) is not None:
        return False
    return linear.lora_B[name].bias is None and isinstance(linear.lora_dropout[name], nn.Identity)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Autocast's dtype if it is enabled, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _alternating(rows: int, shares: int) -> list[list[int]]:
    """Split rows sorted by length into shares of similar token counts: 0, 1, 1, 0, 0, 1, ... for two shares."""
    found: list[list[int]] = [[] for _ in range(shares)]
    for row in range(rows):
        turn, place = divmod(row, shares)
        found[shares - 1 - place if turn % 2 else place].append(row)
    return found
