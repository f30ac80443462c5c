"""Runs as people compare them: their metrics read back from storage, tables, figures, reports."""
