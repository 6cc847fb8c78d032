"""ZeRO against DDP: the same losses and weights, and the same checkpoints from one to the other.

Ranks are processes of their own on the CPU (gloo, meeting in a file: no ports). They leave what they found in
safetensors files, which the tests compare.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.spawn import start_processes

from danube_ray.artifacts import MANIFEST, read_json_lines
from danube_ray.config import ConfigError, LoopConfig, LoraConfig
from danube_ray.train import checkpoint, zero
from danube_ray.train.context import LocalContext
from danube_ray.train.loop import fit
from danube_ray.train.metrics import METRICS
from danube_ray.train.optimizer import learning_rate_at
from danube_ray.train.protocol import Context, Strategy
from danube_ray.train.step import accumulate
from danube_ray.train.strategy import build_strategy
from danube_ray.train.zero import check_zero
from tests.train.counting import OPTIMIZER, SETTINGS, CountingTask

STEPS, KEPT = 50, 20  # of a run, and after how many its state is kept
STAGES = ["zero1", "zero2", "zero3"]
CLOSE = {"atol": 1e-5, "rtol": 0}
Saved = dict[str, torch.Tensor]


class StumblingTask(CountingTask):
    """Counting, with the loss of chosen steps made no number."""

    broken = False

    def loss(self, model, batch):
        return super().loss(model, batch) * (float("nan") if self.broken else 1.0)


TASK = StumblingTask(STEPS)


def make(parallelism: str, context: Context, prepare: Callable[[nn.Module], nn.Module] = lambda m: m) -> Strategy:
    torch.manual_seed(0)
    module = prepare(TASK.build_model().to(context.device))
    settings = dataclasses.replace(SETTINGS, parallelism=parallelism, deterministic=False)
    return build_strategy(module, OPTIMIZER, settings, context)


def train(strategy: Strategy, context: Context, steps: range, settings: LoopConfig = SETTINGS) -> Saved:
    """Losses and gradient norms of `steps`. Two ranks accumulate over two micro-batches each, three over one."""
    losses, norms = [], []
    for step in steps:
        batch = TASK.reader(step, context.rank, context.world_size)
        gradient = accumulate(TASK, strategy, batch, step, settings, context)
        strategy.step(learning_rate_at(step, STEPS, OPTIMIZER))
        losses.append(gradient.loss)
        norms.append(gradient.norm)
    return {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}


def kept(strategy: Strategy, context: Context) -> Saved:
    """Rank 0's state, weights and moments together."""
    weights, moments = strategy.state()
    if context.rank == 0:
        assert moments.keys() == {f"{name}.{moment}" for name in weights for moment in checkpoint.MOMENTS}
    return {**weights, **moments}


def state_of(saved: Saved) -> Saved:
    return {name: tensor for name, tensor in saved.items() if name not in ("losses", "norms")}


def put_back(strategy: Strategy, saved: Saved, updates: int) -> None:
    moments = {name: tensor for name, tensor in saved.items() if name.endswith(checkpoint.MOMENTS)}
    strategy.load({name: saved[name] for name in saved.keys() - moments.keys()}, moments, updates)


def write(context: Context, folder: Path, name: str, found: Saved) -> None:
    if context.rank == 0:
        save_file(found, folder / f"{name}.safetensors")
    if context.world_size > 1:
        dist.barrier()


def go_on(strategy: Strategy, context: Context, folder: Path, begin: str, steps: range, end: str) -> None:
    """Load the state in file `begin`, train `steps`, and write the state to file `end`."""
    saved = load_file(folder / f"{begin}.safetensors")
    put_back(strategy, state_of(saved), steps.start)
    train(strategy, context, steps)
    write(context, folder, end, kept(strategy, context))


