"""A finished run as tables in the terminal and as pictures."""

from condu.report.tables import matrix_table, misalignment, summary_table

__all__ = ["matrix_table", "misalignment", "summary_table"]
