"""A GGUF file, or any other `LanguageModel`, as a model of lm-eval: what scores a quantized level beside its reference.

Both sides of such a comparison go through this one adapter, so that they differ in their weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from danube_ray.data.tokenizer import Tokenizer
from danube_ray.evaluate.harness import go_offline
from danube_ray.inference.protocol import LanguageModel
from danube_ray.inference.scoring import log_softmax

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    Pair = tuple[tuple[str, str], list[int], list[int]]  # the texts, the context's ids, the continuation's ids

MAX_NEW_TOKENS = 256  # of an answer whose task names no limit, as lm-eval's own models have it


def language_model_lm(model: LanguageModel, tokenizer: Tokenizer) -> LM:
    """`model` with the begin token and texts tokenized as lm-eval's transformers model does it.

    A request longer than the context loses its beginning, as there.
    """
    go_offline()
    from lm_eval.api.model import TemplateLM  # a second of imports: paid by who evaluates
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class LanguageModelLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return model.eos_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = tokenizer.encode(string)
            return ids if add_special_tokens is False else [tokenizer.bos_id, *ids]

        def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[tuple[float, bool]]:
            return [continuation_score(model, context, continuation) for _, context, continuation in requests]

        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
            return [sum(score for score, _ in self._rolling(request.args[0])) for request in requests]

        def _rolling(self, text: str) -> list[tuple[float, bool]]:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=model.context_length - 1,
                context_len=1,
            )
            return self._loglikelihood_tokens([(("", text), *make_disjoint_window(pair)) for pair in windows])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [answer(model, tokenizer, self.tok_encode(r.args[0]), r.args[1]) for r in requests]

    return LanguageModelLM()


def continuation_score(model: LanguageModel, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-probability (nats) of `continuation` after `context`, and whether it is what the model likes best."""
    ids = [*context, *continuation][-model.context_length :]
    count = min(len(continuation), len(ids) - 1)
    labels = np.asarray(ids[-count:])
    scores = log_softmax(model.logits(ids, rows=range(len(ids) - 1 - count, len(ids) - 1)))  # (R, V)
    return float(scores[np.arange(count), labels].sum()), bool((scores.argmax(axis=1) == labels).all())


def answer(model: LanguageModel, tokenizer: Tokenizer, prompt: Sequence[int], how: dict[str, Any]) -> str:
    """Text after `prompt`, up to the first of lm-eval's `until`, by its `max_gen_toks`, `temperature`, `do_sample`."""
    max_tokens = min(how.get("max_gen_toks", MAX_NEW_TOKENS), model.context_length - 1)
    temperature = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
    kept = prompt[-(model.context_length - max_tokens) :]
    text = tokenizer.decode(model.generate(kept, max_tokens, temperature=temperature))
    until = how.get("until") or []
    ends = [text.find(end) for end in ([until] if isinstance(until, str) else until) if end]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
