"""How much memory one GPU needs for a training step, by a formula over the model's sizes and the recipe's lengths.

It counts what the forward pass (`policy`, `losses`) keeps for the backward pass, tensor by tensor; `dry_run` compares
it with the measured memory of a cut model's step. Not counted: torch's context (about 0.5 GB), fragmentation, and the
evaluations between steps.

Letters: N tokens of a backbone call with their padding, L of one row, P of the shared prefix, D hidden size, A width of
all query heads, K of all key heads, F of the MLP, R rank of LoRA, V tokens of the vocabulary, T positions with logits;
c bytes of a product's operand: 2 under bf16 autocast, else 4. The frozen base has 4 bytes a weight, or 2
(base_dtype: bfloat16); what is trained, the residual stream and the optimizer are float32.

    layer     N (8 D + g c D + c A (3 + 2 (P + L) / L) + 4 c F + 7 c R)
              8 D: the residual stream at both norms; g: inputs of LoRA's A matrices, 5 copies where they are cast
              (q, k, v, gate, up), 2 where they are not; 3 A: queries, what attention gives, and that again before the
              output matrix; 2 A (P + L) / L: keys and values of every query head, of the prefix too; F: gate, silu,
              up, their product. Eager attention keeps heads (P + L) (4 + c) for each token on top.
    cast      c x the backbone's matrices for each backbone call that the graph holds: autocast makes a bf16 copy of a
              frozen float32 matrix at every call, and its backward pass keeps it. Nothing without autocast, nor of a
              base that is bfloat16 already.
    calls     one for the prefix of each conversation and one for each mini-batch of rows; with activation_checkpointing
              only one at a time, recomputed in the backward pass, when the logits are freed; and the prefixes' keys and
              values.
    logits    SFT: T V (2 c + 16), T over both conversations: the logits, the base's, log-softmax for the cross-entropy,
              and log-softmax, softmax and difference for the KL; beside them 20 T V of the larger conversation while
              its KL is computed. GRPO: T V (2 c + 4), and 8 T V of gradients.
    backward  the gradient of a layer's inner tensors, about one layer's activations of one call.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        layers, hidden, heads, kv_heads, head_size, width: of the decoder (`width` is the MLP's).
        vocabulary: tokens that have logits.
        parameters: of the base, in all.
        matrices: parameters of the decoder's linear layers, without embeddings and head.
        trainable: parameters that are trained.
        rank: of LoRA.
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
    """A conversation of a step: rows after one prefix.

    Attributes:
        rows: how many.
        tokens: of a row, padding included.
        prefix: tokens of the shared prefix.
        answers: positions with logits, of all rows together.
    """

    rows: int
    tokens: int
    prefix: int
    answers: int = 0

    @property
    def all_tokens(self) -> int:
        """Of the prefix once, and of the rows."""
        return self.prefix + self.rows * self.tokens


@dataclass(frozen=True)
class Conditions:
    """What a step's memory depends on beside the model and the rows.

    Attributes:
        chunk: rows of a backbone call.
        activation_checkpointing: see `policy.Policy`.
        autocast: products in bf16.
        eager: attention that stores its weights.
        stage: "sft" or "grpo", which losses are on the logits.
        base: the base's logits are computed too (a KL).
        weight: bytes of a frozen weight.
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
        """Bytes of a value that is multiplied."""
        return 2 if self.autocast else 4

    @property
    def cast(self) -> int:
        """Bytes of the copy of a frozen weight that autocast makes for a product."""
        return self.operand if self.autocast and self.weight != self.operand else 0


def weights(shape: Shape, how: Conditions) -> int:
    """Bytes of the frozen base and the adapter (float32)."""
    return how.weight * shape.parameters + 4 * shape.trainable


def optimizer(shape: Shape, averaged: bool = False) -> int:
    """Bytes of AdamW's two moments, and of the weights' moving average if they are `averaged`, float32."""
    return (12 if averaged else 8) * shape.trainable


def gradients(shape: Shape, gpus: int = 1) -> int:
    """Bytes of the trainable weights' gradients, float32; DDP's buckets hold them once more."""
    return 4 * shape.trainable * (2 if gpus > 1 else 1)


def layer_bytes(shape: Shape, tokens: int, row: int, prefix: int, how: Conditions) -> int:
    """Bytes that one decoder layer keeps of `tokens` tokens in rows of `row` tokens, after a prefix."""
    c, heads = how.operand, shape.heads * shape.head_size
    copies = 5 if how.autocast else 2
    each = 8 * shape.hidden + copies * c * shape.hidden + c * heads * (3 + 2 * (prefix + row) / row)
    each += 4 * c * shape.width + 7 * c * shape.rank
    if how.eager:
        each += shape.heads * (prefix + row) * (4 + c)
    return round(tokens * each)


def activations(shape: Shape, parts: list[Part], how: Conditions) -> dict[str, int]:
    """Bytes kept for the backward pass: "layers", and "casts" of frozen matrices.

    Of both, "again" is what activation_checkpointing recomputes once the logits are freed; "backward" is what the
    backward pass needs in addition.
    """
    layers = casts = largest = again = 0
    cast = how.cast * shape.matrices
    for part in parts:
        prefix = layer_bytes(shape, part.prefix, part.prefix, 0, how)
        size = min(how.chunk, part.rows)
        largest = max(largest, layer_bytes(shape, size * part.tokens, part.tokens, part.prefix, how))
        if how.activation_checkpointing:
            layers, largest = layers + cache(shape, 1, part.prefix, 4), max(largest, prefix)
        else:
            rows = layer_bytes(shape, part.rows * part.tokens, part.tokens, part.prefix, how)
            layers += shape.layers * (prefix + rows)
            casts += cast * (1 + -(-part.rows // how.chunk))
    if how.activation_checkpointing:
        layers, casts, again = layers + shape.layers * largest, cast, shape.layers * largest + cast
    return {"layers": layers, "casts": casts, "again": again, "backward": largest}


def logits(shape: Shape, parts: list[Part], how: Conditions) -> int:
    """Bytes of the logits and of the losses' tensors over them, at their peak."""
    positions, most = sum(part.answers for part in parts), max((part.answers for part in parts), default=0)
    c, kept = how.operand, 0
    if not positions:
        return 0
    head = how.cast * shape.vocabulary * shape.hidden  # its bf16 copy, as for the other matrices
    calls = sum(part.answers > 0 for part in parts)
    if how.stage == "grpo":
        kept = positions * ((1 + how.base) * c + (4 if how.autocast else 0) + 8)
    else:
        kept = positions * ((1 + how.base) * c + 4 + 12 * how.base) + most * (20 if how.base else 8)
    return kept * shape.vocabulary + head * calls


def live_copy(shape: Shape, how: Conditions, most_copied: int) -> tuple[int, int]:
    """Bytes of the merged copy that samples and encodes, and of the peak while it is made (a copy of the base first).

    Larger models than `most_copied` parameters are used in place.
    """
    if shape.parameters > most_copied:
        return 0, 0
    return how.operand * shape.parameters, weights(shape, how)


def cache(shape: Shape, rows: int, tokens: int, value: int) -> int:
    """Bytes of keys and values of `rows` rows of `tokens` tokens, `value` bytes each."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * rows * tokens * value


def environment(documents: int, hidden: int, value: int, graph_width: int) -> tuple[int, int]:
    """Bytes of the corpus's matrix (on the GPU) and of its versions and graph (in the host's memory)."""
    return documents * hidden * value, documents * (8 + 8 * graph_width)
