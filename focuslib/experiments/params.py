"""The parameter files: what a notebook takes, checked before anything runs."""

from pathlib import Path
from typing import Any

from focuslib.errors import UserError, pick
from focuslib.paths import read_yaml

# The parameters of an experiment, and the types a YAML value may have.
TYPES: dict[str, tuple[type, ...]] = {
    "profile": (str,),
    "models": (list,),
    "checkpoints": (dict, type(None)),
    "datasets": (list,),
    "methods": (list,),
    "limit": (int, type(None)),
    "trace_samples": (int,),
    "matched": (dict, type(None)),
    "matched_limit": (int, type(None)),
    "sweeps": (dict,),
    "ablation_limit": (int, type(None)),
    "write_pth": (bool,),
    "device": (str,),
    "workers": (int,),
    "dtype": (str,),
    "seed": (int,),
}


NEEDED = ("models", "datasets", "limit", "trace_samples", "device", "dtype", "seed")
NEEDED_BY = {
    "main": ("methods",),
    "baselines": ("methods",),
    "image": ("methods",),
    "dse": ("sweeps", "ablation_limit"),
}
FROM_ONE = ("limit", "matched_limit", "ablation_limit", "trace_samples", "workers")


def read_params(path: Path) -> dict[str, Any]:
    """The parameters of one notebook and profile, names and types checked. The file has the notebook's name."""
    params = read_yaml(path)
    try:
        for name, value in params.items():
            check_param(name, value)
        for name in (*NEEDED, *NEEDED_BY.get(path.stem, ())):
            if name not in params:
                raise UserError(f"{name} is missing")
        if params.get("matched") and "matched_limit" not in params:
            raise UserError("matched_limit is missing; matched needs it")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return params


def check_param(name: str, value: Any) -> None:
    """Refuse an unknown parameter or a value of the wrong type."""
    types = pick(TYPES, name, "parameter")
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise UserError(f"{name} is {value!r}; it must be {wanted}")
    if name in FROM_ONE and value is not None and value < 1:
        raise UserError(f"{name} is {value}; it must be at least 1")
