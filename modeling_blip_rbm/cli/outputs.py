"""Where captions go: to the terminal, beside each image, or into a table. Each is stopped at any moment without losing what it has.

An output is a context manager with `has(source)`, whether there is nothing left to do for an image, and `write(source, record)`.
"""

import hashlib
import os
import re
import tempfile
from collections import Counter
from functools import lru_cache
from itertools import chain
from pathlib import Path

from filelock import FileLock, Timeout

from modeling_blip_rbm.cli.console import json_line, say
from modeling_blip_rbm.cli.tables import FORMATS, parquet, read_jsonl, record_line
from modeling_blip_rbm.files import Member, image_endings


class Printed:
    """On standard output: "file: caption", or an object a line."""

    def __init__(self, as_json: bool):
        self.as_json = as_json

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def has(self, source) -> bool:
        return False

    def write(self, source, record: dict):
        if self.as_json:
            say(json_line(record))
            return
        for caption in record["captions"]:
            frame = f"#{caption['frame']}" if "frame" in caption else ""
            say(f"{record['image']}{frame}: {caption['generated_text']}")


class Beside(Printed):
    """photo.txt beside photo.jpg, a line a caption; where two images would share it, photo.jpg.txt and photo.png.txt."""

    def __init__(self, existing: str):
        self.existing = existing

    def has(self, source) -> bool:
        file = self.file(source)
        return self.existing == "skip" and file.is_file() and file.stat().st_size > 0

    @staticmethod
    def file(source) -> Path:
        """
        Raises:
            ValueError: if there is no folder beside the image.
        """
        if not isinstance(source, Path):
            raise ValueError(f"{source}: --output txt writes beside images in folders only: choose captions.jsonl")
        shared = _images_of_name(source.parent)[source.stem] > 1 or source.suffix.lower() == ".txt"
        return source.with_name(f"{source.name}.txt") if shared else source.with_suffix(".txt")

    def check(self, sources: list):
        """
        Raises:
            ValueError: if there is no place beside one of the images.
        """
        for folder in {self.file(source).parent for source in sources}:
            if folder.is_dir() and not os.access(folder, os.W_OK):
                raise ValueError(f"{folder}: no text file can be written there: choose --output captions.jsonl")

    def write(self, source, record: dict):
        lines = [caption["generated_text"] for caption in record["captions"]]
        file = self.file(source)
        if not lines:
            return
        if self.existing == "append" and file.is_file():
            lines = [*file.read_text(encoding="utf-8").splitlines(), *lines]
        part = file.with_name(f".{file.name}.part")
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(part, file)


@lru_cache
def _images_of_name(folder: Path) -> Counter:
    """How many images of a folder have each name without its ending."""
    try:
        names = [Path(name) for name in os.listdir(folder)]
    except OSError:  # said where the image is read
        return Counter()
    return Counter(name.stem for name in names if name.suffix.lower() in image_endings())


