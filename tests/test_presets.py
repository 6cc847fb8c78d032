"""The presets against the reports' numbers and against the models that they build."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from danube_ray.config import RunConfig, to_dict
from danube_ray.model.transformer import Transformer
from danube_ray.planner import H100, plan
from danube_ray.presets import PRESETS, danube2_1_8b, danube3_4b, danube3_500m, danube_1_8b, nano

BILLION = 10**9
REPORTED_BILLIONS = {"danube_1_8b": 1.831, "danube2_1_8b": 1.831, "danube3_500m": 0.514, "danube3_4b": 3.962}


@pytest.mark.parametrize("name", PRESETS)
def test_the_computed_parameters_are_those_of_the_built_model(name: str):
    model = PRESETS[name]().model
    with torch.device("meta"):
        built = Transformer(model)
    counted = sum(weight.numel() for weight in built.parameters())
    assert counted == model.num_parameters
    assert not list(built.buffers())
    if name in REPORTED_BILLIONS:
        assert round(counted / 1e9, 3) == REPORTED_BILLIONS[name]
    if name.startswith("proxy_"):
        millions = int(name.removeprefix("proxy_").removesuffix("m"))
        assert counted / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_carries_its_name_and_can_be_stored(name: str):
    run = PRESETS[name]()
    assert run.name == name
    assert to_dict(run)["model"]["num_layers"] == run.model.num_layers
    windows_per_step = [run.global_batch_tokens // stage.sequence_length for stage in run.stages]
    assert all(windows % run.loop.num_workers == 0 for windows in windows_per_step)


@pytest.mark.parametrize("name", PRESETS)
def test_any_preset_can_be_tried_without_fp8(name: str):
    dataclasses.replace(PRESETS[name]().loop, precision="bf16", fp8_scaling=None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_the_gpus_it_is_for(name: str):
    run = PRESETS[name]()
    assert plan(run, H100, run.loop.num_workers).fits


def test_only_the_4b_model_needs_zero():
    spread = {name: preset().loop.parallelism for name, preset in PRESETS.items()}
    assert spread.pop("danube3_4b") == "zero1" and set(spread.values()) == {"ddp"}
    run = danube3_4b()
    alone = dataclasses.replace(run, loop=dataclasses.replace(run.loop, parallelism="ddp"))
    assert not plan(alone, H100, 8).fits


def test_danube2_can_go_on_from_danube():
    """Nothing but what `danube remap` changes differs: vocabulary, context and window."""
    before, after = danube_1_8b().model, danube2_1_8b().model
    assert dataclasses.replace(before, context_length=8_192, sliding_window=None) == after


def web_percent(run: RunConfig) -> list[float]:
    return [round(100 * stage.shares["web"] / sum(stage.shares.values()), 1) for stage in run.stages]


def test_danube_doubles_its_window_at_a_constant_batch():
    run = danube_1_8b()
    assert [stage.tokens // BILLION for stage in run.stages] == [700, 100, 100, 100]
    assert [stage.sequence_length for stage in run.stages] == [2_048, 4_096, 8_192, 16_384]
    windows = [run.global_batch_tokens // stage.sequence_length for stage in run.stages]
    assert windows == [576, 288, 144, 72]
    assert run.optimizer.warmup_steps * run.global_batch_tokens == pytest.approx(2.36e9, rel=1e-3)
    assert run.model.sliding_window == 4_096
    assert sum(stage.tokens for stage in run.stages) / run.global_batch_tokens == pytest.approx(run.num_steps, abs=1)


def test_web_shares_and_tokens_by_stage_are_the_reports():
    assert web_percent(danube2_1_8b()) == [84.5, 72.8, 55.5]
    assert web_percent(danube3_4b()) == web_percent(danube3_500m()) == [90.6, 81.7, 51.6]
    assert [stage.tokens // BILLION for stage in danube2_1_8b().stages] == [1_000, 950, 50]
    assert [stage.tokens // BILLION for stage in danube3_4b().stages] == [4_600, 1_350, 50]
    assert danube3_500m().total_tokens == 4_000 * BILLION
    assert danube2_1_8b().model.sliding_window is None


def test_nano_shows_every_mechanism_of_the_large_runs():
    run = nano()
    assert len(run.stages) == 3
    assert web_percent(run) == sorted(web_percent(run), reverse=True)
    assert [stage.sequence_length for stage in run.stages] == [128, 256, 512]
    assert 1_000_000 <= run.model.num_parameters <= 1_500_000
    assert 1_000_000 <= run.total_tokens <= 1_500_000
    assert run.num_steps * run.global_batch_tokens == run.total_tokens
    assert run.optimizer.warmup_steps < run.stage_ends[0]
