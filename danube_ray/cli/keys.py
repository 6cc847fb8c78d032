"""The verb that makes API keys."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from danube_ray.cli.console import Positional


def keys(
    name: Positional[str],
    file: Path | None = None,
    requests_per_minute: int | None = None,
    concurrent_requests: int | None = None,
) -> None:
    """Make an API key for `danube serve`, and print it.

    It is shown this once: only its hash is kept.

    Args:
        name: whose key it is; logs and limits go by it.
        file: the keys file to add the hash to, made if it is missing. A server that reads it lets the key in within a
            second, and no longer once its line is taken out. Without one the line to keep is printed.
        requests_per_minute: a limit of this key's own, instead of the server's.
        concurrent_requests: likewise, of answers under way.
    """
    from danube_ray.serve.keys import ENVIRONMENT, append, make_key

    secret, key = make_key(name, requests_per_minute=requests_per_minute, concurrent_requests=concurrent_requests)
    aside = Console(stderr=True, soft_wrap=True, highlight=False)  # so that $(danube keys NAME) is the key alone
    if file is not None:
        append(file, key)
        aside.print(f"the hash is in [bold]{file}[/bold]; keep the key, nothing else does:")
    else:
        aside.print(f"for a keys file, or for {ENVIRONMENT}:\n{key.line}\nkeep the key, nothing else does:")
    print(secret)
