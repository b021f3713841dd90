"""Writers of synthetic training data and their budget: the protocol, and a local causal language model.

A writer answers prompts in order and never raises for a single bad answer, only if continuing is pointless. The other
writer, an LLM behind an endpoint, is in `endpoint_writer`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from search_r3.errors import InputError

CHARACTERS_A_TOKEN = 4
"""Characters per token of English text, used if tokens are not counted (OpenAI's rule of thumb)."""
_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to be answered, in at most `max_tokens` tokens.

    `opening` is how a correct answer begins. A local model's answer is prefilled with it, since small models forget the
    form; endpoints do not support this and get only the instruction.
    """

    system: str
    user: str
    max_tokens: int
    opening: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply; `cut_off` says that it reached the token limit."""

    text: str
    cut_off: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A prompt without a reply: `reason` is counted in the manifest, `detail` is shown to the user."""

    reason: str
    detail: str = ""


@dataclass(slots=True)
class Usage:
    """Number of calls and of input and output tokens; `estimated` counts calls whose tokens were not reported."""

    calls: int = 0
    input: int = 0
    output: int = 0
    estimated: int = 0


class Writer(Protocol):
    """Answers prompts. `batch` is the preferred number of documents per call of `write`."""

    name: str
    batch: int
    usage: Usage

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines a reply, without key, address or path."""
        ...

    def write(self, prompts: Sequence[Prompt]) -> list[Reply | Failure]:
        """One reply or failure per prompt, in order.

        Raises:
            InputError: the writer is not available.
        """
        ...


class LocalWriter:
    """A local causal language model with a chat template, run by Search-R3's own engine.

    Args:
        model: a loaded SearchR3 model; only its text generation is used.
        temperature: 0 is greedy decoding.
        batch_size: prompts generated together.
    """

    def __init__(self, model: Any, *, temperature: float = 0.7, seed: int = 0, batch_size: int = 16) -> None:
        if not 0 <= temperature <= 2:
            raise InputError(f"temperature must be between 0 and 2, got {temperature}")
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, got {batch_size}")
        self.model = model
        self.name = model.name
        self.batch = batch_size
        self.usage = Usage()
        self.temperature, self.seed = temperature, seed

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "writer": "local",
            "model": self.name,
            "contract_hash": self.model.contract_hash,
            "dtype": self.model.dtype,
            "temperature": self.temperature,
            "batch_size": self.batch,
        }

    def write(self, prompts: Sequence[Prompt]) -> list[Reply | Failure]:
        """See `Writer.write`. The same prompts in the same call give the same replies."""
        groups: dict[tuple[str, int, str], list[int]] = {}
        for number, prompt in enumerate(prompts):
            groups.setdefault((prompt.system, prompt.max_tokens, prompt.opening), []).append(number)
        answers: dict[int, Reply | Failure] = {}
        for (system, max_tokens, opening), numbers in groups.items():
            replies = self._write(system, [prompts[number].user for number in numbers], max_tokens, opening)
            answers.update(zip(numbers, replies, strict=True))
        return [answers[number] for number in range(len(prompts))]

    def _write(self, system: str, users: Sequence[str], max_tokens: int, opening: str) -> list[Reply | Failure]:
        from search_r3.model.searchr3 import encode_as_text
        from search_r3.prompts import Conversation, render

        tokenizer = self.model.tokenizer
        frame = render(Conversation(system), tokenizer, give_answer=False)
        begun = tokenizer.encode(opening, add_special_tokens=False) if opening else []
        rows = [[*ids, *frame.suffix, *begun] for ids in encode_as_text(tokenizer, users)]
        config = self.model.checkpoint.model.config.get_text_config()
        room = getattr(config, "max_position_embeddings", 1 << 30) - len(frame.prefix) - max_tokens - 1
        fitting = [i for i, row in enumerate(rows) if len(row) <= room]
        answers: list[Reply | Failure] = [Failure("too long for the model", "lower --max-chars") for _ in rows]
        if fitting:
            key = "\0".join((str(self.seed), system, *users)).encode("utf-8", "replace")
            written = self.model.engine.generate(
                frame.prefix,
                [rows[i] for i in fitting],
                max_new_tokens=max_tokens,
                temperature=self.temperature,
                seed=int.from_bytes(hashlib.blake2b(key, digest_size=6).digest()),
                batch_size=self.batch,
                progress=None,
            )
            for i, generation in zip(fitting, written, strict=True):
                self.usage.calls += 1
                self.usage.input += len(frame.prefix) + len(rows[i])
                self.usage.output += len(generation.token_ids)
                text = opening + tokenizer.decode(generation.token_ids, skip_special_tokens=True)
                cut_off = len(generation.token_ids) >= max_tokens
                answers[i] = Reply(without_thinking(text), cut_off)
        return answers


@dataclass(frozen=True, slots=True)
class Budget:
    """A spending limit in tokens or money, or none. Prices are per million tokens, in any one currency."""

    tokens: int | None = None
    """Input and output tokens together."""
    cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "cost"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"the budget must be above 0, got {value}")
        for name in ("price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name} must be 0 or more, got {value}")
        if (self.price_in is None) != (self.price_out is None):
            raise InputError("give both prices, --price-in and --price-out, or neither")
        if self.cost is not None and self.price_in is None:
            raise InputError("a budget in money requires the prices: give --price-in and --price-out")

    def cost_of(self, tokens_in: int, tokens_out: int) -> float | None:
        """In the prices' currency; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def allows(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether this total usage is within the budget."""
        if self.tokens is not None and tokens_in + tokens_out > self.tokens:
            return False
        return self.cost is None or (self.cost_of(tokens_in, tokens_out) or 0) <= self.cost


def count_characters(text: str) -> int:
    """The approximate number of tokens in a text, by its length."""
    return -(-len(text) // CHARACTERS_A_TOKEN)


def token_counter(model: str) -> Callable[[str], int]:
    """A function that counts the tokens of a text with a local model's tokenizer; `model` is named as `--local` names
    one.

    Raises:
        InputError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    from search_r3.model.resolve import resolve
    from search_r3.model.searchr3 import encode_as_text

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(model), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{model} has no tokenizer that transformers can read ({str(error).splitlines()[0]})"
        ) from error
    return lambda text: len(encode_as_text(tokenizer, [text])[0])


def without_thinking(text: str) -> str:
    """A reply without a leading <think>...</think> block."""
    return _THINKING.sub("", text, count=1)
