"""What the notebooks show, under one name: `from focuslib.report import notebook as report`."""

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
from focuslib.report.int8 import degradation_table, precision_table, write_int8_table
from focuslib.report.methods import (
    kept_by_method_figure,
    methods_average,
    methods_figure,
    methods_table,
    write_methods,
)
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
    "kept_by_method_figure",
    "kept_tokens_figure",
    "layout_of_table_two",
    "meta_data_table",
    "methods_average",
    "methods_figure",
    "methods_table",
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
    "write_int8_table",
    "write_methods",
    "write_tables",
]
