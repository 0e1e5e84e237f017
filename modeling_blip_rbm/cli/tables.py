"""Tables of captions as files: JSON lines, CSV, COCO results and Parquet, a reader and a writer each.

A record is {"image": name, "captions": [{"generated_text": ..., "score": ...}, ...]}, as a line of `--json`. What a writer writes, its reader
gives back, and `training/lib/readers.py` reads too.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path


COLUMNS = ("image", "caption", "score", "confidence")  # of CSV, a line a caption
COCO_NAME = re.compile(r"(?:COCO_\w+_)?0*(\d+)")
ROWS_AT_ONCE = 1000  # of Parquet: a row group


def read_jsonl(file: Path) -> Iterator[dict]:
    """Records of JSON lines. A last line that was never finished is left out.

    Raises:
        ValueError: naming the line that is no record.
    """
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line) if line.strip() else None
            except ValueError:
                if not line.endswith("\n"):
                    return
                raise ValueError(f"{file}, line {number} is not JSON: give --output another name") from None
            if entry is not None:
                yield _checked(file, entry)


def _checked(file: Path, entry) -> dict:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or "captions" not in entry:
        raise ValueError(f"{file} is there, but --output did not write it: give --output another name")
    return entry


def write_jsonl(file: Path, records: Iterable[dict]):
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(record_line(record) for record in records)


def record_line(record: dict) -> str:
    """A record as a line of JSON. Names that are not UTF-8 are escaped."""
    line = json.dumps(record, ensure_ascii=False)
    return (line if line.encode("utf-8", "ignore").decode() == line else json.dumps(record)) + "\n"


def read_csv(file: Path) -> Iterator[dict]:
    """Records of a CSV of `COLUMNS`."""
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines)
        if not {"image", "caption"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file} is there, but --output did not write it: give --output another name")
        for image, of_image in groupby(rows, key=lambda row: row["image"]):
            captions = [
                {"generated_text": row["caption"]}
                | {name: float(row[name]) for name in ("score", "confidence") if row.get(name)}
                for row in of_image
                if row["caption"]
            ]
            yield {"image": image, "captions": captions}


def write_csv(file: Path, records: Iterable[dict]):
    with open(file, "w", encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(COLUMNS)
        for record in records:  # an image whose captions were all withheld has a line without one, and so is known
            for caption in record["captions"] or [{}]:
                rows.writerow([record["image"], *(caption.get(name, "") for name in ("generated_text", *COLUMNS[2:]))])


def read_coco(file: Path) -> Iterator[dict]:
    """Records of COCO results with file names, as `write_coco` writes them."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        entries = [(result["file_name"], result) for result in results]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is there, but --output did not write it: give --output another name") from None
    for image, result in entries:
        scores = {name: result[name] for name in ("score", "confidence") if name in result}
        yield {"image": image, "captions": [{"generated_text": result["caption"], **scores}]}


def write_coco(file: Path, records: Iterable[dict]):
    """COCO's results format, of each image the best caption: image_id is the number in COCO_val2014_000000391895.jpg, or else the name."""
    with open(file, "w", encoding="utf-8") as lines:
        before = "[\n"
        for record in records:
            for caption in record["captions"][:1]:
                stem = Path(record["image"]).stem
                number = COCO_NAME.fullmatch(stem)
                result = {
                    "image_id": int(number[1]) if number else stem,
                    "caption": caption["generated_text"],
                    "file_name": record["image"],
                } | {name: caption[name] for name in ("score", "confidence") if name in caption}
                lines.write(before + json.dumps(result))
                before = ",\n"
        lines.write("[]\n" if before == "[\n" else "\n]\n")


def parquet():
    """pyarrow.parquet.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("--output .parquet needs pyarrow: pip install pyarrow, or choose .jsonl") from None
    return pyarrow.parquet


def read_parquet(file: Path) -> Iterator[dict]:
    """Records of a Parquet file of `write_parquet`."""
    with parquet().ParquetFile(file) as table:
        if not {"image", "captions", "scores", "confidences"} <= set(table.schema_arrow.names):
            raise ValueError(f"{file} is there, but --output did not write it: give --output another name")
        for rows in table.iter_batches(ROWS_AT_ONCE):
            for row in rows.to_pylist():
                captions = []
                for values in zip(row["captions"], row["scores"], row["confidences"]):
                    named = zip(("generated_text", "score", "confidence"), values)
                    captions.append({name: value for name, value in named if value is not None})
                yield {"image": row["image"], "captions": captions}


def write_parquet(file: Path, records: Iterable[dict]):
    """A row an image: image, and lists of its captions, scores and confidences."""
    import pyarrow

    numbers = pyarrow.list_(pyarrow.float32())
    fields = {"image": pyarrow.string(), "captions": pyarrow.list_(pyarrow.string()), "scores": numbers}
    schema = pyarrow.schema(fields | {"confidences": numbers})
    with parquet().ParquetWriter(file, schema) as table:
        records = iter(records)
        while rows := list(islice(records, ROWS_AT_ONCE)):
            columns = {"image": [row["image"] for row in rows]}
            for column, name in {"captions": "generated_text", "scores": "score", "confidences": "confidence"}.items():
                columns[column] = [[caption.get(name) for caption in row["captions"]] for row in rows]
            table.write_table(pyarrow.table(columns, schema=schema))


# reader and writer of each ending
FORMATS = {
    ".jsonl": (read_jsonl, write_jsonl),
    ".csv": (read_csv, write_csv),
    ".json": (read_coco, write_coco),
    ".parquet": (read_parquet, write_parquet),
}
