"""How rows become the bytes of a file, and rows again: Parquet, CSV, JSON lines, Arrow.

A format writes a whole file at once, after the rows of a roll are known, and can read back what it wrote under
the schema that it had. Text may be compressed as a whole (``.csv.gz``), Parquet and Arrow compress inside.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from datafusion import SessionConfig, SessionContext

from operators.sources.json import is_read_as_text

__all__ = ["ArrowFormat", "CsvFormat", "FileFormat", "JsonFormat", "ParquetFormat", "format_of"]

_TEXT_SUFFIXES = {"none": "", "gzip": ".gz", "zstd": ".zst"}
_PARQUET_CODECS = ("none", "snappy", "gzip", "brotli", "lz4", "zstd")
_ARROW_CODECS = ("none", "lz4", "zstd")
_GZIP_LEVEL = 5


class FileFormat(Protocol):
    """A format that a file sink writes."""

    @property
    def kind(self) -> str:
        """Its name."""

    @property
    def details(self) -> Mapping[str, Any]:
        """What `format_of` makes it from again, ``kind`` among them; the commit log holds it as JSON."""

    @property
    def title(self) -> str:
        """Its name for people."""

    @property
    def suffix(self) -> str:
        """How the names of its files end."""

    def check(self, schema: pa.Schema) -> None:
        """Raise `pa.ArrowException` if files of this format cannot hold such columns and give them back."""

    def write(self, rows: pa.Table, file: BinaryIO) -> None:
        """Write one whole file."""

    def read(self, file: BinaryIO, schema: pa.Schema) -> pa.Table:
        """The rows of a file that was written with this schema."""


@dataclass(frozen=True, slots=True)
class ParquetFormat:
    """Parquet; ``compression`` is one of its codecs."""

    compression: str = "zstd"
    kind: str = "parquet"
    title: str = "Parquet"
    suffix: str = ".parquet"

    def __post_init__(self) -> None:
        _require_codec(self.compression, _PARQUET_CODECS)

    @property
    def details(self) -> Mapping[str, Any]:
        """See `FileFormat`."""
        return _details(self)

    def check(self, schema: pa.Schema) -> None:
        """See `FileFormat`."""
        pq.write_table(schema.empty_table(), pa.BufferOutputStream())

    def write(self, rows: pa.Table, file: BinaryIO) -> None:
        """See `FileFormat`."""
        pq.write_table(rows, file, compression=self.compression)

    def read(self, file: BinaryIO, schema: pa.Schema) -> pa.Table:
        """See `FileFormat`."""
        with pq.ParquetFile(file) as opened:
            return opened.read(schema.names).cast(schema)


@dataclass(frozen=True, slots=True)
class ArrowFormat:
    """Arrow IPC: the file format, or with ``stream`` the streaming one; ``compression``: none, lz4 or zstd."""

    compression: str = "zstd"
    stream: bool = False
    kind: str = "arrow"
    title: str = "Arrow"

    def __post_init__(self) -> None:
        _require_codec(self.compression, _ARROW_CODECS)

    @property
    def details(self) -> Mapping[str, Any]:
        """See `FileFormat`."""
        return _details(self)

    @property
    def suffix(self) -> str:
        """``.arrow``, of streams ``.arrows``."""
        return ".arrows" if self.stream else ".arrow"

    def check(self, schema: pa.Schema) -> None:
        """Arrow holds everything."""

    def write(self, rows: pa.Table, file: BinaryIO) -> None:
        """See `FileFormat`."""
        options = pa.ipc.IpcWriteOptions(compression=None if self.compression == "none" else self.compression)
        new = pa.ipc.new_stream if self.stream else pa.ipc.new_file
        with new(file, rows.schema, options=options) as writer:
            writer.write_table(rows)

    def read(self, file: BinaryIO, schema: pa.Schema) -> pa.Table:
        """See `FileFormat`."""
        opened = pa.ipc.open_stream(file) if self.stream else pa.ipc.open_file(file)
        return opened.read_all().cast(schema)


class _Text:
    """What the formats of text share: the codecs that there are, and names of files that tell them."""

    __slots__ = ()
    compression: str
    kind: str

    def __post_init__(self) -> None:
        _require_codec(self.compression, _TEXT_SUFFIXES)

    @property
    def details(self) -> Mapping[str, Any]:
        """See `FileFormat`."""
        return _details(self)

    @property
    def suffix(self) -> str:
        """That of the format and that of the compression."""
        return f".{self.kind}{_TEXT_SUFFIXES[self.compression]}"


@dataclass(frozen=True, slots=True)
class CsvFormat(_Text):
    """CSV with a header line: null is nothing, empty text is ``""``; ``compression``: none, gzip or zstd."""

    compression: str = "none"
    delimiter: str = ","
    kind: str = "csv"
    title: str = "CSV"

    def check(self, schema: pa.Schema) -> None:
        """See `FileFormat`."""
        _refuse(schema, "CSV", pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
        _try(self, schema)

    def write(self, rows: pa.Table, file: BinaryIO) -> None:
        """See `FileFormat`."""
        with _compressed(file, self.compression) as out:
            pacsv.write_csv(rows, out, pacsv.WriteOptions(delimiter=self.delimiter))

    def read(self, file: BinaryIO, schema: pa.Schema) -> pa.Table:
        """See `FileFormat`."""
        convert = pacsv.ConvertOptions(
            column_types=schema, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        )
        # A row of one null is an empty line.
        parse = pacsv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True, ignore_empty_lines=False)
        with _decompressed(file, self.compression) as text:
            return pacsv.read_csv(text, parse_options=parse, convert_options=convert).select(schema.names)


@dataclass(frozen=True, slots=True)
class JsonFormat(_Text):
    """JSON lines: an object for each row, without its nulls; ``compression``: none, gzip or zstd."""

    compression: str = "none"
    kind: str = "json"
    title: str = "JSON"

    def check(self, schema: pa.Schema) -> None:
        """See `FileFormat`."""
        _refuse(schema, "JSON", pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_map)
        for field in schema:
            if any(is_read_as_text(inner) for inner in _inside(field.type)):
                raise pa.ArrowTypeError(f"JSON holds no {field.type} that is read again; cast {field.name!r}")
        _try(self, schema)

    def write(self, rows: pa.Table, file: BinaryIO) -> None:
        """See `FileFormat`. DataFusion writes, to a file of this machine, which is then copied."""
        session = SessionContext(SessionConfig().with_target_partitions(1))
        with tempfile.TemporaryDirectory(prefix="json-") as directory, _compressed(file, self.compression) as out:
            path = Path(directory) / "rows.json"
            session.from_arrow(rows).write_json(os.fspath(path))
            if path.exists():  # without rows none is written
                with path.open("rb") as written:
                    shutil.copyfileobj(written, out)

    def read(self, file: BinaryIO, schema: pa.Schema) -> pa.Table:
        """See `FileFormat`."""
        read_as = pa.schema([f.with_type(pa.string()) if is_read_as_text(f.type) else f for f in schema])
        options = pajson.ParseOptions(explicit_schema=read_as, unexpected_field_behavior="ignore")
        with _decompressed(file, self.compression) as text:
            data = text.read()
        if not data:
            return schema.empty_table()
        read = pajson.ReadOptions(block_size=len(data) + 1)
        return pajson.read_json(pa.BufferReader(data), read_options=read, parse_options=options).cast(schema)


def format_of(details: Mapping[str, Any]) -> FileFormat:
    """The format of these `FileFormat.details`; `ValueError` for one that is not known."""
    formats: Mapping[str, Callable[..., FileFormat]] = {
        "parquet": ParquetFormat,
        "arrow": ArrowFormat,
        "csv": CsvFormat,
        "json": JsonFormat,
    }
    options = {key: value for key, value in details.items() if key != "kind"}
    if details.get("kind") not in formats:
        raise ValueError(f"files of the format {details.get('kind')!r} cannot be read; known are {sorted(formats)}")
    return formats[details["kind"]](**options)


def _details(format_: Any) -> Mapping[str, Any]:
    return {key: value for key, value in asdict(format_).items() if key not in ("title", "suffix")}


def _compressed(file: BinaryIO, compression: str) -> Any:
    """A stream into the file, which stays open."""
    if compression == "gzip":  # Arrow's is at the highest level, which takes five times as long for little
        return gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=file, mtime=0)
    kept = pa.PythonFile(_Kept(file), mode="w")
    return kept if compression == "none" else pa.CompressedOutputStream(kept, compression)


def _decompressed(file: BinaryIO, compression: str) -> Any:
    opened = pa.PythonFile(file, mode="r")
    return opened if compression == "none" else pa.CompressedInputStream(opened, compression)


class _Kept:
    """A file that Arrow does not close."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.closed = False

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def _try(format_: FileFormat, schema: pa.Schema) -> None:
    """Write a row of nulls and read it."""
    nulls = pa.table(
        [pa.nulls(1, field.type) for field in schema], schema=pa.schema([f.with_nullable(True) for f in schema])
    )
    buffer = pa.BufferOutputStream()
    format_.write(nulls, buffer)
    format_.read(pa.BufferReader(buffer.getvalue()), nulls.schema)


def _inside(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types within a nested one."""
    for i in range(kind.num_fields):
        inner = kind.field(i).type
        yield inner
        yield from _inside(inner)


def _refuse(schema: pa.Schema, what: str, *kinds: Callable[[pa.DataType], bool]) -> None:
    for field in schema:
        if any(is_kind(field.type) for is_kind in kinds):
            raise pa.ArrowTypeError(f"{what} holds no {field.type}; cast {field.name!r} to text")


def _require_codec(compression: str, codecs: Any) -> None:
    if compression not in codecs:
        raise ValueError(f"compression must be one of {tuple(codecs)}, not {compression!r}")
