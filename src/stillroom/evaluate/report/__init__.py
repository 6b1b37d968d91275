"""Report: an evaluation as a page to look at and as Markdown."""

from stillroom.evaluate.report.content import sentences, task_changes
from stillroom.evaluate.report.page import read_results, rebuild, write_report
from stillroom.evaluate.report.tables import unit_of

__all__ = ["read_results", "rebuild", "sentences", "task_changes", "unit_of", "write_report"]