def run_whole(context: Context, folder: Path) -> None:
    """Every parallelism from the same start; stage 3, an option, for fewer steps."""
    for parallelism in ("ddp", *STAGES):
        strategy = make(parallelism, context)
        assert strategy.state()[1] == {}  # no moments before the first update
        curves = train(strategy, context, range(KEPT))
        write(context, folder, f"{parallelism}-{KEPT}", {**curves, **kept(strategy, context)})
        if parallelism == "zero3":
            break
        rest = train(strategy, context, range(KEPT, STEPS))
        curves = {name: torch.cat((curve, rest[name])) for name, curve in curves.items()}
        write(context, folder, f"{parallelism}-{STEPS}", {**curves, **kept(strategy, context)})
        if parallelism == "zero2":  # back to the kept step in place, and on again
            go_on(strategy, context, folder, f"zero2-{KEPT}", range(KEPT, STEPS), "zero2-rolled-back")


def run_resumed(context: Context, folder: Path) -> None:
    """ZeRO-1 from its own state; and from DDP's, to leave one for other stages and numbers of workers."""
    go_on(make("zero1", context), context, folder, f"zero1-{KEPT}", range(KEPT, STEPS), "zero1-resumed")
    go_on(make("zero1", context), context, folder, f"ddp-{KEPT}", range(KEPT, 35), "chain-35")


def finish_chain(context: Context, folder: Path) -> None:
    for parallelism in ("zero2", "zero3") if context.world_size > 1 else ("zero2",):
        end = f"chain-{parallelism}-{context.world_size}"
        go_on(make(parallelism, context), context, folder, "chain-35", range(35, STEPS), end)


def run_discarding(context: Context, folder: Path) -> None:
    """Gradients thrown away: none at all, a step's, one of NaN, and half of an accumulation. Then some more steps."""
    for parallelism in ("ddp", *STAGES):
        strategy = make(parallelism, context)
        train(strategy, context, range(2))
        strategy.discard()
        for step, TASK.broken in ((2, False), (3, True)):
            batch = TASK.reader(step, context.rank, context.world_size)
            norm = accumulate(TASK, strategy, batch, step, SETTINGS, context).norm
            assert math.isnan(norm) == TASK.broken
            strategy.discard()
        TASK.broken = False
        with strategy.accumulating(last=False):
            rows = TASK.reader(2, context.rank, context.world_size)
            strategy.backward(TASK.loss(strategy.model, {name: torch.from_numpy(row) for name, row in rows.items()}))
        strategy.discard()
        curves = train(strategy, context, range(4, 8))
        write(context, folder, f"{parallelism}-discarding", {**curves, **kept(strategy, context)})


def run_in_bf16(context: Context, folder: Path) -> None:
    for parallelism in ("ddp", *STAGES):
        settings = dataclasses.replace(SETTINGS, precision="bf16")
        write(context, folder, f"{parallelism}-bf16", train(make(parallelism, context), context, range(2), settings))


def run_loop(context: Context, folder: Path) -> None:
    """The loop under DDP; and under ZeRO-1 and, from its checkpoint at step 4, ZeRO-2."""
    runs = folder / "ddp-run", folder / "zero-run"
    fit(CountingTask(8), runs[0], SETTINGS, OPTIMIZER, context)
    fit(CountingTask(8), runs[1], dataclasses.replace(SETTINGS, parallelism="zero1"), OPTIMIZER, context)
    if context.rank == 0:
        (checkpoint.checkpoint_folder(runs[1] / "checkpoints", 8) / MANIFEST).unlink()
    dist.barrier()
    fit(CountingTask(8), runs[1], dataclasses.replace(SETTINGS, parallelism="zero2"), OPTIMIZER, context)


def run_prepared(context: Context, folder: Path) -> None:
    """Modules that were changed before ZeRO gets them: compiled, and frozen beside adapters."""
    from danube_ray.posttrain.lora import add_adapters  # PEFT takes seconds to import

    def compiled(module: nn.Module) -> nn.Module:
        module.compile(backend="aot_eager")
        return module

    def adapted(module: nn.Module) -> nn.Module:
        return add_adapters(module, LoraConfig())

    for prepare, stages in ((compiled, STAGES[:2]), (adapted, STAGES)):
        for parallelism in ("ddp", *stages):
            strategy = make(parallelism, context, prepare)
            curves = train(strategy, context, range(6))
            write(context, folder, f"{parallelism}-{prepare.__name__}", {**curves, **kept(strategy, context)})


