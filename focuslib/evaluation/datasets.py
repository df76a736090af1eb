"""The data sets of the experiments: which lmms-eval tasks they are, and which of their numbers is the score."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from focuslib.errors import needs_extra
from focuslib.tasks.tinyimage import build as tinyimage
from focuslib.tasks.tinyvideo import build as tinyvideo

Sample = dict[str, Any]  # one logged sample of lmms-eval
Results = dict[str, dict[str, Any]]  # task → metric key → value


def _stock_version() -> str:
    return "lmms-eval " + version("lmms-eval")


@dataclass(frozen=True)
class Dataset:
    """One data set.

    tasks: its lmms-eval task names (or groups). sample_score: a logged sample → 0 … 1 (right or wrong, for paired
        comparisons). score: (results, samples) → the published score.
    own_folder: where the tasks' YAML files are; None: they are lmms-eval's own, in its folder of the data set's name.
    version: says which edition of the data was used; part of a result's identity.
    prepare: makes the data now, where the package makes them.
    together: questions that are scored together; a limit is rounded up to whole groups.
    category: a logged sample → its category, where the score is the mean over categories ("" where it is not).
    facts: a logged sample → what breakdowns need of its question: question_type, difficulty, target (the right answer).
    docs: its questions, where they can be had without lmms-eval, each with options, answer_text and question_type.
    """

    name: str
    tasks: tuple[str, ...]
    sample_score: Callable[[Sample], float]
    score: Callable[[Results, list[Sample]], float]
    own_folder: Path | None = None
    version: Callable[[], str] = _stock_version
    prepare: Callable[[], object] = lambda: None
    together: int = 1
    category: Callable[[Sample], str] = lambda sample: ""
    facts: Callable[[Sample], dict[str, Any]] = lambda sample: {}
    docs: Callable[[], list[dict[str, Any]]] | None = None

    @property
    def stock(self) -> bool:
        """Whether the tasks are lmms-eval's own."""
        return self.own_folder is None

    @property
    def folder(self) -> Path:
        """Where the tasks' YAML files are (lmms-eval's are found without importing it)."""
        if self.own_folder is not None:
            return self.own_folder
        package = find_spec("lmms_eval")
        if package is None or package.origin is None:
            raise needs_extra(f"data set {self.name}", "eval")
        return Path(package.origin).parent / "tasks" / self.name


def _embedded(task: str, benchmark: ModuleType, docs: Callable[[], list[dict[str, Any]]]) -> Dataset:
    """A task that ships with the package; benchmark: the module that builds its data. docs: see Dataset."""
    folder = Path(inspect.getfile(benchmark)).parent
    return Dataset(
        name=task,
        tasks=(task,),
        sample_score=lambda sample: float(sample["acc"]),
        score=lambda results, samples: 100 * results[task]["acc,none"],
        own_folder=folder,
        version=lambda: f"{folder.name} {benchmark.version()}",
        prepare=benchmark.build,
        facts=_facts,
        docs=docs,
    )


def _facts(sample: Sample) -> dict[str, Any]:
    doc = sample["doc"]
    known = {name: doc[name] for name in ("question_type", "difficulty") if name in doc}
    return {**known, "target": doc["answer"]}


def _matches(metric: str, answer: str = "answer") -> Callable[[Sample], float]:
    return lambda sample: float(sample[metric]["pred_answer"] == sample[metric][answer])


def _metric(task: str, metric: str, scale: float = 1.0) -> Callable[[Results, list[Sample]], float]:
    return lambda results, samples: scale * results[task][f"{metric},none"]


def _mvbench_score(results: Results, samples: list[Sample]) -> float:
    """The mean of the subtasks; lmms-eval leaves the group's own row empty."""
    scores = [row["mvbench_accuracy,none"] for row in results.values() if "mvbench_accuracy,none" in row]
    return sum(scores) / len(scores)


def _mmbench_score(results: Results, samples: list[Sample]) -> float:
    return sum(row["gpt_eval_score,none"] for row in results.values()) / len(results)


def _mmbench_sample(sample: Sample) -> float:
    """Whether the letter that the task itself reads in the answer is the right one; unreadable answers are wrong."""
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    logged = sample["gpt_eval_score"]
    return float(MMBench_Evaluator().prefetch_answer(logged) == logged["answer"])


MME = ("mme_cognition_score", "mme_perception_score")


def _mme_score(results: Results, samples: list[Sample]) -> float:
    """Both parts together; with a limit, there may be no question of one of them."""
    return sum(results["mme"].get(f"{metric},none", 0.0) for metric in MME)


def _mme_sample(sample: Sample) -> float:
    return float(next(sample[key]["score"] for key in MME if key in sample))


_SPLITS = {"": "test", "_tune": "tune"}  # ending of a name → split

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        *(
            _embedded(f"tinyvideo_{task}{ending}", tinyvideo, partial(tinyvideo.load_docs, task, split))
            for task in ("attributes", "needle", "motion")
            for ending, split in _SPLITS.items()
        ),
        *(
            _embedded(f"tinyimage_attributes{ending}", tinyimage, partial(tinyimage.load_docs, split))
            for ending, split in _SPLITS.items()
        ),
        Dataset(
            "videomme",
            ("videomme",),
            _matches("videomme_perception_score"),
            _metric("videomme", "videomme_perception_score"),
        ),
        Dataset(
            "mlvu",
            ("mlvu_dev",),
            _matches("mlvu_percetion_score"),  # the task spells its key so
            _metric("mlvu_dev", "mlvu_percetion_score"),
            category=lambda sample: sample["mlvu_percetion_score"]["task_type"],
        ),
        Dataset(
            "mvbench",
            ("mvbench",),
            lambda sample: float(sample["mvbench_accuracy"]["score"]),
            _mvbench_score,
        ),
        Dataset(
            "vqav2",
            ("vqav2_val",),
            lambda sample: float(sample["exact_match"]),
            _metric("vqav2_val", "exact_match", scale=100),
        ),
        Dataset("mme", ("mme",), _mme_sample, _mme_score, together=2),
        Dataset(
            "mmbench",
            ("mmbench_en_dev", "mmbench_cn_dev", "mmbench_ru_dev"),
            _mmbench_sample,
            _mmbench_score,
        ),
    )
}
