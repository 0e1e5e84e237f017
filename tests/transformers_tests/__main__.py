"""Transformers' common tests on BLIP-RBM and on its own BLIP, in one table: `make test-hf`, docs/transformers-tests.md."""

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parent
STOCK = "StockBlip"


class Recorder:
    """Pytest plugin. `results`: {class: {test: (outcome, reasons)}}; a test fails with any of its sub-tests."""

    def __init__(self):
        self.results = {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        _, name, test = report.nodeid.split("::")[:3]
        tests = self.results.setdefault(name, {})
        outcome, reasons = tests.get(test, (report.outcome, []))
        if outcome != "failed" and report.failed:
            outcome, reasons = "failed", []
        if report.outcome == outcome and (reason := why(report)):
            reasons = [*reasons, reason]
        tests[test] = outcome, reasons


def why(report) -> str:
    """One line on why a test failed or was skipped; empty if it passed."""
    if report.passed:
        return ""
    if report.skipped:
        return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
    crash = getattr(report.longrepr, "reprcrash", None)
    message, place = (crash.message, f"{Path(crash.path).name}:{crash.lineno}") if crash else (str(report.longrepr), "")
    return f"{' '.join(message.split())[:200]} ({place})"


def table(results: dict) -> tuple[str, int]:
    """Counts of each class, then what fails, why and in which classes; and how many failures stock BLIP does not have.

    Tests that differ only in their parameters, and fail for the same reason, share a line.
    """
    lines, failures, own = [], {}, 0
    for name, tests in results.items():
        counts = Counter(outcome for outcome, _ in tests.values())
        lines.append(f"{name:20} {counts['passed']:4} passed {counts['failed']:4} failed {counts['skipped']:4} skipped")
        for test, (outcome, reasons) in tests.items():
            if outcome == "failed":
                in_stock = results.get(STOCK, {}).get(test, ("",))[0] == "failed"
                own += name != STOCK and not in_stock
                more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
                key = not in_stock, re.sub(r"_\d+_.*", "_*", test), re.sub(r"/\S*/", "", reasons[0]) + more
                failures.setdefault(key, []).append(name)
    for (ours, test, reason), names in sorted(failures.items(), key=lambda failure: (not failure[0][0], *failure[0])):
        classes = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in Counter(names).items())
        lines += ["", f"{'OURS' if ours else 'stock'}  {test}  [{classes}]", f"      {reason}"]
    return "\n".join(lines), own


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.transformers_tests", description=__doc__)
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="folder for transformers' source distribution"
    )
    parser.add_argument(
        "--checkout", type=Path, help="git checkout of transformers, instead of its source distribution"
    )
    parser.add_argument("--json", type=Path, help="write the outcomes here as well")
    parser.add_argument("-k", default="", help="only tests that match, as pytest's -k")
    parser.add_argument("-v", action="store_true", help="pytest's own output too")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    os.environ["TRANSFORMERS_TESTS"] = str(args.cache.resolve())
    if args.checkout:
        os.environ["TRANSFORMERS_TESTS_CHECKOUT"] = str(args.checkout.resolve())
    recorder = Recorder()
    flags = [
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-W",
        "ignore",
        "--rootdir",
        str(HERE.parents[1]),
    ]
    flags += ["-o", "python_classes=", "--import-mode", "importlib", "-k", args.k]
    if not args.v:
        flags += ["--no-header", "--no-summary", "-q", "-q"]
    pytest.main([*flags, str(HERE / "classes.py")], plugins=[recorder])
    text, own = table(recorder.results)
    print(text, f"{own} failures that {STOCK} does not have", sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(recorder.results, indent=1, sort_keys=True) + "\n")
    sys.exit(1 if own or not recorder.results else 0)


if __name__ == "__main__":
    main()
