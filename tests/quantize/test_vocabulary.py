from __future__ import annotations

import ctypes
import io
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import tokenizers
from gguf import GGUFReader
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from danube_ray.artifacts import read_json, write_json
from danube_ray.config import ConfigError
from danube_ray.data.tokenizer import Tokenizer, import_tokenizer
from danube_ray.inference.llamacpp import library
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.vocabulary import LLAMA3_SPLIT
from tests.models import SMALL, TEXT, tiny_model, tiny_tokenizer
from tests.quantize.random_model import write_random_model

STRANGE = ["", " ", "two  spaces", "\ttab\nline\n\n", "Żółć 🌊 मानक", "</s> <|prompt|> as text", "I'll, WE'LL 12345 …"]


def llama_ids(gguf_file, texts, special=False):
    """llama.cpp's ids of texts, with the tokens it puts around them."""
    llama = library()
    model = llama.llama_model_load_from_file(str(gguf_file).encode(), llama.llama_model_default_params())
    vocabulary = ctypes.c_void_p(llama.llama_model_get_vocab(model))
    ids, found = (ctypes.c_int32 * 1000)(), []
    for text in texts:
        data, flags = text.encode(), (ctypes.c_bool(True), ctypes.c_bool(special))
        count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), *flags)
        found.append(ids[:count])
    llama.llama_model_free(model)
    return found


def field(path, key):
    return GGUFReader(path).fields[f"tokenizer.ggml.{key}"].contents()


@pytest.mark.parametrize("kept", ["tokenizer.model", "tokenizer.json"])
def test_llama_cpp_tokenizes_as_sentencepiece_does(kept, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    for name in {"tokenizer.model", "tokenizer.json"} - {kept}:
        (folder / name).unlink()
    convert(folder, tmp_path / "model.gguf", "F16")
    tokenizer = Tokenizer.load(model_folder)
    texts = [*TEXT, *STRANGE]
    assert llama_ids(tmp_path / "model.gguf", texts) == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]


@pytest.mark.parametrize("name", [pytest.param("llama2", marks=pytest.mark.slow), "mistral_v1"])
def test_published_tokenizers_need_no_tokenizer_model(name, shared_data, tmp_path):
    folder = write_random_model(tmp_path / "model", replace(SMALL, vocab_size=32_000))
    tokenizer = import_tokenizer(shared_data / "tokenizers" / f"{name}_tokenizer.model", folder)
    (folder / "tokenizer.model").unlink()
    convert(folder, tmp_path / "model.gguf", "F16")
    texts = [*TEXT, *STRANGE, (shared_data / "README.md").read_text()[:2000]]
    assert llama_ids(tmp_path / "model.gguf", texts) == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]


SPLITS = {
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ],
    "gpt-2": [pre_tokenizers.ByteLevel(False)],
    "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)],
}


def byte_tokenizer(folder, split, **changes):
    """A BPE over bytes beside a model, in place of what was there; `changes` are of tokenizer.json's fields."""
    (folder / "tokenizer.model").unlink()
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    steps = SPLITS[split]
    fast.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(TEXT, trainer)
    fast.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    fast.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", fast.token_to_id("<|begin|>"))]
    )
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer.json", {**read_json(folder / "tokenizer.json"), **changes})
    write_json(folder / "tokenizer_config.json", {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}})
    return fast


@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_tokenizes_bytes_as_tokenizers_does(split, tmp_path):
    folder = tiny_model(tmp_path / "model")
    fast = byte_tokenizer(folder, split)
    convert(folder, tmp_path / "model.gguf", "F16")
    texts = [*TEXT, *STRANGE]
    assert llama_ids(tmp_path / "model.gguf", texts) == [fast.encode(text).ids for text in texts]
    assert llama_ids(tmp_path / "model.gguf", ["a<|end|>"], special=True) == [fast.encode("a<|end|>").ids]
    assert field(tmp_path / "model.gguf", "pre") == split
    bos, eos = fast.token_to_id("<|begin|>"), fast.token_to_id("<|end|>")
    assert (field(tmp_path / "model.gguf", "bos_token_id"), field(tmp_path / "model.gguf", "eos_token_id")) == (
        bos,
        eos,
    )
    assert field(tmp_path / "model.gguf", "tokens")[eos + 1 :] == [f"[PAD{i}]" for i in range(eos + 1, 512)]


