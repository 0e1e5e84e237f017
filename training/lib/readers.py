"""The forms in which people keep image-caption pairs, one reader each: all give the same `Row`s.

| form | known by | reader |
|---|---|---|
| COCO's captions_*.json | `images`, `annotations` | `read_coco` |
| Karpathy's dataset_*.json | `images` with `sentences` and `split` | `read_karpathy` |
| a JSON list (BLIP's), JSON lines (`blip-rbm caption --json`) | objects, one an image or a caption | `read_objects` |
| a JSON object of captions by image file (kohya's meta_cap.json) | keys that name images | `read_mapping` |
| CSV, TSV, Kaggle's captions.txt and results.csv, Flickr8k.token.txt | lines with a delimiter | `read_delimited` |
| a folder with metadata.csv or metadata.jsonl | these names, at any depth | `read_metadata` |
| a folder with photo.txt or photo.caption beside photo.png | pairs of files | `read_sidecars` |
| Parquet, Arrow, WebDataset, `save_to_disk`, the Hub | `datasets` | `read_dataset` |

A file is known by its content, not by its name, and may be compressed by gzip.
"""

import csv
import gzip
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

from datasets import Dataset, Image, IterableDataset, ReadInstruction, load_dataset, load_from_disk

from training.lib.image_files import IMAGE_SUFFIXES


IMAGE_COLUMNS = (
    "image", "img", "image_path", "file_name", "filename", "path", "jpg", "png", "image_name", "image_file", "img_path",
    "filepath", "jpeg", "webp",
)  # fmt: skip
CAPTION_COLUMNS = (
    "captions", "caption", "text", "texts", "sentences", "raw", "txt", "description", "comment", "generated_text",
    "sentence",
)  # fmt: skip
ID_COLUMNS = ("image_id", "img_id", "cocoid", "imgid", "id")  # the last may number captions just as well
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
DATA_SUFFIXES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".gz", ".parquet", ".arrow", ".tar", ".zip"}
# where images lie below the folder of their captions, as COCO, Flickr8k and Flickr30k are unpacked
IMAGE_FOLDERS = ("", "images", "Images", "flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset")


class Row(NamedTuple):
    """One entry of the data: an image, or one caption of it."""

    image: Any  # path, or {"bytes", "path"}, or the bytes
    captions: Any  # as in the data, see `caption_values`
    image_id: Optional[str]
    where: str  # "captions.csv, line 3"
    split: Optional[str] = None
    names_image: bool = True  # whether `image_id` tells images apart; a column "id" may number captions


@dataclass
class Columns:
    """What the caller says of the data: names of columns, and the folder that relative image paths are meant from."""

    image: Optional[str] = None
    caption: Optional[str] = None
    image_dir: Optional[str] = None
    need_image: bool = True


@dataclass
class Source:
    """Data that were found, not yet read through.

    Args:
        rows: gives the rows of the split from the first on, at every call.
        folders: where relative image paths are looked for.
        splits: number of rows of every split that was found.
        outside: number of rows that are in none of them.
        table: the same rows as `datasets` has them, memory-mapped, with its column of images.
    """

    rows: Callable[[], Iterator[Row]]
    folders: list[Path]
    splits: dict[str, int] = field(default_factory=dict)
    outside: int = 0
    table: Optional[Dataset | IterableDataset] = None
    image_column: Optional[str] = None


def find_column(columns, wanted: Optional[str], known: tuple[str, ...], what: str, where: str = "") -> str:
    """The column that was asked for, or the first that is known, in capitals or not.

    Raises:
        ValueError: if there is none, with what there is.
    """
    where = f"{where}: " * bool(where)
    if wanted is not None and wanted not in columns:
        raise ValueError(f"{where}there is no column {wanted!r} for the {what}; the data have {sorted(columns)}")
    lower = {name.lower(): name for name in reversed(list(columns))}
    column = wanted or next((lower[name] for name in known if name in lower), None)
    if column is None:
        texts = "If they are captions without images, a captioner cannot learn from them. "
        raise ValueError(
            f"{where}no column for the {what} was found among {sorted(columns)}. {texts * (what == 'image')}"
            f"Say which it is with --{what}_column (known by themselves: {', '.join(known)})"
        )
    return column


