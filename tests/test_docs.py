"""What the documents say is so."""

import re
import subprocess
import sys

import pytest

from tests.conftest import REPO


DOCUMENTS = ["README.md", "model_card.md", "training/README.md", "docs/blip-faults.md", "docs/experiments.md"]
MADE_BY_COMMANDS = ("runs/", "demo.", "results.json", "align.json", ".venv", "photo.jpg", "my_photos/", "holiday/")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_that_documents_name_exist(document):
    text = (REPO / document).read_text()
    paths = re.findall(r"`([\w./-]+(?:/|\.(?:py|md|yaml|json|txt|jpg|toml|jsonl)))`", text)
    bases = (REPO, REPO / "checkpoints" / "blip-rbm-small", REPO / document.rpartition("/")[0])
    for path in paths:
        if not path.startswith(MADE_BY_COMMANDS) and path != "log.jsonl":
            assert any((base / path).exists() for base in bases), f"{document} names {path}"
    assert document in ("docs/experiments.md",) or paths


def test_every_file_of_the_package_is_in_the_readme():
    text = (REPO / "README.md").read_text()
    for file in (REPO / "modeling_blip_rbm").glob("*.py"):
        if file.name != "__init__.py":
            assert f"`modeling_blip_rbm/{file.name}`" in text
    for file in (REPO / "training").glob("*.py"):
        if file.name not in ("__init__.py", "arguments.py", "checkpoints.py"):
            assert f"`training/{file.name}`" in text


def test_make_targets_that_documents_name_exist():
    makefile = (REPO / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)", (REPO / document).read_text()):
            assert re.search(rf"^{target}:.*##", makefile, re.M), f"{document}: make {target}"


def test_tests_that_the_fault_list_names_exist():
    tests = "\n".join(file.read_text() for file in (REPO / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", (REPO / "docs" / "blip-faults.md").read_text()):
        assert f"def {name}(" in tests, name


def test_numbers_and_copied_code_are_up_to_date():
    result = subprocess.run(
        [sys.executable, "-m", "training.report", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_photographs_have_credits():
    credits = (REPO / "examples" / "CREDITS.md").read_text()
    photographs = list((REPO / "examples").glob("*.jpg"))
    assert len(photographs) >= 6 and all(f"`{photograph.name}`" in credits for photograph in photographs)