def test_tokenizers_that_llama_cpp_would_not_follow_are_refused(tmp_path):
    def refused(split="gpt-2", **changes):
        folder = tiny_model(tmp_path / "model")
        byte_tokenizer(folder, split, **changes)
        with pytest.raises(ConfigError) as error:
            convert(folder, tmp_path / "model.gguf", "F16")
        return str(error.value)

    other = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    assert "splits of Llama 3, GPT-2" in refused(pre_tokenizer=other)
    assert "splits of Llama 3, GPT-2" in refused(normalizer={"type": "NFKC"})
    assert "allowed is 'BPE'" in refused(model={"type": "Unigram", "vocab": []})
    folder = tiny_model(tmp_path / "other")
    byte_tokenizer(folder, "gpt-2")
    whole = read_json(folder / "tokenizer.json")
    assert "ignore_merges" in refused(model={**whole["model"], "ignore_merges": True})
    assert "U+2581" in refused(model={**whole["model"], "byte_fallback": True}, normalizer={"type": "NFKC"})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.model, or tokenizer\.json"):
        convert(folder, tmp_path / "model.gguf", "F16")


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ({"model_type": "unigram"}, "type of .* is 'unigram'"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer of .* is 'nmt_nfkc'"),
        ({"remove_extra_whitespaces": True}, "all spaces kept"),
        (None, "a whole sentencepiece model"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_would_not_follow_are_refused(trained, said, model_folder, tmp_path):
    folder, made = shutil.copytree(model_folder, tmp_path / "model"), io.BytesIO(b"version https://git-lfs")
    if trained is not None:
        plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=made, vocab_size=320, byte_fallback=True, minloglevel=2,
            hard_vocab_limit=False, **{**plain, **trained},
        )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    with pytest.raises(ConfigError, match=said):
        convert(folder, tmp_path / "model.gguf", "F16")


def test_merges_that_sentencepiece_would_not_make_are_refused(model_folder, tmp_path):
    """It joins any two pieces that make a third: of a pair left out llama.cpp's ids would be others."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    whole = read_json(folder / "tokenizer.json")
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in whole["model"]["merges"]]
    makers = Counter("".join(pair) for pair in merges)
    twice = next(pair for pair in merges if makers["".join(pair)] > 1)
    for changed, said in (
        ([pair for pair in merges if pair != twice], 'merges of .* is "no '),
        ([*(pair for pair in merges if pair != twice), twice], "pairs of a piece far apart"),
    ):
        write_json(folder / "tokenizer.json", {**whole, "model": {**whole["model"], "merges": changed}})
        with pytest.raises(ConfigError, match=said):
            convert(folder, tmp_path / "model.gguf", "F16")


def test_a_larger_embedding_is_padded_with_unused_pieces(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tiny_tokenizer(folder, vocab_size=400)
    convert(folder, tmp_path / "model.gguf", "F16")
    assert len(field(tmp_path / "model.gguf", "tokens")) == 512
    assert field(tmp_path / "model.gguf", "tokens")[-1] == "[PAD511]"


def test_added_tokens_are_pieces_of_their_own(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = tiny_tokenizer(folder, vocab_size=400)
    write_json(folder / "added_tokens.json", {"<|user|>": 400, "<pad>": 9000})
    config = read_json(folder / "tokenizer_config.json")
    plain = {"401": {"content": "<br>", "special": False}}
    write_json(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": plain})
    convert(folder, tmp_path / "model.gguf", "F16")
    assert field(tmp_path / "model.gguf", "tokens")[400:403] == ["<|user|>", "<br>", "[PAD402]"]
    assert field(tmp_path / "model.gguf", "token_type")[400:403] == [3, 4, 5]
    ids = llama_ids(tmp_path / "model.gguf", ["<|user|>the<br>"], special=True)[0]
    assert [ids[0], ids[1], ids[-1]] == [1, 400, 401]
    assert Tokenizer.load(tokenizer).vocab_size == 400
