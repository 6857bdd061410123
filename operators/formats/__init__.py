"""How the bytes of records become columns.

``base.py`` says what a format is, and finds the records that cannot be decoded; ``json.py``, ``csv.py``, ``raw.py`` and
``avro.py`` are formats. ``lines.py`` is what the first two share. Avro's types are in ``avro_types.py``, what reads
them in ``avro_columns.py``, and ``registry.py`` asks for schemas by number.
"""

from operators.formats.avro import AvroFormat
from operators.formats.base import Decoded, Format, FormatError, Rejected, decode
from operators.formats.csv import CsvFormat
from operators.formats.json import JsonFormat, infer_json
from operators.formats.raw import RawFormat
from operators.formats.registry import SchemaRegistry

__all__ = [
    "AvroFormat",
    "CsvFormat",
    "Decoded",
    "Format",
    "FormatError",
    "JsonFormat",
    "RawFormat",
    "Rejected",
    "SchemaRegistry",
    "decode",
    "infer_json",
]