def caption_values(value) -> list[Optional[str]]:
    """The captions of a row as text: of one text or number, a list of them, or objects that hold one; None for what is
    no caption."""
    if isinstance(value, str) or value is None:
        return [value and without_surrogates(value)]
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in caption_values(part)]
    if isinstance(value, dict):
        return caption_values(next((value[name] for name in CAPTION_COLUMNS if name in value), None))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return [str(value) if is_number else None]


def id_text(value) -> Optional[str]:
    """An id as it is written, or None for an empty one: 1, 1.0 and "01" are three."""
    return None if value is None or value != value else without_surrogates(str(value)).strip() or None


def without_surrogates(text: str) -> str:
    """Text that can be written as UTF-8: JSON may hold half of a pair of surrogates."""
    return text if text.isascii() else text.encode("utf-8", "ignore").decode()


def read_text(file: Path) -> str:
    """A text file, compressed or not: UTF-8, or UTF-16 with its mark.

    Raises:
        ValueError: naming the line that is of another encoding.
    """
    content = file.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{file} is damaged: it cannot be decompressed ({error})") from None
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. If the file is Latin-1 or "
            f"Windows-1252, convert it: iconv -f WINDOWS-1252 -t UTF-8 {file.name} > new-{file.name}"
        ) from None
    if "\0" in text:
        raise ValueError(f"{file} is neither text nor a format that is read (Parquet, Arrow, WebDataset's .tar)")
    return text


def rows_of_records(records: list[tuple[str, dict]], names: list[str], columns: Columns, file: Path) -> list[Row]:
    """Rows of objects or lines of a table, each with where it stands."""
    image = find_column(names, columns.image, IMAGE_COLUMNS, "image", str(file)) if columns.need_image else None
    caption = find_column(names, columns.caption, CAPTION_COLUMNS, "caption", str(file))
    if image is None:  # then it is at best a name
        image = next((name for name in IMAGE_COLUMNS if name in names), None)
    id_column = id_column_of(names, image)
    return [
        Row(record.get(image), record.get(caption), id_text(record.get(id_column)), where, None, id_column != "id")
        for where, record in records
    ]


def id_column_of(names, image_column: Optional[str]) -> Optional[str]:
    return next((name for name in ID_COLUMNS if name in names and name != image_column), None)


def read_coco(file: Path, content: dict, columns: Columns) -> list[Row]:
    """COCO's captions_*.json: `images` with ids and file names, `annotations` with captions.

    Raises:
        ValueError: if an id stands for two files, so that nobody knows which one is captioned.
    """
    captions, names = {}, {}
    for annotation in content["annotations"]:
        captions.setdefault(id_text(annotation.get("image_id")), []).append(annotation.get("caption"))
    for image in content["images"]:
        key, name = id_text(image.get("id")), image.get("file_name")
        if names.setdefault(key, name) != name:
            raise ValueError(
                f"{file}: image id {key} stands for two files, {names[key]} and {name}: give each an id of its own, "
                "then their captions can be told apart"
            )
    rows = [Row(name, captions.pop(key, None), key, f"{file.name}, image {key}") for key, name in names.items()]
    return rows + [Row(None, of_image, key, f"{file.name}, image {key}") for key, of_image in captions.items()]


def read_karpathy(file: Path, content: dict, columns: Columns) -> list[Row]:
    """Karpathy's dataset_coco.json, dataset_flickr8k.json, ...: `images` with `sentences` and `split`."""
    return [
        Row(
            str(Path(image.get("filepath") or "") / (image.get("filename") or "")),
            image.get("sentences"),
            id_text(image.get("cocoid", image.get("imgid"))),
            f"{file.name}, image {number}",
            SPLITS.get(image.get("split"), image.get("split")),
        )
        for number, image in enumerate(content["images"])
    ]


