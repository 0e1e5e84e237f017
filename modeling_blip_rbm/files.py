"""Which images a person means who names files, folders, patterns, archives and addresses."""

import glob
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import fsspec
from PIL import Image


# Formats of Pillow that hold no photograph, that it only recognises, or for which it runs another program.
NO_PHOTOGRAPHS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Photographs that Pillow, or one without plugins, cannot read: tried all the same, so that they are named and not passed over.
UNREADABLE = (".avif", ".heic", ".heif", ".hif", ".jxl", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
LITTER = ("__MACOSX",)  # besides what is hidden, such as macOS's ._photo.jpg and Jupyter's .ipynb_checkpoints
# fsspec's name of each kind of archive
ARCHIVES = {".zip": "zip"} | dict.fromkeys((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"), "tar")


@lru_cache(4)
def _archive(path: Path, kind: str):
    """An archive as fsspec's file system. It stays open: a shard's images are read one after the other."""
    how = {"compression": "gzip"} if path.suffix.lower() == ".tgz" else {}  # fsspec knows the others by their names
    return fsspec.filesystem(kind, fo=str(path), **how)


@dataclass(frozen=True)
class Member:
    """An image inside an archive; as text archive.zip/path/of/image.jpg."""

    archive: Path
    kind: str
    path: str

    def __str__(self):
        return f"{self.archive}/{PurePosixPath(self.path)}"

    def read(self) -> bytes:
        """
        Raises:
            ValueError: if the archive is damaged there.
        """
        try:
            return _archive(self.archive, self.kind).cat_file(self.path)
        except Exception as error:  # zipfile, tarfile and zlib each raise their own
            raise ValueError(f"{self}: cannot be read from the archive ({error})") from error


def image_endings() -> set[str]:
    """File endings of images, in lower case: all that Pillow reads, with what its plugins add, and photographs that it cannot read."""
    registered = Image.registered_extensions()  # imports Pillow's plugins
    readable = {ending for ending, kind in registered.items() if kind in Image.OPEN and kind not in NO_PHOTOGRAPHS}
    return readable | set(UNREADABLE)


def find_images(paths) -> tuple[list[Path | Member | str], list[str]]:
    """The files named and, in place of every folder, the images below it, sorted; each once, however often it is named.

    In folders, hidden files and folders are passed over, and linked folders followed, each once. Nothing is opened but zip and tar archives,
    whose images stand in their place. A path that does not exist and has * or ? is a pattern, in which ** is any number of folders. An
    address (http://, https://) stays as it is.

    Returns:
        the images, and what was wrong with the other paths.
    """
    found, errors, endings = {}, [], image_endings()
    for name in paths:
        if not str(name):  # which Path takes for the working directory
            errors.append("an image's path is empty: give a file or a folder")
            continue
        images, wrong = _meant_by(name, endings)
        errors += wrong
        for image in images:
            found.setdefault(os.path.abspath(image) if isinstance(image, Path) else str(image), image)
    return list(found.values()), errors


def _meant_by(name, endings: set[str]) -> tuple[list, list[str]]:
    """The images of one path, and what is wrong with it."""
    if str(name).startswith(("http://", "https://")):
        return [str(name)], []
    path = Path(name)
    if os.path.isdir(path):
        inside, wrong = _below(path, endings)
        return inside, wrong if inside or wrong else [f"{path}: no image in this folder"]
    if kind := archive_kind(path):
        return _inside(path, kind, endings)
    if glob.has_magic(str(name)) and not os.path.lexists(path):
        return _like(str(name), endings)
    return [path], []  # that it is missing, or a pipe, is said where it is read


def archive_kind(path: Path) -> str | None:
    """What fsspec calls an archive of this name, or None if it is no archive that exists."""
    kind = next((kind for ending, kind in ARCHIVES.items() if path.name.lower().endswith(ending)), None)
    return kind if kind and os.path.isfile(path) else None


def _like(pattern: str, endings: set[str]) -> tuple[list, list[str]]:
    found, errors = [], []
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = Path(name)
        if os.path.isdir(path):
            if "**" not in pattern:  # which goes through them by itself
                inside, wrong = _below(path, endings)
                found, errors = found + inside, errors + wrong
        elif path.suffix.lower() in endings:
            found.append(path)
        elif kind := archive_kind(path):
            inside, wrong = _inside(path, kind, endings)
            found, errors = found + inside, errors + wrong
    return found, errors if found or errors else [f"{pattern}: no image has a name of this pattern"]


def _inside(archive: Path, kind: str, endings: set[str]) -> tuple[list, list[str]]:
    try:
        names = _archive(archive, kind).find("")
    except Exception as error:  # zipfile, tarfile and zlib each raise their own
        return [], [f"{archive}: cannot be read as an archive ({error})"]
    members = []
    for name in names:  # as the archive has it, such as ./photo.jpg
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") or part in LITTER for part in path.parts)
        if path.suffix.lower() in endings and not hidden:
            members.append(Member(archive, kind, name))
    return members, [] if members else [f"{archive}: no image in this archive"]


def _below(folder: Path, endings: set[str]) -> tuple[list[Path], list[str]]:
    files, errors, seen, waiting = [], [], set(), [folder]
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            with os.scandir(folder) as listed:
                entries = [entry for entry in listed if not entry.name.startswith(".") and entry.name not in LITTER]
        except OSError as error:
            errors.append(f"{folder}: this folder cannot be read ({error.strerror})")
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link to what was visited, or to a folder around it
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = folder / entry.name
            if os.path.isdir(path) or entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif path.suffix.lower() in endings and (entry.is_symlink() or entry.is_file()):
                files.append(path)  # a link to nothing too: that is said where it is read
        waiting.sort(key=lambda path: (os.path.islink(path), path), reverse=True)  # real folders before links to them
    return sorted(files), errors


def image_files(paths) -> list[Path | Member | str]:
    """As `find_images`.

    Raises:
        ValueError: if a folder holds no image or cannot be read.
    """
    files, errors = find_images(paths)
    if errors:
        raise ValueError(errors[0])
    return files
