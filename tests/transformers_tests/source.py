"""The tests that transformers runs on its models, as a package that can be imported.

The source distribution on PyPI carries the files of `tests/`, without its folders. So `ModelTesterMixin` is there, and
`GenerationTesterMixin` and `ExportTesterMixin` are not: empty classes stand in for them. A git checkout has all three.
"""

import atexit
import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


PACKAGE = "transformers_own_tests"  # not `tests`, which is ours
# Not in the source distribution: the file and the class that test_modeling_common.py imports from it.
ABSENT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def download(cache: Path) -> Path:
    """The source distribution of the installed transformers, from `cache`, or from PyPI where it is not there.

    Raises:
        SystemExit: if it is neither in `cache` nor on a registry that pip reaches.
    """
    archive = cache / f"transformers-{transformers.__version__}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        command += ["--no-build-isolation", "--dest", str(cache), f"transformers=={transformers.__version__}"]
        if subprocess.run(command).returncode or not archive.exists():
            sys.exit(f"{archive.name} is not in {cache} and pip could not fetch it: put it there, or give --checkout")
    return archive


def unpack(archive: Path, folder: Path):
    """Writes the test files of a source distribution into `folder`, with an empty class for each that is absent."""
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                (folder / parts[2]).write_bytes(tar.extractfile(member).read())
    for name, mixin in ABSENT.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"class {mixin}:\n    is_stand_in = True\n")


def load(cache: Path, checkout: Path | None = None):
    """The module `test_modeling_common` of transformers.

    Args:
        cache: folder for the source distribution; made if it is not there.
        checkout: root of a git checkout of transformers at the installed version. None: the source distribution.
    """
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / PACKAGE
    if checkout is None:
        unpack(download(cache.resolve()), folder)
    else:
        shutil.copytree(checkout / "tests", folder)
    sys.path.insert(0, str(root))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")
