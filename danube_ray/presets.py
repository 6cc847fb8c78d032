"""Recipes: functions named for a model, each returning the whole `RunConfig` of its pretraining.

The Danube presets are for eight H100s of 80 GB and carry the numbers of the reports: Danube (arXiv 2401.16818, both
for Danube 1.8B and, in its later version, Danube2) and Danube3 (arXiv 2407.09276). Where a report is silent the choice
is ours and the comment says so. Sources are named web, instruct, wiki, academic, synthetic and other; code is left
out of the mixture, as in the reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from danube_ray.config import LoopConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig

BILLION = 10**9
NODE_OF_8_GPUS = 8

# Danube report, section 3: 2.36B tokens of warm-up are 2,000 steps of this batch. It holds 576 windows of 2,048 tokens
# or 72 of 16,384, so it can stay the same while the window grows. For Danube2 and 3 batch and warm-up are our choice.
DANUBE_BATCH_TOKENS = 1_179_648

# Danube report, section 3: AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, cosine from 2e-4 to 1e-5. The later reports
# leave the learning rate out; that it stays is our choice.
DANUBE_OPTIMIZER = OptimizerConfig(
    learning_rate=2e-4, min_learning_rate=1e-5, warmup_steps=2_000, beta1=0.9, beta2=0.95, weight_decay=0.1
)

# Danube report, section 3: FP8 on the linears of attention and MLP, DDP on one node of 8 H100s; ours for Danube2 and 3.
# Attention takes the machine's best backend (auto); what lies between transformer-engine's products is compiled.
DANUBE_LOOP = LoopConfig(num_workers=NODE_OF_8_GPUS, cpus_per_worker=8, precision="fp8-te", compile=True)

# How the share that is not web is split is ours throughout, in parts of 100: the reports print the web share alone.
# Encyclopaedic and academic text first, then more instructions and synthetic text as the web gives way.
REST_EARLY = {"instruct": 5, "wiki": 30, "academic": 35, "synthetic": 10, "other": 20}
REST_MIDDLE = {"instruct": 15, "wiki": 25, "academic": 25, "synthetic": 20, "other": 15}
REST_LATE = {"instruct": 30, "wiki": 15, "academic": 15, "synthetic": 30, "other": 10}


def shares(web_per_mille: int, rest: dict[str, int]) -> dict[str, int]:
    """Integer shares in parts of 100,000: web as given, the rest split by `rest`'s parts of 100."""
    return {"web": web_per_mille * 100, **{name: (1000 - web_per_mille) * part for name, part in rest.items()}}


def danube_1_8b() -> RunConfig:
    """H2O-Danube 1.8B: 1T tokens in four stages whose window doubles from 2,048 to 16,384 (Danube report, section 3).

    The report gives no mixture by stage: the shares are ours, Danube2's first stage throughout.
    """
    mixture = shares(845, REST_EARLY)
    return RunConfig(
        name="danube_1_8b",
        model=ModelConfig(  # section 2: Llama 2's design, scaled; Mistral's sliding window of 4,096
            vocab_size=32_000,
            hidden_size=2_560,
            intermediate_size=6_912,
            num_layers=24,
            num_heads=32,
            num_kv_heads=8,
            head_dim=80,
            context_length=16_384,
            sliding_window=4_096,
            rope_theta=10_000.0,  # ours: the report names no base
        ),
        # Section 3: 700B tokens at 2,048, then 100B each. Windows a GPU are ours: by the planner's estimate 16k
        # tokens fit into 80 GB beside weights, gradients and optimizer.
        stages=(
            StageConfig(name="2k", tokens=700 * BILLION, sequence_length=2_048, micro_batch_size=8, shares=mixture),
            StageConfig(name="4k", tokens=100 * BILLION, sequence_length=4_096, micro_batch_size=4, shares=mixture),
            StageConfig(name="8k", tokens=100 * BILLION, sequence_length=8_192, micro_batch_size=2, shares=mixture),
            StageConfig(name="16k", tokens=100 * BILLION, sequence_length=16_384, micro_batch_size=1, shares=mixture),
        ),
        global_batch_tokens=DANUBE_BATCH_TOKENS,
        optimizer=DANUBE_OPTIMIZER,
        loop=DANUBE_LOOP,
    )


