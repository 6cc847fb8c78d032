"""Every attention kernel that runs on CPUs against the formula; what each refuses; what `auto` picks on any machine."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from danube_ray.config import ConfigError
from danube_ray.model.attention import BACKENDS, Machine, Need, Visibility, check_attention, choose, refusal
from danube_ray.model.attention.choice import Choice, announce
from danube_ray.model.attention.kernels import Flex, Kernel, Sdpa, TransformerEngine, Varlen
from danube_ray.model.transformer import Transformer
from tests.model.attention_reference import distance, inputs, packed_ids, reference, run
from tests.models import SMALL

CPU = torch.device("cpu")
EXACT = 1e-5  # relative L2 of fp32 kernels against float64
HEAD_DIMS = (80, 96, 120, 128)  # of the Danube models, and the common one
HEADS = {"equal": (4, 4), "grouped": (4, 2), "one kv head": (4, 1)}
PACKED = [[17, 1, 30, 2], [50], [3, 46, 1]]  # documents in rows of 50 tokens
SEEN = {
    "causal": (None, None),
    "window": (7, None),
    "window of two": (2, None),
    "documents": (None, PACKED),
    "both": (7, PACKED),
}


def visibility(window: int | None, rows: list[list[int]] | None) -> Visibility:
    return Visibility.of(len(PACKED), 50, window, packed_ids(rows) if rows else None, CPU)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("window", "rows"), SEEN.values(), ids=SEEN)
def test_sdpa_equals_the_formula(window, rows, head_dim: int, heads: tuple[int, int]):
    qkv, upstream = inputs(3, 50, heads, head_dim, torch.float32, "cpu")
    seen = visibility(window, rows)
    expected = run(lambda q, k, v: reference(q, k, v, window, seen.document_ids), qkv, upstream)
    found = run(Sdpa.prepare(seen), qkv, upstream)
    assert found.heads.shape == (3, 50, heads[0], head_dim)
    assert distance(found.heads, expected.heads) < EXACT
    for gradient, exact in zip(found.gradients, expected.gradients, strict=True):
        assert distance(gradient, exact) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("window", "rows"), SEEN.values(), ids=SEEN)
def test_flex_equals_sdpa(window, rows, head_dim: int):
    qkv, _ = inputs(3, 50, (4, 2), head_dim, torch.float32, "cpu")
    seen = visibility(window, rows)
    assert distance(Flex.prepare(seen)(*qkv), Sdpa.prepare(seen)(*qkv)) < EXACT


@torch.no_grad()
@pytest.mark.parametrize(("window", "rows"), SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("kernel", [Varlen, TransformerEngine])
def test_sequences_end_to_end_say_the_same_as_a_mask(kernel: type[Kernel], window, rows):
    """What the CUDA kernels are told, followed by hand: each sequence by itself, rows of the batch laid end to end."""
    (q, k, v), _ = inputs(3, 50, (4, 2), 16, torch.float32, "cpu")
    seen = visibility(window, rows)
    packed = kernel.prepare(seen).packed  # type: ignore[attr-defined]
    starts = packed.cu_seqlens if packed.cu_seqlens is not None else torch.arange(0, 151, 50)
    assert starts[0] == 0 and starts[-1] == 150
    parts = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert 0 <= end - start <= packed.longest
        if end > start:
            flat = (part.flatten(0, 1)[None, start:end] for part in (q, k, v))
            parts.append(reference(*flat, packed.window, None))
    found = torch.cat(parts, dim=1).view(q.shape)
    assert distance(found, reference(q, k, v, window, seen.document_ids)) < 1e-12


def test_what_hides_nothing_is_dropped():
    def seen(window: int | None, rows: list[list[int]] | None = None) -> Visibility:
        return Visibility.of(2, 1_024, window, packed_ids(rows) if rows else None, CPU)

    assert seen(None).mask() is None
    assert seen(1_024).mask() is None
    assert seen(1_023).mask() is not None
    assert seen(1_024).packed().window is None
    assert seen(1_023).packed().window == 1_023
    whole = seen(600, [[1_024], [1_024]]).packed()  # no document begins inside a row
    assert (whole.cu_seqlens, whole.longest, whole.window) == (None, 1_024, 600)
    halves = [[512, 512], [500, 524]]
    assert seen(600, halves).packed().window == 600  # 524 tokens: the bound is the power of two above
    assert seen(600, [[512, 512], [512, 512]]).packed().window is None
    assert seen(None, [[1] * 1_024, [1] * 1_024]).packed().longest == 256  # few different bounds: T/4 at least


def test_transformer_engine_sees_few_numbers_of_sequences():
    def sequences(*rows: int) -> int:
        ids = packed_ids([[8] * rows[0] + [400 - 8 * rows[0]]])
        packed = TransformerEngine.prepare(Visibility.of(1, 400, None, ids, CPU)).packed
        return len(packed.cu_seqlens) - 1  # type: ignore[arg-type]

    assert [sequences(number) for number in (1, 31, 32, 49)] == [32, 32, 64, 64]


MODEL = dataclasses.replace(SMALL, head_dim=16, initializer_range=0.3)
TEXT = torch.arange(96).view(2, 48) % 61
IDS = packed_ids([[20, 28], [1, 30, 17]])


@torch.no_grad()
def test_a_model_gives_the_same_with_each_backend():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(MODEL, sliding_window=9), attention="sdpa")
    expected = model(TEXT, IDS)
    for name in ("auto", "flex"):
        model.model.attention = name
        torch.testing.assert_close(model(TEXT, IDS), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_stage_changes_window_and_rope_base_from_outside():
    torch.manual_seed(0)
    model = Transformer(MODEL)
    first = model(TEXT)
    changed = dataclasses.replace(MODEL, sliding_window=5, rope_theta=500.0)
    model.model.config = changed
    elsewhere = Transformer(changed)
    elsewhere.load_state_dict(model.state_dict())
    assert torch.equal(model(TEXT), elsewhere(TEXT))
    assert (model(TEXT) - first).abs().max() > 1e-2
    model.model.config = MODEL
    assert torch.equal(model(TEXT), first)


def test_a_compiled_decoder_gives_the_same_and_compiles_once_for_all_documents():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, graphs = Transformer(MODEL), torch._dynamo.testing.CompileCounter()
    expected = model(TEXT, IDS)
    model.model.compile(backend=graphs)
    torch.testing.assert_close(model(TEXT, IDS), expected, atol=1e-5, rtol=1e-5)
    compiled = graphs.frame_count
    model(TEXT, packed_ids([[48], [2, 46]]))
    assert graphs.frame_count == compiled > 0


@pytest.mark.parametrize("dynamic", [None, False])
def test_a_graph_holds_the_variable_length_kernel_for_any_documents(dynamic: bool | None):
    """torch's kernel runs on GPUs alone, but its shapes can be followed here, which is what compilation needs."""
    torch._dynamo.reset()
    graphs = []

    def shapes_only(graph, _):
        graphs.append(graph)
        return lambda *_: (torch.zeros(2, 1_024, 4, 80),)

    def layer(q: Tensor, k: Tensor, v: Tensor, attend) -> Tensor:
        return attend(q, k, v)

    compiled = torch.compile(layer, backend=shapes_only, fullgraph=True, dynamic=dynamic)
    qkv, _ = inputs(2, 1_024, (4, 2), 80, torch.bfloat16, "cpu")
    for rows in ([[600, 424], [1_024]], [[900, 100, 24], [1_000, 24]], [[10] * 100 + [24], [513, 511]]):
        compiled(*qkv, Varlen.prepare(Visibility.of(2, 1_024, 64, packed_ids(rows), CPU)))
    assert len(graphs) == 1
    (call,) = [node for node in graphs[0].graph.nodes if "_varlen_attn" in str(node.target)]
    assert [63, 0] in call.args  # a window of 64 is the query and 63 keys before it


