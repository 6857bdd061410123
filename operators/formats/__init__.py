"""How the bytes of records become columns.

``base.py`` says what a format is, and finds the records that cannot be decoded; ``json.py``, ``csv.py``, ``raw.py``,
``avro.py`` and ``protobuf.py`` are formats. ``lines.py`` is what the first two share, ``cells.py`` the last two. Avro's
types are in ``avro_types.py``, what reads them in ``avro_columns.py``; ``registry.py`` asks for schemas by number.
"""

from operators.formats.avro import AvroFormat
from operators.formats.base import Decoded, Format, FormatError, Rejected, decode
from operators.formats.csv import CsvFormat
from operators.formats.json import JsonFormat, infer_json
from operators.formats.protobuf import ProtobufFormat
from operators.formats.raw import RawFormat
from operators.formats.registry import SchemaRegistry

__all__ = [
    "AvroFormat",
    "CsvFormat",
    "Decoded",
    "Format",
    "FormatError",
    "JsonFormat",
    "ProtobufFormat",
    "RawFormat",
    "Rejected",
    "SchemaRegistry",
    "decode",
    "infer_json",
]
