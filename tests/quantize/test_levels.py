from __future__ import annotations

import math

import pytest
from gguf import GGMLQuantizationType as Type

from danube_ray import presets
from danube_ray.config import ConfigError
from danube_ray.quantize.levels import LEVELS, Shape, check_level, size_bytes, tensor_shapes, tensor_type, tensor_types
from tests.models import SMALL

DANUBE = Shape(num_layers=24, num_heads=32, num_kv_heads=8, tied_embeddings=False)
DANUBE_MODELS = [
    pytest.param(preset().model, id=preset.__name__)
    for preset in (presets.danube_1_8b, presets.danube2_1_8b, presets.danube3_500m, presets.danube3_4b)
]


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
    assert types("Q3_K_M", "ffn_down", Shape(32, 32, 8, tied_embeddings=False)) == [Type.Q5_K] * 2 + [Type.Q4_K] * 30


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


def test_q4_0_keeps_the_first_down_projections_finer_with_an_importance_matrix():
    with_importance = Shape(24, 32, 8, tied_embeddings=False, with_importance=True)
    assert types("Q4_0", "ffn_down", with_importance) == [Type.Q4_1] * 3 + [Type.Q4_0] * 21
    assert types("Q4_0", "ffn_up", with_importance) == types("Q4_0", "ffn_down") == [Type.Q4_0] * 24


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("model", DANUBE_MODELS)
def test_no_danube_model_needs_a_fallback(model, level):
    for with_importance in (False, True):
        chosen = tensor_types(level, model, with_importance=with_importance)
        assert [name for name, (_, fell_back) in chosen.items() if fell_back] == []


@pytest.mark.parametrize("model", DANUBE_MODELS)
def test_shapes_hold_every_parameter_once(model):
    sizes = [math.prod(shape) for shape in tensor_shapes(model).values()]
    assert sum(sizes) == model.num_parameters
    tied = [math.prod(shape) for shape in tensor_shapes(model, tied_embeddings=True).values()]
    assert sum(tied) == model.num_parameters - model.vocab_size * model.hidden_size


@pytest.mark.parametrize(("level", "gigabytes"), [("F16", 1.027), ("Q4_K_M", 0.317)])
def test_sizes_of_danube3_500m_are_the_published_ones(level, gigabytes):
    model = presets.danube3_500m().model
    shapes, kinds = tensor_shapes(model), tensor_types(level, model)
    total = sum(size_bytes(kinds[name][0], math.prod(shape)) for name, shape in shapes.items())
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_tensors_stand_in_the_order_of_llama_cpps_files():
    names = list(tensor_shapes(SMALL))
    assert names[:4] == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_k.weight"]
    assert names[3:] == sorted(names[3:])  # of two layers the order by name is that by number


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
