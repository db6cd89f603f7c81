"""Rows of data: JSONL, JSON, CSV and parquet files, folders and patterns of them, and data sets of the hub.

All but JSONL is read by the library `datasets`. There a column has one type; lines of JSONL may differ in theirs, and
their errors name the line.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlad_megatron.data.presets import HUB, PRESETS, Source
from rlad_megatron.errors import DataError

TABLES = {".csv": "csv", ".json": "json", ".parquet": "parquet"}  # suffix -> what `datasets` calls it
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = ("train", "validation", "test")
BATCH_ROWS = 1000  # that are Python objects at a time
REQUIRED = ("prompt", "answer")  # of a row that a model is asked about
FORMS = "a .jsonl, .json, .csv or .parquet file, a folder or pattern of them, hf:OWNER/NAME, or a preset"


@dataclass(frozen=True)
class Row:
    """One row as it was read.

    Example: Row("data/train.jsonl", 3, "train/3", {"prompt": "1 + 1 = ?", "answer": 2})
    """

    file: str  # or the data set's name
    number: int  # of its line, or row, from 1
    id: str  # unless the row has one
    fields: dict[str, Any]

    @property
    def where(self) -> str:
        return place(self.file, self.number)


def place(file: str, number: int) -> str:
    """Where a row is, for errors: "FILE:LINE" or "FILE: row NUMBER"."""
    is_table = file.startswith(HUB) or Path(file).suffix in TABLES
    return f"{file}: row {number}" if is_table else f"{file}:{number}"


def read_rows(source: Source, required: Sequence[str] = REQUIRED, default_split: str = "train") -> Iterator[Row]:
    """The rows of a source, one after another. Of a table only the columns that `source.columns` names, if it does.

    required: our names of columns that a table must have. default_split: of a hub name without one.
    Raises DataError "where: problem; remedy" for what is missing or malformed.
    """
    if source.name.startswith(HUB):
        yield from _hub_rows(source, required, default_split)
        return
    files = find_files(source)
    stems = [file.stem for file in files]
    empty = True
    for file, stem in zip(files, stems, strict=True):
        prefix = stem if stems.count(stem) == 1 else str(file.with_suffix(""))
        rows = _table_rows(source, file, prefix, required) if file.suffix in TABLES else _jsonl_rows(file, prefix)
        for row in rows:
            empty = False
            yield row
    if empty:
        needed = " and ".join(f'"{name}"' for name in required)
        raise DataError(f"{source.name}: no lines; write one object with {needed} on each line, or row of a table")


def find_files(source: Source) -> list[Path]:
    """The files of a path or pattern, sorted. Raises DataError if there are none."""
    path = Path(source.name)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in SUFFIXES]
        problem = f"{path}: no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file in this folder"
    else:
        files = [Path(name) for name in glob.glob(source.name, recursive=True) if Path(name).is_file()]
        problem = f"{path}: no such file"
    if not files:
        raise DataError(f"{problem}; give {FORMS} ({', '.join(PRESETS)})")
    return sorted(files)


def _jsonl_rows(path: Path, prefix: str) -> Iterator[Row]:
    name = str(path)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, text in enumerate(file, start=1):
                if not text.isspace():
                    yield Row(name, number, f"{prefix}/{number}", _object(name, number, text))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _object(file: str, number: int, text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place(file, number)}: not JSON ({error.msg} at column {error.colno}); write an object"
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{place(file, number)}: a {type(fields).__name__}, not an object; write an object")
    return fields


def _table_rows(source: Source, path: Path, prefix: str, required: Sequence[str]) -> Iterator[Row]:
    import datasets

    try:
        # Streaming reads the file itself; otherwise `datasets` would first write a copy of it.
        data = datasets.load_dataset(
            TABLES[path.suffix],
            data_files=glob.escape(str(path)),
            split="train",
            streaming=True,
            **_reading_options(path),
        )
        yield from _rows_of(data, source, str(path), prefix, required)
    except DataError:
        raise
    except Exception as error:  # of any kind: the library's and those below it
        raise DataError(f"{path}: `datasets` cannot read it ({_said(error)}); write it again") from error


def _reading_options(path: Path) -> dict[str, Any]:
    from datasets import Features, Value

    if path.suffix == ".parquet":
        return {"batch_size": BATCH_ROWS}
    if path.suffix == ".csv":  # as text: pandas would read the answers 007 and NA as 7 and nothing
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
        return {"features": Features({name: Value("string") for name in names}), "keep_default_na": False}
    return {}


def _hub_rows(source: Source, required: Sequence[str], default_split: str) -> Iterator[Row]:
    name, config, split = hub_parts(source, default_split)
    import datasets

    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # of any kind: the library's and those below it
        raise _hub_error(source, error) from error
    found = f"{HUB}{name}:{config}:{split}" if config else f"{HUB}{name}:{split}"
    if not len(data):
        raise DataError(f"{source.key}={source.name}: the split {split} has no rows; use another one")
    yield from _rows_of(data, source, found, f"{name.rpartition('/')[2]}/{split}", required)


def hub_parts(source: Source, default_split: str) -> tuple[str, str, str]:
    """Name, config ("": the default one) and split of hf:OWNER/NAME[:CONFIG][:SPLIT].

    A single part after the name is a split if it is called as splits usually are.
    """
    name, *parts = source.name.removeprefix(HUB).split(":")
    if len(parts) > 2 or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DataError(
            f"{source.key}={source.name}: not a name of the hub; write hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or "
            "hf:OWNER/NAME:CONFIG:SPLIT"
        )
    if len(parts) == 1 and parts[0] in SPLITS:
        parts = ["", *parts]
    config, split = [*parts, "", ""][:2]
    return name, config, split or default_split


def _hub_error(source: Source, error: Exception) -> DataError:
    import datasets
    import huggingface_hub.constants as hub

    lost = (
        isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError) or "cache" in str(error).lower()
    )
    if not lost:
        return DataError(f"{source.key}={source.name}: `datasets` cannot load it ({_said(error)}); check the name")
    why = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else _said(error)
    return DataError(
        f"{source.key}={source.name}: not in the cache {datasets.config.HF_DATASETS_CACHE}, and not to be had from "
        f"the hub ({why}); run `rlad data` once where there is a network, with the same HF_HOME, or give files"
    )


def _said(error: BaseException) -> str:
    """What the library says, or what it says was the cause, in one line."""
    while error.__cause__ is not None and type(error).__name__ == "DatasetGenerationError":
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__


def _rows_of(data: Any, source: Source, file: str, prefix: str, required: Sequence[str]) -> Iterator[Row]:
    """The rows of a `datasets.Dataset` or `IterableDataset`."""
    number, columns = 0, None
    for table in data.with_format("arrow").iter(batch_size=BATCH_ROWS):
        if columns is None:
            columns = _columns(table.column_names, source, file, required)
        for fields in table.select(columns).to_pylist():
            number += 1
            yield Row(file, number, f"{prefix}/{number}", fields)


def _columns(names: list[str], source: Source, file: str, required: Sequence[str]) -> list[str]:
    """The columns to keep. Raises DataError with those that exist if one is missing."""
    wanted = {name: source.columns.get(name, name) for name in [*required, *source.columns]}
    kept: dict[str, None] = {}
    for name, path in wanted.items():
        column = path if path in names else path.partition(".")[0]
        if column not in names:
            raise DataError(missing(file, name, path, names))
        kept[column] = None
    if not source.columns:
        return names
    return [*kept, *(name for name in ("id", "subset") if name in names and name not in kept)]


def missing(where: str, name: str, path: str, existing: Sequence[str]) -> str:
    """The error of a column that does not exist. name: ours. path: the column's."""
    return f'{where}: no "{path}"; there are: {", ".join(existing)}; name the column with data.columns.{name}=COLUMN'
