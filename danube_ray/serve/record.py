"""What is told about one request when it has ended: to the log and to the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    """Filled by whoever learns a fact first; `request.state.record` holds it from the first middleware on."""

    request_id: str
    caller: str | None = None  # the key's name, or the client's address where there are no keys
    model: str | None = None  # only of a model that is served: a client's own text would make a metric of its own
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None  # since `started`
    status: int | None = None  # None until the answer has begun
    error_code: str | None = None
    prompt: str | None = None  # what was asked and answered, only where the settings say so
    answer: str | None = None
    started: float = field(default_factory=time.monotonic)

    def saw_first_token(self) -> None:
        """Called for every piece of an answer; the first one counts."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.started
