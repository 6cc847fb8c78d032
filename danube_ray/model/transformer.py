"""The Danube transformer, in one file: RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases, untied head.

Modules and weights carry the names of Hugging Face's Llama and Mistral, so a checkpoint is a Hugging Face checkpoint
and PEFT finds its targets. Legend: B batch, T time, E hidden size, H query heads, K kv heads, D head dim, F ffn,
V vocabulary.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danube_ray.config import AttentionBackend, ModelConfig, require
from danube_ray.model.attention import BACKENDS, Attend, prepare
from danube_ray.model.functional import Rotation, cross_entropy_sum, logit_gradient, rms_norm, rotate, swiglu
from danube_ray.model.projections import Project, separate


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (Zhang & Sennrich, 2019).

    Returns x's dtype, or autocast's where it is on: the linears that read the result would each cast and keep a copy.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return rms_norm(x.float(), self.weight.float(), self.epsilon).to(dtype)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # or training could not use what inference has made
def rotation(sequence_length: int, head_dim: int, theta: float, device: torch.device) -> Rotation:
    """RoPE's angles: pair d of D/2 turns by position * theta^(-2d/D) radians (Su et al., 2021).

    Made in fp32 when first asked for, and no buffer, which every dtype cast, meta device and state dict would have to
    be kept from. Attention sees only differences of positions, so each window starts at 0.
    """
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    position = torch.arange(sequence_length, device=device, dtype=torch.float32)
    angle = position[:, None, None] * theta ** (-pair / head_dim)  # (T, 1, D/2)
    return torch.cat((angle.cos(), angle.cos()), dim=-1), torch.cat((-angle.sin(), angle.sin()), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.project: Project = separate
        self.rotate = rotate

    def forward(self, x: Tensor, by: Rotation, attend: Attend) -> Tensor:
        projected = self.project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)  # (B, T, H, D), (B, T, K, D) twice
        q, k = self.rotate(q, by), self.rotate(k, by)
        if x.is_cpu:
            # CPU kernels take fp32 two to three times as fast as bf16 here, so autocast stops at the projections.
            with torch.autocast("cpu", enabled=False):
                heads = attend(q, k, v.float())
        else:
            heads = attend(q.to(v.dtype), k.to(v.dtype), v)
        return self.o_proj(heads.flatten(2).to(v.dtype))  # (B, T, E)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.project: Project = separate
        self.activate = swiglu

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x, self.gate_proj, self.up_proj)  # (B, T, F) each
        return self.down_proj(self.activate(gate, up))  # (B, T, E)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, by: Rotation, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), by, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Tokens to normed hidden states: everything below the head.

    `config` may be replaced between steps by one with another window or RoPE base (a stage's), `attention` by another
    backend: each forward pass reads them. With `checkpoint_layers` set, a layer keeps only its input for the backward
    pass, and computes the rest again there.
    """

    def __init__(self, config: ModelConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.config = config
        self.attention: AttentionBackend = attention
        self.checkpoint_layers = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        config, sequence_length = self.config, tokens.shape[1]
        by = rotation(sequence_length, config.head_dim, config.rope_theta, tokens.device)
        x = self.embed_tokens(tokens)  # (B, T, E)
        attend = prepare(self.attention, config, x, document_ids)
        for layer in self.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, by, attend, use_reentrant=False)
            else:
                x = layer(x, by, attend)
        return self.norm(x)


class Head(nn.Linear):
    """Hidden states to logits, or to the loss of their labels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.logit_gradient = logit_gradient

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(input)  # (B, T, V)
        return cross_entropy_sum(input, self.weight, labels, self.logit_gradient)


class Transformer(nn.Module):
    """Next-token logits of a Danube model, or their loss.

    Weights start as N(0, initializer_range); the projections that write into the residual stream are scaled down by
    1/sqrt(2 * num_layers), so that its variance at the top does not grow with depth (GPT-2, section 2.3). On the meta
    device the model has shapes and no values.
    """

    def __init__(self, config: ModelConfig, attention: AttentionBackend = "auto") -> None:
        super().__init__()
        require(attention in ("auto", *BACKENDS), "attention", attention, f"auto, {', '.join(BACKENDS)}")
        self.config = config
        self.model = Decoder(config, attention)
        self.lm_head = Head(config)
        self.reset_parameters()

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) after each of `tokens` (B, T), int64. `document_ids` (B, T) keep packed texts apart.

        With `labels` (B, T), int64, the sum of their cross-entropy in nats instead, an fp32 scalar; -100 is not
        trained. The logits never exist at once, and no upstream gradient but a scalar's is possible.
        """
        length, limit = tokens.shape[1], self.config.context_length
        require(length <= limit, "sequence length", length, f"at most the model's context_length={limit}")
        return self.lm_head(self.model(tokens, document_ids), labels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every weight anew from torch's global generator."""
        deviation = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # norms
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(0.0, deviation / math.sqrt(2 * self.config.num_layers))
            else:
                parameter.normal_(0.0, deviation)
