"""Where the project's own files are, and how its YAML is read."""

import os
from pathlib import Path
from typing import Any, ClassVar

import yaml

from focuslib.errors import UserError, brief

_PACKAGE = Path(__file__).parent
# Beyond any file that a person writes; YAML's references can make a short text endless.
_MOST_VALUES, _DEEPEST, _LARGEST = 10_000, 20, 2**63


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


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept between runs: ``$FOCUS_CACHE/<name>``, by default ``~/.cache/focus``."""
    return Path(os.environ.get("FOCUS_CACHE", "~/.cache/focus")).expanduser() / name


def shown(path: Path) -> Path:
    """A path as the user knows it: from the project's root if it is inside."""
    root = project_root()
    return path.relative_to(root) if path.is_relative_to(root) else path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping of plain values. Raises UserError that names the file, and the line or the key."""
    path = Path(path)
    return parse_yaml(read_text(path), path)


def read_text(path: Path) -> str:
    """A parameter file's text. Raises UserError that names the file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such parameter file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (OSError, ValueError) as error:  # a folder, say, or a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from error


def parse_yaml(text: str, path: Path) -> dict[str, Any]:
    """What `read_yaml` gives, of a text; path: the file it is from, for messages."""
    try:
        value = yaml.load(text, _Loader)  # a safe one
        if not isinstance(value, dict):
            raise UserError("must hold names and values (name: value)")
        _check_plain(value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}:{line} not valid YAML ({_folded(problem)})") from error
    except RecursionError:
        raise UserError(f"{path}: lists and mappings are nested too deeply; write them flat") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return value


def _folded(problem: Any) -> str:
    """What PyYAML or Python says, in one line."""
    return " ".join(str(problem).split())[:200]


class _Loader(yaml.SafeLoader):
    """Plain YAML: a date stays text, a name given twice is refused, and a value that cannot be is said with its line.

    Not the faster C loader: that one crashes the interpreter on deep nesting.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"line {node.start_mark.line + 1}: {brief(node.value)}: {_folded(error)}") from error

    def construct_mapping(self, node, deep=False):
        names = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                line = key.start_mark.line + 1
                raise UserError(f"line {line}: {brief(key.value)} is given twice; keep one of them")
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _check_plain(content: dict[str, Any]) -> None:
    """Refuse what no parameter is, and what could not be named in a message."""
    name = ""
    left: list[tuple[str, Any, int]] = [(name, content, 0)]
    for _ in range(_MOST_VALUES):
        if not left:
            return
        name, value, depth = left.pop()
        if depth > _DEEPEST:
            raise UserError(f"{name} is nested too deeply; write it flat")
        if isinstance(value, dict):
            for key, part in value.items():
                if not isinstance(key, str) or not key.isprintable():
                    where = f" of {name}" if name else ""
                    raise UserError(f"name {brief(key)}{where} is not a word; write a word, if need be in quotes")
                left.append((name or brief(key).strip("'\""), part, depth + 1))
        elif isinstance(value, list):
            left += [(name, part, depth + 1) for part in value]
        elif isinstance(value, str) and not value.isprintable():
            raise UserError(f"{name} holds {brief(value)}, with characters that cannot be shown; leave them out")
        elif isinstance(value, int) and abs(value) >= _LARGEST:
            raise UserError(f"{name} holds {brief(value)}; write a smaller number")
        elif not isinstance(value, (str, int, float, type(None))):
            raise UserError(f"{name} holds {brief(value)}; write a number, a word, true, false or null")
    raise UserError(f"{name} holds more than {_MOST_VALUES} values; YAML references (&, *) multiply: write them out")
