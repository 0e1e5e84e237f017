"""`python -m tests.fuzz` prints the table and what ended badly; with --write the table goes into docs/reliability.md."""

import argparse
import re
import sys
from pathlib import Path

from tests.fuzz.run import run_all, table


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--write", action="store_true", help="renew the table in docs/reliability.md")
args = parser.parse_args()
counts, bad = run_all()
print(table(counts))
print(*bad, sep="\n")
if args.write:
    document = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
    block = f"<!-- fuzz -->\n{table(counts)}\n<!-- /fuzz -->"
    document.write_text(re.sub(r"<!-- fuzz -->.*<!-- /fuzz -->", lambda match: block, document.read_text(), flags=re.S))
sys.exit(bool(bad))