def run_waiting(context: Context, folder: Path) -> None:
    """Rank 1's forward pass takes half a second longer: rank 0 waits for its gradients, and not the other way round."""

    class LateTask(CountingTask):
        def loss(self, model, batch):
            threading.Event().wait(0.5 * context.rank)
            return super().loss(model, batch)

    for parallelism in ("ddp", "zero1", "zero2"):
        strategy = make(parallelism, context)
        batch = TASK.reader(0, context.rank, context.world_size)
        accumulate(LateTask(STEPS, micro_batch_size=3), strategy, batch, 0, SETTINGS, context)
        waited_s = torch.tensor([strategy.communication_s()])
        save_file({"waited_s": waited_s}, folder / f"{parallelism}-waiting-{context.rank}.safetensors")


def two_ranks(context: Context, folder: Path) -> None:
    run_waiting(context, folder)
    run_whole(context, folder)
    run_resumed(context, folder)
    run_discarding(context, folder)
    run_in_bf16(context, folder)
    run_loop(context, folder)


def three_ranks(context: Context, folder: Path) -> None:
    zero.BUCKET_ELEMENTS = 3_000  # several buckets, and gradients larger than one
    finish_chain(context, folder)


def on_gpu(context: Context, folder: Path) -> None:
    for parallelism in ("ddp", *STAGES):
        for precision in ("fp32", "bf16"):
            strategy = make(parallelism, context)
            curves = train(strategy, context, range(8), dataclasses.replace(SETTINGS, precision=precision))
            put_back(strategy, {name: tensor.cpu() for name, tensor in kept(strategy, context).items()}, 8)
            curves["after"] = train(strategy, context, range(8, 10))["losses"]
            save_file(curves, folder / f"{parallelism}-{precision}.safetensors")


