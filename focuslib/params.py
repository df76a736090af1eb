"""The parameter files: what a notebook takes, checked before anything runs, and the methods' hyper-parameters."""

from pathlib import Path
from typing import Any

import yaml

from focuslib.errors import UserError, pick

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


def project_root() -> Path:
    """The project's folder: the first one upwards from the working directory that holds params/.

    Elsewhere it is the checkout that the package is installed from.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).parents[1]):
        if (folder / "params" / "methods.yaml").is_file():
            return folder
    raise UserError(f"{Path.cwd()}: not inside the project (no params/methods.yaml here or above); run from its folder")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises UserError naming the file and line."""
    try:
        value = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such parameter file") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}:" if where else ""
        raise UserError(f"{path}:{line} not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold names and values (name: value)")
    return value


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


def method_settings(method: str, model: str, dataset: str, path: Path | None = None) -> dict[str, Any]:
    """The hyper-parameters of a method for a model and data set, from params/methods.yaml."""
    content = _methods_file(path or project_root() / "params" / "methods.yaml")
    return matching_settings(content.get(method) or [], model, dataset)


def _methods_file(path: Path) -> dict[str, Any]:
    """params/methods.yaml, its names checked: a misspelt one would silently match nothing."""
    from focuslib.methods import METHODS
    from focuslib.models import MODELS
    from focuslib.tasks.datasets import DATASETS

    content = read_yaml(path)
    try:
        for method, entries in content.items():
            pick(METHODS, method, "method")
            for entry in entries or []:
                for kind, table in (("models", MODELS), ("datasets", DATASETS)):
                    names = entry.get(kind, [])
                    if not isinstance(names, list):
                        raise UserError(f"{method}: {kind} is {names!r}; it must be a list")
                    for name in names:
                        pick(table, name, kind.removesuffix("s"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return content


def matching_settings(entries: list[dict[str, Any]], model: str, dataset: str) -> dict[str, Any]:
    """The settings for a model and data set in a list like those of methods.yaml: a later entry that matches wins.

    An entry matches the `models` and `datasets` it names, or all. Raises UserError if it is no such list.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"settings {entries!r} must be a list of entries, such as - {{threshold: 0.5}}")
    settings: dict[str, Any] = {}
    for entry in entries:
        entry = dict(entry)
        models, datasets = entry.pop("models", None), entry.pop("datasets", None)
        if (models is None or model in models) and (datasets is None or dataset in datasets):
            settings.update(entry)
    return settings