def read_objects(file: Path, content: list, columns: Columns, unit: str = "entry") -> list[Row]:
    """A list of objects, one an image or a caption. `unit` and number say where one stands: from 1 for lines."""
    records = [(number, entry) for number, entry in enumerate(content, start=1) if entry is not None]
    for number, entry in records:
        if not isinstance(entry, dict):
            raise ValueError(
                f"{file}, {unit} {number} is {str(entry)[:40]!r}, but must be an object: {{'image': ..., 'caption': "
                "...}"
            )
    names = list(dict.fromkeys(name for _, entry in records for name in entry))
    return rows_of_records([(f"{file.name}, {unit} {n}", entry) for n, entry in records], names, columns, file)


def read_object(file: Path, content: dict, columns: Columns) -> list[Row]:
    """JSON lines of one line."""
    return read_objects(file, [content], columns, "line")


def read_mapping(file: Path, content: dict, columns: Columns) -> list[Row]:
    """Captions by image file, as text, list or object: kohya's meta_cap.json."""
    return [Row(name, captions, None, f"{file.name}, entry {n}") for n, (name, captions) in enumerate(content.items())]


# documents of JSON, in this order: how each is known, and its reader
JSON_READERS = (
    (lambda content: "sentences" in (first_of(content, "images") or {}), read_karpathy),
    (lambda content: isinstance(content, dict) and {"images", "annotations"} <= set(content), read_coco),
    (lambda content: isinstance(first_of({"": content}, ""), dict), read_objects),
    (lambda content: isinstance(content, dict) and looks_like_image(next(iter(content), "")), read_mapping),
    (lambda content: isinstance(content, dict) and set(content) & set(CAPTION_COLUMNS), read_object),
)  # fmt: skip


def first_of(content, name: str):
    """The first object of a list in a document, or None."""
    values = content.get(name) if isinstance(content, dict) else None
    return values[0] if isinstance(values, list) and values and isinstance(values[0], dict) else None


def read_json(file: Path, text: str, columns: Columns) -> list[Row]:
    """One JSON document, or one object a line.

    Raises:
        ValueError: if a line is no JSON, naming it; or for a document of another kind.
    """
    lines = text.split("\n")  # not splitlines: a caption may hold other signs that end lines
    if file.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")) or is_json_lines(lines):
        content = []
        for number, line in enumerate(lines, start=1):
            try:
                content.append(json.loads(line) if line.strip() else None)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
        return read_objects(file, content, columns, "line")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON, or cut off: {error}") from None
    for known, reader in JSON_READERS:
        if known(content):
            try:
                return reader(file, content, columns)
            except (AttributeError, TypeError) as error:
                raise ValueError(
                    f"{file} is damaged: an entry is not an object as {reader.__name__} knows it ({error})"
                ) from None
    raise ValueError(
        f"{file} holds JSON, but neither COCO captions (images, annotations), nor Karpathy's (images with sentences), "
        "nor a list of {'image': ..., 'caption': ...}"
    )


def is_json_lines(lines: list[str]) -> bool:
    """Whether the first line is whole, and another follows."""
    if not any(line.strip() for line in lines[1:]):
        return False
    try:
        return isinstance(json.loads(lines[0]), dict)
    except ValueError:
        return False


def looks_like_image(name: str) -> bool:
    """Whether a text is the name of an image, as `1000268201_693b08cb0e.jpg#0` is."""
    return Path(re.sub(r"#\d+$", "", name.strip())).suffix.lower() in IMAGE_SUFFIXES


