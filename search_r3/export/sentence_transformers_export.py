"""Make a merged export loadable by `SentenceTransformer(path)`, for direct embedding, using only that library's
modules.

A conversation is the prompt ("document" or "query"), the text, and the given answer with the embed token, which the
tokenizer appends to every text; the last token's state, normalized, is the embedding (https://sbert.net).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.prompts import PromptTemplate

TEXT_TOKENS = 512
"""Tokens that `SearchR3.encode_document` keeps of a text by default."""
SIDES = ("document", "query")
# sentence-transformers reads each module's class from modules.json: 5 knows these names, 6 still does.
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write_modules(folder: Path, model: Any) -> None:
    """Add the files that sentence-transformers needs to a merged model saved to `folder` by `SearchR3.save_pretrained`.

    The tokenizer there is changed: with special tokens it appends the end of the conversation to the text. SearchR3
    never adds special tokens, so it can still load the folder.

    Args:
        model: the SearchR3 model that was saved.

    Raises:
        InputError: the two conversations end differently, or the tokenizer joins texts in a way that a prompt and an
            ending cannot reproduce.
    """
    templates: dict[str, PromptTemplate] = {side: model.templates[side] for side in SIDES}
    if templates["document"].suffix != templates["query"].suffix:
        raise InputError(
            "the document's and the query's conversations end differently; sentence-transformers' prompts "
            "only precede a text, so export with --format safetensors"
        )
    prompts = {side: model.tokenizer.decode(list(template.prefix)) for side, template in templates.items()}
    _append_ending(folder, templates["document"].suffix)
    _check_tokens(folder, model.tokenizer, templates, prompts)
    limit = len(templates["document"].prefix) + TEXT_TOKENS + len(templates["document"].suffix)
    most = getattr(model.checkpoint.model.config, "max_position_embeddings", None)
    files = {
        "modules.json": MODULES,
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {side: prompts[side] for side in SIDES},
            "default_prompt_name": "document",
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {"max_seq_length": min(limit, most or limit), "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": model.dimension,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }
    for name, content in files.items():
        atomic_write_text(folder / name, json.dumps(content, indent=2) + "\n")


def _append_ending(folder: Path, suffix: tuple[int, ...]) -> None:
    """Make the tokenizer append `suffix` whenever special tokens are added."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        raise InputError(
            f"{file} is missing: this model's tokenizer has no fast form; export with --format safetensors"
        )
    backend = Tokenizer.from_file(str(file))
    tokens = [backend.id_to_token(token) for token in suffix]
    names = [
        f"<ending-{number}>" for number in range(len(tokens))
    ]  # not the tokens themselves, which may contain any character
    backend.post_processor = TemplateProcessing(
        single=["$A", *names],
        pair=None,
        special_tokens=[
            {"id": name, "ids": [token], "tokens": [text]}
            for name, token, text in zip(names, suffix, tokens, strict=True)
        ],
    )
    atomic_write_text(file, backend.to_str(pretty=True))
    # A model's own tokenizer class may rebuild its backend and lose the ending; this class keeps it.
    record = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    atomic_write_text(settings, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _check_tokens(folder: Path, ours: Any, templates: dict[str, PromptTemplate], prompts: dict[str, str]) -> None:
    """Check the written tokenizer: prompt and text, as sentence-transformers joins them, must give SearchR3's ids."""
    from transformers import AutoTokenizer

    from search_r3.model.golden import GOLDEN_TEXTS
    from search_r3.model.tokenization import encode_as_text

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = encode_as_text(ours, GOLDEN_TEXTS)
    for side, template in templates.items():
        theirs = tokenizer([prompts[side] + text for text in GOLDEN_TEXTS])["input_ids"]
        if theirs != [[*template.prefix, *row, *template.suffix] for row in rows]:
            raise InputError(
                f"this tokenizer joins the {side} prompt and a text differently from SearchR3, so "
                "sentence-transformers would embed other tokens; export with --format safetensors"
            )
