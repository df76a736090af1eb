"""Write docs/changed_numbers.md: each number of the laptop profile's tables that version 0.2.0 changed, and why.

    python docs/changed_numbers.py

Before: docs/changed_numbers_before (0.1.0). After: docs/changed_numbers_after. Both were computed on one machine, on
the embedded benchmark of 0.1.0, which the graded one has replaced since.
"""

from pathlib import Path

import pandas as pd

DOCS = Path(__file__).parent
BEFORE, AFTER = DOCS / "changed_numbers_before", DOCS / "changed_numbers_after"
HEAD = """# Changed numbers

Version 0.2.0 remade every table of the laptop profile, in two steps. This page is about the first, still on the
embedded model and benchmark of 0.1.0: each number that changed, before (0.1.0) and after, and why. The second gave the
profile another model and [a graded benchmark](models/tiny.md), after which no number can be compared with these.
Both columns were computed on one machine. Not in the list: columns that are new (`Asked`, `Failed`,
`Table II sparsity`, `Est. time`, `Est. energy`, `Note`), and `int8.csv`, which takes the INT8 columns of
`accuracy.csv`.

What changed the numbers: the questions of the embedded benchmark are dealt so that a limit holds every kind in
proportion (the first 120 motion questions were all of one kind before); sparsity is counted alike for every method;
settings were chosen anew under that count; CMC replaces by zeros in a last interval without an I-frame; INT8 covers
every linear layer but the output head; the similarity kernel adds in another order.
"""
DEALT = "questions dealt by kind: other questions among the first"
COUNTED = "counted from each layer, as for every method"
TUNED = "settings chosen anew on the tune split"
MATCHED = "matched anew at equal counted sparsity, on 240 questions instead of 120"
EIGHT_BIT = "every linear layer but the head in 8 bit; own table (int8.csv)"
KERNEL = "same settings; the similarity kernel adds in another order, which flips single vectors"


def reason(file: str, row: str, column: str) -> str:
    """Why a number changed, by its table, row and column."""
    row = row.lower()
    if file == "comparison_matched.csv":
        return MATCHED
    if "int8" in row or "INT8" in column:
        return EIGHT_BIT
    if "sec only" in row:
        return f"{COUNTED}: the MLP sees fewer tokens where the layer prunes"
    of_focus = " focus" in f" {row}" if file in ("comparison.csv", "ablation.csv") else column == "Focus"
    if of_focus and "tinyimage" not in row:
        return KERNEL
    if file.startswith("dse_") or file in ("ablation.csv", "meta_data.csv"):
        return COUNTED if "Operations" in column else DEALT
    if file in ("adaptiv_sparsity.csv", "cmc_sparsity.csv"):
        return f"{TUNED}; {DEALT}"
    counted = "parsity" in column and ("adaptiv" in row or "framefusion" in row)
    return f"{TUNED}; {COUNTED}" if counted else TUNED


def changes(file: str) -> list[str]:
    """One line of Markdown for each number of a table that differs."""
    before, after = pd.read_csv(BEFORE / file), pd.read_csv(AFTER / file)
    keys = [c for c in before if not pd.api.types.is_numeric_dtype(before[c]) and c in after]
    keys += [c for c in ("m_tile_size", "vector_size") if c in before]
    before, after = before.set_index(keys), after.set_index(keys)
    lines = []
    for key in before.index:
        row = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
        if key not in after.index:
            lines.append(f"| {row} | | there | absent | |")
            continue
        for column in before.columns.intersection(after.columns, sort=False):
            old, new = before.loc[key, column], after.loc[key, column]
            if old != new and not (pd.isna(old) and pd.isna(new)):
                shown = ["" if pd.isna(value) else f"{value:g}" for value in (old, new)]
                lines.append(f"| {row} | {column} | {shown[0]} | {shown[1]} | {reason(file, row, column)} |")
    return lines


def main() -> None:
    parts = [HEAD]
    for path in sorted(BEFORE.glob("*.csv")):
        if lines := changes(path.name):
            table = ["| row | column | before | after | why |", "|---|---|---|---|---|", *lines]
            parts.append("\n".join([f"## {path.name}", "", *table, ""]))
    (DOCS / "changed_numbers.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
