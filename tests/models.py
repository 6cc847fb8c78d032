"""Tiny models for tests: a shape, and a Llama folder of random weights by transformers with a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

from danube_ray.config import ModelConfig

# Sizes that FP8's kernels take; weights wide enough for every path to move the logits.
SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=64,
    initializer_range=0.1,
)
TEXT = [
    "The Danube rises in the Black Forest and flows through ten countries to the Black Sea.",
    "A river carries water, sand and stories from the mountains down to the plain.",
    "def add(first: int, second: int) -> int: return first + second",
    "Numbers such as 0, 1, 12, 345 and 6789 stand beside words; so do (brackets) and 'quotes'.",
    "Question: which river is longer? Answer: the Volga is longer than the Danube.",
]


def tiny_model(
    folder: Path,
    *,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    intermediate_size: int = 352,
    context_length: int = 256,
    sliding_window: int | None = None,
    seed: int = 0,
    tied_embeddings: bool = False,
    max_shard_size: str = "1GB",
) -> Path:
    """Write a Hugging Face folder of about 0.5M parameters with its tokenizer, and return it.

    Weights are drawn four times wider than usual, so that logits differ enough to rank tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    tiny_tokenizer(folder)
    shape = {
        "vocab_size": 512,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "initializer_range": 0.08,
        "tie_word_embeddings": tied_embeddings,
    }
    torch.set_num_threads(1)  # of matrices this small, threads only cost
    torch.manual_seed(seed)
    if sliding_window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=sliding_window))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def tiny_tokenizer(folder: Path, vocab_size: int = 512) -> Path:
    """Write a tokenizer folder: BPE with byte fallback, trained on `TEXT`."""
    from danube_ray.data.tokenizer import train_tokenizer

    train_tokenizer(TEXT, folder, vocab_size)
    return folder
