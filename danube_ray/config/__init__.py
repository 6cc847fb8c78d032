"""Every setting of a run, as frozen dataclasses that validate themselves and compute what follows from them.

A configuration is data: it imports neither torch nor ray, reads no file, and prints as JSON. Presets build them
(`danube_ray.presets`), the command line overrides single fields, and each run stores the resolved result.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from danube_ray.config.check import ConfigError, require, require_positive, valid_name
from danube_ray.config.curation import CurationConfig, Extraction
from danube_ray.config.finetuning import DpoConfig, EncoderConfig, FinetuneConfig, LoraConfig
from danube_ray.config.model import BOS_ID, EOS_ID, UNK_ID, ModelConfig
from danube_ray.config.rules import NO_RULES, RULE_SETS, RULES, SIGNALS, WEB_RULES, HeuristicRules, LineRules
from danube_ray.config.run import QUALITY_BOUNDS, RunConfig, StageConfig
from danube_ray.config.serving import DEFAULT_HOST, DEFAULT_PORT, EngineSettings, GateSettings, ServeConfig, ServedModel
from danube_ray.config.training import (
    FP8_SCALINGS,
    AttentionBackend,
    Fp8Scaling,
    LoopConfig,
    OptimizerConfig,
    Parallelism,
    Precision,
)

__all__ = [
    "ConfigError",
    "require",
    "require_positive",
    "valid_name",
    "CurationConfig",
    "Extraction",
    "DpoConfig",
    "EncoderConfig",
    "FinetuneConfig",
    "LoraConfig",
    "BOS_ID",
    "EOS_ID",
    "UNK_ID",
    "ModelConfig",
    "NO_RULES",
    "RULE_SETS",
    "RULES",
    "SIGNALS",
    "WEB_RULES",
    "HeuristicRules",
    "LineRules",
    "QUALITY_BOUNDS",
    "RunConfig",
    "StageConfig",
    "DEFAULT_HOST",
    "DEFAULT_PORT",
    "EngineSettings",
    "GateSettings",
    "ServeConfig",
    "ServedModel",
    "FP8_SCALINGS",
    "AttentionBackend",
    "Fp8Scaling",
    "LoopConfig",
    "OptimizerConfig",
    "Parallelism",
    "Precision",
    "to_dict",
]


def to_dict(config: object) -> dict[str, Any]:
    """A configuration as plain JSON-able values."""
    return dataclasses.asdict(config)  # type: ignore[arg-type]
