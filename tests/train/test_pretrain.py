"""Pretraining as a task: what a run is known by, what its stages change, and the weights it may begin with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from danube_ray.artifacts import ArtifactError, write_json
from danube_ray.cli.console import stored_run
from danube_ray.config import ConfigError, RunConfig, to_dict
from danube_ray.data.shards import write_tokens
from danube_ray.model.huggingface import export_model, load_config
from danube_ray.model.transformer import Transformer
from danube_ray.train.context import LocalContext
from danube_ray.train.export import export_checkpoint
from danube_ray.train.loop import fit
from danube_ray.train.pretrain import PretrainTask
from tests.models import tiny_tokenizer
from tests.runtime.text import MODEL, documents, small_run, write_text


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("tokens") / "tokens")


@pytest.fixture
def run(tokens: Path, tmp_path: Path) -> RunConfig:
    return small_run(tokens, tmp_path, "run")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model of the run's shape, in a Hugging Face folder."""
    torch.manual_seed(7)
    export_model(Transformer(MODEL).state_dict(), MODEL, tmp_path / "start", torch.float32)
    return tmp_path / "start"


def with_stage(run: RunConfig, index: int, **changes) -> RunConfig:
    stages = list(run.stages)
    stages[index] = dataclasses.replace(stages[index], **changes)
    return dataclasses.replace(run, stages=tuple(stages))


def tokens_by(folder: Path, tokenizer_sha256: str) -> Path:
    """The same shards whatever tokenizer they say they are made with."""
    sources = {source: {"unscored": documents(1, 1, 300)} for source in ("web", "docs", "stdlib")}
    held_out = {source: documents(2, 1, 20) for source in sources}
    write_tokens(folder, sources, held_out, vocab_size=64, tokenizer_sha256=tokenizer_sha256)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randint(3, 64, (2, 32)))


def test_a_run_is_known_by_its_model_its_data_and_their_order(run: RunConfig):
    identity = PretrainTask(run).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["model"] == to_dict(MODEL) and identity["init_from"] is None
    changed = {
        "model": dataclasses.replace(run, model=dataclasses.replace(MODEL, rms_norm_eps=1e-6)),
        "plan": with_stage(run, 1, sliding_window=8),
    }
    for field, other in changed.items():
        different = PretrainTask(other).identity()
        assert [name for name in identity if identity[name] != different[name]] == [field]
    for other in (with_stage(run, 0, shares={"web": 1}), dataclasses.replace(run, global_batch_tokens=512)):
        different = PretrainTask(other).identity()
        assert [name for name in identity if identity[name] != different[name]] == ["plan", "data"]
    for same in (
        dataclasses.replace(run, name="b", max_epochs=9.0),
        with_stage(run, 0, micro_batch_size=1),
        dataclasses.replace(run, loop=dataclasses.replace(run.loop, num_workers=2, checkpoint_every_steps=3)),
    ):
        assert PretrainTask(same).identity() == identity


def test_shards_of_another_tokenizer_are_other_data(run: RunConfig, tmp_path: Path):
    by_tokenizer = [
        PretrainTask(dataclasses.replace(run, tokens_dir=str(tokens_by(tmp_path / name, name)))).identity()
        for name in ("first", "second")
    ]
    assert [identity.pop("tokenizer") for identity in by_tokenizer] == ["first", "second"]
    assert by_tokenizer[0] == by_tokenizer[1]


def test_a_stage_trains_with_its_own_window_base_and_learning_rate(run: RunConfig):
    """Steps 0 to 11 are the first stage's, 12 to 23 the second's."""
    run = with_stage(with_stage(run, 0, sliding_window=4), 1, rope_theta=500.0, learning_rate_scale=0.5)
    task = PretrainTask(run)
    model = task.build_model()
    state = model.state_dict()
    for step, stage in ((0, 0), (11, 0), (12, 1), (23, 1), (3, 0)):
        task.enter_step(model, step)
        alike = Transformer(run.model_in(run.stages[stage]))
        alike.load_state_dict(state)
        assert torch.equal(logits(model), logits(alike))
        assert task.learning_rate_scale(step) == (1.0, 0.5)[stage]
        length = run.stages[stage].sequence_length
        assert task.flops_per_token(step) == run.model_in(run.stages[stage]).flops_per_token(length)
    assert task.flops_per_token(0) < MODEL.flops_per_token(32)
    plain = Transformer(MODEL)
    plain.load_state_dict(state)
    for step in (0, 12):  # so neither setting is without effect
        task.enter_step(model, step)
        assert not torch.allclose(logits(model), logits(plain), atol=1e-4)


