from __future__ import annotations

import pytest
from gguf import GGMLQuantizationType as Type

from danube_ray.config import ConfigError
from danube_ray.quantize.levels import LEVELS, Shape, check_level, tensor_type

DANUBE = Shape(num_layers=24, num_heads=32, num_kv_heads=8, tied_embeddings=False)
DANUBE_ROWS = (1536, 2560, 3840, 4096, 6912, 10240)


def types(level, part, shape=DANUBE, columns=2560):
    return [tensor_type(level, f"blk.{layer}.{part}.weight", columns, shape)[0] for layer in range(shape.num_layers)]


@pytest.mark.parametrize(("level", "base"), [("Q4_K_M", Type.Q4_K), ("Q5_K_M", Type.Q5_K)])
@pytest.mark.parametrize("part", ["attn_v", "ffn_down"])
def test_medium_levels_widen_the_ends_and_every_third_layer(level, base, part):
    wide = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
    assert types(level, part) == [Type.Q6_K if layer in wide else base for layer in range(24)]


def test_q3_k_m_widens_the_first_layers_most():
    assert types("Q3_K_M", "attn_v") == [Type.Q5_K] * 2 + [Type.Q4_K] * 22
    assert types("Q3_K_M", "ffn_down") == [Type.Q5_K] + [Type.Q4_K] * 23
    assert types("Q3_K_M", "attn_output") == [Type.Q4_K] * 24
    assert types("Q3_K_M", "ffn_up") == [Type.Q3_K] * 24


def test_q2_k_values_depend_on_how_many_heads_share_them():
    pairs = Shape(num_layers=2, num_heads=8, num_kv_heads=4, tied_embeddings=False)
    assert types("Q2_K", "attn_v") == [Type.Q4_K] * 24
    assert types("Q2_K", "attn_v", pairs) == [Type.Q3_K] * 2
    assert types("Q2_K", "ffn_down", pairs) == types("Q2_K", "attn_output", pairs) == [Type.Q3_K] * 2
    assert types("Q2_K", "attn_k", pairs) == [Type.Q2_K] * 2


def test_the_head_stays_wide_also_where_it_is_the_embedding():
    tied = Shape(num_layers=2, num_heads=4, num_kv_heads=4, tied_embeddings=True)
    assert tensor_type("Q4_0", "output.weight", 2560, DANUBE) == (Type.Q6_K, False)
    assert tensor_type("Q4_0", "token_embd.weight", 2560, DANUBE) == (Type.Q4_0, False)
    assert tensor_type("Q4_0", "token_embd.weight", 2560, tied) == (Type.Q6_K, False)
    assert tensor_type("Q8_0", "output.weight", 2560, DANUBE) == (Type.Q8_0, False)


@pytest.mark.parametrize("level", LEVELS)
def test_no_danube_model_needs_a_fallback(level):
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = ["token_embd.weight", "output.weight", *(f"blk.3.{part}.weight" for part in parts)]
    assert not any(tensor_type(level, name, columns, DANUBE)[1] for name in names for columns in DANUBE_ROWS)


def test_rows_that_256_does_not_divide_fall_back_to_blocks_of_32_and_others_to_f16():
    fallbacks = {"Q6_K": Type.Q8_0, "Q5_K_M": Type.Q5_1, "Q4_K_M": Type.Q5_0, "Q3_K_M": Type.Q4_0, "Q2_K": Type.Q4_0}
    for level, kind in fallbacks.items():
        assert tensor_type(level, "blk.3.ffn_up.weight", 352, DANUBE) == (kind, True)
        assert tensor_type(level, "blk.3.ffn_up.weight", 100, DANUBE) == (Type.F16, True)
    assert tensor_type("Q4_0", "blk.3.ffn_up.weight", 352, DANUBE) == (Type.Q4_0, False)
    assert tensor_type("Q8_0", "blk.3.ffn_up.weight", 100, DANUBE) == (Type.F16, True)


def test_an_unknown_level_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="level is 'Q4', allowed is F32, F16, .*Q2_K"):
        check_level("Q4")
