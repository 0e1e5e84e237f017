"""`blip-rbm caption --output`: captions in files, kept whatever happens, and read back by training."""

import csv
import functools
import http.server
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features

from modeling_blip_rbm import BlipRBMForConditionalGeneration, load_image
from modeling_blip_rbm.__main__ import main
from modeling_blip_rbm.cli.caption import BatchSize, with_affixes
from modeling_blip_rbm.cli.outputs import Beside, Table
from modeling_blip_rbm.files import find_images
from tests.conftest import REPO, random_image
from training.lib.readers import Columns, caption_values, read_source


NAMES = ("a.png", "b.jpg", "more/c.png")
TABLES = ("captions.jsonl", "captions.csv", "captions.json", "captions.parquet")
FORKS = multiprocessing.get_context("forkserver")  # processes of their own, for which everything is imported once
FORKS.set_forkserver_preload(["modeling_blip_rbm.__main__"])


@pytest.fixture
def photos(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        random_image(seed=i).save(folder / name)
    monkeypatch.chdir(tmp_path)  # where failed.jsonl goes
    return folder


@pytest.fixture
def caption(saved_model, capsys):
    def run(*args):
        code = main(["caption", *map(str, args), "--model", str(saved_model)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, lines=out.splitlines(), err=err)

    return run


def read_back(path, folder) -> dict[str, list[str]]:
    """Captions by image as the training stages read them."""
    captions = {}
    for row in read_source(str(path), "train", Columns()).rows():
        name = str((folder / row.image).resolve().relative_to(folder.resolve()))
        captions.setdefault(name, []).extend(caption_values(row.captions))
    return captions


def test_txt_beside_each_image_is_read_back(caption, photos):
    printed = caption(photos, "--num-beams", 2)
    result = caption(photos, "--output", "txt", "--num-captions", 2)
    assert result.code == 0 and not result.lines and "3 captioned" in result.err
    captions = read_back(photos, photos)
    assert set(captions) == set(NAMES) and all(len(of_image) == 2 for of_image in captions.values())
    assert [f"{photos / name}: {captions[name][0]}" for name in NAMES] == printed.lines
    assert not list(photos.rglob("*.part"))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_back_and_gone_on_with(name, caption, photos):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    table = photos.parent / name
    assert caption(photos / "a.png", photos / "more", "--output", table).code == 0
    first = table.read_bytes()
    result = caption(photos, "--output", table)
    assert result.code == 0 and "1 captioned, 2 skipped" in result.err
    captions = read_back(table, photos.parent)
    assert set(captions) == {f"photos/{image}" for image in NAMES}
    assert [f"{photos.parent / image}: {captions[image][0]}" for image in sorted(captions)] == caption(photos).lines
    assert table.read_bytes() != first and not list(photos.parent.glob("*.part*"))
    assert b"existing" not in table.read_bytes()  # which is of the journal
    last = table.read_bytes()
    assert "0 captioned, 3 skipped" in caption(photos, "--output", table).err and table.read_bytes() == last


@pytest.mark.parametrize("name", ["txt", *TABLES[:2], TABLES[3]])
def test_what_exists_is_replaced_or_added_to(name, caption, photos):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path, root = (photos, photos) if name == "txt" else (photos.parent / name, photos.parent)
    output = name if name == "txt" else path
    caption(photos, "--output", output, "--prefix", "first")
    caption(photos / "a.png", "--output", output, "--existing", "append", "--prefix", "second")
    caption(photos / "b.jpg", "--output", output, "--existing", "overwrite", "--prefix", "third")
    begins = {Path(image).name: [c.split()[0] for c in captions] for image, captions in read_back(path, root).items()}
    assert begins == {"a.png": ["first", "second"], "b.jpg": ["third"], "c.png": ["first"]}


def test_images_that_would_share_a_text_file(caption, photos):
    random_image(seed=7).save(photos / "a.jpg")
    caption(photos, "--output", "txt")
    assert {file.name for file in photos.rglob("*.txt")} == {"a.png.txt", "a.jpg.txt", "b.txt", "c.txt"}
    assert all(len(captions) == 1 for captions in read_back(photos, photos).values())


def test_ctrl_c_keeps_everything_and_a_second_start_finishes(caption, photos, monkeypatch):
    table, write = photos.parent / "captions.csv", Table.write

    def stopped(self, source, record):
        write(self, source, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Table, "write", stopped)
    assert caption(photos, "--output", table, "--batch-size", 1).code == 130
    monkeypatch.undo()
    monkeypatch.chdir(photos.parent)
    assert len(read_back(table, photos.parent)) == 1
    assert "2 captioned, 1 skipped" in caption(photos, "--output", table).err


def written(output: Path) -> int:
    """Captions that a run under way has put on disk: lines of the journal, or text files in a folder."""
    if output.is_dir():
        return sum(file.stat().st_size > 0 for file in output.glob("*.txt"))
    journal = Path(f"{output}.part")
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@pytest.mark.parametrize("name", ["txt", *TABLES])
def test_a_process_that_is_stopped_loses_nothing_and_a_second_start_finishes(name, how, caption, saved_model, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    folder, images = tmp_path / "many", 61
    folder.mkdir()
    for i in range(images):
        random_image(seed=i).save(folder / f"{i}.png")
    output = folder if name == "txt" else tmp_path / name
    options = [folder, "--output", "txt" if name == "txt" else output, "--failed", tmp_path / "failed.jsonl"]
    options += ["--max-length", 3, "--batch-size", 1]
    command = ["caption", *options, "--model", saved_model, "--prefix", "first"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    process = FORKS.Process(target=main, args=([str(one) for one in command],))
    process.start()
    while written(output) < 5:
        assert process.is_alive()
        time.sleep(0.001)
    before = written(output)
    os.kill(process.pid, how)
    process.join(60)
    assert process.exitcode == (-how if how == signal.SIGKILL else 0)  # at Ctrl-C `main` returns
    kept = written(output) if how == signal.SIGKILL or name == "txt" else len(read_back(output, tmp_path))
    assert 5 <= before <= kept < images
    result = caption(*options, "--prefix", "second")
    assert result.code == 0 and f"{images - kept} captioned, {kept} skipped" in result.err
    captions = read_back(output, folder if name == "txt" else tmp_path)
    begins = [caption.split()[0] for [caption] in captions.values()]  # one each
    assert len(captions) == images and begins.count("first") == kept and begins.count("second") == images - kept
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".part", ".whole")]


@pytest.mark.parametrize("existing, meant", [("overwrite", ["new"]), ("append", ["old", "new"])])
def test_a_journal_that_was_left_is_taken_in_as_its_run_meant_it(existing, meant, tmp_path):
    table, image = tmp_path / "captions.csv", tmp_path / "a.png"
    says = lambda text: {"captions": [{"generated_text": text}]}
    with Table(table, "skip") as first:
        first.write(image, says("old"))
    before = table.read_bytes()
    with Table(table, existing) as killed:
        killed.write(image, says("new"))
        journal = killed.journal.read_bytes()
    assert read_back(table, tmp_path) == {"a.png": meant}
    table.write_bytes(before)
    killed.journal.write_bytes(journal)
    with Table(table, "skip") as second:
        assert second.has(image)
    assert read_back(table, tmp_path) == {"a.png": meant}
    if existing == "overwrite":  # killed when the file was renamed already
        killed.journal.write_bytes(journal)
        with Table(table, "skip"):
            pass
        assert read_back(table, tmp_path) == {"a.png": meant}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", TABLES)
def test_names_that_are_no_unicode_are_known_again(name, caption, photos):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    random_image(seed=3).save(photos / os.fsdecode(b"caf\xe9.png"))
    assert "4 captioned" in caption(photos, "--output", name).err
    assert "0 captioned, 4 skipped" in caption(photos, "--output", name).err


def test_a_journal_left_by_a_power_cut_is_taken_in(caption, photos):
    table = photos.parent / "captions.jsonl"
    entry = {"image": "photos/a.png", "captions": [{"generated_text": "kept"}]}
    Path(f"{table}.part").write_text(json.dumps(entry) + '\n{"image": "photos/b.jpg", "capt')
    assert "2 captioned, 1 skipped" in caption(photos, "--output", table).err
    assert read_back(table, photos.parent)["photos/a.png"] == ["kept"]


def test_journals_of_other_tables_are_left(caption, photos):
    other = photos.parent / "captions.jsonl.part"
    other.write_text('{"image": "photos/a.png", "captions": [{"generated_text": "of another table"}]}\n')
    assert "3 captioned" in caption(photos, "--output", photos.parent / "captions.json").err and other.exists()


def test_two_runs_do_not_write_one_file(caption, photos):
    table = photos.parent / "captions.csv"
    with Table(table, "skip"):
        result = caption(photos, "--output", table)
    assert result.code == 2 and "another run writes" in result.err


def test_processes_share_the_images(caption, photos, monkeypatch):
    table = photos.parent / "captions.csv"
    with Table(table, "skip", (1, 2)) as other:  # still at work while the first one ends
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        assert "process 1 of 2: 2 captioned" in caption(photos, "--output", table).err
        assert set(read_back(table, photos.parent)) == {"photos/a.png", "photos/more/c.png"}
        other.write(photos / "b.jpg", {"captions": [{"generated_text": "of the other"}]})
    assert set(read_back(table, photos.parent)) == {f"photos/{name}" for name in NAMES}


@pytest.mark.slow
def test_accelerate_launch_splits_a_folder(saved_model, photos):
    table, two = photos.parent / "captions.csv", REPO / "training" / "accelerate" / "multi-cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", two, "-m", "modeling_blip_rbm"]
    command += ["caption", photos, "--output", table, "--model", saved_model]
    result = subprocess.run(list(map(str, command)), cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "process 1 of 2: 2 captioned" in result.stderr and "process 2 of 2: 1 captioned" in result.stderr
    assert set(read_back(table, photos.parent)) == {f"photos/{name}" for name in NAMES}


@pytest.mark.parametrize(
    "output, said",
    [
        ("captions.xml", "neither txt nor"),
        ("nowhere/captions.csv", "there is no folder nowhere"),
        ("other.csv", "did not write it"),
        ("other.json", "did not write it"),
        ("other.jsonl", "did not write it"),
    ],
)
def test_outputs_that_cannot_be_written(output, said, caption, photos):
    for name in ("other.csv", "other.json", "other.jsonl"):
        (photos.parent / name).write_text('{"of": "somebody else"}\n')
    before = sorted(photos.parent.iterdir())
    result = caption(photos, "--output", output)
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) <= 2
    assert sorted(photos.parent.iterdir()) == before


def test_csv_is_what_spreadsheets_read(caption, photos):
    caption(photos / "a.png", "--output", photos / "c.csv", "--prefix", 'a "quoted", trigger')
    with open(photos / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["image", "caption", "score", "confidence"] and rows[0]["image"] == "a.png"
    assert rows[0]["caption"].startswith('a "quoted", trigger ') and 0 < float(rows[0]["score"]) <= 1


def test_coco_results_have_the_datasets_ids(caption, photos):
    random_image().save(photos / "COCO_val2014_000000391895.jpg")
    caption(photos, "--output", photos / "c.json")
    results = json.loads((photos / "c.json").read_text())
    assert [result["image_id"] for result in results] == [391895, "a", "b", "c"]


def test_failures_are_listed_and_the_list_is_renewed(caption, photos):
    (photos / "d.jpg").write_text("no image")
    (photos / "e.jpg").write_text("no image")
    result = caption(photos, "--output", "txt")
    assert result.code == 2 and "3 captioned, 2 failed (2 not an image" in result.err and "failed.jsonl" in result.err
    failed = [json.loads(line) for line in Path("failed.jsonl").read_text().splitlines()]
    assert [entry["image"] for entry in failed] == [str(photos / "d.jpg"), str(photos / "e.jpg")]
    assert all(entry["error"].startswith("not an image") for entry in failed)
    for name in ("d.jpg", "e.jpg"):
        (photos / name).unlink()
    assert caption(photos, "--output", "txt").code == 0 and not Path("failed.jsonl").exists()


def test_a_list_of_failures_that_cannot_be_written_is_known_before(caption, photos):
    for content in ('{"my": "own file"}\n', "notes\n"):
        Path("failed.jsonl").write_text(content)
        result = caption(photos, "--output", "txt")
        assert result.code == 2 and "give --failed another name" in result.err
        assert Path("failed.jsonl").read_text() == content and not list(photos.rglob("*.txt"))
    result = caption(photos, "--output", "txt", "--failed", "no folder/failed.jsonl")
    assert result.code == 2 and "give --failed another place" in result.err and len(result.err.splitlines()) == 1


def test_text_files_have_a_place(caption, photos, monkeypatch):
    result = caption(photos / "gone" / "a.png", photos / "b.jpg", "--output", "txt")
    assert result.code == 2 and "gone/a.png: no such file" in result.err and (photos / "b.txt").is_file()
    shutil.copy(photos / "a.png", photos / "an image.txt")
    caption(photos / "an image.txt", "--output", "txt", "--existing", "overwrite")
    assert (photos / "an image.txt").read_bytes() == (photos / "a.png").read_bytes()
    assert (photos / "an image.txt.txt").is_file()
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != photos / "more")  # root may write anywhere
    result = caption(photos, "--output", "txt")
    assert result.code == 2 and f"{photos / 'more'}: no text file can be written there" in result.err


def test_advice_to_programmers_is_not_shown(caption, photos, recwarn):
    assert caption(photos / "a.png").code == 0
    assert not [warning for warning in recwarn if "transformers" in warning.filename]


def test_confidence(caption, photos, model, saved_model):
    result = caption(photos, "--min-confidence", 0.5)
    assert result.code == 2 and "never calibrated" in result.err
    model.config.rbm_confidence = [0.0, 5.0, 0.0]
    model.save_pretrained(saved_model)
    sure = {e["image"]: e["captions"][0]["confidence"] for e in map(json.loads, caption(photos, "--json").lines)}
    least = sorted(sure.values())[1]
    entries = [json.loads(line) for line in caption(photos, "--json", "--min-confidence", least).lines]
    kept = {entry["image"] for entry in entries if entry["captions"]}
    assert kept == {image for image, confidence in sure.items() if confidence >= least} and len(kept) == 2
    assert sum("withheld" in entry for entry in entries) == 1
    result = caption(photos, "--output", "txt", "--min-confidence", least)
    assert "2 captioned, 1 withheld" in result.err and len(list(photos.rglob("*.txt"))) == 2


def test_standard_input_patterns_and_archives(caption, photos, monkeypatch):
    piped = lambda content: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    plain = caption(photos / "a.png", photos / "more" / "c.png").lines
    piped(f"{photos}/a.png\n\n{photos}/more\n".encode())
    assert caption("-").lines == plain
    piped(f"{photos}/a.png\0{photos}/more/c.png\0".encode())
    assert caption("-").lines == plain
    piped(f"\ufeff{photos}/a.png\r\n  \r\n{photos}/more\r\n".encode())  # as Windows writes it
    assert caption("-").lines == plain
    assert caption(f"{photos}/**/*.png").lines == plain and caption(f"{photos}/*r?").lines == plain[1:]
    assert "no image has a name" in caption(f"{photos}/*.gif").err
    piped((photos / "b.jpg").read_bytes())
    assert "standard input is an image" in caption("-").err
    archives = [
        shutil.make_archive(f"{photos.parent}/shard", kind, photos) for kind in ("zip", "tar", "gztar", "xztar")
    ]
    archives.append(shutil.copy(archives[2], photos.parent / "shard.tgz"))
    for archive in map(str, archives):
        lines = caption(archive).lines
        assert [line.partition(": ")[0] for line in lines] == [f"{archive}/{name}" for name in NAMES]
        assert [lines[0].partition(": ")[2], lines[2].partition(": ")[2]] == [p.partition(": ")[2] for p in plain]
    (photos.parent / "half.zip").write_bytes(b"PK\3\4 and no more")
    assert "cannot be read as an archive" in caption(photos.parent / "half.zip").err
    assert "--output txt writes beside" in caption(archive, "--output", "txt").err


def test_avif_and_heic(caption, photos):
    """HEIC through pillow-heif, where that is installed; AVIF through Pillow's own codec, where it has one."""
    read = [kind for kind, there in (("avif", features.check("avif")), ("heic", heic_plugin() is not None)) if there]
    if not read:
        pytest.skip("neither Pillow's AVIF nor pillow-heif is there")
    image = Image.linear_gradient("L").resize((53, 37)).convert("RGB")
    for kind in read:
        image.save(photos / "more" / f"z.{kind}", quality=100)
        with zipfile.ZipFile(photos / f"{kind}.zip", "w") as archive:
            archive.write(photos / "more" / f"z.{kind}", f"z.{kind}")
        off = np.asarray(load_image(photos / "more" / f"z.{kind}"), float) - np.asarray(image, float)
        assert off.shape == (37, 53, 3) and np.abs(off).max() < 9
        result = caption(photos / "more", photos / f"{kind}.zip")
        assert result.code == 0 and len({line.partition(": ")[2] for line in result.lines if f"z.{kind}" in line}) == 1
        assert sum(f"z.{kind}: " in line for line in result.lines) == 2


def heic_plugin():
    try:
        import pillow_heif
    except ImportError:
        return None
    pillow_heif.register_heif_opener()
    return pillow_heif


def test_heic_without_the_plugin_is_one_line(caption, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    monkeypatch.setattr(Image, "EXTENSION", {end: kind for end, kind in Image.EXTENSION.items() if kind != "HEIF"})
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    for name in ("photo.HEIC", "called.jpg"):
        (photos / "more" / name).write_bytes(content)
    with zipfile.ZipFile(photos / "shard.zip", "w") as archive:
        archive.writestr("photo.heic", content)
    result = caption(photos / "more", photos / "shard.zip", "--output", "captions.csv")
    said = [line for line in result.err.splitlines() if "not an image" in line and "captioned" not in line]
    names = ["more/called.jpg", "more/photo.HEIC", "shard.zip/photo.heic"]
    hint = "not an image, or of a kind that Pillow cannot read; for HEIC, `pip install pillow-heif`"
    assert result.code == 2 and said == [f"blip-rbm: {photos / name}: {hint}" for name in names]
    assert "1 captioned, 3 failed (3 not an image" in result.err


def test_addresses_stay_as_they_are(photos):
    url = "https://example.org/photo.jpg?size=*"
    assert find_images([url, url]) == ([url], [])
    with pytest.raises(ValueError, match="beside images in folders only"):
        Beside.file(url)
    assert Table(photos / "c.csv", "skip").name(url) == url


def test_addresses_are_fetched(caption, photos):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=photos)
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        result = caption(f"{place}/more/c.png", f"{place}/gone.png")
        server.shutdown()
    [plain] = caption(photos / "more" / "c.png").lines
    assert result.lines == [f"{place}/more/c.png: {plain.partition(': ')[2]}"]
    assert result.code == 2 and f"{place}/gone.png: cannot be read as an image (it could not be fetched" in result.err


def test_a_terminal_sees_progress(caption, photos, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars = [line for line in caption(photos, "--batch-size", 1).err.splitlines() if line.startswith("caption: ")]
    assert any("3/3" in bar and ("image/s" in bar or "s/image" in bar) for bar in bars)


@pytest.mark.parametrize("option, dtype", [("--dtype=bfloat16", torch.bfloat16), ("--dtype=auto", torch.float32)])
def test_the_models_numbers(option, dtype, caption, photos, monkeypatch):
    generate, seen = BlipRBMForConditionalGeneration.generate, []
    recorded = lambda self, **settings: seen.append(self.dtype) or generate(self, **settings)
    monkeypatch.setattr(BlipRBMForConditionalGeneration, "generate", recorded)
    assert len(caption(photos, option).lines) == 3 and set(seen) == {dtype}


def test_linear_layers_in_8_bits(caption, photos, monkeypatch):
    optimize, asked = BlipRBMForConditionalGeneration.optimize_for_inference, []
    recorded = lambda self, int8=False: asked.append(int8) or optimize(self, int8=int8)
    monkeypatch.setattr(BlipRBMForConditionalGeneration, "optimize_for_inference", recorded)
    assert len(caption(photos, "--int8").lines) == len(caption(photos).lines) == 3 and asked == [True, False]


def test_frames_of_an_animation(caption, photos):
    frames = [random_image(seed=i) for i in range(9)]
    frames[0].save(photos / "film.gif", save_all=True, append_images=frames[1:], duration=50)
    first = caption(photos / "film.gif").lines
    result = caption(photos / "film.gif", photos / "a.png", "--frames", 3, "--batch-size", 2, "--json")
    film, still = (json.loads(line) for line in result.lines)
    assert [one["frame"] for one in film["captions"]] == [0, 4, 8] and len(still["captions"]) == 1
    assert first == [f"{photos / 'film.gif'}: {film['captions'][0]['generated_text']}"]
    lines = caption(photos / "film.gif", "--frames", 2).lines
    assert [line.partition(": ")[0].partition("film.gif")[2] for line in lines] == ["#0", "#8"]


def test_sampling_is_repeatable(caption, photos):
    sample = lambda seed: caption(photos, "--sample", "--top-p", 0.95, "--temperature", 2, "--seed", seed).lines
    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--temperature", "2"], "--temperature is of sampling"),
        (["--min-length", "9", "--max-length", "5"], "--min-length 9 is more than"),
        (["--prefix", "two\nlines"], "several lines"),
        (["--suffix", "its end\n"], "several lines"),
        (["--json", "--output", "txt"], "give one of them"),
        (["--output", "c.json", "--existing", "append"], "one caption an image"),
        (["--device", "cuda:7"], "no such device"),
    ],
)
def test_options_that_do_not_go_together(options, said, caption, photos, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = caption(photos, *options)
    assert result.code == 2 and said in result.err and not result.lines


def test_lengths(caption, photos, monkeypatch):
    generate, asked = BlipRBMForConditionalGeneration.generate, {}
    recorded = lambda self, **settings: asked.update(settings) or generate(self, **settings)
    monkeypatch.setattr(BlipRBMForConditionalGeneration, "generate", recorded)
    lines = caption(photos, "--max-length", 2).lines
    assert asked["max_new_tokens"] == 2 and max(len(line.partition(": ")[2].split()) for line in lines) <= 2
    caption(photos, "--min-length", 7, "--max-length", 9)
    assert (asked["min_new_tokens"], asked["max_new_tokens"]) == (7, 9)


def test_affixes():
    assert with_affixes("a dog", "sks person,", "") == "sks person, a dog"
    assert (
        with_affixes("a dog", "", ", photo") == "a dog, photo" and with_affixes("a dog", "A ", "here") == "A a dog here"
    )


def test_the_batch_is_halved_where_memory_ends():
    tried = []

    def captioner(contents, batch_size, **settings):
        tried.append(batch_size)
        if batch_size > 3:
            raise torch.cuda.OutOfMemoryError
        return [content * 2 for content in contents]

    batch = BatchSize(None, "cuda")
    assert batch.size == 64
    batch.size = 11
    assert batch.run(captioner, list(range(11)), {}) == [2 * i for i in range(11)] and tried == [11, 6, 3, 3, 3, 2]
    with pytest.raises(ValueError, match="memory ends at --batch-size 5"):
        BatchSize(5, "cuda").run(captioner, list(range(9)), {})
