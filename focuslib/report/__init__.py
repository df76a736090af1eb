"""Tables, figures and pages of the experiments, derived from results on disk. Nothing here loads or runs a model.

A table needs the extra [eval], a figure [lab] as well: so a file is imported when one of its names is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focuslib.report.dse import ablation_table, shared_with_main, sweep_figure, sweep_table, write_dse_tables
    from focuslib.report.figures import (
        example_clip,
        example_view,
        kept_tokens_figure,
        retained_figure,
        show,
        site_sparsity_figure,
        trade_off_figure,
    )
    from focuslib.report.int8 import degradation_table, precision_table
    from focuslib.report.tables import (
        CMC_SPARSITIES,
        accuracy_table,
        average_table,
        beside_published,
        comparison_table,
        cost_table,
        layout_of_table_two,
        meta_data_table,
        paired_table,
        sparsity_table,
        write_tables,
    )

__all__ = [
    "CMC_SPARSITIES",
    "ablation_table",
    "accuracy_table",
    "average_table",
    "beside_published",
    "comparison_table",
    "cost_table",
    "degradation_table",
    "example_clip",
    "example_view",
    "kept_tokens_figure",
    "layout_of_table_two",
    "meta_data_table",
    "paired_table",
    "precision_table",
    "retained_figure",
    "shared_with_main",
    "show",
    "site_sparsity_figure",
    "sparsity_table",
    "sweep_figure",
    "sweep_table",
    "trade_off_figure",
    "write_dse_tables",
    "write_tables",
]


_FILES = ("tables", "int8", "dse", "figures")  # those that draw come last


def __getattr__(name: str) -> Any:
    if name in __all__:
        for file in _FILES:
            module = import_module(f"{__name__}.{file}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
