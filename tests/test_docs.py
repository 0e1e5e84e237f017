"""What the documents say is so."""

import re
import subprocess
import sys

import pytest
import yaml

import modeling_blip_rbm
from tests.conftest import REPO


DOCUMENTS = sorted(
    str(file.relative_to(REPO))
    for pattern in ("*.md", "training/*.md", "boltzmann/*.md", "experiments/*/*.md", "docs/**/*.md")
    for file in REPO.glob(pattern)
)
HISTORY = ("CHANGELOG.md", "docs/experiments/")  # may name what is gone
MADE_BY_COMMANDS = (
    "runs/",
    "demo.",
    "results.json",
    "align.json",
    ".venv",
    "photo.jpg",
    "photo.txt",
    ".cache/",
    "dataset.json",
    "captions.txt",
    "Flickr8k.token.txt",
    "tests/test_modeling_common.py",
    "tests/generation/",
    "my_photos/",
    "holiday/",
    "log.jsonl",
    "run.sh",
)
ARCHITECTURE = (REPO / "docs" / "architecture.md").read_text()


def text_of(document: str) -> str:
    return (REPO / document).read_text()


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if not name.startswith(HISTORY)])
def test_paths_that_documents_name_exist(document):
    bases = (REPO, REPO / "checkpoints" / "blip-rbm-small", (REPO / document).parent)
    for path in re.findall(r"`([\w./-]+(?:/|\.(?:py|md|yaml|json|txt|jpg|toml|jsonl|cff|sh)))`", text_of(document)):
        if not path.startswith(MADE_BY_COMMANDS):
            assert any((base / path).exists() for base in bases), f"{document} names {path}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_exist(document):
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(document)):
        assert ((REPO / document).parent / path).exists(), f"{document} links to {path}"


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if not name.startswith(HISTORY)])
def test_make_targets_and_modules_that_documents_name_exist(document):
    text, makefile = text_of(document), text_of("Makefile")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:.*##", makefile, re.M), f"{document}: make {target}"
    for module in re.findall(r"-m ((?:training|experiments|benchmarks|boltzmann|modeling_blip_rbm)[\w.]*)", text):
        path = REPO / module.replace(".", "/")
        if module != "training.STAGE" and module != "training.NAME":
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{document}: -m {module}"


def test_readme_is_a_page():
    assert len(text_of("README.md").encode()) <= 10_240


@pytest.mark.parametrize(
    "folder", ["modeling_blip_rbm", "modeling_blip_rbm/cli", "boltzmann", "training", "training/lib"]
)
def test_every_file_is_in_the_map(folder):
    missing = [
        file.name
        for file in (REPO / folder).glob("*.py")
        if file.name != "__init__.py" and f"| `{folder}/{file.name}` |" not in ARCHITECTURE
    ]
    assert not missing, f"docs/architecture.md, table of {folder}/, has no line for {', '.join(missing)}"


def test_the_five_answers_lead_somewhere():
    section = ARCHITECTURE.split("## Five questions")[1].split("\n## ")[0]
    answers = re.findall(r"\| `([^`]+)`: `([^`]+)` \|", section)
    assert len(answers) == 5
    for file, name in answers:
        content = text_of(file)
        defined = rf"^\s*(?:def|class) {name}\b" if file.endswith(".py") else re.escape(name)
        assert re.search(defined, content, re.M), f"{file} has no {name}"


def test_tests_that_the_fault_list_names_exist():
    tests = "\n".join(file.read_text() for file in (REPO / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text_of("docs/blip-faults.md"))
    assert len(named) >= 20
    missing = [name for name in named if f"def {name}(" not in tests]
    assert not missing, f"docs/blip-faults.md names {', '.join(missing)}"


def test_numbers_are_up_to_date():
    result = subprocess.run(
        [sys.executable, "-m", "training.report", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_cards_metadata_is_what_the_hub_reads():
    metadata = yaml.safe_load(text_of("model_card.md").split("---")[1])
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert [metric["name"] for metric in metrics] == ["CIDEr-D", "BLEU-4", "ROUGE-L"]
    assert all(isinstance(metric["value"], float) for metric in metrics)


def test_versions_agree():
    changelog = re.findall(r"^## (\d+\.\d+\.\d+)", text_of("CHANGELOG.md"), re.M)
    assert changelog[0] == modeling_blip_rbm.__version__, "CHANGELOG.md: the newest released version comes first"
    assert f'version = "{modeling_blip_rbm.__version__}"' in text_of("pyproject.toml")
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == modeling_blip_rbm.__version__
    ruff = re.search(r"^ruff==(.+)$", text_of("requirements.txt"), re.M).group(1)
    assert yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"][0]["rev"] == f"v{ruff}"


def test_workflow_runs_what_ci_runs():
    steps = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]["test"]["steps"]
    assert {"run": ".ci/run"} in steps and (REPO / ".ci" / "run").stat().st_mode & 0o111


def test_images_have_credits_and_no_credit_is_without_image():
    examples = REPO / "examples"
    credited = re.findall(r"^\| `([\w/]+\.(?:jpg|png))` \|", text_of("examples/CREDITS.md"), re.M)
    assert sorted(credited) == sorted(
        file.relative_to(examples).as_posix() for file in examples.rglob("*.*") if file.suffix in (".jpg", ".png")
    )
