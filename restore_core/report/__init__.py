"""What a person looks at: plots, tables, sheets of pictures, and one self-contained page about a restored bucket."""

from restore_core.report.quality import quality_curves, quality_tables, triptychs
from restore_core.report.restoration import restore_page
from restore_core.report.study import overview, study_plot, study_table
from restore_core.report.training import loss_plot, sample_sheet

__all__ = [
    "loss_plot",
    "overview",
    "quality_curves",
    "quality_tables",
    "restore_page",
    "sample_sheet",
    "study_plot",
    "study_table",
    "triptychs",
]
