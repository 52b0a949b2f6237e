"""How vectors are composed from rows of tables, as data."""

from __future__ import annotations

import dataclasses
import functools
import json

KEYS = ("murmur3", "splitmix64", "radix", "linear")  # in the order of csrc/tables/compose.h
COMBINES = ("sum", "mean", "product")
MAX_ROWS = 2**31 - 1
MAX_PARTS = 256
FIELDS = 12  # integers of a part
FORMAT = 1  # of to_json()


@dataclasses.dataclass(frozen=True)
class Part:
    """What one table contributes to the vector of an id: ``width`` values from one row.

    Parameters
    ----------
    rows, width : int
        Shape of the table; at most 2^31 - 1 rows.
    key : {"murmur3", "splitmix64", "radix", "linear"}, default "murmur3"
        Where the row number, key mod ``rows``, comes from. Hashes: key number ``b`` of seed ``a``,
        as in :class:`emblas.tables.TableSpec`. ``radix``: ``id // a``. ``linear``:
        ``(a id + b) mod p`` without overflow (universal hashing where p is a prime above all ids).
        Ids are unsigned 64-bit patterns.
    a, b, p : int
        Constants of the key.
    limit : int, default 0
        Ids must be below it; 0 allows any. It makes a partition of a known vocabulary refuse ids
        that it would silently confuse with others.
    base : int, default 0
        Element of the flat table array at which row 0 starts.
    stride : int, optional
        Elements from one row to the next, at most ``width``; default ``width``. Rows that are
        closer overlap: they are chunks of one memory array.
    column : int, default 0
        First column of the result. Parts with the same column form a slot, and are combined.
    feature : int, default 0
        Which feature's ids the part takes.
    signed : bool, default False
        Multiply by -1 where the highest bit of the (hashed) key is set.
    """

    rows: int
    width: int
    key: str = "murmur3"
    a: int = 0
    b: int = 0
    p: int = 1
    limit: int = 0
    base: int = 0
    stride: int | None = None
    column: int = 0
    feature: int = 0
    signed: bool = False

    @property
    def row_stride(self) -> int:
        """``stride``, or ``width`` where none was given."""
        return self.width if self.stride is None else self.stride

    @property
    def end(self) -> int:
        """One past the last element of the flat array that the part may read."""
        return self.base + (self.rows - 1) * self.row_stride + self.width

    def fields(self) -> tuple[int, ...]:
        """Return the part as the operators take it."""
        return (
            self.feature, KEYS.index(self.key), self.a, self.b, self.p, self.rows, self.limit,
            self.base, self.row_stride, self.width, self.column, int(self.signed),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Composition:
    """How the vectors of ids are composed from rows of tables that lie in one flat array.

    Parameters
    ----------
    parts : tuple of Part
        By feature, then by column: the slots stand side by side without gaps.
    combine : {"sum", "mean", "product"}, default "sum"
        How the parts of a slot are combined. Slots are concatenated.

    Raises
    ------
    TypeError, ValueError
        If the parts don't fit together; the message says how.

    Examples
    --------
    The quotient-remainder trick for 1000 ids of 16 dimensions, 25 + 40 rows:

    >>> Composition(
    ...     (
    ...         Part(25, 16, "radix", a=40, limit=1000),
    ...         Part(40, 16, "radix", a=1, limit=1000, base=25 * 16),
    ...     ),
    ...     combine="product",
    ... ).size
    1040
    """

    parts: tuple[Part, ...]
    combine: str = "sum"

    def __post_init__(self) -> None:
        if not self.parts or not all(isinstance(part, Part) for part in self.parts):
            raise TypeError("parts must be a tuple of at least one Part")
        if self.combine not in COMBINES:
            raise ValueError(f"combine must be one of {', '.join(COMBINES)}, got {self.combine!r}")
        column, before = 0, None
        for number, part in enumerate(self.parts):
            _check_part(number, part)
            same_feature = before is not None and before.feature == part.feature
            expected = 0 if before is None else before.feature + 1
            if not same_feature and part.feature != expected:
                raise ValueError(
                    f"parts[{number}].feature must be {expected} (features count up from 0), "
                    f"got {part.feature}"
                )
            if same_feature and before is not None and part.column == before.column:
                if part.width != before.width:
                    raise ValueError(
                        f"parts[{number}].width must be {before.width} as for the part before it "
                        f"in its slot, got {part.width}"
                    )
            elif part.column != column:
                raise ValueError(
                    f"parts[{number}].column must be {column} (slots stand side by side), "
                    f"got {part.column}"
                )
            else:
                column += part.width
            before = part
        most = max(self.parts_of(feature) for feature in range(self.num_features))
        if most > MAX_PARTS:
            raise ValueError(f"a feature can have at most {MAX_PARTS} parts, got {most}")

    def parts_of(self, feature: int) -> int:
        """Count the parts of a feature."""
        return sum(part.feature == feature for part in self.parts)

    @property
    def num_features(self) -> int:
        """Number of features, each with its own ids."""
        return self.parts[-1].feature + 1

    @functools.cached_property
    def dim(self) -> int:
        """Columns of the result."""
        return self.parts[-1].column + self.parts[-1].width

    @functools.cached_property
    def size(self) -> int:
        """Elements of the flat table array."""
        return max(part.end for part in self.parts)

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of all tables together: the size of an optimizer's state by rows."""
        rows: dict[tuple[int, int, int], int] = {}
        for part in self.parts:
            table = part.base, part.row_stride, part.width
            rows[table] = max(rows.get(table, 0), part.rows)
        return sum(rows.values())

    @functools.cached_property
    def fields(self) -> list[int]:
        """The parts as the operators take them."""
        return [field for part in self.parts for field in part.fields()]

    def to_json(self) -> str:
        """Return the composition as text, to be stored beside the tables."""
        parts = [dataclasses.asdict(part) for part in self.parts]
        return json.dumps({"format": FORMAT, "combine": self.combine, "parts": parts})

    @classmethod
    def from_json(cls, text: str) -> Composition:
        """Read the text of :meth:`to_json`; ValueError if another version has written it."""
        fields = json.loads(text)
        if fields.pop("format", None) != FORMAT or "parts" not in fields:
            raise ValueError(f"composition must have format {FORMAT}, got {text[:200]}")
        return cls(tuple(Part(**part) for part in fields["parts"]), fields["combine"])


def _check_part(number: int, part: Part) -> None:
    name = f"parts[{number}]"
    if part.key not in KEYS:
        raise ValueError(f"{name}.key must be one of {', '.join(KEYS)}, got {part.key!r}")
    hashed = part.key in KEYS[:2]
    for field, low, high in (
        ("rows", 1, MAX_ROWS),
        ("width", 1, 2**40),
        ("a", 0 if hashed else 1, 2**32 - 1 if hashed else 2**63 - 1),
        ("b", 0, 63 if hashed else 2**63 - 1),
        ("p", 1, 2**63 - 1),
        ("limit", 0, 2**63 - 1),
        ("base", 0, 2**62),
        ("row_stride", 1, part.width),
    ):
        value = getattr(part, field)
        if not isinstance(value, int):
            raise TypeError(f"{name}.{field} must be an int, got {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"{name}.{field} must be {low} to {high}, got {value}")
    if part.signed and not hashed:
        raise ValueError(f"{name} can't be signed: its key {part.key!r} is no hash")


def tables_of(parts: list[int] | tuple[int, ...]) -> list[tuple[tuple[int, int, int], int]]:
    """Return the tables of parts as operators take them, by base: (base, stride, width), rows."""
    rows: dict[tuple[int, int, int], int] = {}
    for i in range(0, len(parts), FIELDS):
        *_, count, _, base, stride, width, _, _ = parts[i : i + FIELDS]
        rows[base, stride, width] = max(rows.get((base, stride, width), 0), count)
    return sorted(rows.items())


def rows_are_apart(parts: list[int] | tuple[int, ...]) -> bool:
    """Tell whether no element of the flat array belongs to two rows."""
    tables = tables_of(parts)
    ends = [base + rows * width for (base, _, width), rows in tables]
    starts = [base for (base, _, _), _ in tables[1:]]
    return all(end <= start for end, start in zip(ends[:-1], starts, strict=True)) and all(
        stride == width for (_, stride, width), _ in tables
    )
