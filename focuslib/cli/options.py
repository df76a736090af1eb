"""The options that several commands share, and what the shell completes their values with."""

import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from focuslib.paths import params_folder

_PACKAGE = Path(__file__).parents[1]


def model_names(incomplete: str = "") -> list[str]:
    """The models whose names begin so."""
    return _declared("models", incomplete)


def method_names(incomplete: str = "") -> list[str]:
    """The methods whose names begin so."""
    return _declared("methods", incomplete)


def task_names(incomplete: str = "") -> list[str]:
    """The data sets whose names begin so."""
    from focuslib.evaluation.datasets import DATASETS

    return [name for name in DATASETS if name.startswith(incomplete)]


def profile_names(incomplete: str = "") -> list[str]:
    """The profiles whose names begin so: the folders of params/ with parameters in them."""
    folders = {path.parent.name for path in params_folder().glob("*/*.yaml")} - {"published"}
    return sorted(name for name in folders if name.startswith(incomplete))


def _declared(room: str, incomplete: str) -> list[str]:
    """The names that a room's classes go by, read from their source: to import them takes seconds, at every Tab."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((_PACKAGE / room).glob("*.py")))
    names = re.findall(r'^    name(?:: ClassVar\[str\])? = "(\w+)"$', source, re.MULTILINE)
    return [name for name in names if name.startswith(incomplete)]


def _list_settings(wanted: bool) -> None:
    """Print what each method can be set to, from its docstring and defaults."""
    if not wanted:
        return
    from focuslib.methods import METHODS

    for name, method in METHODS.items():
        defaults = ", ".join(f"{field.name}={field.default}" for field in fields(method)) or "nothing to set"
        print(f"{name}: {defaults}\n\n{textwrap.indent(inspect.getdoc(method) or '', '    ')}\n")
    raise typer.Exit()


_MODEL, _METHOD, _QUESTIONS, RESULTS = "Model", "Method", "Questions", "Results"  # panels of the help

Model = Annotated[
    str,
    Option(help="Adapter name; or any checkpoint (owner/name).", autocompletion=model_names, rich_help_panel=_MODEL),
]
Checkpoint = Annotated[
    str | None,
    Option(help="Checkpoint folder or hub id; without it, the adapter's published one.", rich_help_panel=_MODEL),
]
Frames = Annotated[
    int | None,
    Option(min=1, help="The most frames of a video; without it, the adapter's own rule.", rich_help_panel=_MODEL),
]
Fps = Annotated[
    float | None, Option(help="Frames a second of a video, as far as --frames allows.", rich_help_panel=_MODEL)
]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1 …", rich_help_panel=_MODEL)]
Dtype = Annotated[str, Option(help="float32, bfloat16, float16 or auto.", rich_help_panel=_MODEL)]
Method = Annotated[str, Option(help="dense, focus, …", autocompletion=method_names, rich_help_panel=_METHOD)]
Settings = Annotated[
    list[str] | None,
    Option("--set", metavar="NAME=VALUE", help="A hyper-parameter of the method; repeatable.", rich_help_panel=_METHOD),
]
ListSettings = Annotated[
    bool,
    Option(
        "--list-settings", callback=_list_settings, is_eager=True, rich_help_panel=_METHOD,
        help="Say every method's hyper-parameters, and end.",
    ),
]  # fmt: skip
Task = Annotated[
    str,
    Option(
        help="Data set, such as tinyvideo_motion or videomme.", autocompletion=task_names, rich_help_panel=_QUESTIONS
    ),
]
Tasks = Annotated[
    list[str],
    Option(
        "--task", help="Data set; give several to average over them.", autocompletion=task_names,
        rich_help_panel=_QUESTIONS,
    ),
]  # fmt: skip
Limit = Annotated[
    int | None, Option(min=1, help="Only the first so many questions of each task.", rich_help_panel=_QUESTIONS)
]
Seed = Annotated[int, Option(help="Seed of all random numbers.", rich_help_panel=_QUESTIONS)]
Workers = Annotated[
    int,
    Option(
        min=1, rich_help_panel=_QUESTIONS,
        help="Processes that share the work, such as one a GPU (with --device cuda).",
    ),
]  # fmt: skip
Engine = Annotated[
    str | None,
    Option(
        metavar="local|ray", rich_help_panel=_QUESTIONS,
        help="Where the workers are: processes of this machine, or those of a Ray cluster (extra [cluster]).",
    ),
]  # fmt: skip
Address = Annotated[
    str | None,
    Option(
        rich_help_panel=_QUESTIONS,
        help="Of a running Ray cluster, or auto; without it, one of this machine alone.",
    ),
]
Shard = Annotated[
    int | None, Option(min=1, rich_help_panel=_QUESTIONS, help="Questions that a worker is given at a time.")
]
Out = Annotated[Path, Option(help="Folder of results.", rich_help_panel=RESULTS)]
Profile = Annotated[str, Option(help="Folder of params/.", autocompletion=profile_names)]
