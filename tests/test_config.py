"""Configurations refuse what can't run, in words that name the setting, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from danube_ray.config import (
    ConfigError,
    DpoConfig,
    FinetuneConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    to_dict,
    valid_name,
)

MODEL = ModelConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=64,
)
SHORT = StageConfig(name="short", tokens=1_000, sequence_length=16, micro_batch_size=2, shares={"web": 3, "wiki": 1})
LONG = dataclasses.replace(SHORT, name="long", sequence_length=64)
RUN = RunConfig(name="run", model=MODEL, stages=(SHORT, LONG), global_batch_tokens=128)
TUNE = FinetuneConfig(name="tune", base="base", data="data.jsonl")
DPO = DpoConfig(name="tune", base="base", data="data.jsonl")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MODEL, {"num_kv_heads": 3}, "ModelConfig.num_kv_heads is 3, allowed is a divisor of num_heads=4"),
        (MODEL, {"head_dim": 7}, "ModelConfig.head_dim is 7, allowed is even; RoPE rotates pairs"),
        (MODEL, {"sliding_window": 0}, "ModelConfig.sliding_window is 0, allowed is greater than 0"),
        (SHORT, {"shares": {}}, "StageConfig.shares of stage 'short' is {}, allowed is at least one source"),
        (SHORT, {"shares": {"web": 0.5}}, "StageConfig.shares of stage 'short' is {'web': 0.5}, allowed is positive"),
        (SHORT, {"shares": {"web": 0}}, "StageConfig.shares of stage 'short' is {'web': 0}, allowed is positive"),
        (
            SHORT,
            {"min_quality": {"wkii": 0.5}},
            "StageConfig.min_quality of stage 'short' is 'wkii', allowed is a source of the stage: web, wiki",
        ),
        (SHORT, {"min_quality": {"web": 2}}, "stage 'short' is {'web': 2}, allowed is one of 0, 0.25, 0.5, 0.75"),
        (SHORT, {"min_quality": {"web": 0.6}}, "stage 'short' is {'web': 0.6}, allowed is one of 0, 0.25, 0.5, 0.75"),
        (OptimizerConfig(), {"min_learning_rate": 1}, "is 1, allowed is between 0 and learning_rate=0.0002"),
        (OptimizerConfig(), {"warmup_steps": -1}, "OptimizerConfig.warmup_steps is -1, allowed is 0 or more"),
        (OptimizerConfig(), {"weight_decay": -1}, "OptimizerConfig.weight_decay is -1, allowed is 0 or more"),
        (OptimizerConfig(), {"beta2": 1.0}, "OptimizerConfig.beta2 is 1.0, allowed is in [0, 1)"),
        (LoopConfig(), {"max_restarts": -1}, "LoopConfig.max_restarts is -1, allowed is 0 or more"),
        (
            LoopConfig(precision="fp8-te", fp8_scaling="delayed"),
            {"activation_checkpointing": True},
            "LoopConfig.activation_checkpointing is True, allowed is False with delayed scaling of fp8-te",
        ),
        (RUN, {"name": "a/b"}, "RunConfig.name is 'a/b', allowed is letters, digits"),
        (RUN, {"stages": ()}, "RunConfig.stages is (), allowed is at least one stage"),
        (RUN, {"global_batch_tokens": 96}, "sequence_length of stage 'long' is 64, allowed is a divisor of global_"),
        (RUN, {"global_batch_tokens": 12_800}, "tokens of stage 'short' is 1000, allowed is enough for a step"),
        (
            RUN,
            {"stages": (dataclasses.replace(SHORT, tokens=1), LONG)},
            "tokens of stage 'short' is 1, allowed is",
        ),
        (
            OptimizerConfig(),
            {"schedule": "linear"},
            "OptimizerConfig.schedule is 'linear', allowed is one of cosine",
        ),
        (LoopConfig(), {"on_bad_step": "ignore"}, "LoopConfig.on_bad_step is 'ignore', allowed is one of stop, skip"),
        (
            RUN,
            {"stages": (dataclasses.replace(LONG, sequence_length=128),)},
            "sequence_length of stage 'long' is 128, allowed is at most 64",
        ),
        (
            RUN,
            {"stages": (dataclasses.replace(SHORT, sequence_length=24), LONG), "global_batch_tokens": 192},
            "sequence_length of stage 'short' is 24, allowed is a divisor of the longest stage's 64",
        ),
        (
            SHORT,
            {"sliding_window": 17},
            "sliding_window of stage 'short' is 17, allowed is between 1 and sequence_length=16",
        ),
        (MODEL, {"sliding_window": 65}, "ModelConfig.sliding_window is 65, allowed is at most context_length=64"),
        (OptimizerConfig(), {"decay_fraction": 1.1}, "OptimizerConfig.decay_fraction is 1.1, allowed is in (0, 1]"),
        (LoopConfig(), {"fp8_scaling": "current"}, "precision bf16 is 'current', allowed is None without FP8"),
        (LoopConfig(precision="fp8-te"), {"fp8_scaling": "rowwise"}, "allowed is one of current, delayed, block"),
        (LoopConfig(), {"fp8_guard_every_steps": 10}, "fp8_guard_every_steps is 10, allowed is 0 without FP8"),
        (
            LoopConfig(precision="fp8-te"),
            {"parallelism": "zero3"},
            "allowed is a precision that is not FP8 under zero3",
        ),
        (LoopConfig(), {"min_workers": 2}, "LoopConfig.min_workers is 2, allowed is between 1 and num_workers=1"),
        (LoopConfig(), {"min_workers": 0}, "LoopConfig.min_workers is 0, allowed is between 1 and num_workers=1"),
        (LoopConfig(), {"skip_steps": (3, 0)}, "LoopConfig.skip_steps is 0, allowed is steps counted from 1"),
        (LoraConfig(), {"dropout": 1.0}, "LoraConfig.dropout is 1.0, allowed is in [0, 1)"),
        (TUNE, {"max_length": -1}, "FinetuneConfig.max_length is -1, allowed is greater than 0"),
        (TUNE, {"name": ".hidden"}, "FinetuneConfig.name is '.hidden', allowed is letters"),
        (DPO, {"beta": 0}, "DpoConfig.beta is 0, allowed is greater than 0"),
        (DPO, {"lora": None}, "DpoConfig.lora is None, allowed is a LoraConfig; the frozen base"),
    ],
)
def test_a_wrong_value_is_one_clear_error(config: object, changes: dict, message: str):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(config, **changes)  # type: ignore[type-var]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (MODEL, "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim context_length"),
        (MODEL, "rope_theta rms_norm_eps"),
        (SHORT, "tokens sequence_length micro_batch_size learning_rate_scale rope_theta"),
        (OptimizerConfig(), "learning_rate epsilon max_grad_norm"),
        (LoopConfig(), "num_workers cpus_per_worker log_every_steps validate_every_steps checkpoint_every_steps"),
        (LoopConfig(), "keep_checkpoints fp8_guard_max_gap hang_timeout_s spike_deviations"),
        (RUN, "global_batch_tokens max_epochs validation_windows"),
        (LoraConfig(), "rank alpha"),
        (TUNE, "epochs batch_size micro_batch_size max_length"),
    ],
)
def test_nothing_is_refused_where_there_must_be_something(config: object, names: str):
    for name in names.split():
        with pytest.raises(ConfigError, match=rf"^{type(config).__name__}\.{name} is 0, allowed is greater than 0$"):
            dataclasses.replace(config, **{name: 0})  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MODEL, {"sliding_window": 64}),
        (SHORT, {"sliding_window": 16}),
        (OptimizerConfig(), {"decay_fraction": 1.0, "min_learning_rate": 2e-4, "warmup_steps": 0, "beta1": 0.0}),
        (LoopConfig(precision="bf16"), {"parallelism": "zero3"}),
        (LoopConfig(), {"min_workers": 1, "skip_steps": (1,)}),
        (LoopConfig(precision="fp8-te"), {"fp8_scaling": "current", "activation_checkpointing": True}),
        (RUN, {"global_batch_tokens": 64}),
    ],
)
def test_a_value_on_the_bound_is_taken(config: object, changes: dict):
    taken = dataclasses.replace(config, **changes)  # type: ignore[type-var]
    assert {name: getattr(taken, name) for name in changes} == changes


def test_fp8_scales_as_its_precision_does_unless_it_is_told_another_way():
    loops = [LoopConfig(), LoopConfig(precision="fp8-te"), LoopConfig(precision="fp8-te", fp8_scaling="block")]
    assert [loop.scaling for loop in loops] == [None, "current", "block"]


def test_stage_ends_round_cumulative_tokens():
    """Ten stages of 10.5 batches each end at step 105: rounding each one alone would lose or gain five steps."""
    stages = tuple(dataclasses.replace(SHORT, name=f"s{index}", tokens=1_344) for index in range(10))
    run = dataclasses.replace(RUN, stages=stages)
    assert run.num_steps == 105
    assert run.stage_at(0) == 0
    for index, end in enumerate(run.stage_ends[:-1]):
        assert (run.stage_at(end - 1), run.stage_at(end)) == (index, index + 1)


@pytest.mark.parametrize("window", [None, 5, 16, 64])
def test_flops_count_every_key_that_a_query_sees(window: int | None):
    model, length = dataclasses.replace(MODEL, sliding_window=window), 16
    keys = sum(min(position + 1, window or length) for position in range(length)) / length
    weights = model.num_parameters - model.vocab_size * 16 - 16 * (2 * model.num_layers + 1)  # no look-up, no norms
    assert model.flops_per_token(length) == pytest.approx(6 * weights + 12 * 2 * 4 * 8 * keys)


def test_a_configuration_is_json():
    stored = json.loads(json.dumps(to_dict(RUN)))
    assert stored["stages"][1]["shares"] == {"web": 3, "wiki": 1}
    assert stored["optimizer"]["learning_rate"] == RUN.optimizer.learning_rate


def test_configurations_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RUN.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("name", "valid"), [("run-1.b_c", True), ("", False), (".x", False), ("a b", False)])
def test_names_can_name_folders(name: str, valid: bool):
    assert valid_name(name) is valid
