"""The planner: what it counts against autograd and the reports, its formula's laws, and its own error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danube_ray.config import ConfigError, LoopConfig, ModelConfig, Precision, RunConfig
from danube_ray.model.functional import rotate, swiglu
from danube_ray.model.precision import autocast, convert
from danube_ray.model.transformer import Transformer, rotation
from danube_ray.planner import (
    H100,
    HARDWARE,
    Work,
    comparisons,
    hardware_named,
    memory,
    parse_hardware,
    plan,
    stage_work,
    step_time,
)
from danube_ray.planner import coefficients as based_on
from danube_ray.planner.memory import largest_micro_batch, layer_bytes_per_token, working_bytes_per_token
from danube_ray.planner.speed import EAGER, weight_bytes
from danube_ray.presets import PRESETS, danube3_4b, danube3_500m, danube_1_8b, nano

A100 = HARDWARE["a100"]
CPU = torch.device("cpu")


def work_of(run: RunConfig, num_gpus: int = 8, stage: int = 0, **loop) -> Work:
    return stage_work(dataclasses.replace(run, loop=dataclasses.replace(run.loop, **loop)), run.stages[stage], num_gpus)


def kept_bytes(config: ModelConfig, precision: Precision, num_layers: int) -> int:
    """Bytes that autograd keeps of a forward pass of 4 x 64 tokens, weights and their casts aside."""
    model = convert(Transformer(dataclasses.replace(config, num_layers=num_layers)), precision)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {shape for weight in model.parameters() for shape in (weight.shape, weight.t().shape)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes:
            kept[storage.data_ptr()] = storage  # holding it, so that no other gets its address
        return tensor

    with autocast(precision, CPU), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.randint(0, config.vocab_size, (4, 64)))
    return sum(storage.nbytes() for storage in kept.values())


class TestCounts:
    """What the formulas count, against what torch does."""

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_a_layer_keeps_what_autograd_keeps(self, precision: Precision):
        config = nano().model
        found = (kept_bytes(config, precision, 2) - kept_bytes(config, precision, 1)) / (4 * 64)
        # Each norm keeps a number a token, not counted; and CPUs attend in fp32, whatever the precision.
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        on_cpu = 2 * 4
        if precision == "bf16":
            on_cpu += 2 * (2 * queries + 2 * keys) + 2 * queries
        assert found == layer_bytes_per_token(config, precision) + on_cpu

    def test_eager_kernels_move_what_their_operations_read_and_write(self):
        """RoPE and SwiGLU, operation by operation; norms are one kernel on GPUs alone, and so are counted by hand."""
        by = rotation(64, 32, 10_000.0, CPU)
        heads, gate, up = torch.randn(2, 64, 8, 32), torch.randn(512, 64), torch.randn(512, 64)
        _, per_head, per_ffn = EAGER
        rope = traffic(lambda x: rotate(x, by).to(x.dtype), heads.bfloat16())
        assert rope == pytest.approx(per_head, rel=0.05)
        assert traffic(swiglu, gate.bfloat16(), up.bfloat16()) == per_ffn


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what operations read and write, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view and "::device" not in operation.name():
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
        return result


def traffic(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> float:
    """Bytes moved for each number of an input, forward and backward."""
    leaves = [x.requires_grad_() for x in inputs]
    gradient = torch.ones_like(compute(*leaves))
    with Traffic() as moved:
        torch.autograd.grad(compute(*leaves), leaves, gradient)
    return moved.bytes / leaves[0].numel()


class TestMemory:
    @pytest.mark.parametrize(
        ("parallelism", "bytes_a_parameter"), [("ddp", 16.0), ("zero1", 9.5), ("zero2", 6.5), ("zero3", 3.0)]
    )
    def test_what_a_parameter_takes_on_eight_gpus(self, parallelism: str, bytes_a_parameter: float):
        work = work_of(danube3_4b(), parallelism=parallelism, precision="bf16")
        needed = memory(work)
        static = needed.weights_bytes + needed.gradients_bytes + needed.optimizer_bytes
        assert static == pytest.approx(bytes_a_parameter * work.model.num_parameters)
        buffers = {"ddp": 0, "zero1": 0.2e9, "zero2": 0.4e9, "zero3": 4.4e9}
        assert needed.buffers_bytes == buffers[parallelism]
        alone = memory(dataclasses.replace(work, num_gpus=1))  # nobody to share with
        assert alone.total_bytes >= needed.total_bytes

    def test_the_parts_add_up_and_grow_with_the_micro_batch_alone(self):
        work = work_of(danube_1_8b())
        one, two = (memory(dataclasses.replace(work, micro_batch_size=size)) for size in (4, 8))
        assert two.activations_bytes == 2 * one.activations_bytes
        by_token = 2 * work.model.hidden_size * 4 * work.sequence_length  # the loss's gradient of its input
        assert two.loss_bytes - one.loss_bytes == by_token
        assert two.total_bytes - one.total_bytes == one.activations_bytes + one.working_bytes + by_token
        assert sum(dataclasses.asdict(one).values()) == one.total_bytes
        fp32, bf16 = (working_bytes_per_token(work.model, precision) for precision in ("fp32", "bf16"))
        assert fp32 - bf16 == 4 * 2 * work.model.intermediate_size  # four gradients of the MLP, twice as wide

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("preset", ["danube_1_8b", "danube3_500m", "danube3_4b", "proxy_20m"])
    def test_the_largest_micro_batch_is_the_largest_that_fits(self, preset: str, checkpointing: bool):
        work = work_of(PRESETS[preset](), activation_checkpointing=checkpointing)

        def fits(windows: int) -> bool:
            return memory(dataclasses.replace(work, micro_batch_size=windows)).total_bytes <= H100.usable_bytes

        largest = largest_micro_batch(work, H100)
        assert 0 < largest <= work.windows and fits(largest)
        assert largest == work.windows or not fits(largest + 1)

    def test_a_model_that_fits_no_gpu_has_no_micro_batch(self):
        tiny_gpu = dataclasses.replace(H100, memory_bytes=2**30)
        assert largest_micro_batch(work_of(danube_1_8b()), tiny_gpu) == 0
        plan_on_it = plan(danube_1_8b(), tiny_gpu, 8)
        assert not plan_on_it.fits and plan_on_it.remedy is None


class TestSpeed:
    def test_the_products_take_the_formulas_flop_at_the_rate_given(self):
        """Where no head dim is padded, FLOP by `ModelConfig.flops_per_token` over their time is the rate."""
        model = dataclasses.replace(danube_1_8b().model, head_dim=64, num_heads=40)
        gpu = dataclasses.replace(H100, gemm_share=0.5, flash_share=0.5)
        work = Work(model=model, loop=LoopConfig(), sequence_length=8_192, micro_batch_size=1, windows=2)
        seconds = step_time(work, gpu)
        products_s = seconds.linears_s + seconds.head_s + seconds.attention_s
        assert products_s == pytest.approx(work.tokens * model.flops_per_token(8_192) / (0.5 * gpu.peak_flops))

    def test_padding_and_windows_count_in_attention(self):
        stages = [step_time(work_of(danube_1_8b(), stage=stage), H100).attention_s for stage in range(4)]
        assert stages == sorted(stages)
        assert stages[3] < 2 * stages[2]  # the window of 4,096 keeps a token's keys from doubling
        run = danube_1_8b()
        opened = dataclasses.replace(run.stages[3], sliding_window=None)
        whole = step_time(stage_work(run, opened, 8), H100).attention_s
        assert whole > 2 * stages[3]

    @pytest.mark.parametrize("scaling", ["current", "delayed", "block"])
    def test_fp8_speeds_the_linears_alone_and_costs_casts(self, scaling: str):
        bf16 = step_time(work_of(danube_1_8b(), precision="bf16"), H100)
        fp8 = step_time(work_of(danube_1_8b(), fp8_scaling=scaling), H100)
        assert 1.3 < bf16.linears_s / fp8.linears_s < 2
        assert (fp8.attention_s, fp8.head_s) == (bf16.attention_s, bf16.head_s)
        assert bf16.casts_s == 0 < fp8.casts_s
        assert fp8.total_s < bf16.total_s

    def test_alone_there_is_no_network_and_zero_costs_more_of_it_than_ddp(self):
        assert step_time(work_of(danube_1_8b(), num_gpus=1), H100).network_s == 0
        waits = [step_time(work_of(danube3_4b(), parallelism=p), H100).network_s for p in ("ddp", "zero1")]
        assert 0 < waits[0] < waits[1]
        slow = dataclasses.replace(H100, link_bytes_per_s=1e9)  # too slow to hide
        all_reduce_s = 2 * 7 / 8 * 4 * danube_1_8b().model.num_parameters / 1e9
        seconds = step_time(work_of(danube_1_8b()), slow)
        assert 0.8 * all_reduce_s < seconds.network_s < all_reduce_s + 0.1

    def test_checkpointing_computes_the_forward_pass_again(self):
        plain, again = (step_time(work_of(danube_1_8b(), activation_checkpointing=on), H100) for on in (False, True))
        assert again.linears_s == pytest.approx(plain.linears_s * 4 / 3)
        assert again.head_s == plain.head_s

    def test_small_layers_wait_for_the_cpu_that_launches_them(self):
        run = PRESETS["proxy_20m"]()
        work = dataclasses.replace(work_of(run, num_gpus=1), micro_batch_size=1)
        assert step_time(work, H100).launching_s > 0
        assert step_time(work_of(danube_1_8b()), H100).launching_s == 0

    def test_more_micro_batches_cost_more_for_the_same_tokens(self):
        work = work_of(danube_1_8b())
        few, many = (step_time(dataclasses.replace(work, micro_batch_size=size), H100) for size in (8, 1))
        assert many.weights_s > 4 * few.weights_s
        assert many.linears_s == few.linears_s
        for precision, first, more in (("fp32", 0, 12), ("bf16", 12, 24)):  # bytes of casts and of sums in fp32
            work = work_of(danube_1_8b(), precision=precision)
            parameters = work.linear_parameters + work.head_parameters
            passes = [dataclasses.replace(work, micro_batch_size=work.windows // number) for number in (1, 2)]
            assert list(map(weight_bytes, passes)) == [first * parameters, (first + more) * parameters]


class TestPlan:
    def test_a_plan_adds_up(self):
        priced = plan(danube_1_8b(), H100, 8)
        for stage in priced.stages:
            assert stage.days == pytest.approx(stage.stage.tokens / stage.tokens_per_s / 86_400)
            assert stage.tokens_per_s == pytest.approx(danube_1_8b().global_batch_tokens / stage.step_time.total_s)
            assert stage.mfu == pytest.approx(stage.tokens_per_s * stage.flops_per_token / 8 / H100.peak_flops)
        assert priced.gpu_hours == pytest.approx(priced.days * 24 * 8)
        assert priced.cost == pytest.approx(priced.gpu_hours * H100.price_per_hour)

    def test_the_estimate_is_within_sight_of_what_is_known(self):
        """Sanity, not accuracy: the issue's aims are 45k in bf16 and 57k in FP8, the Danube report reached 36.6k."""
        for precision, compiled, aim in (
            ("bf16", True, 45_000),
            ("fp8-torchao", True, 57_000),
            ("fp8-te", False, 57_000),
        ):
            work = work_of(danube_1_8b(), num_gpus=1, precision=precision, compile=compiled, attention="te")
            assert 0.7 * aim < work.tokens / step_time(work, H100).total_s < 1.1 * aim

    def test_windows_that_do_not_divide_cost_their_padding(self):
        run, stage = danube_1_8b(), danube_1_8b().stages[3]  # 72 windows of 16,384
        assert stage_work(run, stage, 16).windows == 5
        eight, sixteen = (plan(run, H100, gpus).stages[3] for gpus in (8, 16))
        assert sixteen.tokens_per_s < 2 * 0.92 * eight.tokens_per_s

    def test_a_stages_own_window_is_planned(self):
        run = danube_1_8b()
        stages = (*run.stages[:3], dataclasses.replace(run.stages[3], sliding_window=1_024))
        narrowed = plan(dataclasses.replace(run, stages=stages), H100, 8).stages[3]
        assert narrowed.work.model.sliding_window == 1_024
        assert narrowed.tokens_per_s > plan(run, H100, 8).stages[3].tokens_per_s

    def test_the_presets_fit_the_node_they_are_made_for(self):
        for name, preset in PRESETS.items():
            run = preset()
            assert plan(run, H100, run.loop.num_workers).fits, name

    def test_the_4b_model_does_not_fit_under_ddp_and_the_remedy_does(self):
        run = danube3_4b()
        under_ddp = dataclasses.replace(run, loop=dataclasses.replace(run.loop, parallelism="ddp"))
        priced = plan(under_ddp, H100, 8)
        assert not priced.fits and priced.remedy is not None
        assert "--loop.parallelism zero1" in priced.remedy.options
        ways = {(way.parallelism, way.activation_checkpointing): way.windows for way in priced.stages[0].largest}
        assert ways["ddp", False] == 0 < ways["zero1", False] <= ways["zero2", False] < ways["zero2", True]
        assert ("zero3", False) not in ways  # not with FP8
        delayed = plan(dataclasses.replace(run, loop=dataclasses.replace(run.loop, fp8_scaling="delayed")), H100, 8)
        assert not any(way.activation_checkpointing for way in delayed.stages[0].largest)

    def test_a_plan_tells_of_the_numbers_that_its_run_rests_on_and_no_others(self):
        def told(num_gpus: int, **loop) -> dict[str, float]:
            return {each.what: each.value for each in based_on.used(LoopConfig(**loop), H100, num_gpus)}

        alone, pair, node, nodes = (told(num_gpus) for num_gpus in (1, 2, 8, 16))
        assert pair.keys() - alone.keys() == {"links between GPUs", based_on.OVERLAP.what, based_on.STRAGGLING.what}
        assert node == pair and pair["links between GPUs"] == 370  # GB/s
        assert nodes.keys() - node.keys() == {based_on.BETWEEN_NODES.what}
        eager, compiled = based_on.EAGER_HOST_S.what, based_on.COMPILED_HOST_S.what
        assert eager in alone and alone.keys() ^ told(1, compile=True).keys() == {eager, compiled}
        for scaling in ("current", "delayed", "block"):
            fp8 = told(1, precision="fp8-te", fp8_scaling=scaling)
            assert fp8.keys() - alone.keys() == {based_on.FP8_GEMM[scaling].what, based_on.FP8_CAST_BYTES[scaling].what}

    def test_a_micro_batch_too_large_is_cut_to_what_fits(self):
        run = danube3_500m()
        stages = (run.stages[0], dataclasses.replace(run.stages[1], micro_batch_size=18), run.stages[2])
        alone = dataclasses.replace(run.loop, num_workers=1)
        priced = plan(dataclasses.replace(run, stages=stages, loop=alone), H100, 1)
        assert [stage.fits for stage in priced.stages] == [True, False, True] and not priced.fits
        assert priced.remedy is not None
        largest = priced.stages[1].largest[0].windows
        assert priced.remedy.options == (f"--stages.1.micro-batch-size {largest}",)

    def test_precisions_that_a_gpu_lacks_are_refused(self):
        with pytest.raises(ConfigError, match=r"precision on A100.*is 'fp8-te'.*--loop.precision bf16"):
            plan(danube_1_8b(), A100, 8)
        emulated = dataclasses.replace(danube_1_8b(), loop=LoopConfig(precision="fp8-emulated"))
        with pytest.raises(ConfigError, match="one that GPUs compute"):
            plan(emulated, H100, 8)
        bf16 = dataclasses.replace(danube_1_8b(), loop=LoopConfig(precision="bf16"))
        assert plan(bf16, A100, 8).days > 2 * plan(bf16, H100, 8).days

    @pytest.mark.parametrize(
        ("text", "gpu", "count"), [("h100:8", "h100", 8), ("H200", "h200", 1), (" a100:16", "a100", 16)]
    )
    def test_hardware_is_named_briefly(self, text: str, gpu: str, count: int):
        assert parse_hardware(text) == (HARDWARE[gpu], count)

    @pytest.mark.parametrize("text", ["h100:0", "h100:-1", "h100:eight", "h100:12", "cpu:4", "", "h100:8:8"])
    def test_hardware_that_is_not_known_is_refused(self, text: str):
        with pytest.raises(ConfigError, match="hardware is"):
            parse_hardware(text)

    def test_what_torch_calls_a_gpu_is_found(self):
        assert hardware_named("NVIDIA H100 80GB HBM3") is H100
        assert hardware_named("NVIDIA H100 PCIe") is None  # other clocks, another peak