class Table:
    """A file of captions, whole at any moment. What this run captions is a line in a journal beside it, captions.csv.part, until the run ends;
    then both become the new file. A journal that was left, by a power cut or kill -9, is taken in when the next run begins.

    Args:
        existing: "skip" leaves out images that the file has; "overwrite" replaces their captions; "append" adds to them.
        rank: of how many processes write one file this is which.

    Raises:
        ValueError: if the file cannot be written, is of no known kind, or was not written by this class.
    """

    def __init__(self, path: Path, existing: str, rank: tuple[int, int] = (0, 1)):
        self.path, self.existing = path, existing
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"--output {path}: is neither txt nor a file that ends in {', '.join(FORMATS)}")
        if not path.parent.is_dir():
            raise ValueError(f"--output {path}: there is no folder {path.parent}")
        if path.suffix.lower() == ".parquet":
            parquet()
        if path.suffix.lower() == ".json" and existing == "append":
            raise ValueError(
                "--existing append: COCO results have one caption an image; choose .jsonl, .csv or .parquet"
            )
        self.reader, self.writer = FORMATS[path.suffix.lower()]
        number, of = rank
        self.alone = of == 1
        self.journal = path.with_name(f"{path.name}.part" if self.alone else f"{path.name}.{number}.part")
        self.done: set[str] = set()

    def __enter__(self):
        self._mine = _locked(self.journal, wait=False)
        for journal in self._journals() if self.alone else [self.journal]:
            if journal == self.journal:
                self._take_in(journal)
            elif lock := _locked(journal, wait=False, needed=False):
                self._take_in(journal)
                lock.release()
        if self.existing == "skip" and self.path.exists():
            self.done = {record["image"] for record in self.reader(self.path)}
        elif self.path.exists():
            next(self.reader(self.path), None)  # that it is ours is known before hours of work
        self._lines = open(self.journal, "w", encoding="utf-8")
        return self

    def __exit__(self, *error):
        self._lines.close()
        self._take_in(self.journal)
        self._mine.release()

    def _journals(self) -> list[Path]:
        """This run's journal, and those of processes that shared the file before."""
        name = re.compile(re.escape(self.path.name) + r"(\.\d+)?\.part")
        return sorted(self.path.with_name(file) for file in os.listdir(self.path.parent) if name.fullmatch(file))

    def name(self, source) -> str:
        """What the table calls an image: its path from the table's folder, so that both can be moved together."""
        if isinstance(source, str):
            return source
        name = self._from_here(source)
        if self.path.suffix.lower() == ".parquet":  # which holds UTF-8 only, and a name is to be known again
            name = name.encode("utf-8", "backslashreplace").decode()
        return name

    def _from_here(self, source: Path | Member) -> str:
        archive, inside = (
            (source.archive, str(source).removeprefix(str(source.archive)))
            if isinstance(source, Member)
            else (source, "")
        )
        try:
            return Path(os.path.relpath(archive, self.path.parent)).as_posix() + inside
        except ValueError:  # on another drive of Windows
            return Path(os.path.abspath(archive)).as_posix() + inside

    def has(self, source) -> bool:
        return self.name(source) in self.done

    def write(self, source, record: dict):
        self._lines.write(record_line(record | {"image": self.name(source), "existing": self.existing}))
        self._lines.flush()

    def _take_in(self, journal: Path):
        """The journal's lines become the file's, which is written anew and renamed. What is not appended replaces what the file has of an image,
        so that a journal whose run was killed after the renaming can be taken in again."""
        if not journal.is_file():
            return
        if journal.stat().st_size:
            lock = _locked(self.path, wait=True)
            old = self.reader(self.path) if self.path.exists() else ()
            replaced = {entry["image"] for entry in read_jsonl(journal) if entry.get("existing") != "append"}
            old = (record for record in old if record["image"] not in replaced)
            new = ({name: entry[name] for name in entry if name != "existing"} for entry in read_jsonl(journal))
            whole = journal.with_suffix(".whole")
            self.writer(whole, chain(old, new))
            os.replace(whole, self.path)
            lock.release()
        journal.unlink()


def _locked(file: Path, wait: bool, needed: bool = True) -> FileLock | None:
    """A lock on a file among the processes of this machine, held until it is released or the process ends.

    Raises:
        ValueError: if another process has it, and it is `needed`.
    """
    key = hashlib.sha256(os.fsencode(os.path.realpath(file))).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir(), f"blip-rbm-{key}.lock"))  # not among the user's files
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        if needed:
            raise ValueError(f"another run writes {file}: wait for its end, or give another --output") from None
        return None
    return lock


def new_output(args, rank: tuple[int, int]):
    """The output that --output, --existing and --json mean.

    Raises:
        ValueError: if it cannot be written.
    """
    if args.output is None:
        return Printed(args.json)
    return Beside(args.existing) if args.output == "txt" else Table(Path(args.output), args.existing, rank)


__all__ = ["Beside", "Printed", "Table", "new_output"]
