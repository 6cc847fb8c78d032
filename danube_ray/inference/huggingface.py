"""A Hugging Face folder run by transformers: the reference that every other way to run a model is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import log_softmax

from danube_ray.config import require


class HuggingFaceModel:
    """A `LanguageModel` over a local folder, or over a hub id, which needs a `revision`: a hub name alone can change.

    Code that comes with a model is never run. `dtype` is that of weights and activations; logits are float32.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        from transformers import AutoModelForCausalLM

        local = Path(model).is_dir()
        remedy = "name a commit, or a folder that exists"
        require(local or revision is not None, f"revision of {model}", revision, "a commit of the hub", remedy)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(model),
            revision=revision,
            local_files_only=local,
            trust_remote_code=False,
            dtype=getattr(torch, dtype),
        )
        self._model.to(device).eval()
        config = self._model.config
        eos = config.eos_token_id
        require(eos is not None, f"eos_token_id of {model}", eos, "a token id", "set it in config.json")
        self.vocab_size: int = config.vocab_size
        self.context_length: int = config.max_position_embeddings
        self.eos_id: int = eos[0] if isinstance(eos, list) else eos

    def logits(self, ids: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Next-token logits at every position of one sequence: (T, V) float32; or only at `rows`."""
        return self._forward([ids], rows)[0].cpu().numpy()

    def log_probs(self, batch: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability (nats) of every token but the first of each sequence: (T - 1,) float32 each.

        The batch is one forward pass, padded on the right: a causal model never sees the padding.
        """
        scores = log_softmax(self._forward(batch), dim=-1)
        parts = []
        for row, ids in zip(scores, batch, strict=True):
            labels = torch.tensor(ids[1:], device=row.device)
            parts.append(row[: len(labels)].gather(1, labels[:, None])[:, 0].cpu().numpy())
        return parts

    @torch.inference_mode()
    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> list[int]:
        """New ids after the prompt, as `LanguageModel.generate` says; ends early where the context is full."""
        from transformers import GenerationConfig

        self._check_length(ids)
        if len(ids) == self.context_length:
            return []
        # a configuration of our own: the folder's could carry sampling settings that nobody asked for here
        settings = GenerationConfig(
            max_new_tokens=min(max_tokens, self.context_length - len(ids)),
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0 if temperature > 0 else None,
            repetition_penalty=repetition_penalty,
            eos_token_id=self.eos_id,
            pad_token_id=self.eos_id,
        )
        prompt = torch.tensor([list(ids)], device=self._model.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = self._model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        answer = output[0, len(ids) :].tolist()
        return answer[: answer.index(self.eos_id)] if self.eos_id in answer else answer

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> torch.Tensor:
        """Logits (B, T, V) float32 of sequences padded to the longest; the head computes no more than `rows`."""
        for ids in batch:
            self._check_length(ids)
        longest = max(len(ids) for ids in batch)
        padded = [[*ids, *[self.eos_id] * (longest - len(ids))] for ids in batch]
        kept = 0 if rows is None else torch.tensor(rows, device=self._model.device)  # 0 keeps all of them
        tokens = torch.tensor(padded, device=self._model.device)
        return self._model(tokens, use_cache=False, logits_to_keep=kept).logits.float()

    def _check_length(self, ids: Sequence[int]) -> None:
        allowed = f"1 to the context's {self.context_length}"
        require(0 < len(ids) <= self.context_length, "number of tokens", len(ids), allowed)
