"""The decoder of the Llama family with LoRA as few large operations, with a hand-written backward pass.

LoRA (arXiv 2106.09685) is concatenated with the frozen matrix: y = [x, xA'] [W, sB]' is one product, and so is its
gradient. Projections of the same input are one matrix, and a layer is one node of the graph, which recomputes what is
cheap. Frozen weights are held once in the dtype of the products; the residual stream stays float32.

Letters in shapes: N tokens of all rows, B rows, L tokens of a row with padding, P of the shared prefix, T keys (P + L
and padding), D dimension, H heads, K key-value heads, G = H / K, E dimension of a head, F width of the MLP, R LoRA
ranks of one projection together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from search_r3.training.kernels.merged_linear import Projection

FAMILY = ("LlamaForCausalLM", "Qwen2ForCausalLM")
"""Architectures whose layers are computed exactly, as tested; `llama_forward.FAMILY` has Mistral too, for inference."""
ROWS_TOGETHER = 8
"""Rows of similar length that are padded to one length: fewer need less padding, more need fewer calls."""
KEYS_MULTIPLE = 32
"""Keys are padded to a multiple of this: torch's softmax is up to twice as fast on whole vectors."""


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
        self.rotary_width = (self.groups + 1) * self.kv_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.eps = config.rms_norm_eps

    def parameters(self) -> list[nn.Parameter]:
        """Every LoRA weight of the layer."""
        return [weight for projection in self.projections for weight in projection.parameters()]


@dataclass
class _Group:
    """Adjacent rows padded to one length; the first begins at token `start`."""

    start: int
    rows: int
    length: int
    mask: Tensor
    """(G * L, T), 0 where a query attends to a key, else -inf."""

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.rows * self.length)


@dataclass
class Plan:
    """How rows are packed into N consecutive tokens, for one pass through all layers.

    Attributes:
        ids_N: token ids; padding is 0.
        starts: each row's first token.
        prefix: tokens of the shared prefix before every row.
    """

    ids_N: Tensor
    starts: list[int]
    prefix: int
    groups: list[_Group]
    cos_N1E: Tensor
    sin_N1E: Tensor


class FusedDecoder:
    """Runs a PEFT causal LM's decoder layers on packed tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_base_model().get_decoder()
        self.config = model.get_base_model().config.get_text_config()
        self._key: Any = None
        self._layers: list[Layer] = []

    def layers(self) -> list[Layer]:
        """The layers with the adapters' current weights, in the dtype of autocast, or else of the model."""
        weights = [weight for weight in self.decoder.parameters() if not weight.requires_grad]
        dtype = _product_dtype(weights[0])
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

    def plan(self, rows: Sequence[Sequence[int]], prefix: int, layers: list[Layer]) -> Plan:
        """Pack `rows` (sorted by length, to need little padding) after a prefix of `prefix` tokens."""
        first = layers[0]
        device, dtype = first.qkv.matrix.device, first.qkv.matrix.dtype
        together = ROWS_TOGETHER if device.type == "cpu" else len(rows)
        ids: list[int] = []
        position: list[int] = []
        starts: list[int] = []
        groups = []
        for begin in range(0, len(rows), together):
            some = rows[begin : begin + together]
            longest = max(map(len, some))
            mask_LT = _mask(longest, prefix, device, dtype)
            groups.append(_Group(len(ids), len(some), longest, mask_LT.repeat(first.groups, 1)))
            for row in some:
                starts.append(len(ids))
                ids += [*row, *[0] * (longest - len(row))]
                position += range(prefix, prefix + longest)
        position_1N = torch.tensor([position], device=device)
        cos_1NE, sin_1NE = self.decoder.rotary_emb(torch.empty(0, device=device), position_1N)
        half = first.head_dim // 2
        sin_1NE = torch.cat([-sin_1NE[..., :half], sin_1NE[..., half:]], -1)  # see `_apply_rotary`
        cos_N1E, sin_N1E = (table[0, :, None].to(dtype) for table in (cos_1NE, sin_1NE))
        return Plan(torch.tensor(ids, device=device), starts, prefix, groups, cos_N1E, sin_N1E)

    def prefix(self, hidden_PD: Tensor, plan: Plan, layers: list[Layer]) -> list[Tensor]:
        """Keys and values (K, P, E) of each layer for tokens that begin a conversation."""
        shared = []
        for layer in layers:
            hidden_PD, keys_KPE, values_KPE = self._layer(layer, plan, hidden_PD, None, None)
            shared += [keys_KPE, values_KPE]
        return shared

    def rows(self, hidden_ND: Tensor, plan: Plan, layers: list[Layer], shared: Sequence[Tensor]) -> Tensor:
        """Hidden states (N, D) after the last layer and before the final norm."""
        for index, layer in enumerate(layers):
            hidden_ND = self._layer(layer, plan, hidden_ND, shared[2 * index], shared[2 * index + 1])[0]
        return hidden_ND

    def final_norm(self, hidden_TD: Tensor) -> Tensor:
        """The decoder's last norm."""
        return self.decoder.norm(hidden_TD)

    def _layer(self, layer: Layer, plan: Plan, hidden: Tensor, keys: Tensor | None, values: Tensor | None) -> Any:
        adapted = adapter_on(self.decoder)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return _LayerFunction.apply(hidden.to(wide), keys, values, layer, plan, adapted, *layer.parameters())


