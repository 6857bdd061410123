"""Canonical keys, their 64-bit hash, and row-wise equality.

Two keys are the same key exactly if their canonical values are equal: floats with one NaN and one zero,
strings and binaries of every Arrow layout as ``string`` and ``binary``, dictionaries and runs decoded, null equal
to null. The hash decides where a row lives, in every process and for as long as the store exists, so it is
specified here and versioned; it never depends on a library's own hash, nor on how an array is sliced.
A hash only finds candidates: whoever looks up a key verifies it with `rows_equal`.

The hash, version 1. All arithmetic is modulo 2**64; ``mix`` is the finaliser of splitmix64, a bijection::

    mix(x):  x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x >> 31
    G     =  0x9E3779B97F4A7C15
    fold(w_1 .. w_n):      h = 0; for each w: h = mix((h ^ w) + G)             a fixed number of words
    seq(l, w_1 .. w_n):    mix(l + sum over i of mix(w_i + i * G))             any number of words, length l

Every value of a column becomes one word, and the hash of a row is ``fold`` over the words of its columns:

==============================================  ========================================================
null, of any type                               0xD6E8FEB86659FD93
bool                                            0 or 1
integers; decimal32, decimal64; date, time,     the integer, sign-extended (unsigned: zero-extended), so
timestamp, duration                             that widening an integer keeps its hash
float16, float32, float64                       the bits of the canonical value as float64 (NaN: 0x7FF8 << 48)
decimal128, decimal256, month_day_nano          fold over the little-endian 8-byte words
string, binary, fixed_size_binary               seq(number of bytes, little-endian 8-byte words, the last
                                                one padded with zeros)
struct                                          fold over the words of the children
list, fixed_size_list                           seq(number of elements, words of the elements)
map                                             as a list of structs of key and value
==============================================  ========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = [
    "GOLDEN",
    "HASH_VERSION",
    "NULL_WORD",
    "Hasher",
    "canonical_schema",
    "canonicalise",
    "distinct",
    "hash_columns",
    "mix_word",
    "mix_words",
    "rows_equal",
]

HASH_VERSION = 1
"""Goes into every manifest and SSTable that holds hashes. A change of the table above needs a new number."""

Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]

_BLOCK_ROWS = 1 << 15  # what one pass works on stays in the processor's cache
_ROUNDS = 8  # words of a string that are hashed round by round; the rest of long ones all at once
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
GOLDEN = 0x9E3779B97F4A7C15
NULL_WORD = 0xD6E8FEB86659FD93
_MASK = (1 << 64) - 1
_NULL = np.uint64(NULL_WORD)
_TAIL_MASK = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Hasher:
    """`hash_columns`, of which only the highest ``bits`` count; few bits make collisions, for tests.

    The highest ones, since ranges of the hash space are then still evenly filled.
    """

    bits: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 64:
            raise ValueError(f"bits must be between 0 and 64, not {self.bits}")

    def hash(self, batch: pa.RecordBatch, columns: Sequence[str]) -> Words:
        """The hash of every row over these columns, in this order."""
        if not columns:
            return np.zeros(batch.num_rows, dtype=np.uint64)
        hashes = hash_columns([batch.column(name) for name in columns])
        if self.bits < 64:
            hashes &= np.uint64((1 << 64) - (1 << (64 - self.bits)))
        return hashes


# --- canonical form --------------------------------------------------------------------------------


def canonical_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of `canonicalise`'s result; names, nullability and metadata are kept."""
    fields = [f.with_type(_canonical_type(f.type)) for f in schema]
    return pa.schema(fields, metadata=schema.metadata)


