"""Check values against a pydantic model, and say what is wrong with them in one line."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from focuslib.errors import UserError, brief, unknown

_WANTED = {
    "string_type": "str",
    "int_type": "int",
    "bool_type": "true or false",
    "float_type": "a number",
    "list_type": "a list",
    "dict_type": "a mapping (name: value)",
    "model_type": "a mapping (name: value)",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_short": "longer; give at least one",
    "string_too_short": "longer; give at least one character",
}
_ORDER = {"extra_forbidden": 0, "missing": 2}  # a misspelt name first: it is why another one is missing


class Strict(BaseModel):
    """A model that takes no other names, and no value of another type: a bool is no int, a text no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


def validate(model: type[BaseModel], values: dict[str, Any], where: str, kind: str = "parameter") -> dict[str, Any]:
    """The values with defaults filled in, as plain lists, dicts and numbers.

    Parameters
    ----------
    model, values
        What they must be, and what they are.
    where
        The file or option that they are from.
    kind
        What one of them is called.

    Raises
    ------
    UserError
        In one line: where, which value, and what it must be.
    """
    try:
        return model.model_validate(values).model_dump()
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, model, kind)}") from error


def explain(error: ValidationError, model: type[BaseModel], kind: str = "parameter") -> str:
    """The first thing that is wrong, in one line."""
    problem = min(error.errors(include_url=False), key=lambda part: _ORDER.get(part["type"], 1))
    place, reason, context = problem["loc"], problem["type"], problem.get("ctx", {})
    name = _path(place)
    if reason == "extra_forbidden" and len(place) == 1:
        return unknown(place[0], model.model_fields, kind)
    if reason == "extra_forbidden":
        return f"{name} is not known; leave it out"
    if reason == "missing":
        return f"{name} is missing"
    if reason == "value_error":  # a validator's own words
        return f"{name} {context['error']}".strip()
    wanted = _WANTED[reason].format(**context) if reason in _WANTED else problem["msg"].removeprefix("Input should be ")
    if len(place) == 1 and type(None) in get_args(model.model_fields[str(place[0])].annotation):
        wanted += " or null"
    return f"{name} is {brief(problem['input'])}; it must be {wanted}"


def _path(place: tuple[int | str, ...]) -> str:
    """Where a value is, as in sweeps.m_tile_size.values[0]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")