class _LayerFunction(torch.autograd.Function):
    """One layer on N tokens: hidden states (N, D), and the tokens' keys and values if they have no prefix."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, keys: Any, values: Any, layer: Layer, plan: Plan, adapted: bool, *lora: Tensor
    ) -> Any:
        with _no_autocast(hidden_ND):
            tokens = len(hidden_ND)
            x1 = layer.qkv.empty_inputs(tokens)
            _norm(hidden_ND, layer.norm_attention, layer.eps, x1[:, : layer.qkv.inputs])
            qkv = layer.qkv.forward(x1, adapted)
            rotated_NHE = _apply_rotary(
                qkv[:, : layer.rotary_width].unflatten(1, (-1, layer.head_dim)), plan.cos_N1E, plan.sin_N1E
            )
            value_NKE = qkv[:, layer.rotary_width :].unflatten(1, (-1, layer.head_dim))
            x2 = layer.out.empty_inputs(tokens)
            attended = []
            for group in plan.groups:
                attended += _attend(layer, group, rotated_NHE, value_NKE, keys, values, x2)
            middle_ND = hidden_ND + layer.out.forward(x2, adapted)
            x3 = layer.gate_up.empty_inputs(tokens)
            _norm(middle_ND, layer.norm_mlp, layer.eps, x3[:, : layer.gate_up.inputs])
            gate_up = layer.gate_up.forward(x3, adapted)
            width = layer.down.inputs
            x4 = layer.down.empty_inputs(tokens)
            torch.mul(functional.silu(gate_up[:, :width]), gate_up[:, width:], out=x4[:, :width])
            out_ND = middle_ND + layer.down.forward(x4, adapted)
            h4 = x4[:, width:].clone()
            # The LoRA weights are saved so that changing them before the backward pass is an error, as in torch.
            ctx.save_for_backward(hidden_ND, x1, x2, middle_ND, x3, gate_up, h4, *attended, *lora)
            ctx.layer, ctx.plan, ctx.adapted, ctx.has_prefix = layer, plan, adapted, keys is not None
            if keys is not None:
                return out_ND, None, None
            own_KNE = rotated_NHE[:, layer.kv_heads * layer.groups :].transpose(0, 1)
            return out_ND, own_KNE.to(hidden_ND.dtype), value_NKE.transpose(0, 1).to(hidden_ND.dtype)

    @staticmethod
    def backward(ctx: Any, dout_ND: Tensor, dkeys: Any, dvalues: Any) -> Any:
        layer, plan = ctx.layer, ctx.plan
        if not ctx.adapted:
            raise RuntimeError("no gradient is computed while the adapter is off")
        with _no_autocast(dout_ND):
            hidden_ND, x1, x2, middle_ND, x3, gate_up, h4, *rest = ctx.saved_tensors
            tokens, width = len(hidden_ND), layer.down.inputs

            dy4 = layer.down.empty_gradients(tokens)
            dy4[:, : layer.down.outputs] = dout_ND
            dact = layer.down.backward(dy4)
            gate, up = gate_up[:, :width], gate_up[:, width:]
            swish = functional.silu(gate)
            found4 = layer.down.gradients(swish * up, h4, dy4)
            dy3 = layer.gate_up.empty_gradients(tokens)
            torch.mul(dact, swish, out=dy3[:, width : 2 * width])
            torch.ops.aten.silu_backward.grad_input(dact.mul_(up), gate, grad_input=dy3[:, :width])
            dx3 = layer.gate_up.backward(dy3)
            found3 = layer.gate_up.gradients(x3[:, : layer.gate_up.inputs], x3[:, layer.gate_up.inputs :], dy3)
            dmiddle_ND = _norm_backward(dx3, middle_ND, layer.norm_mlp, layer.eps, dout_ND)

            dy2 = layer.out.empty_gradients(tokens)
            dy2[:, : layer.out.outputs] = dmiddle_ND
            dx2 = layer.out.backward(dy2)
            found2 = layer.out.gradients(x2[:, : layer.out.inputs], x2[:, layer.out.inputs :], dy2)

            dy1 = layer.qkv.empty_gradients(tokens)
            heads = layer.kv_heads * layer.groups
            drotated_NHE = dy1.new_empty(tokens, heads + layer.kv_heads, layer.head_dim)
            dvalue_NKE = dy1[:, layer.rotary_width : layer.qkv.outputs].unflatten(1, (-1, layer.head_dim))
            dprefix = None
            if ctx.has_prefix:
                dprefix = hidden_ND.new_zeros(2, layer.kv_heads, plan.prefix, layer.head_dim)
            for index, group in enumerate(plan.groups):
                _attend_backward(layer, group, rest[4 * index : 4 * index + 4], dx2, drotated_NHE, dvalue_NKE, dprefix)
            if dkeys is not None:
                drotated_NHE[:, heads:] += dkeys.transpose(0, 1).to(drotated_NHE.dtype)
            if dvalues is not None:
                dvalue_NKE += dvalues.transpose(0, 1).to(dvalue_NKE.dtype)
            dy1[:, : layer.rotary_width] = _apply_rotary(drotated_NHE, plan.cos_N1E, -plan.sin_N1E).flatten(1)
            dx1 = layer.qkv.backward(dy1)
            found1 = layer.qkv.gradients(x1[:, : layer.qkv.inputs], x1[:, layer.qkv.inputs :], dy1)
            dhidden_ND = _norm_backward(dx1, hidden_ND, layer.norm_attention, layer.eps, dmiddle_ND)
            dk, dv = (None, None) if dprefix is None else (dprefix[0], dprefix[1])
            return dhidden_ND, dk, dv, None, None, None, *found1, *found2, *found3, *found4


def supports(model: Any) -> bool:
    """Whether `FusedDecoder` can compute this PEFT causal LM: its family, plain LoRA, everything else frozen."""
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


def _product_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _mask(length: int, prefix: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    keys = -(-(prefix + length) // KEYS_MULTIPLE) * KEYS_MULTIPLE
    return torch.full((length, keys), -torch.inf, device=device, dtype=dtype).triu(prefix + 1)


def _apply_rotary(x_NHE: Tensor, cos_N1E: Tensor, sin_N1E: Tensor) -> Tensor:
    """Rotary positions: x cos + swapped(x) sin, the sign of rotate_half in sin's first half; -sin turns back."""
    half = x_NHE.shape[-1] // 2
    swapped_NHE = torch.cat([x_NHE[..., half:], x_NHE[..., :half]], -1)
    return (x_NHE * cos_N1E).addcmul_(swapped_NHE, sin_N1E)


