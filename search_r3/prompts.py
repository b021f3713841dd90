"""The conversations (document, query, query with reasoning; perhaps latent steps and reading) and the embed token.

The wording of the direct conversation is the paper's stage 1 (arXiv 2510.07048, section 3); that of the others is
ours. They are saved in every checkpoint and hashed into its embedding contract: a different wording gives a different
embedding space.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from jinja2 import TemplateError

from search_r3.errors import InputError

EMBED_TOKEN = "<|embed_token|>"
"""The token that ends every assistant turn; the hidden state *at* it is the embedding."""


@dataclass(frozen=True)
class Conversation:
    """The conversation that requests an embedding.

    Attributes:
        system: the system message.
        answer: the assistant's text before the embed token if the turn is given rather than generated ("" if the model
            reasons).

    In the paper the turn ends with a full stop after the token. Nothing after the token is ever fed in, so it is
    omitted: the embedding state should not be trained to predict a full stop.
    """

    system: str
    answer: str = ""


@dataclass(frozen=True)
class LatentConversation(Conversation):
    """The conversation of queries that are embedded in latent mode (LaSER, arXiv 2603.01425).

    A latent step feeds a soft token: the vocabulary's input embeddings, weighted by the softmax of the logits at the
    last state. The first follows the given answer, and the embedding is the mean of the states at the soft tokens,
    after the final norm, normalized to unit length. The embed token is not given: the model may emit it softly.

    Attributes:
        steps: number of soft tokens.
    """

    steps: int = 3


@dataclass(frozen=True)
class ReadingConversation(Conversation):
    """The conversation of queries that are embedded together with the first hits of a search (as ANCE-PRF does with
    an encoder, arXiv 2108.13454).

    The user's turn is the query, then each passage after its `marker`, in the order of the search. A passage is a
    document's full text, its title first, cut at `passage_tokens`. The assistant's turn is the given answer. With
    reasoning the same user's turn is in the reasoning conversation instead, so that the reasoning follows the passages.

    Attributes:
        passages: how many passages the checkpoint was trained with, and a search reads by default.
        passage_tokens: the tokens that are read of each passage.
        marker: the text before each passage, in which "#" stands for its number, from 1.
    """

    passages: int = 4
    passage_tokens: int = 48
    marker: str = "\n\n[#]\n"

    def marker_of(self, number: int) -> str:
        """The text before passage `number`."""
        return self.marker.replace("#", str(number))


@dataclass(frozen=True)
class Prompts:
    """The conversations of a checkpoint.

    Attributes:
        document, query: conversations for embedding directly.
        reasoning: the conversation in which a query is reasoned about first.
        latent: the conversation with latent steps; None if the checkpoint has no latent mode.
        reading: the conversation with passages; None if the checkpoint has no reading mode.
    """

    document: Conversation = field(
        default_factory=lambda: Conversation("Please represent documents.", "The embedding is ")
    )
    query: Conversation = field(
        default_factory=lambda: Conversation("Please represent user queries.", "The embedding is ")
    )
    reasoning: Conversation = field(
        default_factory=lambda: Conversation(
            "Please represent user queries. First enrich the query in a few words: its core concepts and how they "
            "relate, key terms with short definitions, synonyms and related terms, connected topics and uses. "
            "Every response must end with the embedding token."
        )
    )
    latent: LatentConversation | None = None
    reading: ReadingConversation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, as written to the checkpoint.

        A conversation that is None is left out, so that the hash of older contracts does not change.
        """
        return {name: talk for name, talk in asdict(self).items() if talk is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Prompts:
        """The inverse of `to_dict`. Raises InputError for a conversation that is missing or malformed."""
        names = [f.name for f in fields(cls) if f.name not in _OPTIONAL]
        try:
            if not isinstance(data, dict):
                raise TypeError(f"found {data!r}")
            made = {name: Conversation(**data[name]) for name in names}
            made |= {name: kind(**data[name]) for name, kind in _OPTIONAL.items() if data.get(name) is not None}
            for conversation in made.values():
                _check(conversation)
            return cls(**made)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise InputError(f"the checkpoint's prompts must have {', '.join(names)}: {error}") from error


_OPTIONAL: dict[str, type[Conversation]] = {"latent": LatentConversation, "reading": ReadingConversation}
"""The conversations that a checkpoint may lack."""


def _check(conversation: Conversation) -> None:
    """Raise TypeError unless every field has its type, and every number is 1 or more."""
    for field_ in fields(conversation):
        value = getattr(conversation, field_.name)
        if field_.type == "str" and not isinstance(value, str):
            raise TypeError(f"{field_.name} must be a string, not {value!r}")
        if field_.type == "int" and not (type(value) is int and value >= 1):
            raise TypeError(f"{field_.name} must be a whole number of 1 or more, not {value!r}")


@dataclass(frozen=True)
class PromptTemplate:
    """A conversation rendered by a chat template and tokenized, with a gap for the user's text.

    Attributes:
        prefix: token ids before the user's text; the same for every text, so an engine computes it once.
        suffix: token ids after it, up to the first token that the assistant writes; ends with the embed token if
            the assistant's turn is given.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


_HOLE = "SEARCHR3USERTEXT"


def latent_conversation(steps: int) -> LatentConversation:
    """The conversation that new adapters with a latent mode get.

    The first soft token stands where the direct conversation has the embed token, which training has made the likely
    next token there: so latent steps begin near the direct embedding.
    """
    system = "Please represent user queries. First think about the query in a few steps without words."
    return LatentConversation(system, "The embedding is", steps)


def with_latent_steps(prompts: Prompts, steps: int) -> Prompts:
    """`prompts` with a conversation in `steps` latent steps; the one that they have, if it has as many. 0: without."""
    if prompts.latent is not None and prompts.latent.steps == steps:
        return prompts
    return replace(prompts, latent=latent_conversation(steps) if steps else None)


def reading_conversation(passages: int = 4, passage_tokens: int = 48) -> ReadingConversation:
    """The conversation that new adapters with a reading mode get."""
    system = (
        "Please represent user queries. Each query is followed by passages that a first search found; some may not "
        "answer it."
    )
    return ReadingConversation(system, "The embedding is ", passages, passage_tokens)


def with_reading(prompts: Prompts, passages: int, passage_tokens: int) -> Prompts:
    """`prompts` with a conversation that reads so many passages of so many tokens; the one that they have, if it does.
    0 passages: without."""
    known = prompts.reading
    if known is not None and (known.passages, known.passage_tokens) == (passages, passage_tokens):
        return prompts
    return replace(prompts, reading=reading_conversation(passages, passage_tokens) if passages else None)


def templates_of(prompts: Prompts, tokenizer: Any) -> dict[str, PromptTemplate]:
    """Every conversation of a checkpoint as token ids, under its name in `Prompts`. Raises InputError as `render`."""
    templates = {
        "document": render(prompts.document, tokenizer, give_answer=True),
        "query": render(prompts.query, tokenizer, give_answer=True),
        "reasoning": render(prompts.reasoning, tokenizer, give_answer=False),
    }
    if prompts.latent is not None:
        templates["latent"] = render(prompts.latent, tokenizer, give_answer=True, embed_token=False)
    if prompts.reading is not None:
        templates["reading"] = render(prompts.reading, tokenizer, give_answer=True)
    return templates


def render(
    conversation: Conversation, tokenizer: Any, *, give_answer: bool, embed_token: bool = True
) -> PromptTemplate:
    """Render `conversation` with the base model's own chat template.

    Args:
        tokenizer: a transformers tokenizer that knows the embed token and has a chat template.
        give_answer: end with the given answer and the embed token (documents, direct queries); otherwise stop where
            the assistant begins to write.
        embed_token: False leaves out the embed token after the given answer (latent steps).

    Raises:
        InputError: the tokenizer has no chat template (the model is not instruction-tuned), or one that takes no
            system message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the base model has no chat template; Search-R3 needs an instruction-tuned model")
    messages = [{"role": "system", "content": conversation.system}, {"role": "user", "content": _HOLE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # some templates refuse a system message
        raise InputError(f"the base model's chat template refuses our conversation: {error}") from error
    if text.count(_HOLE) != 1:
        raise InputError("the base model's chat template must show the user's text once, unchanged; use another base")
    before, _, after = text.partition(_HOLE)
    if give_answer:
        after += conversation.answer + (EMBED_TOKEN if embed_token else "")
    encode = lambda piece: tuple(tokenizer.encode(piece, add_special_tokens=False))  # noqa: E731
    return PromptTemplate(prefix=encode(before), suffix=encode(after))