def write_results(folder: Path, *rows: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


MODE = {
    "contestant": "danube_ray",
    "precision": "bf16",
    "fp8_scaling": None,
    "attention": "auto",
    "compile": "each block",
    "activation_checkpointing": False,
    "micro_batch": 8,
}
ROW = {
    "case": "danube_1_8b-2048-bf16",
    "kind": "speed",
    "preset": "danube_1_8b",
    "sequence_length": 2_048,
    "optimizer_shards": 1,
    "tokens_per_s": {"median": 40_000.0, "low": 39_000.0, "high": 41_000.0},
    "tokens_per_step": 147_456,
    "mode": MODE,
    "memory": {"peak": {"allocated_gib": 70.0}, "planner_gib": 66.0},
    "machine": {"device": "NVIDIA H100 80GB HBM3"},
}
RUNS = {name: preset() for name, preset in PRESETS.items()}


class TestMeasured:
    def test_a_result_is_compared_with_the_formula_for_the_same_work(self, tmp_path: Path):
        (found,) = comparisons(write_results(tmp_path, ROW), RUNS)
        work = work_of(danube_1_8b(), num_gpus=1, precision="bf16", compile=True)
        work = dataclasses.replace(work, windows=72)
        assert found.predicted_tokens_per_s == pytest.approx(work.tokens / step_time(work, H100).total_s)
        assert found.speed_error == pytest.approx(found.predicted_tokens_per_s / 40_000 - 1)
        assert found.memory_error == pytest.approx(memory(work).total_bytes / (70 * 2**30) - 1)

    def test_pairs_count_for_us_and_not_for_the_peer(self, tmp_path: Path):
        pair = {key: value for key, value in ROW.items() if key not in ("tokens_per_s", "mode", "memory")}
        peer = {**MODE, "contestant": "transformers LlamaForCausalLM"}
        figures = {"ours": (50_000.0, MODE), "peer": (20_000.0, peer)}
        pair |= {name: {"tokens_per_s": {"median": speed}, "mode": mode} for name, (speed, mode) in figures.items()}
        (found,) = comparisons(write_results(tmp_path, pair), RUNS)
        assert found.measured_tokens_per_s == 50_000
        assert found.memory_error is None

    def test_plain_results_will_do_and_what_cannot_be_predicted_is_left_out(self, tmp_path: Path):
        plain = {"device": "NVIDIA H200", "preset": "danube3_500m", "sequence_length": 8_192, "micro_batch": 3}
        plain |= {"precision": "fp8-te", "tokens_per_s": 100_000.0, "mfu_of_bf16_peak": 0.4}
        others = (
            {**ROW, "machine": {"device": "cpu"}},
            {**ROW, "preset": "somebody_elses"},
            {**ROW, "mode": {**MODE, "precision": "fp8-te", "fp8_scaling": "rowwise"}},
            {"case": "failed", "error": {"type": "OutOfMemoryError"}},
            {"case": "a sweep", "sweep": [{"micro_batch": 1}]},
        )
        folder = write_results(tmp_path, plain, *others)
        with (folder / "results.jsonl").open("a") as file:
            file.write('{"tokens_per_s": 1')  # torn by a crash
        (found,) = comparisons(tmp_path, RUNS)
        assert (found.gpu, found.work.loop.precision) == (HARDWARE["h200"], "fp8-te")
        assert comparisons(tmp_path / "nowhere", RUNS) == []

    def test_a_share_of_the_optimizer_is_a_share_of_its_time_and_memory(self, tmp_path: Path):
        whole, share = comparisons(write_results(tmp_path, ROW, {**ROW, "optimizer_shards": 8}), RUNS)
        assert share.predicted_tokens_per_s > whole.predicted_tokens_per_s
        moments = 8 * danube_1_8b().model.num_parameters
        assert whole.predicted_bytes - share.predicted_bytes == pytest.approx(moments * 7 / 8)