def machine(capability: tuple[int, int], *missing: str) -> Machine:
    """A GPU of that compute capability where the modules named can't be imported."""
    return Machine("cuda", "a GPU", capability, lambda module: f"no {module}" if module in missing else None)


PLAIN_CPU = Machine("cpu", "cpu", (0, 0), lambda module: "not for a CPU")
H100, A100, V100 = machine((9, 0)), machine((8, 0)), machine((7, 0))
TRAINING = Need(dtype=torch.bfloat16, head_dim=80, training=True, masked=True, deterministic=False)
FP32 = dataclasses.replace(TRAINING, dtype=torch.float32)
PLAIN = dataclasses.replace(TRAINING, masked=False)
EXACTLY = dataclasses.replace(TRAINING, deterministic=True)
INFERENCE = dataclasses.replace(FP32, training=False)


def of_dim(head_dim: int) -> Need:
    return dataclasses.replace(TRAINING, head_dim=head_dim)


@pytest.mark.parametrize(
    ("name", "need", "where", "says"),
    [
        *((name, TRAINING, PLAIN_CPU, "a CUDA GPU") for name in ("flash", "te", "varlen")),
        *((name, TRAINING, V100, "Ampere or later") for name in ("flash", "te", "varlen")),
        *((name, FP32, H100, "bfloat16 or float16; use precision bf16") for name in ("flash", "te", "varlen")),
        *((name, of_dim(84), H100, "multiple of 8") for name in ("flash", "te", "varlen")),
        ("flash", of_dim(264), H100, "at most 256"),
        ("varlen", of_dim(264), H100, "at most 256"),
        ("te", of_dim(136), H100, "at most 128"),
        ("flash", TRAINING, machine((9, 0), "flash_attn"), r"flash_attn \(no flash_attn\); pip install"),
        ("te", TRAINING, machine((9, 0), "transformer_engine.pytorch"), r"transformer_engine.*; pip install"),
        ("te", EXACTLY, H100, "not deterministic; use attention flash"),
        ("flex", FP32, PLAIN_CPU, "no backward pass on CPUs"),
        ("flex", TRAINING, machine((9, 0), "triton"), "importable triton"),
        ("flex", of_dim(8), H100, "a head_dim of at least 16"),
        ("flex", TRAINING, Machine("xpu", "xpu", (0, 0), lambda _: None), "a CUDA GPU, or a CPU"),
    ],
)
def test_a_backend_refuses_what_it_cannot_do(name, need: Need, where: Machine, says: str):
    with pytest.raises(ConfigError, match=rf"attention is '{name} on .*', allowed is .*{says}"):
        choose(name, need, where)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_an_h100_with_everything_refuses_no_danube(name, head_dim: int):
    assert refusal(name, of_dim(head_dim), H100) is None


