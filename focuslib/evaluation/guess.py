"""Guesses without looking: what a data set's questions and their usual answers give away."""

from __future__ import annotations

from collections import Counter
from typing import Any

from focuslib.evaluation.datasets import DATASETS

Docs = list[dict[str, Any]]  # questions: options (words), answer_text (the right one), question_type


def majority(tune: Docs, test: Docs) -> list[float]:
    """Score of each test question, 0 … 1, if that option is chosen which most often was right in tune, kind by kind.

    Of options that were right equally often, or never, one is drawn: the score is its chance of being the right one.
    """
    known = Counter((doc["question_type"], doc["answer_text"]) for doc in tune)
    scores = []
    for doc in test:
        counts = {option: known[doc["question_type"], option] for option in doc["options"]}
        best = [option for option, count in counts.items() if count == max(counts.values())]
        scores.append((doc["answer_text"] in best) / len(best))
    return scores


def chance(test: Docs) -> list[float]:
    """Score of each question, 0 … 1, if an option is drawn."""
    return [1 / len(doc["options"]) for doc in test]


def guesses(dataset: str) -> dict[str, list[float]] | None:
    """Guesser → score of each question of a data set, in order; None where it has no tune split to learn from."""
    test, tune = (DATASETS[name].docs if name in DATASETS else None for name in (dataset, f"{dataset}_tune"))
    if test is None or tune is None:
        return None
    docs = test()
    return {"chance": chance(docs), "majority": majority(tune(), docs)}
