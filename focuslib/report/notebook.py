"""What the notebooks show, under one name: `from focuslib.report import notebook as report`."""

from focuslib.report.breakdown import (
    breakdown_table,
    matched_results,
    near_results,
    pairs_sentence,
    pairs_table,
    significant_pairs,
)
from focuslib.report.curves import areas_table, curves_figure, curves_table, write_curves
from focuslib.report.dse import (
    ablation_table,
    shared_with_main,
    sweep_figure,
    sweep_sentence,
    sweep_table,
    write_dse_tables,
)
from focuslib.report.figures import (
    example_clip,
    example_view,
    kept_tokens_figure,
    retained_figure,
    show,
    site_sparsity_figure,
    trade_off_figure,
)
from focuslib.report.guessers import guessers_table
from focuslib.report.int8 import degradation_table, precision_table, write_int8_table
from focuslib.report.looks import looks_figures
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
    "areas_table",
    "average_table",
    "beside_published",
    "breakdown_table",
    "comparison_table",
    "cost_table",
    "curves_figure",
    "curves_table",
    "degradation_table",
    "example_clip",
    "example_view",
    "guessers_table",
    "kept_by_method_figure",
    "kept_tokens_figure",
    "layout_of_table_two",
    "looks_figures",
    "matched_results",
    "meta_data_table",
    "methods_average",
    "methods_figure",
    "methods_table",
    "near_results",
    "paired_table",
    "pairs_sentence",
    "pairs_table",
    "precision_table",
    "retained_figure",
    "shared_with_main",
    "show",
    "significant_pairs",
    "site_sparsity_figure",
    "sparsity_table",
    "sweep_figure",
    "sweep_sentence",
    "sweep_table",
    "trade_off_figure",
    "write_curves",
    "write_dse_tables",
    "write_int8_table",
    "write_methods",
    "write_tables",
]
