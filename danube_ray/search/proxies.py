"""Small runs that stand in for a large one: the same data order and schedule shape, a smaller model, fewer tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from danube_ray.config import ConfigError, ModelConfig, RunConfig


def proxy(run: RunConfig, name: str, model: ModelConfig, total_tokens: int) -> RunConfig:
    """`run` with another model and about `total_tokens` tokens, each stage keeping its share of the run.

    Warm-up shrinks with the run, so that the schedule keeps its shape; sequences longer than the proxy's context
    are cut to it.
    """
    scale = total_tokens / run.total_tokens
    stages = tuple(
        dataclasses.replace(
            stage,
            tokens=max(1, round(stage.tokens * scale)),
            sequence_length=min(stage.sequence_length, model.context_length),
        )
        for stage in run.stages
    )
    warmup = max(1, round(run.optimizer.warmup_steps * scale))
    optimizer = dataclasses.replace(run.optimizer, warmup_steps=warmup)
    return dataclasses.replace(run, name=name, model=model, stages=stages, optimizer=optimizer)


def override(config: Any, values: dict[str, Any]) -> Any:
    """A configuration with fields replaced by dotted path: `{"optimizer.learning_rate": 1e-3}`."""
    for path, value in values.items():
        field, _, rest = path.partition(".")
        if field not in {f.name for f in dataclasses.fields(config)}:
            known = ", ".join(f.name for f in dataclasses.fields(config))
            raise ConfigError(f"field of {type(config).__name__}", field, known)
        inner = override(getattr(config, field), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{field: inner})
    return config
