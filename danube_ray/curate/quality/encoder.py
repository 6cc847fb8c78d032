"""The BERT encoder at work: int8 by ONNX Runtime on a CPU, torch on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from danube_ray.artifacts import ArtifactError
from danube_ray.curate.quality.calibration import Platt
from danube_ray.curate.quality.model import ENCODER, read_facts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GRAPH = "model.int8.onnx"
TOKENIZER = "tokenizer.json"
# No vocabulary makes tokens this long on average, so what follows in a text can't be among its first tokens.
CHARS_PER_TOKEN = 32
BATCH_TOKENS = 32_768


class Runner(Protocol):
    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """(N,) float64 log-odds of N token sequences."""
        ...


@dataclass(frozen=True, eq=False)
class Encoder:
    """Scores texts by their first `max_tokens` tokens; `platt` makes log-odds probabilities."""

    tokenizer: Tokenizer
    runner: Runner
    max_tokens: int
    platt: Platt | None = None

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) float64 probabilities that texts are good, calibrated."""
        assert self.platt is not None
        return self.platt(self.log_odds(texts))

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) float64, not calibrated."""
        return self.runner(self.tokens(texts))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [text[: self.max_tokens * CHARS_PER_TOKEN] for text in texts]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(cut)]

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Self:
        """The encoder of a quality model's folder on `cpu` or `cuda`. Raises `ArtifactError` where it has none."""
        calibration = read_facts(folder)["encoder_calibration"]
        if calibration is None:
            raise ArtifactError(f"{folder} has no encoder: it was trained with encoder None")
        return cls.of_folder(folder / ENCODER, device, Platt(**calibration))

    @classmethod
    def of_folder(cls, folder: Path, device: str = "cpu", platt: Platt | None = None) -> Self:
        """From a Hugging Face folder with `model.int8.onnx` beside the weights, where `device` is `cpu`."""
        tokenizer, max_tokens = load_tokenizer(folder)
        runner = OnnxRunner(folder / GRAPH) if device == "cpu" else TorchRunner(folder, device)
        return cls(tokenizer, runner, max_tokens, platt)


def load_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """A folder's tokenizer, and the tokens that it cuts texts to."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    truncation = tokenizer.truncation
    assert truncation is not None  # whoever wrote the folder cut it to its model's context
    return tokenizer, truncation["max_length"]


class OnnxRunner:
    """One text at a time, on one thread: nothing is padded, and the scales of dynamic quantization see one text, so a
    score depends on its text alone, whatever is scored beside it.
    """

    def __init__(self, graph: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        rows = (np.array([text], np.int64) for text in texts)
        outputs = [np.asarray(self.session.run(None, {"input_ids": row})[0]) for row in rows]
        return np.array([output.item() for output in outputs], np.float64)


class TorchRunner:
    """Batches of texts of about the same length, padded to the longest: float32 on a CPU, bfloat16 on a GPU."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        self.model, self.device = model.to(device).eval(), device

    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        import torch

        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        scores = np.empty(len(texts))
        start = 0
        while start < len(order):
            longest = len(texts[order[start]])
            batch = order[start : start + max(1, BATCH_TOKENS // longest)]
            tokens = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros(tokens.shape, np.int64)
            for row, index in enumerate(batch):
                tokens[row, : len(texts[index])] = texts[index]
                mask[row, : len(texts[index])] = 1
            with torch.inference_mode():
                ids, seen = torch.from_numpy(tokens).to(self.device), torch.from_numpy(mask).to(self.device)
                scores[batch] = self.model(input_ids=ids, attention_mask=seen).logits[:, 0].double().cpu().numpy()
            start += len(batch)
        return scores
