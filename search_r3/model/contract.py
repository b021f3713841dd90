"""The embedding contract: everything that two embeddings must share to be compared.

The weights, the token, the conversations, the pooling and the dimension. Its hash goes into every index and cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from search_r3.errors import InputError
from search_r3.prompts import EMBED_TOKEN, Prompts

FORMAT = 2
HASHED_FORMAT = 1
"""The format whose fields are hashed. It stays the same: a contract that `migrate` brought to a newer format keeps its
hash, and so its indexes. A field of a newer format may enter the hash only if older formats could not express it."""
POOLING = "l2(last_hidden_state[embed_token])"


@dataclass(frozen=True)
class Contract:
    """What two embeddings must have in common to be compared.

    Attributes:
        base: the base model's name, by which it is loaded again; not hashed.
        base_weights: SHA-256 over the base's tensors.
        adapter_weights: SHA-256 over the adapter's tensors; "" for an untrained base.
        embed_token_id: the id of `EMBED_TOKEN` in this model's vocabulary.
        dimension: the length of an embedding.
        prompts: the conversations.
        chat_template: SHA-256 of the tokenizer's chat template.
        pooling: how the hidden states become one vector.
        fold_capitals: texts all in capitals are brought to ordinary case before they are tokenized, see
            `search_r3.model.capitals`. From format 2 on; a record without it means False.
        format: the version of this record.
    """

    base: str
    base_weights: str
    adapter_weights: str
    embed_token_id: int
    dimension: int
    prompts: Prompts = field(default_factory=Prompts)
    chat_template: str = ""
    pooling: str = POOLING
    fold_capitals: bool = False
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the contract without the display name: equal if and only if the spaces are the same."""
        record = self.to_dict() | {"format": HASHED_FORMAT}
        del record["base"]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record; `from_dict` reads it back.

        What has a default in every older format is left out, and the format is the oldest that expresses the rest: so
        contracts of today keep their hash, and older versions read them.
        """
        record = {k: v for k, v in self.__dict__.items() if k != "prompts"} | {"format": self._oldest_format()}
        if not self.fold_capitals:
            del record["fold_capitals"]
        return record | {"prompts": self.prompts.to_dict(), "embed_token": EMBED_TOKEN}

    def _oldest_format(self) -> int:
        return 2 if self.fold_capitals else 1

    @classmethod
    def from_dict(cls, record: dict[str, Any], where: str) -> Contract:
        """Read a record of this format or an older one. Raises InputError, which names `where`, if it is malformed or
        newer."""
        for name, kind in _TYPES.items():
            value = record.get(name, kind())
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{where}: {name} is {value!r}, not {_NAMES[kind]}; the checkpoint is damaged")
        if not isinstance(folds := record.get("fold_capitals", False), bool):
            raise InputError(f"{where}: fold_capitals is {folds!r}, not true or false; the checkpoint is damaged")
        record = migrate(record, where)
        if record.pop("embed_token", EMBED_TOKEN) != EMBED_TOKEN:
            raise InputError(f"{where}: the embed token must be {EMBED_TOKEN}")
        try:
            return cls(**record | {"prompts": Prompts.from_dict(record["prompts"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{where} is not an embedding contract: {error}") from error


def migrate(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A contract's record of any format up to this one as a record of `FORMAT`, a step at a time; a new dictionary.

    Raises:
        InputError: a newer or impossible format; `where` is named in it.
    """
    record, found = dict(record), record.get("format", 0)
    if found > FORMAT:
        raise InputError(
            f"{where} was written by a newer Search-R3 (format {found}, this one reads up to {FORMAT}); "
            "upgrade it: pip install -U search-r3"
        )
    if found < 0:
        raise InputError(f"{where}: format is {found}; the checkpoint is damaged, download it again")
    for older in range(found, FORMAT):
        record = _STEPS[older](record) | {"format": older + 1}
    return record


def _from_0(record: dict[str, Any]) -> dict[str, Any]:
    """Records without a format did not name the pooling: there was only one."""
    return {"pooling": POOLING, "chat_template": ""} | record


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_0, 1: dict}
"""Format -> the step to the next one."""
_TYPES: dict[str, type] = {
    **dict.fromkeys(("base", "base_weights", "adapter_weights", "chat_template", "pooling"), str),
    **dict.fromkeys(("embed_token_id", "dimension", "format"), int),
}
_NAMES = {str: "a text", int: "a whole number"}
