"""Loads models and refuses those whose files lack weights.

If the files lack a weight, or have it in another shape, transformers and PEFT initialize it at random and only log
that. Two loads of one folder would then be two different models with the same contract.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search_r3.errors import InputError

MAX_NAMED = 3
"""Maximum number of weights that a message names."""
MISSING = re.compile(r"^(\S.*?)\s*\|\s*(?:\x1b\[[\d;]*m)*MISSING", re.MULTILINE)
"""Matches a missing weight in transformers' loading report."""
_watching = threading.Lock()


def load_causal_lm(folder: Path, dtype: Any, **settings: Any) -> Any:
    """The causal language model in `folder`, by transformers. No code from the folder is run.

    Args:
        dtype: the torch dtype of the weights.
        settings: further arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        InputError: the files lack weights of the model, or have some in another shape.
        OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError: raised by transformers.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # its type annotations lack output_loading_info
    model, info = auto.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below
        **settings,
    )
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise InputError(
            f"{folder}: {name} has the shape {tuple(stored)}, but config.json implies {tuple(expected)}; "
            "the checkpoint is damaged, download it again"
        )
    refuse_missing(folder, info["missing_keys"])  # does not contain an output matrix that is tied to the embeddings
    return model


def check_adapter(model: Any, file: Path) -> None:
    """Raise InputError unless `file` has all weights of a PEFT model's adapter."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        stored = set(tensors.keys())
    refuse_missing(file.parent, get_peft_model_state_dict(model, save_embedding_layers=False).keys() - stored)


def refuse_missing(folder: str | Path, names: Collection[str]) -> None:
    """Raise InputError if any `names` are given, which are weights that the files of `folder` lack."""
    if names:
        named = ", ".join(sorted(names)[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
        raise InputError(f"{folder} is incomplete: its files lack weights of the model ({named}); download it again")


@contextmanager
def watched_loading(folder: str | Path) -> Iterator[None]:
    """A context in which another library loads a model through transformers; it refuses models that lack weights.

    Because transformers then only logs which weights it initialized, its log is read. A missing pooler is accepted:
    mean pooling and pooling by one token do not use it. Only one thread at a time can be inside.

    Raises:
        InputError: weights are missing.
    """
    logger, missing = logging.getLogger("transformers.modeling_utils"), set[str]()

    def take(record: logging.LogRecord) -> bool:
        missing.update(MISSING.findall(record.getMessage()))
        return record.levelno >= logging.ERROR

    with _watching:
        level = logger.level
        logger.setLevel(logging.WARNING)
        logger.addFilter(take)
        try:
            yield
        finally:
            logger.removeFilter(take)
            logger.setLevel(level)
    refuse_missing(folder, {name for name in missing if "pooler" not in name.split(".")})
