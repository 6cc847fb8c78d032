from __future__ import annotations

import shutil

import pytest

from danube_ray.config import ConfigError
from danube_ray.quantize.estimate import estimate, model_of
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.levels import LEVELS


def gigabytes(preset, level):
    config, _ = model_of(preset)
    (found,) = estimate(config, [level])
    assert found.num_fallbacks == 0
    return found.bytes / 1e9


def test_sizes_are_those_that_danube3_published():
    assert round(gigabytes("danube3_4b", "F16"), 2) == 7.92
    assert round(gigabytes("danube3_4b", "Q4_K_M"), 2) == 2.39
    assert gigabytes("danube3_500m", "F16") == pytest.approx(1.027, rel=0.01)
    assert gigabytes("danube3_500m", "Q4_K_M") == pytest.approx(0.317, rel=0.01)


@pytest.mark.parametrize("level", LEVELS)
def test_an_estimate_is_what_a_conversion_writes(level, model_folder, wide_model_folder, tmp_path):
    for folder in (model_folder, wide_model_folder):
        config, tied = model_of(str(folder))
        (found,) = estimate(config, [level], tied_embeddings=tied)
        facts = convert(folder, tmp_path / "model.gguf", level)
        assert found.bits_per_weight == pytest.approx(facts.bits_per_weight)
        assert found.num_fallbacks == len(facts.fallbacks)
        assert found.bytes == pytest.approx(facts.bytes, abs=8_000)


def test_no_weight_is_read(model_folder, tmp_path):
    shutil.copy(model_folder / "config.json", tmp_path)
    assert model_of(str(tmp_path)) == model_of(str(model_folder))
    with pytest.raises(ConfigError, match=r"a folder with config\.json, or one of danube_1_8b"):
        model_of(str(tmp_path / "absent"))


def test_memory_is_the_file_and_a_cache_of_16_bits():
    config, tied = model_of("danube_1_8b")
    assert not tied and config.usable_context == 4_096, "llama.cpp ignores the sliding window"
    (found,) = estimate(config, ["Q4_K_M"], context=1_000)
    assert found.cache_bytes == 1_000 * 24 * 2 * 8 * 80 * 2
    assert found.memory_bytes == found.bytes + found.cache_bytes
