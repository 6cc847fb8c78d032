"""What every setting is held against: one clear error before work starts."""

from __future__ import annotations

from typing import Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that can't be used. Says which, what it was, what is allowed and what to do."""

    def __init__(self, setting: str, value: object, allowed: str, remedy: str = "") -> None:
        super().__init__(f"{setting} is {value!r}, allowed is {allowed}" + (f"; {remedy}" if remedy else ""))
        self._parts = (setting, value, allowed, remedy)

    def inside(self, where: str) -> ConfigError:
        """The same error of the setting as a file names it: `ServedModel.num_slots` lies at `where`.num_slots there."""
        setting, value, allowed, remedy = self._parts
        return ConfigError(f"{where}.{setting.rpartition('.')[2]}", value, allowed, remedy)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        """Rebuilt from its parts: a worker raises it, the driver shows it."""
        return ConfigError, self._parts


def require(condition: bool, setting: str, value: object, allowed: str, remedy: str = "") -> None:
    """Raise `ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(setting, value, allowed, remedy)


def require_positive(owner: object, *names: str) -> None:
    """Raise `ConfigError` unless each named attribute of `owner` is greater than zero."""
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{type(owner).__name__}.{name}", value, "greater than 0")


def require_choices(owner: object) -> None:
    """Raise `ConfigError` unless each attribute of `owner` that a `Literal` types is one of its values.

    Python doesn't look at types, and a name that is none would fall through to whatever comes last.
    """
    for name, hint in get_type_hints(type(owner)).items():
        if get_origin(hint) is Literal:
            value, choices = getattr(owner, name), get_args(hint)
            require(value in choices, f"{type(owner).__name__}.{name}", value, f"one of {', '.join(choices)}")


def valid_name(name: str) -> bool:
    """Whether `name` can name a folder on every system: letters, digits, '.', '_' and '-', not starting with a dot."""
    return bool(name) and not name.startswith(".") and all(c.isalnum() or c in "._-" for c in name)
