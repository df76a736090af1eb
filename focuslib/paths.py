"""Where the project's own files are: the parameter files, and the folder that results go to."""

from pathlib import Path
from typing import Any

import yaml

from focuslib.errors import UserError

_PACKAGE = Path(__file__).parent


def project_root() -> Path:
    """The project's folder: the first one upwards from the working directory that holds params/.

    Elsewhere it is the checkout that the package is installed from; without one, the working directory.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, _PACKAGE.parent):
        if (folder / "params" / "methods.yaml").is_file():
            return folder
    return Path.cwd()


def params_folder() -> Path:
    """The folder of parameter files: the project's, which wins, or the one that the installed package carries."""
    folder = project_root() / "params"
    return folder if folder.is_dir() else _PACKAGE / "params"


def shown(path: Path) -> Path:
    """A path as the user knows it: from the project's root if it is inside."""
    root = project_root()
    return path.relative_to(root) if path.is_relative_to(root) else path


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
