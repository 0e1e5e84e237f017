"""Images as the model takes them, read while it is busy with others."""

import io
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from modeling_blip_rbm.files import Member


ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # and not MPO, in which a camera keeps previews


def read_heic():
    """Let Pillow read HEIC, if pillow-heif is there."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def read_ahead(read, sources: list, number: int):
    """(source, what `read` gives of it or the ValueError that it raises) of one source after the other, up to `number` of them read ahead."""

    def attempt(source):
        try:
            return read(source)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(1) as reader:
        reading = deque()
        try:
            for source in [*sources, *[None] * number]:
                reading.append((source, source and reader.submit(attempt, source)))
                if len(reading) > number:
                    source, content = reading.popleft()
                    yield source, content.result()
        finally:
            reader.shutdown(wait=False, cancel_futures=True)


def read_image(preprocess, source: Path | Member | str):
    """What `preprocess`, which calls an image of bytes by no name, gives of a source.

    Raises:
        ValueError: naming the source.
    """
    if not isinstance(source, Member):
        return preprocess(source)
    content = source.read()
    try:
        return preprocess(content)
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).partition(': ')[2] or error}") from None


def read_frames(preprocess, source: Path | Member | str, number: int) -> list[tuple[int | None, object]]:
    """[(frame, what `preprocess` gives of it)] of an image: `number` frames evenly spread over an animation, or, of every other image, the
    whole of it as frame None.

    Raises:
        ValueError: naming the source.
    """
    frames = _frames_of(preprocess, source, number) if number > 1 and not isinstance(source, str) else []
    return frames or [(None, read_image(preprocess, source))]


def _frames_of(preprocess, source: Path | Member, number: int) -> list[tuple[int, object]]:
    """The frames of an animation; none of what is no animation, or cannot be read, which is said where it is read whole."""
    try:
        with Image.open(io.BytesIO(source.read()) if isinstance(source, Member) else source) as image:
            count = getattr(image, "n_frames", 1) if image.format in ANIMATIONS else 1
            if count < 2:
                return []
            frames = []
            for frame in sorted({round(i * (count - 1) / (number - 1)) for i in range(number)}):
                image.seek(frame)
                frames.append((frame, preprocess(image.convert("RGBA"))))
            return frames
    except Exception:  # whatever Pillow's decoders meet in a damaged file
        return []
