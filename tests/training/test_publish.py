"""Publishing, against a local double of the Hub's endpoints: what arrives there is the model, and loads by itself."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from modeling_blip_rbm.configuration_blip_rbm import HUB_FILES
from tests.conftest import CHECKPOINT, REPO
from training.lib.checkpoints import save_captioner
from training.publish import MARKER, PACKAGE, card_of, check, stage


class HubDouble(BaseHTTPRequestHandler):
    """The endpoints that `create_repo`, `create_branch` and `upload_folder` call, with files kept in memory."""

    repos: dict = {}  # repo id -> {"private": bool, "branches": {name: {path: bytes}}}
    blobs: dict = {}  # sha256 -> bytes

    def log_message(self, *args):
        pass

    def answer(self, content=None, status=200):
        body = json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @property
    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def branch(self, path):
        """Repo id and files of the branch that a path /api/models/ORG/NAME/VERB/BRANCH names."""
        org, name, _, revision = path.removeprefix("/api/models/").split("?")[0].split("/")[:4]
        return f"{org}/{name}", self.repos[f"{org}/{name}"]["branches"][revision]

    def do_POST(self):
        body, host = self.body, f"http://{self.headers['Host']}"
        if self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "no token"}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            private = bool(wanted.get("private") or wanted.get("visibility") == "private")
            self.repos.setdefault(repo_id, {"private": private, "branches": {"main": {}}})
            return self.answer({"url": f"{host}/{repo_id}", "name": repo_id, "id": repo_id})
        if "/branch/" in self.path:
            org, name, _, branch = self.path.removeprefix("/api/models/").split("/")
            self.repos[f"{org}/{name}"]["branches"].setdefault(branch, {})
            return self.answer()
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = lambda path: "lfs" if path.endswith((".safetensors", "tokenizer.json")) else "regular"
            entries = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
            return self.answer({"files": entries})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{host}/blobs/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            repo_id, files = self.branch(self.path)
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
            return self.answer(
                {"commitUrl": f"{host}/{repo_id}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            )
        return self.answer({"error": self.path}, 404)

    def do_PUT(self):
        body = self.body
        assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/blobs/")
        self.blobs[hashlib.sha256(body).hexdigest()] = body
        self.answer()

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me", "auth": {"type": "access_token"}})
        self.answer({"error": self.path}, 404)  # such as a README.md that is not there yet


@pytest.fixture
def hub():
    HubDouble.repos, HubDouble.blobs = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubDouble)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(*command, endpoint="http://127.0.0.1:9", token="hf_test"):
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPO)


def publish(*args, **kwargs):
    return run("-m", "training.publish", "--model", CHECKPOINT, *args, **kwargs)


def files_in(folder, files):
    """The files {name: content} of a repo, as a client downloads them."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_publish_uploads_exactly_what_was_checked(hub, tmp_path):
    result = publish(
        "--repo_id", "me/captions", "--staging", tmp_path / "x", "--private", "--revision", "v1", endpoint=hub
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (
        '"class": "BlipRBMForConditionalGeneration"' in result.stdout
        and f"{hub}/me/captions/commit/0000" in result.stdout
    )
    repo = HubDouble.repos["me/captions"]
    assert repo["private"] and set(repo["branches"]) == {"main", "v1"} and not repo["branches"]["main"]
    files = repo["branches"]["v1"]
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "x").iterdir() if f.name != MARKER}
    assert {"config.json", "modeling_blip_rbm.py", "rbm.py", "README.md", "tokenizer.json"} <= set(files)
    assert "model-index" in files["README.md"].decode().split("---")[1]
    assert check(files_in(tmp_path / "arrived", files))["class"] == "BlipRBMForConditionalGeneration"


PUSH = """
import sys
from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.trainer import CaptionCollator, CaptionSeq2SeqTrainer
from transformers import Seq2SeqTrainingArguments
from tests.conftest import random_image

folder, output = sys.argv[1:]
model = BlipRBMForConditionalGeneration.from_pretrained(folder)
processor = BlipRBMProcessor.from_pretrained(folder)
rows = [{"image": random_image(seed=i), "captions": ["a red dog", "a dog runs"]} for i in range(4)]
args = Seq2SeqTrainingArguments(
    output, max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, remove_unused_columns=False,
    hub_model_id="me/by-trainer", save_strategy="no",
)
trainer = CaptionSeq2SeqTrainer(
    model, args, train_dataset=rows, data_collator=CaptionCollator(processor), processing_class=processor
)
trainer.train()
trainer.push_to_hub()
model.push_to_hub("me/by-model")
processor.push_to_hub("me/by-model")
"""


