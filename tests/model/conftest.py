"""A tiny model loaded once, and a tiny adapter on it, trained by nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from search_r3 import SearchR3


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def save_adapter() -> Callable[..., Path]:
    """Write a random adapter (LoRA on all linear layers plus the embed token's row) with golden vectors."""

    def save(base: Path, folder: Path, seed: int = 0) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model

        from search_r3.model import checkpoint

        loaded = checkpoint.load_base(base, dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings = LoraConfig(
                r=2,
                target_modules="all-linear",
                init_lora_weights=False,
                trainable_token_indices=[loaded.contract.embed_token_id],
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(loaded.model, settings)
            for name, weight in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    torch.nn.init.normal_(weight, std=0.5)
        checkpoint.save_adapter(model, loaded.contract, folder)
        SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "tiny-adapter")