def _inverse_rms(hidden_ND: Tensor, eps: float) -> Tensor:
    norm_N1 = torch.linalg.vector_norm(hidden_ND, dim=-1, keepdim=True)
    return norm_N1.square_().div_(hidden_ND.shape[-1]).add_(eps).rsqrt_()


def _norm(hidden_ND: Tensor, weight_D: Tensor, eps: float, out: Tensor) -> None:
    torch.mul(hidden_ND * _inverse_rms(hidden_ND, eps), weight_D, out=out)


def _norm_backward(dy_ND: Tensor, hidden_ND: Tensor, weight_D: Tensor, eps: float, past_ND: Tensor) -> Tensor:
    """The gradient of RMSNorm's input, plus that of the residual connection (`past`)."""
    inverse_N1 = _inverse_rms(hidden_ND, eps)
    dy_ND = dy_ND * weight_D
    along_N1 = (dy_ND * hidden_ND).sum(-1, keepdim=True)
    along_N1.mul_(inverse_N1.pow(3)).div_(-hidden_ND.shape[-1])
    return torch.addcmul(past_ND, dy_ND, inverse_N1).addcmul_(hidden_ND, along_N1)


def _attend(
    layer: Layer, group: _Group, rotated_NHE: Tensor, value_NKE: Tensor, keys: Any, values: Any, out: Tensor
) -> list[Tensor]:
    """Attention of one group, written to its tokens of `out`; returns queries, keys, values and probabilities."""
    heads, groups, rows, length = layer.kv_heads, layer.groups, group.rows, group.length
    prefix = 0 if keys is None else keys.shape[1]
    rotated_BLHE = rotated_NHE[group.tokens].unflatten(0, (rows, length))
    query = rotated_BLHE[:, :, : heads * groups].transpose(1, 2).reshape(rows * heads, groups * length, -1)
    total = group.mask.shape[1]
    both = rotated_NHE.new_empty(2, rows, heads, total, layer.head_dim)
    own = rotated_BLHE[:, :, heads * groups :], value_NKE[group.tokens].unflatten(0, (rows, length))
    for side, before, after in zip(both, (keys, values), own, strict=True):
        if prefix:
            side[:, :, :prefix] = before
        side[:, :, prefix : prefix + length] = after.transpose(1, 2)
        side[:, :, prefix + length :] = 0
    key, value = both.flatten(1, 2)
    scores = torch.baddbmm(group.mask, query, key.transpose(1, 2), alpha=layer.scale)
    share = torch.softmax(scores, -1)
    attended = torch.bmm(share, value).view(rows, heads * groups, length, -1).transpose(1, 2)
    width = layer.out.inputs
    out[group.tokens, :width].unflatten(0, (rows, length)).unflatten(2, (heads * groups, -1)).copy_(attended)
    return [query, key, value, share]