def enter(rank: int, world_size: int, folder: Path, work: Callable[[Context, Path], None]) -> None:
    torch.set_num_threads(1)
    if world_size > 1:  # a lone process has no group: ZeRO makes its own
        meeting = f"file://{folder / f'meeting-{world_size}'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    work(LocalContext(), folder)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What ranks left: two first, then three and one at the same time.

    They are forks of one process that has imported what would take each of them ten seconds.
    """
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    multiprocessing.set_forkserver_preload([__name__, "deepspeed.runtime.zero.muon.muon_optimizer"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        environment.setenv("DS_ACCELERATOR", "cpu")
        for together in ([(2, two_ranks)], [(3, three_ranks), (1, finish_chain)]):
            groups = [
                start_processes(enter, (count, folder, work), count, join=False, start_method="forkserver")
                for count, work in together
            ]
            for group in groups:
                while not group.join():
                    pass
    return folder


def same(found: Saved, expected: Saved) -> None:
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(("parallelism", "steps"), [("zero1", STEPS), ("zero2", STEPS), ("zero3", KEPT)])
def test_losses_norms_weights_and_moments_are_those_of_ddp(folder, parallelism, steps):
    expected = load_file(folder / f"ddp-{steps}.safetensors")
    assert len(expected["losses"]) == steps and expected["losses"][-1] < expected["losses"][0] - 1
    clipped = expected["norms"] > OPTIMIZER.max_grad_norm
    assert clipped.any() and not clipped.all()
    same(load_file(folder / f"{parallelism}-{steps}.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["zero2-3", "zero3-3", "zero2-1"])
def test_a_state_goes_from_ddp_to_zero_to_another_stage_and_number_of_workers(folder, end):
    whole = load_file(folder / f"ddp-{STEPS}.safetensors")
    same(load_file(folder / f"chain-{end}.safetensors"), state_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize(("parallelism", "end"), [("zero1", "zero1-resumed"), ("zero2", "zero2-rolled-back")])
def test_a_run_resumed_or_rolled_back_in_place_ends_with_the_same_bits(folder, parallelism, end):
    found = load_file(folder / f"{end}.safetensors")
    for name, expected in state_of(load_file(folder / f"{parallelism}-{STEPS}.safetensors")).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", STAGES)
def test_discarded_steps_leave_no_trace(folder, parallelism):
    expected = load_file(folder / "ddp-discarding.safetensors")
    assert expected["losses"].isfinite().all()
    same(load_file(folder / f"{parallelism}-discarding.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", STAGES)
def test_autocast_around_the_forward_pass_holds_inside(folder, parallelism):
    """The first loss is computed by the same weights; from then on bf16 rounds differences of 1e-7 up to its own."""
    found, expected = (load_file(folder / f"{name}-bf16.safetensors")["losses"] for name in (parallelism, "ddp"))
    assert found[0] == expected[0] != load_file(folder / f"ddp-{STEPS}.safetensors")["losses"][0]
    assert found[1] == pytest.approx(expected[1].item(), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "zero1", "zero2"])
def test_a_rank_knows_how_long_it_waited_for_the_others_gradients(folder, parallelism):
    early, late = (load_file(folder / f"{parallelism}-waiting-{rank}.safetensors")["waited_s"] for rank in (0, 1))
    assert early > 0.4 and late < 0.3


@pytest.mark.slow
def test_the_loop_goes_on_from_one_stage_s_checkpoint_under_another(folder):
    found, expected = (
        [row["loss"] for row in read_json_lines(folder / name / METRICS) if row["kind"] == "train"]
        for name in ("zero-run", "ddp-run")
    )
    assert len(found) == 8 and found == pytest.approx(expected, abs=1e-5)
    ends = [checkpoint.checkpoint_folder(folder / name / "checkpoints", 8) for name in ("zero-run", "ddp-run")]
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        found_tensors, expected_tensors = (load_file(end / file) for end in ends)
        assert found_tensors.keys() == expected_tensors.keys()
        same(found_tensors, expected_tensors)


@pytest.mark.slow
def test_compiled_modules_and_adapters_train_as_under_ddp(tmp_path):
    pytest.importorskip("deepspeed")
    start_processes(enter, (2, tmp_path, run_prepared), 2)
    for prepared, stages in (("compiled", STAGES[:2]), ("adapted", STAGES)):
        expected = load_file(tmp_path / f"ddp-{prepared}.safetensors")
        for parallelism in stages:
            same(load_file(tmp_path / f"{parallelism}-{prepared}.safetensors"), expected)


@pytest.mark.gpu
def test_one_gpu_trains_as_without_zero_in_fp32_and_under_autocast(tmp_path):
    """There the engine's own forward pass would switch autocast off, so bf16 would give the losses of fp32."""
    pytest.importorskip("deepspeed")
    start_processes(enter, (1, tmp_path, on_gpu), 1)
    for parallelism in STAGES:
        found, expected = (load_file(tmp_path / f"{name}-fp32.safetensors") for name in (parallelism, "ddp"))
        for name in ("losses", "norms", "after"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
        found, expected = (load_file(tmp_path / f"{name}-bf16.safetensors") for name in (parallelism, "ddp"))
        assert found["losses"][0] == expected["losses"][0]
        torch.testing.assert_close(found["losses"], expected["losses"], atol=2e-2, rtol=0)
    fp32, bf16 = (load_file(tmp_path / f"ddp-{precision}.safetensors")["losses"] for precision in ("fp32", "bf16"))
    assert fp32[0] != bf16[0]


def test_zero_without_deepspeed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match="zero1.*pip install deepspeed"):
        check_zero(LoopConfig(parallelism="zero1"))
    check_zero(LoopConfig())


def test_stage_3_is_refused_under_torch_compile():
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError, match="compile.*zero3.*use zero1 or zero2"):
        check_zero(LoopConfig(parallelism="zero3", compile=True))
    check_zero(LoopConfig(parallelism="zero2", compile=True))
