"""How rows become the bytes of records: the values that a sink sends, one for each row.

``base.py`` says what an encoder is; ``json.py``, ``csv.py`` and ``raw.py`` are encoders. All work on whole columns.
"""

from operators.encoders.base import RowEncoder
from operators.encoders.csv import CsvEncoder
from operators.encoders.json import JsonEncoder, json_text
from operators.encoders.raw import RawEncoder, as_bytes

__all__ = ["CsvEncoder", "JsonEncoder", "RawEncoder", "RowEncoder", "as_bytes", "json_text"]
