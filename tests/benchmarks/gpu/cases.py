"""What the GPU benchmark measures, most important first, and the issue's aims for it.

Kinds: `speed` times one contestant alone; `pairs` times ours and the peer in turn; `limiter` profiles a step by kernel
family; `memory` sweeps the micro-batch. A case's name says all that tells it from the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from danube_ray.config import AttentionBackend, Fp8Scaling, Precision
from danube_ray.presets import PRESETS

Kind = Literal["speed", "pairs", "limiter", "memory"]

# tokens/s on one H100 SXM, by preset, sequence length and number format; and how much faster than the peer.
AIMS = {
    ("danube_1_8b", 2_048, "bf16"): 45_000,
    ("danube_1_8b", 2_048, "fp8"): 57_000,
    ("danube_1_8b", 8_192, "bf16"): 39_000,
    ("danube_1_8b", 8_192, "fp8"): 47_000,
}
RATIO_AIM = 1.5
PACKED_TOKENS = 500  # mean length of a web document, about


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How a step is computed: compiled as far as its precision allows, or without torch.compile (`eager`)."""

    precision: Precision = "bf16"
    scaling: Fp8Scaling | None = None
    attention: AttentionBackend = "auto"
    eager: bool = False
    checkpointing: bool = False

    @property
    def number_format(self) -> str:
        """What an aim is given for: bf16 or fp8."""
        return self.precision.partition("-")[0]

    @property
    def name(self) -> str:
        parts = (
            self.precision,
            self.scaling,
            None if self.attention == "auto" else self.attention,
            "eager" if self.eager else None,
            "checkpointed" if self.checkpointing else None,
        )
        return "-".join(part for part in parts if part)


BF16 = Mode()
TE = Mode(precision="fp8-te", scaling="current")
TORCHAO = Mode(precision="fp8-torchao", scaling="current")
MAIN = (BF16, TE, TORCHAO)
UNCOMPILED = (Mode(eager=True), Mode(precision="fp8-te", scaling="current", eager=True))
OTHER_SCALINGS = (
    Mode(precision="fp8-te", scaling="delayed"),
    Mode(precision="fp8-te", scaling="block"),
    Mode(precision="fp8-torchao", scaling="rowwise"),
)
BACKENDS: tuple[AttentionBackend, ...] = ("flash", "te", "varlen", "flex", "sdpa")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement. `mode` None is the peer alone, with transformers' `peer_attention`.

    `optimizer_shards` N gives AdamW the first 1/N of the parameters: what one of N ranks updates under ZeRO-1, without
    the exchange between them. `document_tokens` None makes every window one document, so that attention computes all
    that the FLOP formula counts.
    """

    kind: Kind
    preset: str
    sequence_length: int
    mode: Mode | None
    peer_attention: Literal["flash_attention_2", "sdpa"] | None = None
    optimizer_shards: int = 1
    document_tokens: int | None = None

    @property
    def name(self) -> str:
        parts = (
            self.preset,
            str(self.sequence_length),
            self.mode.name if self.mode else f"peer-{self.peer_attention or 'auto'}",
            "packed" if self.document_tokens else None,
            f"optimizer-1-of-{self.optimizer_shards}" if self.optimizer_shards > 1 else None,
            {"speed": None, "pairs": "vs-peer"}.get(self.kind, self.kind),
        )
        return "-".join(part for part in parts if part)

    @property
    def aim(self) -> int | None:
        """Tokens/s asked of this case, where there is an aim."""
        return AIMS.get((self.preset, self.sequence_length, self.mode.number_format)) if self.mode else None


def suite(preset: str | None = None) -> list[Case]:
    """The cases in order: the Danube models, or every sequence length of one preset, in its own precision first."""
    if preset is not None:
        run = PRESETS[preset]()
        own = (Mode(precision="fp32", eager=True),) if run.loop.precision == "fp32" else ()
        main = (*own, UNCOMPILED[0], *MAIN)
        more = (*UNCOMPILED[1:], *OTHER_SCALINGS, *(Mode(attention=backend) for backend in BACKENDS))
        lengths = [stage.sequence_length for stage in run.stages]
        return [case for n in lengths for case in [*group(preset, n, main), *speeds(preset, n, *more)]]
    return [
        *group("danube_1_8b", 2_048),
        *speeds("danube_1_8b", 2_048, *UNCOMPILED),
        *group("danube_1_8b", 8_192),
        *group("danube_1_8b", 4_096),
        *group("danube3_500m", 8_192),
        *(dataclasses.replace(case, optimizer_shards=8) for case in group("danube3_4b", 8_192)),
        Case(kind="speed", preset="danube3_4b", sequence_length=8_192, mode=Mode(checkpointing=True)),
        *speeds("danube_1_8b", 2_048, *OTHER_SCALINGS),
        *speeds("danube_1_8b", 2_048, *(Mode(attention=backend) for backend in BACKENDS)),
        *speeds("danube_1_8b", 8_192, *OTHER_SCALINGS, *(Mode(attention=backend) for backend in BACKENDS)),
        Case(kind="speed", preset="danube_1_8b", sequence_length=2_048, mode=None, peer_attention="sdpa"),
        Case(kind="speed", preset="danube_1_8b", sequence_length=8_192, mode=None, peer_attention="sdpa"),
        *(
            dataclasses.replace(case, document_tokens=PACKED_TOKENS)
            for length in (2_048, 8_192)
            for case in speeds("danube_1_8b", length, BF16, TE)
        ),
    ]


def group(preset: str, length: int, modes: tuple[Mode, ...] = MAIN) -> Iterator[Case]:
    """Modes alone, then each against the peer, which stays built from one to the next."""
    yield from speeds(preset, length, *modes)
    for mode in modes:
        yield Case(kind="pairs", preset=preset, sequence_length=length, mode=mode)


def speeds(preset: str, length: int, *modes: Mode) -> Iterator[Case]:
    for mode in modes:
        yield Case(kind="speed", preset=preset, sequence_length=length, mode=mode)


def special(kind: Literal["limiter", "memory"], preset: str | None = None) -> list[Case]:
    """What `--limiter` and `--memory` look at: the main modes, and for the limiter the peer beside them."""
    shapes = [("danube_1_8b", 2_048), ("danube_1_8b", 8_192)]
    if preset is not None:
        shapes = [(preset, stage.sequence_length) for stage in PRESETS[preset]().stages]
    elif kind == "memory":
        shapes += [("danube3_500m", 8_192), ("danube3_4b", 8_192)]
    modes = (*MAIN, *((None,) if kind == "limiter" else ()))
    return [
        Case(
            kind=kind,
            preset=name,
            sequence_length=length,
            mode=mode,
            optimizer_shards=8 if name == "danube3_4b" else 1,
        )
        for name, length in shapes
        for mode in modes
    ]


def chosen(cases: list[Case], patterns: list[str]) -> list[Case]:
    """The cases whose name matches any of the shell patterns; all of them without patterns."""
    return [case for case in cases if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)]