def _attend_backward(
    layer: Layer,
    group: _Group,
    saved: Sequence[Tensor],
    dout: Tensor,
    drotated_NHE: Tensor,
    dvalue_NKE: Tensor,
    dprefix: Tensor | None,
) -> None:
    """Writes the gradients of the group's queries, keys and values, and adds to the prefix's."""
    query, key, value, share = saved
    heads, groups, rows, length = layer.kv_heads, layer.groups, group.rows, group.length
    dattended = dout[group.tokens].unflatten(0, (rows, length)).unflatten(2, (heads * groups, -1)).transpose(1, 2)
    dattended = dattended.reshape(rows * heads, groups * length, -1)
    dshare = torch.baddbmm(group.mask, dattended, value.transpose(1, 2), beta=0, alpha=layer.scale)
    dscores = torch._softmax_backward_data(dshare, share, -1, share.dtype)
    dquery = torch.bmm(dscores, key).view(rows, heads * groups, length, -1)
    dkey = torch.bmm(dscores.transpose(1, 2), query).view(rows, heads, -1, layer.head_dim)
    dvalue = torch.bmm(share.transpose(1, 2), dattended).view(rows, heads, -1, layer.head_dim)
    prefix = 0 if dprefix is None else dprefix.shape[2]
    if dprefix is not None:
        dprefix[0] += dkey[:, :, :prefix].sum(0, dtype=dprefix.dtype)
        dprefix[1] += dvalue[:, :, :prefix].sum(0, dtype=dprefix.dtype)
    drotated_BLHE = drotated_NHE[group.tokens].unflatten(0, (rows, length))
    drotated_BLHE[:, :, : heads * groups] = dquery.transpose(1, 2)
    drotated_BLHE[:, :, heads * groups :] = dkey[:, :, prefix : prefix + length].transpose(1, 2)
    dvalue_NKE[group.tokens].unflatten(0, (rows, length)).copy_(dvalue[:, :, prefix : prefix + length].transpose(1, 2))
