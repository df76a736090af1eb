"""What dense is worth: its score beside those of guessers, and of itself on grey pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd

from focuslib.evaluation.guess import guesses
from focuslib.evaluation.statistics import SATURATED, proportion_interval
from focuslib.experiments.store import CellResult
from focuslib.report.curves import dense_results


def guessers_table(results: list[CellResult]) -> pd.DataFrame:
    """One row a (model, data set): dense's right answers in percent with Wilson's 95 % interval, and three guessers'.

    Chance: an option is drawn. Majority: the option is chosen that most often was right in questions of the kind in the
    tune split. Grey pictures: dense itself, without the media ("blank" cells). All on the same questions.
    """
    blank = {(r.cell.model, r.cell.dataset): r for r in results if r.cell.kind == "blank"}
    rows = []
    for (model, dataset), result in dense_results(results).items():
        scores = [sample["score"] for sample in result.samples]
        low, high = proportion_interval(sum(scores), len(scores))
        row = {"Model": model, "Dataset": dataset, "Questions": len(scores), "Dense": 100 * float(np.mean(scores)),
               "Low": 100 * low, "High": 100 * high}  # fmt: skip
        for guesser, found in (guesses(dataset) or {}).items():
            row[guesser.capitalize()] = 100 * float(np.mean([found[sample["doc_id"]] for sample in result.samples]))
        if (model, dataset) in blank:
            row["Grey pictures"] = 100 * float(np.mean([s["score"] for s in blank[model, dataset].samples]))
        rows.append(row | {"Note": "saturated" if row["Dense"] >= SATURATED else ""})
    return pd.DataFrame(rows)
