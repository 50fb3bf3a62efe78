"""The ledger: one row for every input object, and from it what is left to do."""

from restore_core.manifest.ledger import Ledger
from restore_core.manifest.overview import Overview
from restore_core.manifest.rows import FOLDER, SCHEMA, Row, new_run_id, options_hash, rows_of, table_of
from restore_core.manifest.work import COLUMNS, Found, Sorted, compare, parse_retry, unanswered, values

__all__ = [
    "COLUMNS", "FOLDER", "SCHEMA", "Found", "Ledger", "Overview", "Row", "Sorted",
    "compare", "new_run_id", "options_hash", "parse_retry", "rows_of", "table_of", "unanswered", "values",
]  # fmt: skip
