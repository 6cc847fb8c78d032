"""The one-GPU benchmark's cases, contestants and measurements, on the CPU at a toy size."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from danube_ray.config import ConfigError, RunConfig
from danube_ray.presets import PRESETS, nano
from tests.benchmarks.gpu import build
from tests.benchmarks.gpu.build import largest, ready_ours, ready_peer
from tests.benchmarks.gpu.cases import AIMS, BF16, TORCHAO, Case, Mode, chosen, special, suite
from tests.benchmarks.gpu.measure import Bench, Measurements
from tests.benchmarks.gpu.ours import Ours
from tests.benchmarks.gpu.timing import Parking
from tests.benchmarks.gpu.workload import STEPS_OF_TEXT, batches, one_gpu_run, with_micro_batch, write_noise

CPU = torch.device("cpu")
EAGER = Mode(eager=True)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _toy_nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """nano with two narrow layers, on one thread: tensors this small only make threads wait for each other."""
    torch.set_num_threads(1)
    shape = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 512}
    toy = dataclasses.replace(nano(), model=dataclasses.replace(nano().model, **shape))
    monkeypatch.setitem(PRESETS, "nano", lambda: toy)


def nano_case(kind="speed", mode: Mode | None = EAGER, **changes) -> Case:
    return Case(kind=kind, preset="nano", sequence_length=128, mode=mode, **changes)


def nano_run(folder: Path, case: Case | None = None, micro_batch: int = 4, accumulate: int = 2) -> RunConfig:
    run = one_gpu_run(case or nano_case(), folder, micro_batch, accumulate)
    if not folder.exists():
        write_noise(folder, run.model, (STEPS_OF_TEXT + 1) * run.global_batch_tokens, None)
    return run


def values(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


class TestCases:
    def test_the_most_important_come_first_and_names_tell_all_apart(self):
        cases = suite()
        names = [case.name for case in cases]
        assert names[:6] == [
            "danube_1_8b-2048-bf16",
            "danube_1_8b-2048-fp8-te-current",
            "danube_1_8b-2048-fp8-torchao-current",
            "danube_1_8b-2048-bf16-vs-peer",
            "danube_1_8b-2048-fp8-te-current-vs-peer",
            "danube_1_8b-2048-fp8-torchao-current-vs-peer",
        ]
        for listed in (cases, suite("nano"), special("limiter"), special("memory"), special("limiter", "nano")):
            assert len({case.name for case in listed}) == len(listed)

    def test_every_aim_has_a_case_and_every_model_fits_its_preset(self, tmp_path: Path):
        aimed = {(c.preset, c.sequence_length, c.mode.number_format) for c in suite() if c.mode and c.aim}
        assert aimed == set(AIMS)
        for case in (*suite(), *special("limiter"), *special("memory")):
            run = one_gpu_run(case, tmp_path, None, None)
            preset = PRESETS[case.preset]()
            assert run.model == preset.model
            # One GPU's share of the preset's batch, to the nearest micro-batch: the optimizer's part is as in a run.
            assert run.global_batch_tokens == pytest.approx(preset.global_batch_tokens / 8, rel=0.06)

    def test_a_4b_with_all_of_the_optimizer_is_never_mistaken_for_a_share(self):
        names = [case.name for case in suite() if case.preset == "danube3_4b"]
        assert "danube3_4b-8192-bf16-checkpointed" in names
        assert all("optimizer-1-of-8" in name for name in names if "checkpointed" not in name)

    def test_patterns_choose_and_a_length_that_the_preset_lacks_is_refused(self, tmp_path: Path):
        assert [case.name for case in chosen(suite(), ["danube3_500m-*-vs-peer"])] == [
            f"danube3_500m-8192-{mode}-vs-peer" for mode in ("bf16", "fp8-te-current", "fp8-torchao-current")
        ]
        with pytest.raises(ConfigError, match=r"sequence length of nano is 99.*128, 256, 512"):
            one_gpu_run(dataclasses.replace(nano_case(), sequence_length=99), tmp_path, None, None)


class TestContestants:
    @pytest.mark.parametrize("window", [None, 48])
    def test_ours_and_the_peer_begin_with_the_same_loss_and_gradient(self, window: int | None, tmp_path: Path):
        run = nano_run(tmp_path / "tokens")
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, sliding_window=window))
        ours, peer = ready_ours(nano_case(), run, CPU), ready_peer(nano_case(), run, CPU)
        assert ours.first_step["loss"] == pytest.approx(peer.first_step["loss"], rel=1e-3)
        assert ours.first_step["gradient_norm"] == pytest.approx(peer.first_step["gradient_norm"], rel=0.01)
        family = "Llama" if window is None else "Mistral"
        assert peer.facts()["mode"]["contestant"] == f"transformers {family}ForCausalLM"

    def test_both_learn_from_their_steps(self, tmp_path: Path):
        run = nano_run(tmp_path / "tokens")
        run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, warmup_steps=0))
        rows = next(batches(run))
        for make in (ready_ours, ready_peer):
            contestant = make(nano_case(), run, CPU).contestant
            losses = [float(contestant.train(rows)[0]) for _ in range(4)]
            assert losses[-1] < losses[0]

    def test_where_memory_runs_out_the_largest_divisor_of_the_step_that_fits_is_used_and_named(self, tmp_path: Path):
        run = nano_run(tmp_path / "tokens", micro_batch=6, accumulate=2)

        def ours(at: RunConfig) -> Ours:
            if at.stages[0].micro_batch_size > 3:
                torch.empty(2**60)  # more than any machine has: the real error
            return Ours(at, CPU)

        ready = largest(ours, run, CPU, [])
        assert ready.facts()["mode"]["micro_batch"] == 3  # of 12 windows: 6 and 4 fail, 5 doesn't divide them
        assert [attempt["micro_batch"] for attempt in ready.attempts] == [6, 4]
        assert "allocate" in ready.attempts[0]["error"]["message"]
        whole = largest(lambda at: Ours(at, CPU), with_micro_batch(run, 3), CPU, [])
        assert ready.first_step["gradient_norm"] == pytest.approx(whole.first_step["gradient_norm"], rel=1e-3)

    def test_a_peer_that_cannot_be_had_one_way_is_had_another_and_says_why(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(build, "available_attentions", lambda device: ("flash_attention_2", "sdpa"))
        ready = ready_peer(nano_case(), nano_run(tmp_path / "tokens"), CPU)
        assert ready.facts()["mode"]["attention"] == "sdpa"
        (attempt,) = ready.attempts
        assert attempt["attention"] == "flash_attention_2" and attempt["error"]["type"] == "ImportError"

    def test_a_rank_s_share_of_the_optimizer_updates_that_share_and_no_more(self, tmp_path: Path):
        run = nano_run(tmp_path / "tokens")
        for make in (ready_ours, ready_peer):
            contestant = make(nano_case(optimizer_shards=4), run, CPU).contestant
            model = contestant.strategy.module if isinstance(contestant, Ours) else contestant.model
            before = values(list(model.parameters()))
            contestant.train(next(batches(run)))
            changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            share = sum(p.numel() for p, is_changed in zip(model.parameters(), changed, strict=True) if is_changed)
            assert 1 / 4 <= share / run.model.num_parameters < 0.3  # whole tensors: a little more than its share
            assert all(parameter.grad is None for parameter in model.parameters())
            assert "1 of 4" in contestant.facts()["optimizer"]

    def test_one_that_was_parked_goes_on_as_if_it_had_not_been(self, tmp_path: Path):
        run = nano_run(tmp_path / "tokens")
        parked, other = Ours(run, CPU), Ours(run, CPU)
        first, second = (next(steps) for steps in [batches(run)] * 2)
        for contestant in (parked, other):
            contestant.train(first)
        parking = Parking(parked.tensors())
        parking.park()
        assert sum(tensor.untyped_storage().nbytes() for tensor in parked.tensors()) == 0
        parking.fetch()
        for contestant in (parked, other):
            contestant.train(second)
        assert len(parked.tensors()) == 3 * len(list(parked.strategy.module.parameters()))  # weights and both moments
        for a, b in zip(parked.tensors(), other.tensors(), strict=True):
            assert torch.equal(a, b)


class TestMeasurements:
    @pytest.fixture
    def measure(self, tmp_path: Path) -> Measurements:
        return Measurements(Bench(device=CPU, scratch=tmp_path, steps=3, pairs=2, micro_batch=4, accumulate=1))

    def test_speed(self, measure: Measurements):
        result = measure(nano_case())
        assert result["tokens_per_s"]["median"] == pytest.approx(4 * 128 / sorted(result["step_s"])[1])
        flops = PRESETS["nano"]().model.flops_per_token(128)
        rate = 4 * 128 / sorted(result["step_s"])[1] * flops
        assert result["model_tflops_per_s"] == pytest.approx(rate / 1e12)
        assert result["mfu_of_bf16_peak"] is None  # a CPU has no peak in the table
        assert result["mode"]["micro_batch"] == 4 and result["mode"]["attention"] == "sdpa"
        assert result["memory"]["planner_gib"] > 0

    def test_pairs_keep_the_peer_for_the_next_mode_of_the_shape(self, measure: Measurements):
        first, second = measure(nano_case("pairs")), measure(nano_case("pairs", Mode(eager=True, attention="sdpa")))
        for result in (first, second):
            assert result["ratio"]["pairs"] == 2
            ours, peer = result["ours"], result["peer"]
            assert result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
            assert ours["first_step"]["loss"] == pytest.approx(peer["first_step"]["loss"], rel=1e-3)
        assert first["peer"]["warm_up_s"] == second["peer"]["warm_up_s"]

    def test_a_failed_mode_leaves_the_next_case_as_it_was(self, measure: Measurements):
        with pytest.raises(ConfigError, match="fp8-te"):
            measure(nano_case("pairs", Mode(precision="fp8-te", eager=True)))
        assert measure(nano_case("pairs"))["ratio"]["pairs"] == 2

    def test_packed_windows_have_documents_of_their_own(self, measure: Measurements):
        result = measure(nano_case(document_tokens=50))
        whole = measure(nano_case())
        assert result["first_step"]["loss"] != whole["first_step"]["loss"]

    def test_the_limiter_s_shares_are_of_the_step(self, measure: Measurements):
        result = measure(nano_case("limiter"))
        families = result["families"]
        assert {"GEMM", "attention", "loss", "optimizer", "elementwise"} <= set(families)
        assert families["GEMM"]["s"] == pytest.approx(result["step_s"] * families["GEMM"]["share"])
        assert result["gemm_tflops_per_s"] > 0 and result["attention_tflops_per_s"] > 0
        assert result["tokens"] == 4 * 128
        assert len(result["top_kernels"]) == 25

    def test_memory_is_swept_beside_the_planner_s_figure(self, measure: Measurements):
        result = Measurements(dataclasses.replace(measure.bench, micro_batch=1))(nano_case("memory"))
        planned = [point["planner_gib"] for point in result["sweep"]]
        assert [point["micro_batch"] for point in result["sweep"]] == [1, 2, 4]
        assert planned == sorted(planned) and planned[0] < planned[-1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [BF16, TORCHAO], ids=lambda mode: mode.name)
def test_compiled_steps_start_like_the_compiled_peer(mode: Mode, tmp_path: Path):
    bench = Bench(device=CPU, scratch=tmp_path, pairs=1, micro_batch=4, accumulate=2)
    result = Measurements(bench)(nano_case("pairs", mode))
    assert (result["ours"]["mode"]["compile"], result["peer"]["mode"]["compile"]) == ("each block", "the whole model")
    ours, peer = (result[name]["first_step"] for name in ("ours", "peer"))
    assert ours["loss"] == pytest.approx(peer["loss"], rel=1e-3)
    assert ours["gradient_norm"] == pytest.approx(peer["gradient_norm"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["speed", "pairs", "limiter", "memory"])
def test_every_kind_of_case_runs_compiled_on_a_gpu(kind: str, tmp_path: Path):
    bench = Bench(device=torch.device("cuda"), scratch=tmp_path, steps=2, pairs=2, micro_batch=4, accumulate=2)
    result = Measurements(bench)(nano_case(kind, BF16))
    if kind == "speed":
        assert result["memory"]["peak"]["allocated_gib"] > 0
        assert result["clocks"]["clocks.sm"] > 0
    if kind == "pairs":
        first = [result[name]["first_step"]["gradient_norm"] for name in ("ours", "peer")]
        assert first[0] == pytest.approx(first[1], rel=0.02)
        assert result["peer"]["mode"]["compile"] == "the whole model"
    if kind == "limiter":
        assert {"GEMM", "attention", "optimizer", "loss"} <= set(result["families"])
        assert 0 <= result["idle_share"] < 1
    if kind == "memory":
        peaks = [point["peak"]["allocated_gib"] for point in result["sweep"]]
        assert peaks == sorted(peaks) and peaks[0] < peaks[-1]
