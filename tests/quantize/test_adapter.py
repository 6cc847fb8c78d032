from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from danube_ray.artifacts import read_json, write_json
from danube_ray.config import ConfigError
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.huggingface import HuggingFaceModel
from danube_ray.quantize import adapter as module
from danube_ray.quantize.adapter import check_adapters, convert_adapter, convert_adapters
from danube_ray.quantize.gguf import convert
from tests.adapters import tiny_adapter
from tests.models import tiny_model

IDS = [1, *range(5, 400, 7)]
TOLERANCE = 0.05  # llama.cpp keeps keys and values in 16 bits, and random adapters make them large


@pytest.fixture(scope="module")
def gguf_file(model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "F32.gguf"
    convert(model_folder, path, "F32")
    return path


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    return tiny_adapter(model_folder, tmp_path_factory.mktemp("adapter"), seed=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 3, "lora_alpha": 4, "use_rslora": True},
        {"target_modules": ["q_proj", "k_proj"]},
        {"target_modules": ["v_proj", "lm_head"]},
    ],
    ids=str,
)
def test_a_model_with_its_adapter_is_the_merged_model(settings, model_folder, gguf_file, tmp_path):
    folder = tiny_adapter(model_folder, tmp_path / "adapter", seed=2, merged=tmp_path / "merged", **settings)
    file = convert_adapter(folder, gguf_file, tmp_path / "adapter.gguf")
    base, merged = HuggingFaceModel(model_folder).logits(IDS), HuggingFaceModel(tmp_path / "merged").logits(IDS)
    assert np.abs(base - merged).max() > 0.5
    with GgufModel(gguf_file, adapters={"tuned": file}) as model:
        for name, wanted in ((None, base), ("tuned", merged), (None, base)):
            model.use_adapter(name)
            assert np.abs(model.logits(IDS) - wanted).max() <= TOLERANCE, name


def test_what_llama_cpp_could_not_compute_is_refused_and_nothing_is_written(adapter, gguf_file, tmp_path):
    def refused(change=lambda folder: None, model=gguf_file):
        folder = shutil.copytree(adapter, tmp_path / "changed", dirs_exist_ok=True)
        change(folder)
        with pytest.raises(ConfigError) as error:
            convert_adapter(folder, model, tmp_path / "out" / "adapter.gguf")
        with pytest.raises(ConfigError, match=re.escape(str(error.value))):
            check_adapters({"tuned": folder}, model)
        shutil.rmtree(folder)
        assert not list((tmp_path / "out").glob("*"))
        return str(error.value)

    def setting(**values):
        def change(folder):
            write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **values})

        return lambda: refused(change)

    def weight(change_state):
        def change(folder):
            state = load_file(folder / "adapter_model.safetensors")
            change_state(state)
            save_file(state, folder / "adapter_model.safetensors")

        return refused(change)

    def cut(folder):
        data = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])

    query = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert "use_dora" in setting(use_dora=True)()
    assert "modules_to_save" in setting(modules_to_save=["lm_head"])()
    assert "rank_pattern" in setting(rank_pattern={"q_proj": 8})()
    assert "peft_type" in setting(peft_type="IA3")()
    assert "lora_alpha" in setting(lora_alpha=0)()
    assert "blk.0.attn_k.weight" in setting(r=8)()
    assert "adapter_config.json" in refused(lambda folder: (folder / "adapter_config.json").unlink())
    assert "adapter_config.json" in refused(lambda folder: (folder / "adapter_config.json").write_text("[]"))
    assert "adapter_model.safetensors" in refused(lambda folder: (folder / "adapter_model.safetensors").unlink())
    assert "whole safetensors file" in refused(cut)
    assert "lora_A and lora_B" in weight(lambda state: state.pop(query))
    assert "not finite" in weight(lambda state: state[query].fill_(torch.nan))
    assert "lora_embedding_A" in weight(
        lambda state: state.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 512)})
    )
    assert "layers.2" in weight(lambda state: state.update({query.replace("layers.1", "layers.2"): state.pop(query)}))
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf_file.read_bytes()[:1000])
    assert "torn.gguf" in refused(model=torn)


def test_several_adapters_take_one_look_at_the_model_and_a_check_writes_nothing(
    adapter, gguf_file, model_folder, tmp_path, monkeypatch
):
    other = tiny_adapter(model_folder, tmp_path / "other", seed=3)
    alone = [convert_adapter(folder, gguf_file, tmp_path / "alone.gguf").read_bytes() for folder in (adapter, other)]
    read, whole = [], module.GGUFReader
    monkeypatch.setattr(module, "GGUFReader", lambda path: read.append(path) or whole(path))
    check_adapters({"a": adapter, "b": other}, gguf_file)
    assert not (tmp_path / "out").exists()
    files = convert_adapters({"a": adapter, "b": other}, gguf_file, tmp_path / "out")
    assert [files[name].read_bytes() for name in ("a", "b")] == alone
    assert len(read) == 2 and convert_adapters({}, tmp_path / "no.gguf", tmp_path) == {}


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    other = tiny_model(tmp_path / "other", hidden_size=64)
    convert(other, tmp_path / "other.gguf", "F32")
    with pytest.raises(ConfigError, match=r"blk\.0\.attn_k\.weight.*name its own model"):
        convert_adapter(adapter, tmp_path / "other.gguf", tmp_path / "adapter.gguf")


def test_a_file_that_is_no_adapter_is_refused_by_the_model_that_loads_it(gguf_file):
    with pytest.raises(ConfigError, match="a LoRA adapter of this model"):
        GgufModel(gguf_file, adapters={"tuned": gguf_file})
