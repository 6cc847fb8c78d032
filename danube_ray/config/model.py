"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass

from danube_ray.config.check import require, require_positive

# `<unk>`, `<s>` and `</s>`, as in Llama's and Mistral's models. Shards, training and exported folders count on them.
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama or Mistral decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases, untied head.

    Args:
        vocab_size: pieces of the tokenizer.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: attention and MLP each.
        num_heads: of queries.
        num_kv_heads: of keys and values; a divisor of the heads.
        head_dim: width of a head; even.
        context_length: tokens of the longest sequence.
        sliding_window: a query sees itself and the `sliding_window - 1` tokens before it, as in Mistral; None: all.
        rope_theta: RoPE's base.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of new weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        require_positive(self, "num_kv_heads", "head_dim", "context_length", "rope_theta", "rms_norm_eps")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "ModelConfig.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
            "query heads share key-value heads in equal groups",
        )
        require(self.head_dim % 2 == 0, "ModelConfig.head_dim", self.head_dim, "even", "RoPE rotates pairs")
        if self.sliding_window is not None:
            require_positive(self, "sliding_window")
            require(
                self.sliding_window <= self.context_length,
                "ModelConfig.sliding_window",
                self.sliding_window,
                f"at most context_length={self.context_length}",
                "leave it out: a longer window hides nothing",
            )

    @property
    def num_layer_linear_parameters(self) -> int:
        """Weights of one layer's attention and MLP projections: those that FP8 computes."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, embeddings and head included."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        embeddings = 2 * self.vocab_size * self.hidden_size
        return embeddings + norms + self.num_layers * self.num_layer_linear_parameters

    @property
    def usable_context(self) -> int:
        """The longest context for what ignores a sliding window, as llama.cpp does: the window ends it."""
        return min(self.context_length, self.sliding_window or self.context_length)

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOP per token (forward and backward): 6 per matmul weight plus causal, window-aware attention.

        The input embedding is a look-up and counts nothing. A query at position t scores min(t + 1, window) keys;
        both attention products cost 2 FLOP a multiply-add forward and twice that backward: 12 * heads * head_dim a key.
        """
        window = min(self.sliding_window or sequence_length, sequence_length)
        mean_keys = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
        matmul = self.num_layers * self.num_layer_linear_parameters + self.vocab_size * self.hidden_size
        return 6 * matmul + 12 * self.num_layers * self.num_heads * self.head_dim * mean_keys
