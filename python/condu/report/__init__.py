"""Finished runs as tables in the terminal, as pictures and as one HTML page."""

from condu.report.tables import matrix_table, misalignment, summary_tables

__all__ = ["matrix_table", "misalignment", "summary_tables"]
