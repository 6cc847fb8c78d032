"""Low-rank adapters by PEFT on the project's own transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
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


def load_adapters(model: PeftModel, trained: dict[str, torch.Tensor]) -> PeftModel:
    """Put trained adapter weights into `model`, which may be on "meta": they come with their device and dtype."""
    missing = trained.keys() - dict(model.named_parameters()).keys()
    if missing:
        raise KeyError(f"the model has no {', '.join(sorted(missing)[:3])}: the adapters are of another model or rank")
    model.load_state_dict(trained, strict=False, assign=True)
    return model


def merge(model: PeftModel, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load trained adapter weights and fold them into the base: the state dict of a plain transformer."""
    return load_adapters(model, trained).merge_and_unload().state_dict()


def save_adapters(model: PeftModel, base: Path, folder: Path) -> None:
    """Write the adapters alone as PEFT's files, the settings last; our modules' names are those of transformers.

    `PeftModel.from_pretrained` puts them on the Hugging Face folder `base`, which the settings name.
    """
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.task_type = str(base), TaskType.CAUSAL_LM
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's model card: a form with nothing filled in