def test_the_exported_model_has_the_last_stages_window_and_base(run: RunConfig, tmp_path: Path):
    run = with_stage(with_stage(run, 0, rope_theta=500.0), 1, sliding_window=16)
    run = dataclasses.replace(run, model=dataclasses.replace(MODEL, sliding_window=8))
    folder = tmp_path / run.name
    write_json(folder / "config.json", {**to_dict(run), "kind": "pretrain"})
    assert stored_run(folder).final_model == run.final_model == dataclasses.replace(MODEL, sliding_window=16)
    checkpoint = fit(PretrainTask(run), folder, run.loop, run.optimizer, LocalContext()).checkpoint
    out = export_checkpoint(checkpoint, run.final_model, tiny_tokenizer(tmp_path / "tok"), tmp_path / "model")
    assert load_config(out) == run.final_model


def test_a_run_begins_with_the_weights_it_is_given(run: RunConfig, start: Path):
    """In its own context, window and RoPE base, whatever the folder says of those."""
    model = dataclasses.replace(MODEL, context_length=128, sliding_window=8, rope_theta=500.0)
    built = PretrainTask(dataclasses.replace(run, model=model, init_from=str(start))).build_model()
    assert isinstance(built, Transformer) and built.config == built.model.config == model
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in built.parameters())
    alike = Transformer(model)
    torch.manual_seed(7)
    alike.load_state_dict(Transformer(MODEL).state_dict())
    assert torch.equal(logits(built), logits(alike))


def test_initial_weights_are_a_part_of_what_a_run_is(run: RunConfig, start: Path, tmp_path: Path):
    """Resumed with other ones it is refused; with the same it goes on from its checkpoint, not from them."""
    run = dataclasses.replace(run, init_from=str(start))
    folder, weights = tmp_path / "run", start / "model.safetensors"
    done = fit(PretrainTask(run), folder, run.loop, run.optimizer, LocalContext())
    assert fit(PretrainTask(run), folder, run.loop, run.optimizer, LocalContext()).checkpoint == done.checkpoint
    anew = dataclasses.replace(run, init_from=None)
    with pytest.raises(ArtifactError, match="init_from"):
        fit(PretrainTask(anew), folder, run.loop, run.optimizer, LocalContext())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="init_from"):
        fit(PretrainTask(run), folder, run.loop, run.optimizer, LocalContext())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64, "num_layers": 3}, "hidden_size of RunConfig.init_from=.* is 32, allowed is the run's 64"),
        ({"num_kv_heads": 4}, "num_kv_heads of RunConfig.init_from=.* is 2, allowed is the run's 4"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps of RunConfig.init_from"),
    ],
)
def test_weights_of_another_shape_are_refused_by_the_first_field_that_differs(
    run: RunConfig, start: Path, changes, said
):
    model = dataclasses.replace(MODEL, **changes)
    with pytest.raises(ConfigError, match=said):
        PretrainTask(dataclasses.replace(run, model=model, init_from=str(start)))


def test_another_vocabulary_is_refused_with_the_way_out(run: RunConfig, tmp_path: Path, start: Path):
    larger = dataclasses.replace(MODEL, vocab_size=96)
    export_model(Transformer(larger).state_dict(), larger, tmp_path / "larger", torch.float32)
    with pytest.raises(ConfigError, match="vocab_size .* is 96, allowed is the run's 64; .* with `danube remap`"):
        PretrainTask(dataclasses.replace(run, init_from=str(tmp_path / "larger")))
    tokens = tokens_by(tmp_path / "tokens", "another tokenizer")
    (start / "tokenizer.model").write_bytes(b"as many pieces, but others")
    with pytest.raises(ConfigError, match="tokenizer of RunConfig.init_from=.* with `danube remap`"):
        PretrainTask(dataclasses.replace(run, init_from=str(start), tokens_dir=str(tokens)))


def test_a_folder_without_whole_weights_is_refused_before_any_work(run: RunConfig, start: Path, tmp_path: Path):
    weights = start / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for folder in (start, tmp_path / "nowhere"):
        with pytest.raises(ConfigError):
            PretrainTask(dataclasses.replace(run, init_from=str(folder)))
