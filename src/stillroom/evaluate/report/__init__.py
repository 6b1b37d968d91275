"""Report: an evaluation as a page to look at and as Markdown."""

from stillroom.evaluate.report.changes import task_changes
from stillroom.evaluate.report.content import sentences
from stillroom.evaluate.report.tables import unit_of
from stillroom.evaluate.report.write import read_results, rebuild, write_report

__all__ = ["read_results", "rebuild", "sentences", "task_changes", "unit_of", "write_report"]
