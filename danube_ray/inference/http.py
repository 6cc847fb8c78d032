"""A model behind an OpenAI-compatible URL, asked with the standard library alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from danube_ray.config import ConfigError


def chat(
    url: str,
    model: str,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    api_key: str | None = None,
    timeout_s: float = 120.0,
) -> str:
    """The answer of `model` at `url` (without /v1) to one user message.

    Raises `ConfigError` with the server's own words when it refuses the request or can't be reached.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        message = json.loads(error.read())["error"]["message"]
        raise ConfigError("url", url, "a server that answers", f"it said: {message}") from None
    except urllib.error.URLError as error:
        raise ConfigError("url", url, "a server that can be reached", str(error.reason)) from None
