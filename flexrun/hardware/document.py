"""Reads frozen dataclasses from JSON documents that people write by hand, so every mistake is named by its key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping

from flexrun.core import nearest_name
from flexrun.errors import ConfigError

REMEDY = "correct the file (configs/hardware/ has examples), or measure this machine with: flexrun profile"


def build(cls, values, where: str):
    """Dataclass ``cls`` from a mapping. Fields may be dataclasses, ``X | None``, ``dict[str, X]`` or ``tuple[X, ...]``.

    Raises ConfigError that names ``where`` and the key: unknown, missing, of the wrong kind or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object, got {type(values).__name__}", REMEDY)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}", nearest_name(str(key), fields))
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and name not in values:
            raise ConfigError(f"{where}: {name!r} is missing", REMEDY)
    arguments = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", REMEDY) from error


def _convert(kind, value, where: str):
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # X | None
        return None if value is None else _convert(inner[0], value, where)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected an object, got {type(value).__name__}", REMEDY)
        return {key: _convert(inner[1], each, f"{where}.{key}") for key, each in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {type(value).__name__}", REMEDY)
        return tuple(_convert(inner[0], each, f"{where}[{place}]") for place, each in enumerate(value))
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: expected a text, got {value!r}", REMEDY)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where}: expected a number, got {value!r}", REMEDY)
    if kind is int:
        if not math.isfinite(value) or value != int(value):
            raise ConfigError(f"{where}: expected a whole number, got {value!r}", REMEDY)
        return int(value)
    return float(value)


def require_range(record, names: tuple[str, ...], low: float, high: float = math.inf, *, above: bool = False) -> None:
    """ConfigError where a number of ``record`` is not in [low, high], or with ``above`` not in (low, high]."""
    for name in names:
        require_number(name, getattr(record, name), low, high, above=above)


def require_number(name: str, value: float, low: float, high: float = math.inf, *, above: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < low or value > high or (above and value == low):
        wanted = f"{'above' if above else 'at least'} {low:g}" + ("" if math.isinf(high) else f", at most {high:g}")
        raise ConfigError(f"{name} = {value!r} must be a number {wanted}", REMEDY)
