"""Tables, curves and the HTML report. They read run folders and ledgers, and never run a model."""

from certprune.reports.compare import differences
from certprune.reports.curve_files import read_curves
from certprune.reports.families import families_of
from certprune.reports.families_page import families_csv, families_page
from certprune.reports.files import write_report
from certprune.reports.plot import write_curves
from certprune.reports.read import read_run
from certprune.reports.rows import summary_rows
from certprune.reports.seeds import aggregate
from certprune.reports.smoothed_rows import smoothed_rows
from certprune.reports.study import write_study
from certprune.reports.study_rows import sections_of
from certprune.reports.tables import html_table, markdown_table, rich_table

__all__ = [
    "aggregate",
    "differences",
    "families_csv",
    "families_of",
    "families_page",
    "html_table",
    "markdown_table",
    "read_curves",
    "read_run",
    "rich_table",
    "sections_of",
    "smoothed_rows",
    "summary_rows",
    "write_curves",
    "write_report",
    "write_study",
]