def canonicalise(batch: pa.RecordBatch, keys: Collection[str] | None = None) -> pa.RecordBatch:
    """The batch in its physical form: what tables store, hash and compare.

    Every column gets its canonical type; floats get one NaN and one zero in the columns named in ``keys`` (None: in
    all), since other columns are only carried. Columns, and whole batches, with nothing to change are not copied.
    """
    columns, names = batch.columns, batch.schema.names
    changed = [_canonical(c, floats=keys is None or name in keys) for name, c in zip(names, columns, strict=True)]
    if _same(changed, columns):
        return batch
    return pa.RecordBatch.from_arrays(changed, schema=canonical_schema(batch.schema))


def _canonical_type(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _canonical_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _canonical_type(kind.storage_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if types.is_struct(kind):
        return pa.struct([f.with_type(_canonical_type(f.type)) for f in kind])
    if types.is_fixed_size_list(kind):
        return pa.list_(_canonical_field(kind.value_field), kind.list_size)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.list_(_canonical_field(kind.value_field))
    if types.is_map(kind):
        return pa.map_(_canonical_field(kind.key_field), _canonical_field(kind.item_field), kind.keys_sorted)
    if types.is_union(kind):
        raise TypeError(f"a column of type {kind} cannot be kept as state")
    return kind


def _canonical_field(field: pa.Field) -> pa.Field:
    return field.with_type(_canonical_type(field.type))


def _canonical(array: pa.Array, *, floats: bool) -> pa.Array:
    """The array in its canonical type, and with canonical floats if asked; the very same object if it is already."""
    array, kind = _plain(array), array.type
    types = pa.types
    if types.is_floating(kind := array.type):
        return _canonical_floats(array) if floats else array
    if not types.is_nested(kind):
        return array
    canonical = _canonical_type(kind)
    if types.is_struct(kind):
        children = [array.field(i) for i in range(kind.num_fields)]
        changed = [_canonical(child, floats=floats) for child in children]
        if _same(changed, children):
            return array
        return pa.StructArray.from_arrays(changed, fields=list(canonical), mask=_null_mask(array))
    offsets, children = _elements(array)
    changed = [_canonical(child, floats=floats) for child in children]
    if kind == canonical and _same(changed, children):
        return array
    if types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(changed[0], type=canonical, mask=_null_mask(array))
    starts = pa.array(offsets, pa.int32())
    if types.is_map(kind):
        return pa.MapArray.from_arrays(starts, *changed, type=canonical, mask=_null_mask(array))
    return pa.ListArray.from_arrays(starts, changed[0], type=canonical, mask=_null_mask(array))


def _plain(array: pa.Array) -> pa.Array:
    """Without encodings and views at the top level; the same object if there are none."""
    types = pa.types
    while True:
        kind = array.type
        if types.is_dictionary(kind):
            array = array.dictionary_decode()
        elif types.is_run_end_encoded(kind):
            array = pc.run_end_decode(array)
        elif isinstance(kind, pa.BaseExtensionType):
            array = array.storage
        else:
            break
    if (
        types.is_string_view(kind)
        or types.is_binary_view(kind)
        or types.is_large_string(kind)
        or types.is_large_binary(kind)
    ):
        return array.cast(_canonical_type(kind))
    return array


def _canonical_floats(array: pa.Array) -> pa.Array:
    if not len(array):
        return array
    width = array.type.bit_width // 8
    values = _values(array, f"<f{width}")
    canonical = _one_nan_one_zero(values)
    changed = values.view(f"<u{width}") != canonical.view(f"<u{width}")
    if not changed.any() or (array.null_count and not (changed & _valid(array)).any()):
        return array
    return pa.array(canonical, array.type, mask=~_valid(array))


def _one_nan_one_zero(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    with np.errstate(invalid="ignore"):  # signalling NaNs, as may lie under nulls
        canonical = values + values.dtype.type(0)  # -0.0 + 0.0 is +0.0
    canonical[np.isnan(canonical)] = np.nan
    return canonical


def _elements(array: pa.Array) -> tuple[Positions, list[pa.Array]]:
    """Offsets (from 0, one more than rows) and child arrays of a list, fixed-size list, list view or map."""
    kind, types = array.type, pa.types
    if types.is_fixed_size_list(kind):
        size = kind.list_size
        values = array.values.slice(array.offset * size, len(array) * size)
        return np.arange(len(array) + 1, dtype=np.int64) * size, [values]
    if types.is_list_view(kind) or types.is_large_list_view(kind):  # (casting them to lists loses elements)
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        return np.append(0, np.cumsum(lengths, dtype=np.int64)), [array.flatten()]
    offsets = array.offsets.to_numpy().astype(np.int64)
    first, length = int(offsets[0]), int(offsets[-1] - offsets[0])
    children = [array.keys, array.items] if types.is_map(kind) else [array.values]
    return offsets - first, [child.slice(first, length) for child in children]


def _same(new: Sequence[pa.Array], old: Sequence[pa.Array]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _null_mask(array: pa.Array) -> pa.BooleanArray | None:
    return array.is_null() if array.null_count else None


# --- hash ------------------------------------------------------------------------------------------


def hash_columns(arrays: Sequence[pa.Array]) -> Words:
    """The hash of every row over these columns, in this order, as specified at the top of this module.

    Takes any layout of a type (`canonicalise` is not needed first). Raises ``TypeError`` for a union.
    """
    if not arrays:
        raise ValueError("hash_columns needs at least one column")
    rows = len(arrays[0])
    if any(len(array) != rows for array in arrays):
        raise ValueError(f"columns of different lengths: {[len(array) for array in arrays]}")
    for array in arrays:
        _canonical_type(array.type)  # raises for what cannot be a key
    hashes = np.empty(rows, dtype=np.uint64)
    for start in range(0, rows, _BLOCK_ROWS):
        block = [_words(array.slice(start, _BLOCK_ROWS)) for array in arrays]
        hashes[start : start + _BLOCK_ROWS] = _fold(block)
    return hashes


def distinct(words: Words) -> Words:
    """The different words, sorted. (numpy's ``unique`` keeps a hash table and takes ten times as long.)"""
    ordered = np.sort(words)
    return ordered[np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))] if len(ordered) else ordered


def mix_words(words: Words) -> Words:
    """``fold`` over each word alone (a bijection): another hash out of a hash."""
    return _mix(words + np.uint64(GOLDEN))


def mix_word(word: int) -> int:
    """The same for one word, as a plain integer."""
    x = (word + GOLDEN) & _MASK
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & _MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def _mix(x: Words) -> Words:
    """In place."""
    x ^= x >> _SHIFT_1
    x *= _FACTOR_1
    x ^= x >> _SHIFT_2
    x *= _FACTOR_2
    x ^= x >> _SHIFT_3
    return x


def _fold(words: Sequence[Words]) -> Words:
    hashes = _mix(words[0] + np.uint64(GOLDEN))
    for word in words[1:]:
        hashes ^= word
        hashes += np.uint64(GOLDEN)
        _mix(hashes)
    return hashes


def _golden(i: int) -> np.uint64:
    return np.uint64(i * GOLDEN & (1 << 64) - 1)


def _words(array: pa.Array) -> Words:
    """One word per value."""
    array = _plain(array)
    if not len(array):
        return np.empty(0, dtype=np.uint64)
    kind, types = array.type, pa.types
    if types.is_null(kind):
        return np.full(len(array), _NULL)
    if types.is_struct(kind):
        words = _fold([_words(array.field(i)) for i in range(kind.num_fields)] or [np.zeros(len(array), np.uint64)])
    elif types.is_nested(kind):
        words = _list_words(array)
    elif types.is_string(kind) or types.is_binary(kind) or types.is_fixed_size_binary(kind):
        words = _bytes_words(array)
    else:
        words = _fixed_words(array)
    if array.null_count:
        words = np.where(_valid(array), words, _NULL)
    return words


def _fixed_words(array: pa.Array) -> Words:
    kind, types = array.type, pa.types
    if types.is_boolean(kind):
        words: Words = _filled(array).astype(np.uint64)
        return words
    width = kind.bit_width // 8
    if width > 8:
        parts = _values(array, "<u8", width // 8).reshape(len(array), width // 8)
        return _fold([parts[:, i] for i in range(width // 8)])
    if types.is_floating(kind):
        with np.errstate(invalid="ignore"):
            floats = _values(array, f"<f{width}").astype(np.float64, copy=False)
        return _one_nan_one_zero(floats).view(np.uint64)
    sign = "u" if types.is_unsigned_integer(kind) else "i"
    return _values(array, f"<{sign}{width}").astype(np.int64, copy=False).view(np.uint64)


def _values(array: pa.Array, dtype: str, per_row: int = 1) -> npt.NDArray[Any]:
    """The values of a fixed-width array, garbage where null; no copy."""
    values = np.frombuffer(array.buffers()[1], dtype=dtype, count=(array.offset + len(array)) * per_row)
    return values[array.offset * per_row :]


def _list_words(array: pa.Array) -> Words:
    offsets, children = _elements(array)
    elements = _words(children[0]) if len(children) == 1 else _fold([_words(child) for child in children])
    lengths = np.diff(offsets)
    place = np.arange(1, len(elements) + 1) - np.repeat(offsets[:-1], lengths)
    return _mix(
        _segment_sums(_mix(elements + place.view(np.uint64) * np.uint64(GOLDEN)), offsets) + lengths.view(np.uint64)
    )


def _segment_sums(terms: Words, offsets: Positions) -> Words:
    """Sum of ``terms[offsets[i]:offsets[i + 1]]``: differences of running sums, exact modulo 2**64."""
    running = np.zeros(len(terms) + 1, dtype=np.uint64)
    np.cumsum(terms, out=running[1:])
    return running[offsets[1:]] - running[offsets[:-1]]


def _bytes_words(array: pa.Array) -> Words:
    starts, lengths, load = _byte_ranges(array)
    sums = lengths.astype(np.uint64)
    rows: Positions | slice = slice(None)
    for i in range(_ROUNDS):
        left = lengths[rows] - 8 * i
        longer = left > 0
        if not longer.all():
            rows = np.flatnonzero(longer) if isinstance(rows, slice) else rows[longer]
            left = left[longer]
        if not len(left):
            break
        words = load(starts[rows] + 8 * i)
        words &= _TAIL_MASK[np.minimum(left, 8)]
        words += _golden(i + 1)
        sums[rows] += _mix(words)
    else:
        rows = np.flatnonzero(lengths > 8 * _ROUNDS)
        sums[rows] += _rest_sums(starts[rows], lengths[rows], load)
    return _mix(sums)


def _rest_sums(starts: Positions, lengths: Positions, load: Callable[[Positions], Words]) -> Words:
    """The terms of the words after the first rounds, summed by row."""
    counts = (lengths + 7) // 8 - _ROUNDS
    offsets = np.append(0, np.cumsum(counts))
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts) + _ROUNDS
    words = load(np.repeat(starts, counts) + 8 * place)
    words &= _TAIL_MASK[np.minimum(np.repeat(lengths, counts) - 8 * place, 8)]
    words += (place + 1).view(np.uint64) * np.uint64(GOLDEN)
    return _segment_sums(_mix(words), offsets)


def _byte_ranges(array: pa.Array) -> tuple[Positions, Positions, Callable[[Positions], Words]]:
    """Start and length of every value, and a function that loads the 8 bytes at each of some positions."""
    rows, kind = len(array), array.type
    if pa.types.is_fixed_size_binary(kind):
        edges = np.arange(array.offset, array.offset + rows + 1, dtype=np.int64) * kind.byte_width
        data = array.buffers()[1]
    else:
        offsets = np.frombuffer(array.buffers()[1], dtype="<i4", count=array.offset + rows + 1)
        edges = offsets[array.offset :].astype(np.int64)
        data = array.buffers()[2]
    base, end = 0, int(edges[-1])
    if data is None or data.size < end + 8:
        # The last value ends where the buffer does: a copy of this block gets room for the last load.
        base = int(edges[0])
        data = (b"" if data is None else data[base:end].to_pybytes()) + bytes(8)
    # One word at every byte offset.
    words = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))
    return edges[:-1] - base, np.diff(edges), lambda positions: words[positions]


# --- equality --------------------------------------------------------------------------------------


def rows_equal(a: Sequence[pa.Array], b: Sequence[pa.Array]) -> Bools:
    """For every row: is it the same key in ``a`` and ``b``? Null equals null, NaN equals NaN, -0.0 equals 0.0.

    Raises ``TypeError`` if the canonical types differ, ``ValueError`` for other numbers of columns or rows.
    """
    if not a or len(a) != len(b) or len({len(column) for column in (*a, *b)}) != 1:
        raise ValueError(f"cannot compare columns of lengths {[len(x) for x in a]} with {[len(x) for x in b]}")
    same = _equal(a[0], b[0])
    for x, y in zip(a[1:], b[1:], strict=True):
        same &= _equal(x, y)
    return same


def _equal(x: pa.Array, y: pa.Array) -> Bools:
    same: Bools
    x, y = _canonical(x, floats=False), _canonical(y, floats=False)
    if x.type != y.type:
        raise TypeError(f"cannot compare keys of type {x.type} with keys of type {y.type}")
    kind, types = x.type, pa.types
    if types.is_null(kind):
        return np.ones(len(x), dtype=np.bool_)
    if types.is_struct(kind):
        same = np.ones(len(x), dtype=np.bool_)
        for i in range(kind.num_fields):
            same &= _equal(x.field(i), y.field(i))
    elif types.is_nested(kind):
        same = _equal_lists(x, y)
    else:
        same = _equal_values(x, y)
    if x.null_count or y.null_count:
        x_valid, y_valid = _valid(x), _valid(y)
        same = np.where(x_valid & y_valid, same, x_valid == y_valid)
    return same


def _equal_values(x: pa.Array, y: pa.Array) -> Bools:
    """Values of a flat type; whatever where one of them is null."""
    kind, types = x.type, pa.types
    if types.is_float16(kind):  # no kernel compares these and the next
        x, y = x.cast(pa.float32()), y.cast(pa.float32())
    elif types.is_interval(kind):
        x, y = x.view(pa.binary(16)), y.view(pa.binary(16))
    same = _filled(pc.equal(x, y))
    if types.is_floating(kind):
        same |= _filled(pc.is_nan(x)) & _filled(pc.is_nan(y))
    return same


def _equal_lists(x: pa.Array, y: pa.Array) -> Bools:
    """Lists of equal length, element by element; whatever where one of them is null."""
    (x_offsets, x_children), (y_offsets, y_children) = _elements(x), _elements(y)
    lengths = np.diff(x_offsets)
    same: Bools = lengths == np.diff(y_offsets)
    lengths = np.where(same & _valid(x) & _valid(y), lengths, 0)
    edges = np.append(0, np.cumsum(lengths))
    place = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)
    x_rows = pa.array(np.repeat(x_offsets[:-1], lengths) + place)
    y_rows = pa.array(np.repeat(y_offsets[:-1], lengths) + place)
    differs = np.zeros(len(place), dtype=np.bool_)
    for x_child, y_child in zip(x_children, y_children, strict=True):
        differs |= ~_equal(x_child.take(x_rows), y_child.take(y_rows))
    same &= _segment_sums(differs.astype(np.uint64), edges) == 0
    return same


def _valid(array: pa.Array) -> Bools:
    valid: Bools = np.asarray(array.is_valid())
    return valid


def _filled(mask: pa.BooleanArray) -> Bools:
    filled: Bools = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
    return filled