def read_delimited(file: Path, text: str, columns: Columns) -> list[Row]:
    """A table, all of it text: a header and lines, or image and caption a line without a header, as Flickr8k.token.txt.

    Surplus delimiters belong to the caption, if it is the last column.

    Raises:
        ValueError: if columns are missing, or a line has too many fields, naming it.
    """
    known = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, *(name.lower() for name in (columns.image, columns.caption) if name)}

    def fit(delimiter: str):
        names = [name.strip(' "').lower() for name in text.split("\n", 1)[0].split(delimiter)]
        return sum(name in known for name in names), len(names) > 1 and looks_like_image(names[0]), len(names)

    delimiter = max(",\t;|", key=fit)
    lines = parse_lines(file, text, delimiter)
    if fit(delimiter)[0] == 0 and fit(delimiter)[1]:
        names = ["image", "caption"]
    else:
        names = [name.strip() for name in lines.pop(0)[1]] if lines else []
    caption = find_column(names, columns.caption, CAPTION_COLUMNS, "caption", str(file))
    if twice := [name for name, number in Counter(names).items() if name and number > 1]:
        raise ValueError(
            f"{file}: {len(names)} columns, but several are called {twice[0]!r}: give each a name of its own"
        )
    records = []
    for number, fields in lines:
        while len(fields) > len(names) and not fields[-1].strip():
            fields.pop()
        if len(fields) > len(names) and names[-1] != caption:
            raise ValueError(
                f"{file}, line {number} has {len(fields)} fields, but there are {len(names)} columns: put what holds "
                f"{delimiter!r} in double quotes"
            )
        fields = [*fields[: len(names) - 1], delimiter.join(fields[len(names) - 1 :])]
        if names[0] != caption and looks_like_image(fields[0]):  # without the number of the caption: a.jpg#0
            fields[0] = re.sub(r"#\d+$", "", fields[0].strip())
        records.append((f"{file.name}, line {number}", dict(zip(names, fields))))
    return rows_of_records(records, names, columns, file)