def test_push_to_hub_keeps_the_code(hub, saved_model, tmp_path):
    """By the Trainer and by the model itself: what arrives loads in a clean process, as model and as pipeline."""
    result = run("-c", PUSH, saved_model, tmp_path / "out", endpoint=hub)
    assert result.returncode == 0, result.stderr[-3000:]
    by_trainer, by_model = (HubDouble.repos[f"me/by-{name}"]["branches"]["main"] for name in ("trainer", "model"))
    assert {"config.json", "modeling_blip_rbm.py", "pipeline_blip_rbm.py", "tokenizer.json"} <= set(by_model)
    assert {name for name in by_model if name.endswith((".py", ".safetensors"))} <= set(by_trainer)
    assert check(files_in(tmp_path / "arrived", by_trainer))["class"] == "BlipRBMForConditionalGeneration"


@pytest.fixture
def trained(model, processor, tmp_path):
    save_captioner(model, processor, tmp_path / "trained", max_shard_size="20KB")
    return tmp_path / "trained"


def test_dry_run_uploads_nothing(trained, tmp_path):
    result = publish(
        "--model", trained, "--repo_id", "me/captions", "--staging", tmp_path / "x", "--dry_run"
    )  # no server there
    assert result.returncode == 0 and "nothing uploaded" in result.stdout, result.stderr[-2000:]