def danube2_1_8b() -> RunConfig:
    """H2O-Danube2 1.8B: the same shape without the window, 2T tokens in three stages of falling web share.

    Tokens and web shares by stage are the report's (84.5, 72.8 and 55.5 %); a window of 8,192 in every stage is ours.
    As it stands the run starts anew. The report goes on from Danube 1.8B, its embeddings remapped from Llama 2's
    tokenizer to Mistral's:

        danube remap DANUBE_1_8B --new-tokenizer MISTRAL --out START
        danube pretrain danube2_1_8b --init-from START --tokens-dir TOKENS_BY_MISTRAL
    """
    model = dataclasses.replace(danube_1_8b().model, context_length=8_192, sliding_window=None)
    return RunConfig(
        name="danube2_1_8b",
        model=model,
        stages=stages_8k((1_000, 845), (950, 728), (50, 555), micro_batch_size=2),
        global_batch_tokens=DANUBE_BATCH_TOKENS,
        optimizer=DANUBE_OPTIMIZER,
        loop=DANUBE_LOOP,
    )


def danube3_500m() -> RunConfig:
    """H2O-Danube3 500M: 4T tokens (Danube3 report, section 3), web shares as for the 4B model.

    The report gives the total only; that the stages divide it as the 4B's do, 76.7 : 22.5 : 0.8, is ours. So is bf16,
    compiled: at these widths the planner expects more of a compiler than of transformer-engine's FP8, which has none.
    """
    return RunConfig(
        name="danube3_500m",
        model=ModelConfig(  # widths and heads from the published model's configuration
            vocab_size=32_000,
            hidden_size=1_536,
            intermediate_size=4_096,
            num_layers=16,
            num_heads=16,
            num_kv_heads=8,
            head_dim=96,
            context_length=8_192,
            rope_theta=10_000.0,  # ours: the report names no base
        ),
        stages=stages_8k((3_067, 906), (900, 817), (33, 516), micro_batch_size=3),
        global_batch_tokens=DANUBE_BATCH_TOKENS,
        optimizer=DANUBE_OPTIMIZER,
        loop=dataclasses.replace(DANUBE_LOOP, precision="bf16", compile=True),
    )


def danube3_4b() -> RunConfig:
    """H2O-Danube3 4B: 4.6T, 1.35T and 0.05T tokens of 90.6, 81.7 and 51.6 % web (Danube3 report, section 3).

    Its 24 layers give 3.96B parameters; a summary that says 16 would be 2.72B. One window a GPU fits only with the
    optimizer's state spread over the eight, so ZeRO-1: under DDP weights, gradients and moments alone take 63 GB.
    """
    return RunConfig(
        name="danube3_4b",
        model=ModelConfig(  # widths and heads from the published model's configuration
            vocab_size=32_000,
            hidden_size=3_840,
            intermediate_size=10_240,
            num_layers=24,
            num_heads=32,
            num_kv_heads=8,
            head_dim=120,
            context_length=8_192,
            rope_theta=10_000.0,  # ours: the report names no base
        ),
        stages=stages_8k((4_600, 906), (1_350, 817), (50, 516), micro_batch_size=1),
        global_batch_tokens=DANUBE_BATCH_TOKENS,
        optimizer=DANUBE_OPTIMIZER,
        loop=dataclasses.replace(DANUBE_LOOP, parallelism="zero1"),
    )


def stages_8k(*billions_and_web: tuple[int, int], micro_batch_size: int) -> tuple[StageConfig, ...]:
    """Three stages at 8,192 from (billions of tokens, web share in per mille); the split of the rest is ours."""
    return tuple(
        StageConfig(
            name=name,
            tokens=billions * BILLION,
            sequence_length=8_192,
            micro_batch_size=micro_batch_size,
            shares=shares(web_per_mille, rest),
        )
        for name, (billions, web_per_mille), rest in zip(
            ("broad", "refine", "anneal"), billions_and_web, (REST_EARLY, REST_MIDDLE, REST_LATE), strict=True
        )
    )


