"""Tasks: known data sets, readers of the usual layouts, row checks and metrics."""
