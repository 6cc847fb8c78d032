"""The peer: transformers' Llama or Mistral in a plain torch loop, compiled whole, its loss in the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from danube_ray.config import OptimizerConfig, RunConfig
from danube_ray.model.huggingface import hf_config
from danube_ray.model.transformer import Transformer
from danube_ray.train.protocol import Batch
from tests.benchmarks.gpu.ours import keep_share, optimizer_name


class Peer:
    """Autocast over float32 weights and fused AdamW, as transformers' Trainer sets them up with `bf16=True`.

    It starts with the weights that ours starts with, so first losses and gradient norms can be compared.
    """

    def __init__(
        self, run: RunConfig, device: torch.device, attention: str, *, compiled: bool, optimizer_shards: int = 1
    ) -> None:
        self.run, self.device, self.attention, self.compiled = run, device, attention, compiled
        self.optimizer_shards = optimizer_shards
        torch.manual_seed(run.loop.seed)
        with device:
            weights = Transformer(run.final_model).state_dict()
            self.model = build(run, attention)
        self.model.load_state_dict(weights)
        if run.loop.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
        if compiled:
            self.model.compile(dynamic=False)
        self.optimizer = adamw(self.model, run.optimizer)
        keep_share(self.optimizer, optimizer_shards)

    def train(self, batch: Batch) -> tuple[float | Tensor, float | Tensor]:
        tokens = torch.from_numpy(batch["tokens"]).to(self.device).long()
        parts = tokens.split(self.run.stages[0].micro_batch_size)
        loss = torch.zeros((), device=self.device)
        for part in parts:
            labels = part[:, 1:].contiguous()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.loop.precision != "fp32"):
                # Both names: `labels` asks for the loss, `shift_labels` says that they are shifted already.
                output = self.model(input_ids=part[:, :-1], labels=labels, shift_labels=labels, use_cache=False)
            (output.loss / len(parts)).backward()
            loss += output.loss.detach() / len(parts)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optimizer.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss, norm

    def tensors(self) -> list[Tensor]:
        moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return [*(parameter.detach() for parameter in self.model.parameters()), *moments]

    def facts(self) -> dict[str, Any]:
        return {
            "contestant": f"transformers {type(self.model).__name__}",
            "precision": self.run.loop.precision,
            "attention": self.attention,
            "compile": "the whole model" if self.compiled else "no",
            "activation_checkpointing": self.run.loop.activation_checkpointing,
            "weights": "float32",
            "optimizer": optimizer_name(self.optimizer_shards),
        }


def build(run: RunConfig, attention: str) -> nn.Module:
    """transformers' model of the run's shape, float32, on the default device."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    values = hf_config(run.final_model, torch.float32)
    families = {"llama": (LlamaForCausalLM, LlamaConfig), "mistral": (MistralForCausalLM, MistralConfig)}
    model_class, config_class = families[values["model_type"]]
    config = config_class(**values)
    config._attn_implementation = attention
    return model_class(config).train()


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.min_learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )
