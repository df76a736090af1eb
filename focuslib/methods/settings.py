"""Make a method from its name and settings as a user writes them: on a command line, in YAML, in --model_args."""

import re
import types
import typing
from dataclasses import fields
from typing import Any

from focuslib.errors import UserError, pick
from focuslib.methods import METHODS
from focuslib.methods.base import Method


def make_method(name: str, settings: dict[str, Any] | None = None) -> Method:
    """A method by name. Values may be strings; tuples are written 1,3,5 (or 1:3:5 where commas separate arguments).

    Raises UserError for an unknown method, an unknown setting or a value of the wrong type or range.
    """
    method = pick(METHODS, name, "method")
    hints = typing.get_type_hints(method)
    known = {field.name: hints[field.name] for field in fields(method)}
    values = {}
    for key, value in (settings or {}).items():
        kind = pick(known, key, f"setting of {name}")
        try:
            values[key] = _convert(value, kind)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"method {name}: {key}={value!r} is not {_describe(kind)}") from error
    return method(**values)


def _convert(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [part for part in re.split(r"[\s,:;]+", value.strip("()[] ")) if part]
        if not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(_convert(part, item) for part in value)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None or value == "none" else _convert(value, options[0])
    if kind is bool:
        if isinstance(value, bool):
            return value
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return words[str(value).lower()] if str(value).lower() in words else _refuse(value)
    if kind is int:
        return int(value) if float(value) == int(float(value)) and not isinstance(value, bool) else _refuse(value)
    if kind is float:
        return float(value) if not isinstance(value, bool) else _refuse(value)
    return kind(value)


def _refuse(value: Any) -> Any:
    raise ValueError(value)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__} (such as 1,3,5)"
    return getattr(kind, "__name__", str(kind))
