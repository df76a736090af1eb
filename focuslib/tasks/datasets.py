"""The data sets of the experiments: which lmms-eval tasks they are, and which of their numbers is the score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from focuslib.tasks.tinyvideo import build as tinyvideo

Sample = dict[str, Any]  # one logged sample of lmms-eval
Results = dict[str, dict[str, Any]]  # task → metric key → value


def _stock_version() -> str:
    return "lmms-eval " + version("lmms-eval")


@dataclass(frozen=True)
class Dataset:
    """One data set.

    tasks: its lmms-eval task names (or groups). sample_score: a logged sample → 0 … 1 (right or wrong, for paired comparisons).
    score: (results, samples) → the published score. include_path: folder of the task's YAML; None: built into lmms-eval.
    version: says which edition of the data was used; part of a result's identity.
    """

    name: str
    tasks: tuple[str, ...]
    sample_score: Callable[[Sample], float]
    score: Callable[[Results, list[Sample]], float]
    include_path: Path | None = None
    version: Callable[[], str] = _stock_version


def _tinyvideo(task: str) -> Dataset:
    return Dataset(
        name=task,
        tasks=(task,),
        sample_score=lambda sample: float(sample["acc"]),
        score=lambda results, samples: 100 * results[task]["acc,none"],
        include_path=Path(tinyvideo.__file__).parent,
        version=lambda: "tinyvideo " + tinyvideo.version(),
    )


def _matches(metric: str, answer: str = "answer") -> Callable[[Sample], float]:
    return lambda sample: float(sample[metric]["pred_answer"] == sample[metric][answer])


def _metric(task: str, *metrics: str, scale: float = 1.0) -> Callable[[Results, list[Sample]], float]:
    return lambda results, samples: scale * sum(results[task][f"{metric},none"] for metric in metrics)


def _mvbench_score(results: Results, samples: list[Sample]) -> float:
    """The mean of the subtasks; lmms-eval leaves the group's own row empty."""
    scores = [row["mvbench_accuracy,none"] for row in results.values() if "mvbench_accuracy,none" in row]
    return sum(scores) / len(scores)


def _mmbench_score(results: Results, samples: list[Sample]) -> float:
    return sum(row["gpt_eval_score,none"] for row in results.values()) / len(results)


def _mme_sample(sample: Sample) -> float:
    return float(next(sample[key]["score"] for key in ("mme_perception_score", "mme_cognition_score") if key in sample))


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        *(
            _tinyvideo(f"tinyvideo_{task}{split}")
            for task in ("attributes", "needle", "motion")
            for split in ("", "_tune")
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
        ),
        Dataset("mvbench", ("mvbench",), lambda sample: float(sample["mvbench_accuracy"]["score"]), _mvbench_score),
        Dataset(
            "vqav2",
            ("vqav2_val",),
            lambda sample: float(sample["exact_match"]),
            _metric("vqav2_val", "exact_match", scale=100),
        ),
        Dataset("mme", ("mme",), _mme_sample, _metric("mme", "mme_cognition_score", "mme_perception_score")),
        Dataset(
            "mmbench",
            ("mmbench_en_dev", "mmbench_cn_dev", "mmbench_ru_dev"),
            lambda sample: float(sample["gpt_eval_score"]["prediction"] == sample["gpt_eval_score"]["answer"]),
            _mmbench_score,
        ),
    )
}