def proxy_20m() -> RunConfig:
    """19.9M parameters: the smallest model to search settings with."""
    return proxy("proxy_20m", num_layers=5, num_heads=4, intermediate_size=704, learning_rate=3e-3)


def proxy_50m() -> RunConfig:
    """49.7M parameters."""
    return proxy("proxy_50m", num_layers=6, num_heads=8, intermediate_size=1_408, learning_rate=2e-3)


def proxy_100m() -> RunConfig:
    """98.7M parameters."""
    return proxy("proxy_100m", num_layers=8, num_heads=12, intermediate_size=2_048, learning_rate=1.5e-3)


def proxy_200m() -> RunConfig:
    """200.8M parameters: the last step of the ladder before a real model."""
    return proxy("proxy_200m", num_layers=12, num_heads=16, intermediate_size=2_816, learning_rate=1e-3)


def proxy(name: str, *, num_layers: int, num_heads: int, intermediate_size: int, learning_rate: float) -> RunConfig:
    """A small Danube for one GPU: heads of 64, four of them to a kv head, ffn about 2.7 times the width.

    Ours throughout: 20 tokens a parameter (Hoffmann et al., 2022), in Danube3 4B's stages and mixture while the window
    doubles twice. Learning rates fall with size from common practice; searching them is what a proxy is for.
    """
    model = ModelConfig(
        vocab_size=32_000,
        hidden_size=64 * num_heads,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // 4,
        head_dim=64,
        context_length=4_096,
    )
    tokens = 20 * model.num_parameters
    return RunConfig(
        name=name,
        model=model,
        stages=tuple(
            StageConfig(
                name=stage.name,
                tokens=round(tokens * stage.tokens / danube3_4b().total_tokens),
                sequence_length=sequence_length,
                micro_batch_size=16_384 // sequence_length,
                shares=stage.shares,
            )
            for stage, sequence_length in zip(danube3_4b().stages, (1_024, 2_048, 4_096), strict=True)
        ),
        global_batch_tokens=131_072,
        optimizer=OptimizerConfig(learning_rate=learning_rate, min_learning_rate=learning_rate / 20, warmup_steps=200),
        loop=LoopConfig(precision="bf16"),
    )


def nano() -> RunConfig:
    """1.26M parameters for two CPU cores: every mechanism of the real runs in about a minute and a half.

    Micro-batches of 4,096 tokens in fp32, one worker's whole step, measured fastest; at this size bf16 is slower than
    fp32 even where the CPU has bf16 instructions.
    """

    def stage(name: str, tokens: int, sequence_length: int, web: int, docs: int, stdlib: int) -> StageConfig:
        return StageConfig(
            name=name,
            tokens=tokens,
            sequence_length=sequence_length,
            micro_batch_size=4_096 // sequence_length,
            shares={"web": web, "docs": docs, "stdlib": stdlib},
        )

    return RunConfig(
        name="nano",
        model=ModelConfig(
            vocab_size=2_048,
            hidden_size=128,
            intermediate_size=352,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            context_length=512,
            initializer_range=0.08,  # about 1/sqrt(hidden_size); the usual 0.02 starts too near zero at this width
        ),
        stages=(
            stage("broad", 614_400, 128, web=80, docs=15, stdlib=5),
            stage("refine", 409_600, 256, web=60, docs=25, stdlib=15),
            stage("anneal", 204_800, 512, web=35, docs=35, stdlib=30),
        ),
        # Tuned on documentation and docstrings: small batches and a high rate make the most of 1.2M tokens.
        global_batch_tokens=4_096,
        optimizer=OptimizerConfig(learning_rate=6e-3, min_learning_rate=3e-4, warmup_steps=20),
        loop=LoopConfig(
            num_workers=1,
            cpus_per_worker=2,
            precision="fp32",
            log_every_steps=10,
            validate_every_steps=50,
            checkpoint_every_steps=50,
        ),
        validation_windows=16,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__: preset
    for preset in (
        danube_1_8b,
        danube2_1_8b,
        danube3_500m,
        danube3_4b,
        proxy_20m,
        proxy_50m,
        proxy_100m,
        proxy_200m,
        nano,
    )
}
