"""How the bytes of records become columns.

``base.py`` says what a format is, and finds the records that cannot be decoded; ``json.py``, ``csv.py`` and ``raw.py``
are formats. ``lines.py`` is what the first two share.
"""

from operators.formats.base import Decoded, Format, FormatError, Rejected, decode
from operators.formats.csv import CsvFormat
from operators.formats.json import JsonFormat, infer_json
from operators.formats.raw import RawFormat

__all__ = [
    "CsvFormat",
    "Decoded",
    "Format",
    "FormatError",
    "JsonFormat",
    "RawFormat",
    "Rejected",
    "decode",
    "infer_json",
]
