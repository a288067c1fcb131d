"""A finished run as tables in the terminal and as pictures."""

from condu.report.tables import matrix_table, summary_table

__all__ = ["matrix_table", "summary_table"]
