"""What a model writes while it trains: prompts continued greedily, to be looked at beside the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from danube_ray.config import BOS_ID, EOS_ID
from danube_ray.data.tokenizer import Tokenizer

NEW_TOKENS = 48
BLOCK = 128  # sequences are padded to a multiple, which every attention backend and FP8 kernel can take


@torch.no_grad()
def write_samples(
    module: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], context_length: int
) -> list[dict[str, str]]:
    """Continue each prompt by up to 48 of the likeliest tokens: rows of `prompt` and `continuation`.

    `module` maps tokens (B, T) to logits (B, T, V); the caller's autocast is its precision. Its mode is restored, no
    random number is drawn and no KV cache is kept. Every call makes equally many forward passes, so all ranks can make
    them together where weights are sharded. A prompt that leaves too little room loses its beginning.
    """
    device = next(module.parameters()).device
    most_new = min(NEW_TOKENS, context_length // 2)
    ids = [[BOS_ID, *tokenizer.encode(prompt)][most_new - context_length :] for prompt in prompts]
    ends = torch.tensor([len(row) for row in ids], device=device)  # (B,): where each row's next token goes
    padded = min(-(-(max(map(len, ids)) + most_new) // BLOCK) * BLOCK, context_length)
    tokens = torch.full((len(ids), padded), EOS_ID, device=device)  # (B, T); a causal model never sees the padding
    for row, prompt_ids in zip(tokens, ids, strict=True):
        row[: len(prompt_ids)] = torch.tensor(prompt_ids, device=device)
    rows, was_training = torch.arange(len(ids), device=device), module.training
    module.eval()
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a shape that only samples have
        for new in range(most_new):
            logits = module(tokens)[rows, ends + new - 1]  # (B, V)
            tokens[rows, ends + new] = logits.argmax(dim=-1)
    module.train(was_training)
    return [
        {"prompt": prompt, "continuation": continuation(tokenizer, prompt_ids, row[len(prompt_ids) :][:most_new])}
        for prompt, prompt_ids, row in zip(prompts, ids, tokens.tolist(), strict=True)
    ]


def continuation(tokenizer: Tokenizer, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Text of the new tokens up to the end of the document, as it reads after the prompt."""
    written = new_ids[: new_ids.index(EOS_ID)] if EOS_ID in new_ids else new_ids
    return tokenizer.decode([*prompt_ids, *written])[len(tokenizer.decode(prompt_ids)) :]
