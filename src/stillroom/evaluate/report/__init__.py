"""Report: an evaluation as a page to look at and as Markdown."""
