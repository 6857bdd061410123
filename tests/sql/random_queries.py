"""Random queries over the streams of `tests.sql.running`, each in the dialect's words and in DuckDB's.

A `Part` is a relation with the columns that are known of it. Every kind of step takes parts and gives one; columns get
a fresh name at each, so that nothing depends on how names are resolved. Where the two dialects differ (windows that
overlap, semi joins) both texts are made at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.sql.corpus import Query

__all__ = ["random_query"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A relation: its text in FROM, for a stream and for DuckDB; its columns by kind, and the event time.

    ``unique``: columns that tell rows apart. ``key``: columns that must stay, since rows are corrected by them; None
    if they are not corrected.
    """

    ours: str
    theirs: str
    numbers: tuple[str, ...]
    texts: tuple[str, ...]
    others: tuple[str, ...] = ()
    time: str | None = None
    unique: tuple[str, ...] = ()
    key: tuple[str, ...] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.numbers, *self.texts, *self.others, *([self.time] if self.time else []))


def random_query(seed: int) -> Query:
    """One query; the same for the same seed."""
    part = _Grammar(random.Random(seed)).part(depth=3)
    listed = ", ".join(part.columns)
    return Query(text=f"SELECT {listed} FROM {part.ours} AS z", reference=f"SELECT {listed} FROM {part.theirs} AS z")


