"""How rows become the bytes of records: the values that a sink sends, one for each row.

``base.py`` says what an encoder is; ``json.py``, ``csv.py``, ``avro.py`` and ``raw.py`` are encoders.
All work on whole columns.
"""

from operators.encoders.avro import AvroEncoder, avro_schema
from operators.encoders.base import RowEncoder
from operators.encoders.csv import CsvEncoder
from operators.encoders.json import JsonEncoder, json_text
from operators.encoders.raw import RawEncoder, as_bytes

__all__ = [
    "AvroEncoder",
    "CsvEncoder",
    "JsonEncoder",
    "RawEncoder",
    "RowEncoder",
    "as_bytes",
    "avro_schema",
    "json_text",
]