def parse_lines(file: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The fields of every line that is not empty, and its number.

    Where quotes do not come in pairs they are signs like others, if delimiters are tabs or bars, which captions do not
    hold.

    Raises:
        ValueError: naming the line on which a quote is wrong.
    """
    problem = None
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE) if delimiter in "\t|" else (csv.QUOTE_MINIMAL,):
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=delimiter == "|")
        try:
            return [(reader.line_num, fields) for fields in reader if any(fields)]
        except csv.Error as error:
            problem = problem or f"{file}, line {reader.line_num}: {error}"
    raise ValueError(
        f'{problem}. A quote inside of a quoted text is written twice (""), and every quoted text is closed'
    )


def read_file(file: Path, columns: Columns) -> list[Row]:
    """The rows of a data file of text."""
    if file.suffix.lower() in IMAGE_SUFFIXES or file.suffix.lower() == ".zip":
        raise ValueError(f"{file} is no data file: give the folder with images and captions, unpacked")
    text = read_text(file)
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return (read_json if text.lstrip()[0] in "[{" else read_delimited)(file, text, columns)


def files_below(root: Path) -> Iterator[Path]:
    """Files in a folder and below, in order, without what systems hide among them. Linked folders are entered once.

    Raises:
        ValueError: if a folder cannot be read.
    """

    def unreadable(error: OSError):
        raise ValueError(f"{root}: {error.filename} cannot be read ({error.strerror})")

    entered = set()
    for folder, below, names in os.walk(root, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            below.clear()
            continue
        entered.add(real)
        below[:] = sorted(name for name in below if not name.startswith(".") and name != "__MACOSX")
        for name in sorted(names):
            if not name.startswith(".") and os.path.isfile(os.path.join(folder, name)):
                yield Path(folder, name)


def split_of(path: str) -> Optional[str]:
    """The split whose folder a path goes through. The name of the file says nothing: 'photo of a train.jpg'."""
    return next((SPLITS[part] for part in Path(path).parts[:-1] if part in SPLITS), None)


def read_metadata(root: Path, files: list[Path], columns: Columns) -> list[Row]:
    """metadata.csv or metadata.jsonl of an imagefolder, whose paths are meant from its own folder."""
    rows = []
    for file in files:
        folder = file.parent.relative_to(root)
        for row in read_file(file, columns):
            path = str(folder / row.image) if isinstance(row.image, str) and row.image else None
            rows.append(row._replace(image=path, split=split_of(path or "")))
    return rows


def caption_file(image: Path) -> Optional[Path]:
    names = (image.with_suffix(".txt"), image.with_suffix(".caption"), image.with_name(f"{image.name}.txt"))
    return next((file for file in names if file.is_file()), None)


def read_sidecars(root: Path, images: list[Path], columns: Columns) -> list[Row]:
    """Every image of a folder, with the captions of the text file beside it (as kohya's scripts keep them), one a
    line."""
    rows = []
    for image in images:
        texts = caption_file(image)
        captions = [line for line in read_text(texts).splitlines() if line.strip()] if texts else None
        path = str(image.relative_to(root))
        rows.append(Row(path, captions, None, path, split_of(path)))
    return rows


def data_files(root: Path) -> dict[Path, Optional[str]]:
    """Files of captions in a folder, or in its annotations/, and the split that each is named after: train.csv,
    captions_val2017.json."""
    pattern = re.compile(r"(\.(csv|tsv|jsonl|ndjson|json)(\.gz)?|^captions\.txt|\.token\.txt)$")
    files = [file for file in sorted(root.glob("*")) if pattern.search(file.name)]
    files += sorted((root / "annotations").glob("captions_*.json"))
    return {file: SPLITS.get(re.sub(r"^captions_|\d{4}$", "", file.name.split(".")[0])) for file in files}


def read_folder(root: Path, split: str, columns: Columns, streaming: bool) -> Source:
    """Whatever a folder holds.

    Raises:
        ValueError: if it holds several data files that are not named as splits are, or images alone.
    """
    files = list(files_below(root))
    if metadata := [file for file in files if re.fullmatch(r"metadata\.(csv|jsonl)", file.name)]:
        return source_of(read_metadata(root, metadata, columns), split, root, [root])
    if any(file.suffix in (".parquet", ".arrow", ".tar") for file in files):
        return read_dataset(str(root.resolve()), split, columns, streaming, [root])
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if any(caption_file(image) for image in images):
        return source_of(read_sidecars(root, images, columns), split, root, [root])
    found = data_files(root)
    if found and all(found.values()):
        return read_split_files(root, found, split, columns)
    if len(found) == 1:
        file = next(iter(found))
        return source_of(read_file(file, columns), split, root, image_folders(file))
    if found:
        names = ", ".join(str(file.relative_to(root)) for file in list(found)[:9])
        raise ValueError(f"{root} holds several data files ({names}): give one of them with --dataset")
    if images:
        raise ValueError(
            f"{root} holds {len(images)} images, but no captions: put photo.txt beside photo.jpg, or metadata.csv "
            "(file_name,text) into the folder"
        )
    return read_dataset(str(root.resolve()), split, columns, streaming, [root])


def read_split_files(root: Path, files: dict[Path, str], split: str, columns: Columns) -> Source:
    """Data files that are named after their splits; only those that are asked for are read."""
    asked = {SPLITS.get(name, name) for name in split_names(split)}
    if missing := asked - set(files.values()):
        raise ValueError(
            f"{root} has no split {', '.join(sorted(missing))}; it has {', '.join(sorted(set(files.values())))}"
        )
    rows, folders = [], []
    for file, name in files.items():
        if name in asked:
            rows += [row._replace(split=name) for row in read_file(file, columns)]
            folders += image_folders(file)
    return source_of(rows, split, root, folders)


def split_names(split: str) -> list[str]:
    """The names in "train[:100]+validation"."""
    return [part.split("[")[0] for part in split.split("+")]


def image_folders(file: Path) -> list[Path]:
    """Where the images of a data file may lie: in its folder, in the usual ones below, or beside COCO's annotations."""
    roots = [file.parent] + [file.resolve().parent.parent] * (
        file.resolve().parent.name in ("annotations", "annotation")
    )
    own = file.name.split(".")[0].split("_")[-1]  # captions_train2017.json: train2017
    return [root / name for root in roots for name in (*IMAGE_FOLDERS, own, f"images/{own}")]


def source_of(rows: list[Row], split: str, path: Path, folders: list[Path]) -> Source:
    """The rows of a split.

    Args:
        split: such as "train", "train[:100]", "train+validation". A file that knows no splits is whatever split is
            asked for; a folder is "train".

    Raises:
        ValueError: if there is no such split, or slice.
    """
    split = re.sub(r"\bval\b", "validation", split)
    by_split = {}
    for row in rows:
        by_split.setdefault(row.split, []).append(row)
    outside = by_split.pop(None, [])
    missed = len(outside) if by_split else 0
    if not by_split:
        names = split_names(split) if path.is_file() else ["train"]
        by_split = dict.fromkeys(names, outside)
    sizes = {name: len(of_split) for name, of_split in by_split.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        there = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
        raise ValueError(f"{path} has no split {split!r}; it has {there}. {error}") from None
    chosen = [row for part in parts for row in by_split[part.splitname][part.from_ : part.to]]
    return Source(partial(iter, chosen), folders, splits=sizes, outside=missed)


def rows_of_table(table, image: Optional[str], caption: str, id_column: Optional[str]) -> Iterator[Row]:
    """Rows of what `datasets` loaded; encoded images are not decoded."""
    features = table.features or {}
    if image and (isinstance(table, IterableDataset) or isinstance(features.get(image), Image)):
        table = table.cast_column(image, Image(decode=False))
    for number, row in enumerate(table.select_columns([name for name in (image, caption, id_column) if name])):
        yield Row(row.get(image), row[caption], id_text(row.get(id_column)), f"row {number}", None, id_column != "id")


def read_dataset(path: str, split: str, columns: Columns, streaming: bool, folders: list[Path], **arguments) -> Source:
    """What `datasets` reads: Parquet, Arrow, WebDataset, a Hub id.

    Raises:
        ValueError: if it cannot be loaded, with its reason.
    """
    try:
        if Path(path, "dataset_info.json").exists() or Path(path, "dataset_dict.json").exists():
            saved = load_from_disk(path)
            table = saved[split] if hasattr(saved, "keys") else saved
        else:
            table = load_dataset(path, split=split, streaming=streaming, **arguments)
            # a shard a row group: of a larger one the reader takes up to a gigabyte ahead
            table = table.reshard() if streaming else table
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise ValueError(f"{arguments.get('data_files') or path} ({split}) cannot be loaded: {error}") from error
    names = table.column_names or list(next(iter(table), {}))
    caption = find_column(names, columns.caption, CAPTION_COLUMNS, "caption")
    image = find_column(names, columns.image, IMAGE_COLUMNS, "image") if columns.need_image else None
    id_column = id_column_of(names, image)
    rows = partial(rows_of_table, table, image, caption, id_column)
    return Source(rows, folders, table=table, image_column=image)


def read_source(path: str, split: str, columns: Columns, streaming: bool = False) -> Source:
    """Find out what `path` is, and what reads it.

    Args:
        path: a data file, a folder, or the id of a data set on the Hub.
        columns: see `Columns`.
        streaming: what `datasets` reads is not loaded first.

    Raises:
        ValueError: if there is nothing there, or nothing that is known; naming file and line where one is wrong.
    """
    file = Path(path).expanduser()
    if file.is_file():
        kind = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}.get(file.suffix.lower())
        if kind:  # a file is one split, whatever it is called
            names = dict.fromkeys(split_names(split), str(file.resolve()))
            source = read_dataset(kind, split, columns, streaming, [file.parent], data_files=names)
        else:
            source = source_of(read_file(file, columns), split, file, image_folders(file))
    elif file.is_dir():
        saved = any((file / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
        reader = read_dataset if saved else read_folder
        source = reader(
            *((str(file), split, columns, streaming, [file]) if saved else (file, split, columns, streaming))
        )
    elif file.suffix in DATA_SUFFIXES or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):  # no Hub id
        raise ValueError(f"{path}: no such file or folder")
    else:
        source = read_dataset(path, split, columns, streaming, [])
    if columns.image_dir is not None:
        source.folders = [Path(columns.image_dir).expanduser()]
        if not source.folders[0].is_dir():
            raise ValueError(f"--image_dir {columns.image_dir}: no such folder")
    return source
