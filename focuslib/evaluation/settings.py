"""The methods' hyper-parameters by model and data set, from params/methods.yaml."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from focuslib.errors import UserError, brief, pick
from focuslib.evaluation.datasets import DATASETS
from focuslib.methods import METHODS
from focuslib.methods.settings import typed_settings
from focuslib.models import HfVLM
from focuslib.models.registry import named
from focuslib.paths import params_folder, parse_yaml, read_text
from focuslib.validation import explain


class Entry(BaseModel):
    """Settings of a method (any other names), and where they hold: models, datasets; None for all."""

    model_config = ConfigDict(extra="allow", strict=True)

    models: list[str] | None = None
    datasets: list[str] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings, by name."""
        return self.model_extra or {}


def method_settings(
    method: str, model: str, dataset: str, path: Path | None = None, *, adapter: str | None = None
) -> dict[str, Any]:
    """The hyper-parameters of a method for a model and data set, from params/methods.yaml.

    adapter: the name of the model's adapter, where it is not the model's own (hf).
    Of several methods at once (vidcom2+focus), those of each, as vidcom2.retention.
    Raises UserError for any mistake in the file: a misspelt name would silently match nothing.
    """
    if "+" in method:
        parts = {part: method_settings(part, model, dataset, path, adapter=adapter) for part in method.split("+")}
        return {f"{part}.{key}": value for part, settings in parts.items() for key, value in settings.items()}
    return matching_settings(methods_file(path).get(method, []), model, dataset, adapter)


def methods_file(path: Path | None = None) -> dict[str, list[Entry]]:
    """params/methods.yaml, or another such file, checked: method → its entries."""
    path = path or params_folder() / "methods.yaml"
    return _parsed(path, read_text(path))


@lru_cache(maxsize=4)  # every cell asks
def _parsed(path: Path, text: str) -> dict[str, list[Entry]]:
    content = parse_yaml(text, path)
    try:
        return {method: checked_entries(method, entries or []) for method, entries in content.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def checked_entries(method: str, entries: list[dict[str, Any]]) -> list[Entry]:
    """A list like those of methods.yaml, all names and types checked. Raises UserError."""
    pick(METHODS, method, "method")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{method}: settings {brief(entries)} must be a list of entries, such as - {{threshold: 0.5}}")
    return [_checked(method, entry, f"{method}: entry {number}") for number, entry in enumerate(entries, 1)]


def _checked(method: str, content: dict[str, Any], where: str) -> Entry:
    try:
        entry = Entry.model_validate(content)
        for name in entry.models or []:
            _label(name)
        for name in entry.datasets or []:
            pick(DATASETS, name, "dataset")
        typed_settings(method, entry.settings)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Entry)}") from error
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'method {method}: ')}") from error
    return entry


def matching_settings(entries: list[Entry], model: str, dataset: str, adapter: str | None = None) -> dict[str, Any]:
    """The settings for a model and data set: an entry matches the models and data sets it names, the last one wins.

    A checkpoint of the adapter hf is named as owner/name, and all of them as hf.
    """
    settings: dict[str, Any] = {}
    for entry in entries:
        models = None if entry.models is None else set(map(_label, entry.models))
        if (models is None or model in models or adapter in models) and (
            entry.datasets is None or dataset in entry.datasets
        ):
            settings.update(entry.settings)
    return settings


def _label(name: str) -> str:
    """What cells call the model that an entry names. Raises UserError if there is none."""
    return name if name == HfVLM.name else named(name)[0]
