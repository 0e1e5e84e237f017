"""What a command says to the person at the terminal: lines that only display, complaints, and the summary."""

import json
import os
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

from tqdm.auto import tqdm


def shown(text: str, encoding: str | None = "utf-8") -> str:
    """Text as one line that a terminal only displays: line breaks, escape codes and what it cannot encode are escaped."""
    kept = lambda c: c.isprintable() or unicodedata.category(c) == "Zs"
    text = "".join(c if kept(c) else ascii(c)[1:-1] for c in str(text))
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str):
    """One line on standard output, at once: what is stopped later has printed what it has done."""
    tqdm.write(shown(text, sys.stdout.encoding), file=sys.stdout)
    sys.stdout.flush()


def json_line(entry) -> str:
    """JSON without characters that this output cannot encode or that steer a terminal."""
    line = json.dumps(entry, ensure_ascii=False)
    return line if shown(line, sys.stdout.encoding) == line else json.dumps(entry)


def complain(error):
    """One line on standard error."""
    tqdm.write(f"blip-rbm: {shown(' '.join(str(error).split()), sys.stderr.encoding)}", file=sys.stderr)


class Report:
    """Counts what became of the images, and says so at the end.

    Args:
        failed_file: where a line {"image", "error"} is written for each image that could not be captioned; None: nowhere. The file is made
            with the first of them; one of an earlier run is removed.

    Raises:
        ValueError: if the file is somebody else's, or cannot be written.
    """

    def __init__(self, failed_file: Path | None = None):
        self.counts, self.reasons, self.start = Counter(), Counter(), time.monotonic()
        self.failed_file, self._failed = failed_file, None
        if failed_file is None:
            return
        if _is_report(failed_file):
            failed_file.unlink()
        elif failed_file.is_file() and failed_file.stat().st_size:
            raise ValueError(f"{failed_file} is there, but is no list of failed images: give --failed another name")
        if not os.access(failed_file if failed_file.exists() else failed_file.parent, os.W_OK):
            raise ValueError(f"{failed_file}: cannot be written there: give --failed another place")

    def fail(self, image, error):
        """An image that could not be read, in one line on standard error, and in the file of those that failed."""
        complain(error)
        reason = str(error).removeprefix(f"{image}: ")
        self.counts["failed"] += 1
        self.reasons[reason.split(" (")[0]] += 1
        if self.failed_file is not None:
            if self._failed is None:
                self._failed = open(self.failed_file, "w", encoding="utf-8")
            self._failed.write(json.dumps({"image": str(image), "error": reason}) + "\n")
            self._failed.flush()

    def close(self):
        if self._failed is not None:
            self._failed.close()

    def summary(self, process: str = ""):
        """One line on standard error: how many were captioned, skipped and failed, why, and how long it took."""
        seconds, counts = time.monotonic() - self.start, self.counts
        parts = [f"{counts['captioned']:,} captioned"]
        parts += [f"{counts[name]:,} {name}" for name in ("withheld", "skipped", "failed") if counts[name]]
        line = ", ".join(parts)
        if self.reasons:
            line += f" ({'; '.join(f'{number:,} {reason}' for reason, number in self.reasons.most_common(3))}"
            line += f"; listed in {self.failed_file})" if self._failed is not None else ")"
        rate = f", {counts['captioned'] / seconds:.1f} images/s" if counts["captioned"] and seconds > 0 else ""
        complain(f"{process}{line}, in {tqdm.format_interval(seconds)}{rate}")


def _is_report(file: Path) -> bool:
    """Whether a file is one that `Report` wrote, and no other of that name."""
    try:
        with open(file, encoding="utf-8") as lines:
            return os.path.isfile(file) and set(json.loads(next(lines))) == {"image", "error"}
    except (OSError, ValueError, StopIteration, TypeError):
        return False
