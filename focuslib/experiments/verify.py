"""Compare the tables of a run with the committed ones, within stated tolerances."""

from pathlib import Path

import pandas as pd

from focuslib.errors import UserError
from focuslib.evaluation.statistics import SATURATED

# How far a number may be from the expected one. Runs on one machine agree exactly; on another, rounding can flip an
# answer that hangs in the balance, and which of nearly equal samples is the median.
SCORE, SMALL_SCORE = 2.0, 5.0  # points; the second for cells of fewer than FEW questions
FLIPS = 4  # questions by which a saturated score may differ
FEW = 200
FEW_ASKED, ALL_ASKED = 120, 240  # of tables that do not say: the laptop profile's
FEW_QUESTIONS_COLUMNS = ("accuracy", "INT8_Dense", "INT8_Focus")  # of tables that do not say how many were asked
POINTS = {
    "Computation sparsity": 1.0,
    "Sparsity ±": 1.0,
    "Tokens at the end": 1.0,
    "Table II sparsity": 1.0,
    "Operations left (%)": 1.0,
}
SHARES = {"Sparsity": 0.01, "linear_sparsity": 0.01, "query_sparsity": 0.01, "attn_score_sparsity": 0.01}
EXACT = dict.fromkeys(("Questions", "Failed", "Sequence length", "Num frames", "Num patches"), 0.0)
RELATIVE = {"Operations (million)": 0.02}  # of the expected number
# Intervals of scores and p follow from the scores; one answer moves their ends by another number of points.
DERIVED = (
    "Low", "High", "±", "p", "Difference ±", "Area, low", "Area, high", "Of dense, low", "Of dense, high",
    "± (dense)", "p (dense)", "± (random)", "p (random)", "Change ±", "Sparsity change ±",
)  # fmt: skip
NOT_COMPARED = ("Median index", "Note", *DERIVED)
SWEPT = ("m_tile_size", "vector_size", "Target")  # numbers that tell rows apart


def tolerance(column: str, expected: float, questions: float | None) -> float:
    """The largest difference allowed in a column. questions: how many the row stands for, if its table says so.

    A saturated score may differ by a few questions only.
    """
    if column in RELATIVE:
        return RELATIVE[column] * abs(expected)
    known = {**POINTS, **SHARES, **EXACT}
    if column in known:
        return known[column]
    questions = questions or (FEW_ASKED if column in FEW_QUESTIONS_COLUMNS else ALL_ASKED)
    allowed = SMALL_SCORE if questions < FEW else SCORE
    return min(allowed, 100 * FLIPS / questions) if expected >= SATURATED else allowed


def expected_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables (*.csv) of a folder of expected results, by file name. Raises UserError if there are none."""
    tables = {path.name: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    if not tables:
        raise UserError(f"{folder}: no expected tables (*.csv) there; there is nothing to compare with")
    return tables


def compare_folder(expected: dict[str, pd.DataFrame], fresh: Path) -> list[str]:
    """One line for each difference between expected tables (by file name) and a folder's; empty: they agree."""
    lines = []
    for name, table in expected.items():
        if (fresh / name).exists():
            lines += compare_tables(table, pd.read_csv(fresh / name), name)
        else:
            lines.append(f"{name}: missing in {fresh}")
    return lines


def compare_tables(expected: pd.DataFrame, fresh: pd.DataFrame, name: str) -> list[str]:
    """One line for each difference. Rows are found by their words (model, data set, method …) and sweep values."""
    if list(expected.columns) != list(fresh.columns):
        return [f"{name}: columns {', '.join(fresh.columns)} instead of {', '.join(expected.columns)}"]
    words = [c for c in expected if c not in NOT_COMPARED and not pd.api.types.is_numeric_dtype(expected[c])]
    keys = words + [c for c in SWEPT if c in expected]
    theirs, ours = (table.set_index(keys) if keys else table for table in (expected, fresh))
    lines = [f"{name}: row {_words(key)} is missing" for key in theirs.index.difference(ours.index)]
    lines += [f"{name}: row {_words(key)} is not expected" for key in ours.index.difference(theirs.index)]
    for key in theirs.index.intersection(ours.index):
        questions = theirs.loc[key].get("Questions")
        for column in theirs.columns.difference(NOT_COMPARED, sort=False):
            want, got = theirs.loc[key, column], ours.loc[key, column]
            if pd.isna(want) and pd.isna(got):
                continue
            limit = tolerance(column, want, questions)
            if pd.isna(want) or pd.isna(got) or abs(want - got) > limit:
                lines.append(f"{name}: {_words(key)}: {column} is {got}, expected {want} ± {limit:g}")
    return lines


def _words(key) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
