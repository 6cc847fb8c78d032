"""An encoder before and after its training: the folder it starts from, and the graph that a CPU runs."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from danube_ray.config import ConfigError, require
from danube_ray.curate.quality.encoder import GRAPH, TOKENIZER
from danube_ray.curate.quality.settings import EncoderSettings

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
HUB_FILES = ("config.json", "*.safetensors", "tokenizer*", "vocab.txt", "special_tokens_map.json")


def write_base(settings: EncoderSettings, texts: Iterable[str], folder: Path, seed: int) -> None:
    """The Hugging Face folder that training starts from: a local one, the hub's at a commit, or a fresh BERT.

    A fresh one gets a WordPiece vocabulary from `texts`. Its head, and a pretrained one's, give one log-odds.
    Raises `ConfigError` for a base that can't be had or whose context is shorter than `max_tokens`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

    torch.manual_seed(seed)
    if settings.base is None:
        num_pieces = _train_tokenizer(settings, texts, folder)
        config = BertConfig(
            vocab_size=num_pieces,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            intermediate_size=4 * settings.hidden_size,
            max_position_embeddings=settings.max_tokens,
            hidden_dropout_prob=0.0,  # drawing its random numbers takes half of a step's time on a CPU
            attention_probs_dropout_prob=0.0,
        )
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        return
    base = Path(settings.base) if Path(settings.base).is_dir() else _download(settings, folder)
    config = AutoConfig.from_pretrained(base, local_files_only=True, num_labels=1)
    room = getattr(config, "max_position_embeddings", settings.max_tokens)
    require(settings.max_tokens <= room, "EncoderSettings.max_tokens", settings.max_tokens, f"at most {room}")
    model = AutoModelForSequenceClassification.from_pretrained(
        base, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True).backend_tokenizer
    tokenizer.enable_truncation(settings.max_tokens)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / TOKENIZER))


def _train_tokenizer(settings: EncoderSettings, texts: Iterable[str], folder: Path) -> int:
    """BERT's tokenizer with a vocabulary of these texts; how many pieces it has."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import BertProcessing
    from tokenizers.trainers import WordPieceTrainer

    trained = Tokenizer(WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=settings.vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    sep, cls = (SPECIAL.index(name) for name in ("[SEP]", "[CLS]"))
    trained.post_processor = BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    trained.enable_truncation(settings.max_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    trained.save(str(folder / TOKENIZER))
    return trained.get_vocab_size()


def _download(settings: EncoderSettings, folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    assert settings.base is not None
    try:
        kept = folder.parent / "hub"
        return Path(
            snapshot_download(settings.base, revision=settings.revision, local_dir=kept, allow_patterns=list(HUB_FILES))
        )
    except (OSError, ValueError) as error:
        remedy = "name a local folder, or leave it out to train one from its config"
        allowed = f"a model that the hub gives ({error})"
        raise ConfigError("EncoderSettings.base", settings.base, allowed, remedy) from None


def write_graph(folder: Path) -> None:
    """Export the trained encoder in `folder` as the int8 ONNX graph that `Encoder` runs on a CPU.

    Its input is one text without padding, (1, T), so the graph has no attention mask. Weights of the matrix products
    are int8 by output channel, activations are quantized as they come.
    """
    import onnx
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, attn_implementation="eager"
    )

    class LogOdds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.encoder(input_ids=input_ids).logits[:, 0]

    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "model.onnx"
        torch.onnx.export(
            LogOdds().eval(),
            (torch.ones((1, 16), dtype=torch.int64),),
            str(plain),
            input_names=["input_ids"],
            output_names=["log_odds"],
            dynamic_axes={"input_ids": {1: "tokens"}},
            dynamo=False,  # the newer exporter takes seven times as long, and its graph fails the quantizer's checks
        )
        quieter = logging.getLogger()
        level = quieter.level
        quieter.setLevel(logging.ERROR)  # it recommends a preparation that changes nothing here
        try:
            quantized = Path(scratch) / GRAPH
            float32 = {"DefaultTensorType": onnx.TensorProto.FLOAT}
            quantize_dynamic(plain, quantized, per_channel=True, weight_type=QuantType.QInt8, extra_options=float32)
        finally:
            quieter.setLevel(level)
        shutil.move(quantized, folder / GRAPH)
