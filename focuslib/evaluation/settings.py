"""The methods' hyper-parameters by model and data set, from params/methods.yaml."""

from pathlib import Path
from typing import Any

from focuslib.errors import UserError, pick
from focuslib.evaluation.datasets import DATASETS
from focuslib.methods import METHODS
from focuslib.models import MODELS
from focuslib.paths import params_folder, read_yaml


def method_settings(method: str, model: str, dataset: str, path: Path | None = None) -> dict[str, Any]:
    """The hyper-parameters of a method for a model and data set, from params/methods.yaml."""
    content = _methods_file(path or params_folder() / "methods.yaml")
    return matching_settings(content.get(method) or [], model, dataset)


def _methods_file(path: Path) -> dict[str, Any]:
    """params/methods.yaml, its names checked: a misspelt one would silently match nothing."""
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
