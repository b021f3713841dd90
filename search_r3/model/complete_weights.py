"""Loading models whose files hold every weight, and refusing others.

If the files lack a weight, or hold it in another shape, transformers and PEFT initialize it at random and only log it:
two loads of one folder would then be two models with one contract.
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
"""Weights that a message names, at most."""
MISSING = re.compile(r"^(\S.*?)\s*\|\s*(?:\x1b\[[\d;]*m)*MISSING", re.MULTILINE)
"""A line of transformers' report of what it loaded."""
_watching = threading.Lock()


def load_causal_lm(folder: Path, dtype: Any, **settings: Any) -> Any:
    """transformers' causal language model of `folder`. No code of the folder is run.

    Args:
        dtype: the torch dtype of the weights.
        settings: further arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        InputError: the files lack weights of the model, or hold some in another shape.
        OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError: what transformers raises.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # its types lack output_loading_info
    model, found = auto.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        **settings,
    )
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise InputError(
            f"{folder}: {name} is {tuple(stored)} in the files, and {tuple(expected)} by config.json; the checkpoint "
            "is damaged, download it again"
        )
    refuse_missing(folder, found["missing_keys"])  # an output matrix that is tied to the embeddings is not among them
    return model


def check_adapter(model: Any, file: Path) -> None:
    """Raise InputError unless `file` holds all of a PEFT model's adapter."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        stored = set(tensors.keys())
    refuse_missing(file.parent, get_peft_model_state_dict(model, save_embedding_layers=False).keys() - stored)


def refuse_missing(folder: str | Path, names: Collection[str]) -> None:
    """Raise InputError if there are any `names`, of weights that the files of `folder` lack."""
    if names:
        named = ", ".join(sorted(names)[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
        raise InputError(f"{folder} is incomplete: its files lack weights of the model ({named}); download it again")


@contextmanager
def watched_loading(folder: str | Path) -> Iterator[None]:
    """For models that another library loads through transformers: refuse those whose files lack weights.

    There transformers only logs which weights it initialized, so its log is read. A pooler may be missing: pooling by
    the mean or by one token's state does not use it. Loads inside are serialized.

    Raises:
        InputError: weights were missing.
    """
    logger, found = logging.getLogger("transformers.modeling_utils"), set[str]()

    def take(record: logging.LogRecord) -> bool:
        found.update(MISSING.findall(record.getMessage()))
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
    refuse_missing(folder, {name for name in found if "pooler" not in name.split(".")})
