"""Which files a person means who names files and folders of images."""

import os
from pathlib import Path

from PIL import Image


# Formats of Pillow that hold no photograph, that it only recognises, or for which it runs another program.
NO_PHOTOGRAPHS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Photographs that Pillow cannot read: tried all the same, so that they are named and not passed over.
UNREADABLE = (".heic", ".heif", ".hif", ".jxl", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
LITTER = ("__MACOSX",)  # besides what is hidden, such as macOS's ._photo.jpg and Jupyter's .ipynb_checkpoints


def image_endings() -> set[str]:
    """File endings of images, in lower case: all that Pillow reads, with what its plugins add, and photographs that it cannot read."""
    registered = Image.registered_extensions()  # imports Pillow's plugins
    readable = {ending for ending, kind in registered.items() if kind in Image.OPEN and kind not in NO_PHOTOGRAPHS}
    return readable | set(UNREADABLE)


def find_images(paths) -> tuple[list[Path], list[str]]:
    """The files named and, in place of every folder, the images below it, sorted; each once, however often it is named.

    In folders, hidden files and folders are passed over, and linked folders followed, each once. Nothing is opened.

    Returns:
        the files, and what was wrong with the other paths.
    """
    found, errors, endings = {}, [], image_endings()
    for name in paths:
        path = Path(name)
        if not str(name):  # which Path takes for the working directory
            errors.append("an image's path is empty: give a file or a folder")
            continue
        if os.path.isdir(path):
            inside, wrong = _below(path, endings)
            if not inside and not wrong:
                wrong = [f"{path}: no image in this folder"]
            errors += wrong
        else:
            inside = [path]  # that it is missing, or a pipe, is said where it is read
        for file in inside:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values()), errors


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


def image_files(paths) -> list[Path]:
    """As `find_images`.

    Raises:
        ValueError: if a folder holds no image or cannot be read.
    """
    files, errors = find_images(paths)
    if errors:
        raise ValueError(errors[0])
    return files
