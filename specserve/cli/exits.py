"""Exit statuses of commands; 0 is success, and argparse's own refusals are 2 as well."""

from __future__ import annotations

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130
