"""The embedding contract: everything that two embeddings must have in common to be comparable.

These are the weights, the embed token, the conversations, the pooling and the dimension. The contract's hash is stored
in every index and cache. What concerns documents alone is its document space: an index can be searched by every model
of the same one, such as a query adapter, whose queries go through other weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from search_r3.errors import InputError
from search_r3.prompts import EMBED_TOKEN, Prompts

FORMAT = 5
HASHED_FORMAT = 1
"""The format whose fields are hashed. It does not change, so that a contract keeps its hash, and its indexes stay
valid, when `migrate` converts it to a newer format. A new field may be hashed only if older formats could not express
it."""
POOLING = "l2(last_hidden_state[embed_token])"


@dataclass(frozen=True)
class Contract:
    """What two embeddings must have in common to be comparable.

    Attributes:
        base: the name under which the base model is loaded; not hashed.
        base_weights: SHA-256 of the base's tensors.
        adapter_weights: SHA-256 of the adapter's tensors; "" for an untrained base. Of a query adapter, those of the
            adapter that embeds the documents.
        embed_token_id: the id of `EMBED_TOKEN` in this model's vocabulary.
        dimension: the dimension of an embedding.
        prompts: the conversations.
        chat_template: SHA-256 of the tokenizer's chat template.
        pooling: how the hidden states become one vector.
        fold_capitals: texts all in capitals are changed to ordinary case before they are tokenized, see
            `search_r3.model.capitals`. Added in format 2; a record without it means False.
        query_weights: SHA-256 of a query adapter's tensors; "" if queries go through the weights of documents. Added
            in format 3.
        query_normalizer: SHA-256 of the file by which queries are corrected before they are tokenized, see
            `search_r3.model.query_normalizer`; "" if they are not. Added in format 4.
        query_projection: SHA-256 of the matrix by which the embeddings of queries are mapped, see
            `search_r3.model.query_projection`; "" if they are not. Added in format 5.
        format: the format of this record.
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
    query_weights: str = ""
    query_normalizer: str = ""
    query_projection: str = ""
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the contract without `base`. Embeddings are comparable if and only if it is equal."""
        record = self.to_dict() | {"format": HASHED_FORMAT}
        del record["base"]
        return _sha256(record)

    @property
    def states_hash(self) -> str:
        """`hash` without the query projection, which comes after the model: what files made of its weights name."""
        return replace(self, query_projection="").hash

    @property
    def document_space(self) -> str:
        """SHA-256 (hex) of all that the embedding of a document depends on.

        Models with the same document space can search the same indexes, however their queries are embedded.
        """
        names = ("base_weights", "adapter_weights", "embed_token_id", "dimension", "chat_template", "pooling",
                 "fold_capitals")  # fmt: skip
        return _sha256({name: getattr(self, name) for name in names} | {"document": asdict(self.prompts.document)})

    def to_dict(self) -> dict[str, Any]:
        """The contract as JSON values, for `from_dict`.

        A field with the default value that older formats assume is left out, and the record states the oldest format
        that can express the contract: so existing contracts keep their hash and older versions can read them.
        """
        record = {k: v for k, v in self.__dict__.items() if k != "prompts"} | {"format": self._oldest_format()}
        for name in ("fold_capitals", "query_weights", "query_normalizer", "query_projection"):
            if not record[name]:
                del record[name]
        return record | {"prompts": self.prompts.to_dict(), "embed_token": EMBED_TOKEN}

    def _oldest_format(self) -> int:
        newest = {
            5: self.query_projection, 4: self.query_normalizer, 3: self.query_weights, 2: self.fold_capitals
        }  # fmt: skip
        return next((version for version, value in newest.items() if value), 1)

    @classmethod
    def from_dict(cls, record: dict[str, Any], where: str) -> Contract:
        """Read a record of this format or an older one.

        Raises:
            InputError: the record is malformed or newer; the message names `where`.
        """
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
    """Convert a contract's record of this format or an older one to `FORMAT`, as a new dictionary.

    Raises:
        InputError: the format is newer or invalid; the message names `where`.
    """
    record, version = dict(record), record.get("format", 0)
    if version > FORMAT:
        raise InputError(
            f"{where} was written by a newer Search-R3 (format {version}, this one reads up to {FORMAT}); "
            "upgrade it: pip install -U search-r3"
        )
    if version < 0:
        raise InputError(f"{where}: format is {version}; the checkpoint is damaged, download it again")
    for older in range(version, FORMAT):
        record = _STEPS[older](record) | {"format": older + 1}
    return record


def _from_0(record: dict[str, Any]) -> dict[str, Any]:
    """Records without a format did not name the pooling, because there was only one."""
    return {"pooling": POOLING, "chat_template": ""} | record


def _sha256(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_0, 1: dict, 2: dict, 3: dict, 4: dict}
"""Format -> the function that converts a record to the next format."""
_TYPES: dict[str, type] = {
    **dict.fromkeys(
        (
            "base",
            "base_weights",
            "adapter_weights",
            "query_weights",
            "query_normalizer",
            "query_projection",
            "chat_template",
            "pooling",
        ),
        str,
    ),
    **dict.fromkeys(("embed_token_id", "dimension", "format"), int),
}
_NAMES = {str: "a text", int: "a whole number"}
