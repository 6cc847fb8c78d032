"""Low-rank adapters by PEFT on the project's own transformer."""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

from danube_ray.config import LoraConfig

# Every linear of attention and MLP; embeddings and head stay as they are.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_adapters(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Freeze `model` and put trainable adapters beside its linears."""
    peft = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=TARGETS, bias="none"
    )
    return get_peft_model(model, peft)  # type: ignore[arg-type]


def merge(model: PeftModel, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load trained adapter weights and fold them into the base: the state dict of a plain transformer."""
    missing = trained.keys() - dict(model.named_parameters()).keys()
    if missing:
        raise KeyError(f"the model has no {', '.join(sorted(missing)[:3])}: the adapters are of another model or rank")
    model.load_state_dict(trained, strict=False)
    return model.merge_and_unload().state_dict()
