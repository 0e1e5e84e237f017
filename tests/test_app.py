"""The window, in a real browser: `make test-app`. It needs Gradio, playwright and a Chromium, and is skipped without them."""

import os
import shutil
from urllib.parse import urlparse

import pytest
import torch
from PIL import Image

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from tests.conftest import CHECKPOINT, RBM_SETTINGS, REPO, random_image, randomise


pytest.importorskip("gradio", reason="the window needs Gradio: pip install -e '.[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 1000 * int(os.environ.get("APP_TEST_SECONDS", 60))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium"),
]

import app


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def served(model, saved_model, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    model.rbm_layer.rbm.word_weight.data.mul_(9.0)  # so that the guide tells against a decoder
    head = model.get_output_embeddings()  # that is random, and sure of it
    head.weight.data.mul_(0.02)
    head.bias.data.zero_()
    model.config.rbm_confidence = [0.5, 1.0, 0.1]
    model.save_pretrained(saved_model)
    blocks = app.page(str(saved_model))
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **app.SERVER)
    yield url
    blocks.close()


@pytest.fixture
def visit(browser, served):
    """Opens the page as a person of their own, and notes which hosts it asks."""
    contexts, hosts = [], set()

    def open_page(**settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page = context.new_page()
        page.goto(served)
        page.get_by_role("button", name="Caption", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert hosts - {None} == {"127.0.0.1"}  # None: of data: and blob:


@pytest.fixture
def photos(tmp_path):
    for i in range(2):
        random_image(seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_text("no image")
    return tmp_path


def upload(page, *files):
    page.locator("input[type=file]").first.set_input_files([str(file) for file in files])
    page.get_by_text(files[-1].stem).first.wait_for()
    page.get_by_role("button", name="Caption", exact=True).click()


def test_upload_captions_and_downloads(visit, photos):
    page = visit(accept_downloads=True)
    upload(page, photos / "0.png", photos / "broken.jpg", photos / "1.png")
    page.locator(".cards article").nth(2).wait_for()
    assert page.locator(".cards .ours").count() == 2 and page.locator(".cards meter").count() == 12
    assert "not an image" in page.locator(".cards .broken").inner_text()
    assert "confidence" in page.locator(".cards article").first.inner_text()
    with page.expect_download() as download:
        page.locator("#txt").click()
    lines = download.value.path().read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["0.png", "1.png"]


def test_a_slider_changes_the_caption(visit, photos):
    page = visit()
    upload(page, photos / "0.png")
    ours = page.locator(".cards .ours")
    ours.first.wait_for()
    before = ours.first.inner_text()
    guide, _, number = (page.locator("input[type=range]").nth(i) for i in range(3))
    guide.focus()
    page.keyboard.press("End")
    playwright.expect(ours.first).not_to_have_text(before, timeout=PATIENCE)
    number.focus()
    page.keyboard.press("End")
    playwright.expect(ours).to_have_count(5, timeout=PATIENCE)


def test_two_people_at_once(visit, photos):
    first, second = visit(), visit()
    upload(first, photos / "0.png")
    upload(second, photos / "1.png")
    for page, name in ((first, "0.png"), (second, "1.png")):
        page.locator(".cards .ours").first.wait_for()
        assert page.locator(".cards img").first.get_attribute("alt") == name


def test_keyboard_alone_on_a_phone(visit, photos):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    with page.expect_file_chooser() as chooser:
        press_until(page, lambda: "upload" in focused(page).lower() or "drop" in focused(page).lower())
        page.keyboard.press("Enter")
    chooser.value.set_files(str(photos / "0.png"))
    page.get_by_text("0.png").first.wait_for()
    press_until(page, lambda: focused(page).strip() == "Caption")
    page.keyboard.press("Enter")
    page.locator(".cards .ours").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def focused(page) -> str:
    return page.evaluate("(document.activeElement.ariaLabel || '') + ' ' + document.activeElement.innerText")


def press_until(page, reached):
    for _ in range(60):
        page.keyboard.press("Tab")
        if reached():
            return
    raise AssertionError("Tab does not lead there")


def test_too_many_images(visit, photos):
    files = [photos / f"many{i}.png" for i in range(app.MOST_IMAGES + 1)]
    for file in files:
        shutil.copy(photos / "0.png", file)
    page = visit()
    upload(page, *files)
    page.get_by_text("too many at a time").first.wait_for()


def test_where_a_word_is(saved_model, monkeypatch):
    """A stand-in for `word_map`, which an RBM of tokens has: the class token is left out, and the first patch is the brightest."""
    window = app.Window(str(saved_model))
    assert window.maps(random_image(), ["dog"]) == []  # this RBM reads the image as a whole
    monkeypatch.setattr(window.model.config, "rbm_pooling", "tokens")
    heat = torch.arange(10.0, 0.0, -1.0).expand(1, 2, 10)  # of [CLS] and 3 x 3 patches
    monkeypatch.setattr(window.model, "word_map", lambda pixels, words: heat[:, : len(words)], raising=False)
    (word, picture), (other, _) = window.maps(Image.new("RGB", (90, 60)), ["dog", "ball"])
    assert (word, other) == ("dog", "ball") and picture.size == (90, 60)
    assert sum(picture.getpixel((2, 2))) > sum(picture.getpixel((45, 30))) > sum(picture.getpixel((88, 58)))


def test_where_a_word_is_by_an_rbm_of_tokens(blip, processor, tmp_path):
    model = BlipRBMForConditionalGeneration.from_blip(blip, **RBM_SETTINGS, rbm_pooling="tokens")
    randomise(model.rbm_layer.rbm)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    window = app.Window(str(tmp_path))
    assert [word for word, _ in window.maps(random_image(), ["dog", "ball"])] == ["dog", "ball"]
    random_image().save(tmp_path / "photo.png")
    assert window.caption([str(tmp_path / "photo.png")], 0.5, 1, 1)[0].count("<figure>") == app.MAPS


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="needs the embedded checkpoint")
def test_screenshot(browser, tmp_path):
    """With APP_SCREENSHOT=docs/app.png it renews README's picture."""
    blocks = app.page(str(CHECKPOINT))
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **app.SERVER)
    page = browser.new_page(viewport={"width": 1100, "height": 1100})
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    upload(page, *(REPO / "examples" / f"{name}.jpg" for name in ("photographer", "cat", "coffee")))
    page.locator(".cards article").nth(2).wait_for()
    file = REPO / os.environ.get("APP_SCREENSHOT", tmp_path / "app.png")
    page.screenshot(path=file, full_page=True)
    Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)  # a third of the bytes
    blocks.close()
    assert file.stat().st_size > 20_000


def test_a_space_has_all_that_it_needs(tmp_path):
    app.write_space(tmp_path / "space")
    there = {str(file.relative_to(tmp_path / "space")) for file in (tmp_path / "space").rglob("*")}
    assert {"app.py", "README.md", "requirements.txt", "modeling_blip_rbm/rbm.py", "examples/cat.jpg"} <= there
    assert "checkpoints/blip-rbm-small/config.json" in there and not any("__pycache__" in name for name in there)
    assert not any(file.is_symlink() for file in (tmp_path / "space").rglob("*"))
    assert (tmp_path / "space" / "README.md").read_text().startswith("---\ntitle: BLIP-RBM\n")
    assert "torch" in (tmp_path / "space" / "requirements.txt").read_text()
    with pytest.raises(ValueError, match="exists"):
        app.write_space(tmp_path / "space")