def test_what_would_not_load_is_not_uploaded(tmp_path):
    stage(CHECKPOINT, tmp_path / "x", "me/captions")
    (tmp_path / "x" / "rbm.py").unlink()
    with pytest.raises(RuntimeError, match=r"does not load by itself:[\s\S]*rbm"):
        check(tmp_path / "x")


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_only_files_of_the_list_are_staged(trained, tmp_path):
    for name in ("tokenizer_secrets.env", "tokenizer.json.bak", "left.safetensors", "notes.py"):
        (trained / name).write_text("secret")
    (trained / "rbm.py").unlink()
    (trained / "rbm.py").symlink_to("/etc/hostname")  # code comes from the package, whatever the folder says
    files = set(stage(trained, tmp_path / "x", "me/captions"))
    weights = {file.name for file in trained.glob("model*.safetensors")} | {"model.safetensors.index.json"}
    own = {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert len(weights) > 2 and files == weights | own | {"README.md", *HUB_FILES}
    assert {file.name for file in (tmp_path / "x").iterdir()} == files | {MARKER}
    assert not any(file.is_symlink() for file in (tmp_path / "x").iterdir())
    assert (tmp_path / "x" / "rbm.py").read_bytes() == (PACKAGE / "rbm.py").read_bytes()


@pytest.mark.parametrize("name", ["README.md", "results.json", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["link", "broken link", "pipe"])
def test_what_is_no_regular_file_is_not_published(trained, tmp_path, name, kind):
    (trained / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(trained / name)
    else:
        (trained / name).symlink_to("/etc/hostname" if kind == "link" else "nowhere")
    with pytest.raises(ValueError, match=f"{name} is no regular file, so it is not published"):
        stage(trained, tmp_path / "x", "me/captions")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("shard", ["../secret.safetensors", "model-00099-of-00099.safetensors"])
def test_weights_that_are_not_in_the_folder_are_named(trained, tmp_path, shard):
    (tmp_path / "secret.safetensors").write_text("secret")
    file = trained / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["rbm_layer.gate"] = shard
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"trained lacks weights: no {shard}"):
        stage(trained, tmp_path / "x", "me/captions")


def test_a_folder_that_is_no_staging_is_left_as_it_is(trained, tmp_path):
    """Whatever it holds: a diary, a saved model with its code, a list of an own making."""
    with pytest.raises(ValueError, match=r"holds no BLIP-RBM"):
        stage(tmp_path, tmp_path / "x", "me/captions")
    shutil.copytree(trained, tmp_path / "model")
    for name, text in (("diary", "diary.txt"), ("listed", MARKER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / text).write_text("[1]")
    (tmp_path / "listed" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("diary", "model", "listed"):
        before = content(tmp_path / name)
        with pytest.raises(
            ValueError, match="holds what publish did not write.*nothing was changed; give a new folder"
        ):
            stage(trained, tmp_path / name, "me/captions")
        assert content(tmp_path / name) == before
    with pytest.raises(ValueError, match="is a file"):
        stage(trained, tmp_path / "file", "me/captions")


@pytest.mark.parametrize("change", ["edited", "added", "folder"])
def test_a_staging_that_was_worked_on_is_left_as_it_is(trained, tmp_path, change):
    stage(trained, tmp_path / "x", "me/captions")
    if change == "folder":
        subprocess.run(["git", "init", "-q", tmp_path / "x"], check=True)
    else:
        (tmp_path / "x" / {"edited": "README.md", "added": "photo.png"}[change]).write_text("mine")
    found = {"edited": "README.md", "added": "photo.png", "folder": ".git"}[change]
    with pytest.raises(ValueError, match=rf"what was changed since \({found}\)"):
        stage(trained, tmp_path / "x", "me/captions")
    assert (tmp_path / "x" / found).exists()


def test_a_staging_is_built_anew(trained, tmp_path, monkeypatch):
    """Also one that lost files, and after a try that failed half-way."""
    first = stage(trained, tmp_path / "x", "me/captions")
    (tmp_path / "x" / "rbm.py").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("training.publish.card_of", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage(trained, tmp_path / "x", "me/captions")
    assert not (tmp_path / "x" / "rbm.py").exists() and {f.name for f in tmp_path.iterdir()} == {"trained", "x"}
    assert stage(trained, tmp_path / "x", "me/captions") == first and (tmp_path / "x" / "rbm.py").exists()


def test_staging_apart_from_model_and_package(trained, tmp_path):
    before = content(trained)
    for folder in (trained, trained / "hub", tmp_path, PACKAGE, PACKAGE / "hub", REPO):
        with pytest.raises(ValueError, match="overlaps .*: nothing was changed; give a folder apart from it"):
            stage(trained, folder, "me/captions")
    (tmp_path / "link").symlink_to(trained)
    with pytest.raises(ValueError, match="overlaps"):
        stage(trained, tmp_path / "link", "me/captions")
    assert content(trained) == before and not (PACKAGE / "hub").exists()


def test_a_refusal_is_one_line(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "modeling_blip_rbm.py").write_text("mine")
    result = publish("--repo_id", "me/captions", "--staging", tmp_path / "x", "--dry_run")
    assert (
        result.returncode == 2
        and result.stderr.startswith("publish: error: --staging ")
        and result.stderr.count("\n") == 1
    )
    assert content(tmp_path / "x") == {"modeling_blip_rbm.py": b"mine"}


def test_results_of_another_kind_are_named(trained, tmp_path):
    for text in ("[1]", "3", '{"systems": {}, "images": 7, "dataset": "d", "split": "s"}'):
        (trained / "results.json").write_text(text)
        with pytest.raises(ValueError, match="trained/results.json is not what training.evaluate_captions writes"):
            stage(trained, tmp_path / "x", "me/captions")
    assert not (tmp_path / "x").exists()


def test_what_does_not_load_is_one_line(trained, tmp_path):
    (trained / "tokenizer.json").write_text("{}")
    result = run("-m", "training.publish", "--model", trained, "--repo_id", "me/captions")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "the staged repo in" in result.stderr and "does not load by itself:" in result.stderr


def test_card_has_the_numbers_of_the_results(tmp_path):
    card = card_of(CHECKPOINT, "me/captions")
    cider = json.loads((CHECKPOINT / "results.json").read_text())["systems"]["BLIP-RBM"]["CIDEr-D"]
    assert f"value: {cider:.1f}" in card and "model-index" in card and "me/captions" in card
    assert "It was not evaluated" in card_of(tmp_path, "me/captions")
