"""Make a method from its name and settings as a user writes them: on a command line, in YAML, in --model_args."""

import re
import types
import typing
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from focuslib.errors import UserError, brief, pick
from focuslib.methods import METHODS
from focuslib.methods.base import Method


def make_method(name: str, settings: dict[str, Any] | None = None) -> Method:
    """A method by name. Values may be strings; tuples are written 1,3,5 (or 1:3:5 where commas separate arguments).

    Raises UserError for an unknown method, an unknown setting or a value of the wrong type or range.
    """
    return pick(METHODS, name, "method")(**typed_settings(name, settings or {}))


def typed_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Some settings of a method in their own types; what they mean together is the method's to check.

    Raises UserError for an unknown method, an unknown setting or a value of the wrong type.
    """
    kinds = _kinds(pick(METHODS, name, "method"))
    values = {}
    for key, value in settings.items():
        kind = pick(kinds, key, f"setting of {name}")
        try:
            values[key] = _adapter(kind).validate_python(_as_written(value, kind))
        except ValueError as error:  # pydantic's among them
            raise UserError(f"method {name}: {key}={brief(value)} is not {_describe(kind)}") from error
    return values


@cache
def _kinds(method: type[Method]) -> dict[str, Any]:
    """The settings of a method, and the type of each."""
    hints = typing.get_type_hints(method)
    return {field.name: hints[field.name] for field in fields(method)}


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _as_written(value: Any, kind: Any) -> Any:
    """What pydantic takes for a value as it is written: a list for 1,3,5, and None for none; a bool is no number."""
    kinds = _options(kind)
    if type(None) in kinds and (value is None or value == "none"):
        return None
    if any(typing.get_origin(option) is tuple for option in kinds):
        if isinstance(value, str):
            value = [part for part in re.split(r"[\s,:;]+", value.strip("()[] ")) if part]
        elif not isinstance(value, (list, tuple)):
            value = [value]
    parts = value if isinstance(value, (list, tuple)) else [value]
    if bool not in kinds and any(isinstance(part, bool) for part in parts):
        raise ValueError(value)
    return value


def _options(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _describe(kind: Any) -> str:
    kind = next(option for option in _options(kind) if option is not type(None))
    if typing.get_origin(kind) is tuple:
        item = _options(typing.get_args(kind)[0])[0]
        return f"a list of {item.__name__} (such as 1,3,5)"
    return getattr(kind, "__name__", str(kind))