def test_flex_serves_inference_on_a_cpu():
    assert refusal("flex", INFERENCE, PLAIN_CPU) is None


@pytest.mark.parametrize(
    ("need", "where", "picked"),
    [
        (TRAINING, H100, "flash"),
        (TRAINING, A100, "flash"),
        (EXACTLY, H100, "flash"),
        (TRAINING, machine((9, 0), "flash_attn"), "varlen"),
        (TRAINING, V100, "flex"),
        (TRAINING, machine((7, 0), "triton"), "sdpa"),
        (of_dim(84), machine((9, 0), "triton"), "sdpa"),
        (PLAIN, H100, "sdpa"),
        (FP32, H100, "sdpa"),
        (FP32, PLAIN_CPU, "sdpa"),
        (INFERENCE, PLAIN_CPU, "sdpa"),
    ],
)
def test_auto_picks_by_hardware_and_packages(need: Need, where: Machine, picked: str):
    assert choose("auto", need, where).name == picked


def test_auto_says_whom_it_passed_over():
    reason = choose("auto", TRAINING, machine((9, 0), "flash_attn")).reason
    assert "on a GPU" in reason and "flash needs an importable flash_attn (no flash_attn)" in reason
    asked = []
    eager = Machine("cuda", "a GPU", (9, 0), lambda module: asked.append(module))
    choose("auto", TRAINING, eager)
    assert asked == ["flash_attn"]  # importing transformer-engine takes seconds: not asked for where flash will do


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture):
    announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="danube_ray.model.attention"), torch.no_grad():
        model = Transformer(MODEL)
        for _ in range(2):
            model(TEXT)
    assert [record.getMessage() for record in caplog.records] == ["attention: sdpa (the only one that trains, on cpu)"]


def test_refusals_reach_whoever_starts_a_run():
    assert check_attention("auto", 80, "bf16", CPU) == Choice("sdpa", "the only one that trains, on cpu")
    with pytest.raises(ConfigError, match="attention is 'flash on cpu', allowed is a CUDA GPU; use attention auto"):
        check_attention("flash", 80, "bf16", CPU)
    model = Transformer(MODEL, attention="flex")
    with pytest.raises(ConfigError, match="no backward pass on CPUs"):
        model(TEXT)
    with torch.no_grad():
        model(TEXT)
