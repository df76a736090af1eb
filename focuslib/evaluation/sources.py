"""Where the stock tasks' data lies on disk, and whether it is there. No network, and no import of lmms-eval."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets.naming import camelcase_to_snakecase

from focuslib.errors import UserError
from focuslib.evaluation.datasets import Dataset


@dataclass(frozen=True)
class Source:
    """The data of one task.

    repository: on the hub, owner/name. config: of the repository, None for its only one. split: the one asked.
    videos: the folder of its videos; None: its media are in the data set itself.
    """

    task: str
    repository: str
    config: str | None
    split: str
    videos: Path | None

    @property
    def name(self) -> str:
        """The repository's name as the cache of the `datasets` package spells it."""
        return camelcase_to_snakecase(self.repository.split("/")[1])

    def cache(self) -> Path | None:
        """The folder of the task's questions (Arrow files), if they were loaded once; the only form read offline."""
        root = cache_root() / f"{self.repository.split('/')[0]}___{self.name}"
        found = root.glob(f"{self.config or '*'}/*/*/{self.name}-{self.split}*.arrow")
        return next((file.parent for file in found if (file.parent / "dataset_info.json").is_file()), None)

    def missing(self) -> str | None:
        """What is not there, in a few words; None: nothing."""
        if self.cache() is None:
            config = f" ({self.config})" if self.config else ""
            return f"no data set {self.repository}{config} in {cache_root()}"
        if self.videos and not (self.videos.is_dir() and any(self.videos.iterdir())):
            return f"no videos in {self.videos}"
        return None


def hf_home() -> Path:
    """The folder under which the tasks look for videos."""
    return Path(os.path.expanduser(os.getenv("HF_HOME", "~/.cache/huggingface")))


def cache_root() -> Path:
    """The folder under which lmms-eval has data sets cached."""
    named = os.getenv("LMMS_EVAL_DATASETS_CACHE") or os.getenv("HF_DATASETS_CACHE")
    return Path(os.path.expanduser(named)) if named else hf_home() / "datasets"


def sources(dataset: Dataset) -> Iterator[Source]:
    """The data of each of a data set's tasks, groups taken apart; none if the tasks make their data themselves."""
    if not dataset.stock:
        return
    for name in dataset.tasks:
        settings = _read(dataset.folder / f"{name}.yaml")
        for task in settings["task"] if "group" in settings else [name]:
            settings = _read(dataset.folder / f"{task}.yaml")
            options = settings.get("dataset_kwargs", {})
            videos = hf_home() / options["cache_dir"] if options.get("video") else None
            yield Source(task, settings["dataset_path"], settings.get("dataset_name"), settings["test_split"], videos)


def revisions(dataset: Dataset) -> list[str]:
    """Which revision of each stock task's data is on this disk: the name that the cache gives it."""
    return [folder.name for source in sources(dataset) if (folder := source.cache())]


def require(dataset: Dataset) -> None:
    """Raise UserError, in one line with the fix, if the data set is not on this disk."""
    for source in sources(dataset):
        if what := source.missing():
            raise UserError(f"{dataset.name}: {what}; get it where there is a network: focus fetch {dataset.name}")


def _read(file: Path) -> dict[str, Any]:
    """A task's YAML with what it includes, without its functions (only lmms-eval can import them)."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "!function" not in line]
    settings = yaml.safe_load("\n".join(lines))
    return (_read(file.parent / settings["include"]) if "include" in settings else {}) | settings
