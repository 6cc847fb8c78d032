"""LoRA adapters of tiny models for tests, as PEFT saves them, and what they come to when merged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from danube_ray.posttrain.lora import TARGETS


def tiny_adapter(base: Path, folder: Path, *, seed: int, merged: Path | None = None, **settings: Any) -> Path:
    """Write an adapter of random weights to `folder`, and the merged model with its tokenizer to `merged`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, **settings}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**config, init_lora_weights=False)
    )
    model.save_pretrained(folder)
    if merged is not None:
        model.merge_and_unload().save_pretrained(merged)
        for file in base.glob("tokenizer*"):
            shutil.copy(file, merged)
    return folder
