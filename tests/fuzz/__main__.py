"""`python -m tests.fuzz` prints the table and what ended badly."""

import sys

from tests.fuzz.run import run_all, table


counts, bad = run_all()
print(table(counts))
print(*bad, sep="\n")
sys.exit(bool(bad))