class _Grammar:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names = 0

    def part(self, depth: int) -> Part:
        """A relation of at most so many steps."""
        rng = self._rng
        if depth == 0:
            return self._source()
        steps = [self._windowed, self._windowed, self._grouped, self._ranked, self._filtered, self._projected]
        steps += [self._joined, self._joined, self._union, self._distinct, self._looked_up, self._set_operation]
        return rng.choice(steps)(depth)

    # -- steps

    def _source(self) -> Part:
        name = self._rng.choice(["a", "a", "b"])
        columns = {c: self._name() for c in ("n", "j", "v", "k", "s", "x", "t")}
        picked = f"(SELECT {', '.join(f'{c} AS {new}' for c, new in columns.items())} FROM {name})"
        return Part(
            ours=picked,
            theirs=picked,
            numbers=(columns["n"], columns["j"], columns["v"]),
            texts=(columns["k"], columns["s"]),
            others=(columns["x"],),
            time=columns["t"],
            unique=(columns["n"],),
        )

    def _filtered(self, depth: int) -> Part:
        part = self.part(depth - 1)
        where = self._predicate(part, 2)
        return self._both(part, f"(SELECT * FROM {{}} AS r WHERE {where})")

    def _projected(self, depth: int) -> Part:
        part = self.part(depth - 1)
        if part.key is not None:
            return self._filtered(depth)
        numbers = {self._name(): self._number(part, 2) for _ in range(self._rng.randint(1, 3))}
        texts = {self._name(): self._text(part, 1) for _ in range(self._rng.randint(0, 2))}
        kept = {c: c for c in (*part.unique, *([part.time] if part.time else []))}
        listed = ", ".join(f"{expr} AS {name}" for name, expr in {**numbers, **texts, **kept}.items())
        found = self._both(part, f"(SELECT {listed} FROM {{}} AS r)")
        ours = tuple(c for c in part.unique if c in part.numbers)
        words = tuple(c for c in part.unique if c in part.texts)
        return replace(found, numbers=(*numbers, *ours), texts=(*texts, *words), others=())

    def _distinct(self, depth: int) -> Part:
        part = self.part(depth - 1)
        names = [self._name(), self._name()]
        key = (names[0], names[1])
        listed = f"{self._number(part, 1)} % 5 AS {names[0]}, {self._text(part, 0)} AS {names[1]}"
        if part.key is not None:
            one, other = self._rng.choice(part.numbers or part.key), self._rng.choice(part.columns)
            if {*part.key} - {one, other}:
                return self._filtered(depth)
            return part
        found = self._both(part, f"(SELECT DISTINCT {listed} FROM {{}} AS r)")
        return replace(found, numbers=(names[0],), texts=(names[1],), others=(), time=None, unique=key, key=key)

    def _union(self, depth: int) -> Part:
        parts = [self.part(depth - 1) for _ in range(2)]
        if any(part.key is not None or part.time is None for part in parts):
            return parts[0]
        names = [self._name() for _ in range(4)]
        sides: list[tuple[str, str]] = []
        for part in parts:
            exprs = [self._number(part, 1), self._number(part, 0), self._text(part, 1), part.time]
            listed = ", ".join(f"{expr} AS {name}" for expr, name in zip(exprs, names, strict=True))
            sides.append((f"SELECT {listed} FROM {part.ours} AS r", f"SELECT {listed} FROM {part.theirs} AS r"))
        ours, theirs = (f"({one} UNION ALL {other})" for one, other in zip(*sides, strict=True))
        return Part(ours=ours, theirs=theirs, numbers=(names[0], names[1]), texts=(names[2],), time=names[3])

    def _set_operation(self, depth: int) -> Part:
        parts = [self.part(depth - 1) for _ in range(2)]
        word = self._rng.choice(["INTERSECT", "EXCEPT", "UNION"])
        names = [self._name(), self._name()]
        sides: list[tuple[str, str]] = []
        for part in parts:
            if part.key is not None:
                return part
            listed = f"{self._number(part, 0)} AS {names[0]}, {self._text(part, 0)} AS {names[1]}"
            sides.append((f"SELECT {listed} FROM {part.ours} AS r", f"SELECT {listed} FROM {part.theirs} AS r"))
        ours, theirs = (f"(({one}) {word} ({other}))" for one, other in zip(*sides, strict=True))
        key = (names[0], names[1])
        return Part(ours=ours, theirs=theirs, numbers=key[:1], texts=key[1:], unique=key, key=key)

    def _windowed(self, depth: int) -> Part:
        part = self.part(depth - 1)
        if part.time is None or part.key is not None:
            return self._grouped(depth)
        step = self._rng.choice([1, 2, 3])
        times = self._rng.choice([1, 2, 3])
        size = step * times if self._rng.random() < 0.7 else step * times + 1
        window = self._name()
        kind = self._rng.choice(["tumble", "tumble", "hop", "cumulate"])
        ours, theirs = part.ours, part.theirs
        if kind == "tumble":
            call = f"tumble({part.time}, INTERVAL '{size} seconds')"
            given = call
        elif kind == "hop":
            call = f"hop({part.time}, INTERVAL '{step} seconds', INTERVAL '{size} seconds')"
            given = f"_{window}"
            start = f"tumble({part.time}, INTERVAL '{step} seconds') - d * INTERVAL '{step} seconds'"
            theirs = (
                f"(SELECT * FROM (SELECT *, {start} AS {given} FROM {theirs} AS r, range({size // step + 1}) AS g(d))"
            )
            theirs += f" WHERE {part.time} < {given} + INTERVAL '{size} seconds')"
        else:
            size = step * times
            call = f"cumulate({part.time}, INTERVAL '{step} seconds', INTERVAL '{size} seconds')"
            given = f"_{window}"
            start = f"tumble({part.time}, INTERVAL '{size} seconds')"
            theirs = f"(SELECT *, {start} AS {given} FROM {theirs} AS r, range(1, {times + 1}) AS g(d)"
            theirs += f" WHERE {part.time} < {start} + d * INTERVAL '{step} seconds')"
        keys, calls, having = self._groups(part, retractable=False)
        end = [self._name()] if kind == "cumulate" else []
        names = [window, *end, *keys, *calls]
        exprs = [call, *(["window_end_time()"] if end else []), *keys.values(), *calls.values()]
        other = [given, *([f"{given} + d * INTERVAL '{step} seconds'"] if end else []), *keys.values(), *calls.values()]
        groups = ", ".join([call, *keys.values()])
        listed = ", ".join(f"{expr} AS {name}" for expr, name in zip(exprs, names, strict=True))
        others = ", ".join(f"{expr} AS {name}" for expr, name in zip(other, names, strict=True))
        asked = ", ".join([given, *(["d"] if end else []), *keys.values()])
        return Part(
            ours=f"(SELECT {listed} FROM {ours} AS r GROUP BY {groups}{having})",
            theirs=f"(SELECT {others} FROM {theirs} AS r GROUP BY {asked}{having})",
            numbers=tuple(n for n in (*keys, *calls) if n.startswith("i")),
            texts=tuple(n for n in (*keys, *calls) if n.startswith("w")),
            others=(*(n for n in calls if n.startswith("f")), *end),
            time=window,
            unique=() if end else (window, *keys),
        )

    def _grouped(self, depth: int) -> Part:
        part = self.part(depth - 1)
        keys, calls, having = self._groups(part, retractable=part.key is not None)
        listed = ", ".join(f"{expr} AS {name}" for name, expr in {**keys, **calls}.items())
        groups = f" GROUP BY {', '.join(keys.values())}" if keys else ""
        if not keys:
            having = " HAVING count(*) > 0"  # over no rows at all a stream has no row, DuckDB one
        found = self._both(part, f"(SELECT {listed} FROM {{}} AS r{groups}{having})")
        return replace(
            found,
            numbers=tuple(n for n in (*keys, *calls) if n.startswith("i")),
            texts=tuple(n for n in (*keys, *calls) if n.startswith("w")),
            others=tuple(n for n in calls if n.startswith("f")),
            time=None,
            unique=tuple(keys),
            key=tuple(keys),
        )

    def _groups(self, part: Part, *, retractable: bool) -> tuple[dict[str, str], dict[str, str], str]:
        """Keys and aggregates by name, and perhaps a HAVING."""
        rng = self._rng
        keys: dict[str, str] = {}
        if rng.random() < 0.7:
            keys[self._name("w")] = self._text(part, 0)
        if rng.random() < 0.5:
            keys[self._name("i")] = f"{self._number(part, 1)} % 4"
        calls = {self._name("i"): "count(*)"}
        for _ in range(rng.randint(1, 3)):
            number = self._number(part, 1)
            where = f" FILTER (WHERE {self._predicate(part, 1)})" if rng.random() < 0.3 else ""
            choices = [("i", f"count({number})"), ("i", f"sum({number})"), ("f", f"avg({number})")]
            if not retractable:
                choices += [("i", f"min({number})"), ("i", f"max({number})"), ("i", f"count(DISTINCT {number})")]
                choices += [("w", f"max({self._text(part, 0)})"), ("f", f"bool_or({self._predicate(part, 1)})")]
            kind, call = rng.choice(choices)
            calls[self._name(kind)] = call + where
        having = f" HAVING {rng.choice(list(calls.values()))} IS NOT NULL AND count(*) > {rng.randint(0, 4)}"
        return keys, calls, having if rng.random() < 0.4 else ""

    def _ranked(self, depth: int) -> Part:
        part = self.part(depth - 1)
        if part.key is not None or not part.unique:
            return part
        rng = self._rng
        by = rng.choice([[self._number(part, 1)], [part.time], [self._text(part, 0), self._number(part, 0)]])
        terms = [f"{e} {rng.choice(['ASC', 'DESC'])} NULLS {rng.choice(['FIRST', 'LAST'])}" for e in by if e]
        terms += [f"{c} NULLS LAST" for c in part.unique]
        partition = [rng.choice(part.texts)] if part.texts and rng.random() < 0.8 else []
        windows = [f"tumble({part.time}, INTERVAL '{rng.randint(1, 6)} s')"] if part.time and rng.random() < 0.3 else []
        parted = f"PARTITION BY {', '.join([*partition, *windows])} " if partition or windows else ""
        number, limit = self._name("i"), rng.choice([1, 1, 2, 4])
        found = self._both(
            part,
            f"""(SELECT * FROM (SELECT *, row_number() OVER ({parted}ORDER BY {", ".join(terms)}) AS {number}
            FROM {{}} AS r) WHERE {number} <= {limit})""",
        )
        if windows:
            others = (*part.others, *([part.time] if part.time else []))
            return replace(found, numbers=(*part.numbers, number), others=others, time=None)
        return replace(found, numbers=(*part.numbers, number), key=(*partition, number))

    def _looked_up(self, depth: int) -> Part:
        part = self.part(depth - 1)
        if part.key is not None:
            return part
        label = self._name("w")
        kind = self._rng.choice(["", "LEFT "])
        on = f"{self._number(part, 0)} = d.j"
        found = self._both(part, f"(SELECT r.*, d.label AS {label} FROM {{}} AS r {kind}JOIN dim AS d ON {on})")
        return replace(found, texts=(*part.texts, label), unique=(), others=part.others)

    def _joined(self, depth: int) -> Part:
        left, right = self.part(depth - 1), self.part(min(depth - 1, 1))
        rng = self._rng
        if left.key is not None or right.key is not None or left.time is None or right.time is None:
            return left
        kind = rng.choice(["INNER", "INNER", "LEFT", "RIGHT", "FULL", "SEMI", "ANTI"])
        conditions = []
        if left.texts and right.texts:
            conditions.append(f"l.{rng.choice(left.texts)} = r.{rng.choice(right.texts)}")
        if rng.random() < 0.5 or not conditions:
            conditions.append(f"l.{rng.choice(left.numbers)} % 3 = r.{rng.choice(right.numbers)} % 3")
        low, high = sorted(rng.sample(range(-12, 13), 2))
        times = (f"r.{right.time}", f"l.{left.time}")
        bound = rng.choice(
            [
                "{0} BETWEEN {1} + INTERVAL '{2} milliseconds' AND {1} + INTERVAL '{3} milliseconds'",
                "{0} >= {1} + INTERVAL '{2} milliseconds' AND {0} < {1} + INTERVAL '{3} milliseconds'",
                "{1} > {0} - INTERVAL '{3} milliseconds' AND {1} <= {0} - INTERVAL '{2} milliseconds'",
            ]
        )
        span = rng.choice([1, 2, 5])
        same = f"tumble({times[0]}, INTERVAL '{span} s') = tumble({times[1]}, INTERVAL '{span} s')"
        windowed = rng.random() < 0.3
        conditions.append(same if windowed else bound.format(*times, low * 50, high * 50))
        if rng.random() < 0.3:
            conditions.append(f"l.{rng.choice(left.numbers)} <> r.{rng.choice(right.numbers)}")
        if rng.random() < 0.3:
            side, part = rng.choice([("l", left), ("r", right)])
            conditions.append(f"{side}.{rng.choice(part.numbers)} > {rng.randint(-100, 100)}")
        on = " AND ".join(conditions)
        if kind in ("SEMI", "ANTI"):
            columns, numbers, texts, others = left.columns, left.numbers, left.texts, left.others
        else:
            columns = (*left.columns, *right.columns)
            numbers, texts = (*left.numbers, *right.numbers), (*left.texts, *right.texts)
            others = (*left.others, *right.others)
        time, spare = left.time, right.time
        if kind == "RIGHT":
            time, spare = spare, time
        if kind not in ("SEMI", "ANTI"):
            others = (*others, spare)
        if kind == "FULL" or windowed:
            others, time = (*others, time), None
        listed = ", ".join(columns)
        ours = f"(SELECT {listed} FROM {left.ours} AS l {'LEFT ' if kind in ('SEMI', 'ANTI') else ''}{kind} JOIN"
        theirs = f"(SELECT {listed} FROM {left.theirs} AS l {kind} JOIN {right.theirs} AS r ON {on})"
        return Part(
            ours=f"{ours} {right.ours} AS r ON {on})",
            theirs=theirs,
            numbers=numbers,
            texts=texts,
            others=others,
            time=time,
            unique=left.unique if kind in ("SEMI", "ANTI") else (),
        )

    # -- expressions

    def _number(self, part: Part, depth: int) -> str:
        rng = self._rng
        if depth == 0 or rng.random() < 0.4:
            return rng.choice(part.numbers) if part.numbers else str(rng.randint(-5, 5))
        one, other = self._number(part, depth - 1), self._number(part, depth - 1)
        return rng.choice(
            [
                f"({one} + {other})",
                f"({one} - ({other} - {rng.randint(0, 9)}))",
                f"({one} * {rng.randint(-3, 3)})",
                f"abs({one})",
                f"coalesce({one}, {other})",
                f"nullif({one}, {other})",
                f"CASE WHEN {self._predicate(part, depth - 1)} THEN {one} ELSE {other} END",
                f"CASE WHEN {self._predicate(part, 0)} THEN {one} END",
                f"length({self._text(part, 0)})",
            ]
        )

    def _text(self, part: Part, depth: int) -> str:
        rng = self._rng
        if depth == 0 or rng.random() < 0.5:
            return rng.choice(part.texts) if part.texts else rng.choice(["'a'", "'s1'"])
        one = self._text(part, depth - 1)
        return rng.choice([f"lower({one})", f"({one} || 'x')", f"substr({one}, 1, 2)", f"coalesce({one}, 'none')"])

    def _predicate(self, part: Part, depth: int) -> str:
        rng = self._rng
        number, text = self._number(part, 0), self._text(part, 0)
        if depth > 0 and rng.random() < 0.5:
            one, other = self._predicate(part, depth - 1), self._predicate(part, depth - 1)
            return rng.choice([f"({one} AND {other})", f"({one} OR {other})", f"NOT ({one})", f"({one}) IS NOT TRUE"])
        choices = [
            f"{number} {rng.choice(['<', '<=', '=', '<>', '>', '>='])} {rng.randint(-300, 300)}",
            f"{number} {rng.choice(['<', '=', '>'])} {self._number(part, depth)}",
            f"{number} BETWEEN {rng.randint(-500, 0)} AND {rng.randint(0, 500)}",
            f"{number} {rng.choice(['IN', 'NOT IN'])} (0, 1, {rng.randint(2, 9)}{rng.choice(['', ', NULL'])})",
            f"{text} {rng.choice(['IS NULL', 'IS NOT NULL'])}",
            f"{text} {rng.choice(['LIKE', 'NOT LIKE'])} '%{rng.choice(['a', 's', '1', 'one'])}%'",
            f"{text} {rng.choice(['=', '<>', '<', '>='])} '{rng.choice(['a', 'b', 's2'])}'",
            f"({number} IS DISTINCT FROM {rng.choice(['NULL', '1', number])})",
        ]
        if part.time is not None:
            choices.append(f"{part.time} {rng.choice(['<', '>='])} TIMESTAMP '1970-01-01 00:00:0{rng.randint(0, 9)}'")
        return rng.choice(choices)

    # -- helpers

    def _name(self, kind: str = "c") -> str:
        self._names += 1
        return f"{kind}{self._names}"

    def _both(self, part: Part, text: str) -> Part:
        return replace(part, ours=text.format(part.ours), theirs=text.format(part.theirs))
