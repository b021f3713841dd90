"""How much memory one GPU needs for a training step, by a formula over the model's sizes and the recipe's lengths.

It counts, tensor by tensor, what the forward pass (`policy`, `losses`) keeps for the backward pass; `dry_run` compares
it with the measured memory of a step of a cut model. Not counted: torch's context (about 0.5 GB), fragmentation, and
the evaluations between steps.

Letters: N tokens of a backbone call including padding, L tokens of one row, P tokens of the shared prefix, D hidden
size, A total width of the query heads, K of the key heads, F of the MLP, R rank of LoRA, V vocabulary size, T positions
with logits; c bytes per operand of a product: 2 under bf16 autocast, else 4. The frozen base has 4 bytes per weight, or
2 (base_dtype: bfloat16); trained weights, the residual stream and the optimizer are float32.

    layer     N (8 D + g c D + c A (3 + 2 (P + L) / L) + 4 c F + 7 c R)
              8 D: the residual stream at both norms; g: inputs of LoRA's A matrices, 5 copies where they are cast
              (q, k, v, gate, up), 2 where they are not; 3 A: queries, the output of attention, and its copy before the
              output matrix; 2 A (P + L) / L: keys and values of every query head, including the prefix's; F: gate,
              silu, up, and their product. Eager attention also keeps heads (P + L) (4 + c) per token.
    cast      c x the backbone's matrices for each backbone call in the graph: autocast makes a bf16 copy of a frozen
              float32 matrix at every call, and keeps it for the backward pass. 0 without autocast, and for a bfloat16
              base.
    calls     one for the prefix of each conversation and one for each mini-batch of rows; with activation_checkpointing
              only one at a time, recomputed in the backward pass after the logits are freed; the keys and values of the
              prefixes are kept in addition.
    logits    SFT: T V (2 c + 16), T over both conversations: the logits, the base's, log-softmax for the cross-entropy,
              and log-softmax, softmax and difference for the KL; in addition 20 T V of the larger conversation while
              its KL is computed. GRPO: T V (2 c + 4), and 8 T V of gradients.
    backward  the gradients of the tensors inside one layer: about the activations of one layer for one call.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        layers: number of decoder layers.
        hidden: hidden size.
        heads: number of query heads.
        kv_heads: number of key-value heads.
        head_size: dimension of a head.
        width: width of the MLP.
        vocabulary: number of tokens with logits.
        parameters: number of parameters of the base.
        matrices: number of parameters in the decoder's linear layers, without embeddings and head.
        trainable: number of trained parameters.
        rank: rank of LoRA.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    width: int
    vocabulary: int
    parameters: int
    matrices: int
    trainable: int
    rank: int


@dataclass(frozen=True)
class Part:
    """One conversation of a step: rows with a shared prefix.

    Attributes:
        rows: number of rows.
        tokens: tokens per row, including padding.
        prefix: tokens of the shared prefix.
        answers: positions with logits, over all rows.
    """

    rows: int
    tokens: int
    prefix: int
    answers: int = 0

    @property
    def all_tokens(self) -> int:
        """Tokens of all rows, and of the prefix once."""
        return self.prefix + self.rows * self.tokens


@dataclass(frozen=True)
class Conditions:
    """Everything besides model and rows that affects a step's memory.

    Attributes:
        chunk: rows per backbone call.
        activation_checkpointing: see `policy.Policy`.
        autocast: whether products are computed in bf16.
        eager: whether attention stores its probabilities.
        stage: "sft" or "grpo", which decides the losses on the logits.
        base: whether the base's logits are computed too (for a KL).
        weight: bytes per frozen weight.
    """

    chunk: int
    activation_checkpointing: bool
    autocast: bool
    eager: bool
    stage: str
    base: bool
    weight: int = 4

    @property
    def operand(self) -> int:
        """Bytes per operand of a matrix product."""
        return 2 if self.autocast else 4

    @property
    def cast(self) -> int:
        """Bytes per frozen weight of the copy that autocast makes for a product; 0 if it makes none."""
        return self.operand if self.autocast and self.weight != self.operand else 0


def weights(shape: Shape, conditions: Conditions) -> int:
    """Bytes of the frozen base and the adapter (float32)."""
    return conditions.weight * shape.parameters + 4 * shape.trainable


def optimizer(shape: Shape, averaged: bool = False) -> int:
    """Bytes of AdamW's two moments, and of the weights' moving average if they are `averaged`, float32."""
    return (12 if averaged else 8) * shape.trainable


def gradients(shape: Shape, gpus: int = 1) -> int:
    """Bytes of the trainable weights' gradients, float32, and of a second copy in DDP's buckets."""
    return 4 * shape.trainable * (2 if gpus > 1 else 1)


def layer_bytes(shape: Shape, tokens: int, row: int, prefix: int, conditions: Conditions) -> int:
    """Bytes that one decoder layer keeps for `tokens` tokens in rows of `row` tokens after a prefix."""
    c, heads = conditions.operand, shape.heads * shape.head_size
    copies = 5 if conditions.autocast else 2
    each = 8 * shape.hidden + copies * c * shape.hidden + c * heads * (3 + 2 * (prefix + row) / row)
    each += 4 * c * shape.width + 7 * c * shape.rank
    if conditions.eager:
        each += shape.heads * (prefix + row) * (4 + c)
    return round(tokens * each)


def activations(shape: Shape, parts: list[Part], conditions: Conditions) -> dict[str, int]:
    """Bytes kept for the backward pass: "layers", and "casts" of frozen matrices.

    "again" is the part of both that activation_checkpointing recomputes once the logits are freed; "backward" is what
    the backward pass needs in addition.
    """
    layers = casts = largest = again = 0
    cast = conditions.cast * shape.matrices
    for part in parts:
        prefix = layer_bytes(shape, part.prefix, part.prefix, 0, conditions)
        size = min(conditions.chunk, part.rows)
        largest = max(largest, layer_bytes(shape, size * part.tokens, part.tokens, part.prefix, conditions))
        if conditions.activation_checkpointing:
            layers, largest = layers + cache(shape, 1, part.prefix, 4), max(largest, prefix)
        else:
            rows = layer_bytes(shape, part.rows * part.tokens, part.tokens, part.prefix, conditions)
            layers += shape.layers * (prefix + rows)
            casts += cast * (1 + -(-part.rows // conditions.chunk))
    if conditions.activation_checkpointing:
        layers, casts, again = layers + shape.layers * largest, cast, shape.layers * largest + cast
    return {"layers": layers, "casts": casts, "again": again, "backward": largest}


def logits(shape: Shape, parts: list[Part], conditions: Conditions) -> int:
    """Bytes of the logits and of the losses' tensors over them, at their peak."""
    positions, most = sum(part.answers for part in parts), max((part.answers for part in parts), default=0)
    c, kept = conditions.operand, 0
    if not positions:
        return 0
    head = conditions.cast * shape.vocabulary * shape.hidden  # the bf16 copy of the output matrix
    calls = sum(part.answers > 0 for part in parts)
    if conditions.stage == "grpo":
        kept = positions * ((1 + conditions.base) * c + (4 if conditions.autocast else 0) + 8)
    else:
        per_position = (1 + conditions.base) * c + 4 + 12 * conditions.base
        kept = positions * per_position + most * (20 if conditions.base else 8)
    return kept * shape.vocabulary + head * calls


def live_copy(shape: Shape, conditions: Conditions, most_copied: int) -> tuple[int, int]:
    """Bytes of the merged copy that samples and encodes, and of the peak while it is created from a copy of the base.

    Models with more than `most_copied` parameters are used in place.
    """
    if shape.parameters > most_copied:
        return 0, 0
    return conditions.operand * shape.parameters, weights(shape, conditions)


def cache(shape: Shape, rows: int, tokens: int, value: int) -> int:
    """Bytes of the keys and values of `rows` rows of `tokens` tokens, at `value` bytes per number."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * rows * tokens * value


def environment(documents: int, hidden: int, value: int, graph_width: int) -> tuple[int, int]:
    """Bytes of the corpus's matrix (on the GPU), and of its versions and graph (in the host's memory)."""
    return documents * hidden * value, documents * (8 + 8 * graph_width)
