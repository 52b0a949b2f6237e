"""How ids become rows of a table, as data."""

from __future__ import annotations

import dataclasses
import json

from emblas.tables.composition import MAX_ROWS, Composition, Part

HASHES = ("murmur3", "splitmix64")  # in the order of csrc/tables/tables.h
MAX_HASHES = 16
MAX_EMBEDDINGS = 2**32
DEGENERATE_SEED = 8
FORMAT = 1  # of to_json()


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """The rows of a table that belong to an id: ``row_j = key_j(id) mod num_embeddings``.

    Parameters
    ----------
    num_embeddings : int
        Rows of the table, 1 to 2^32.
    num_hashes : int, default 4
        Rows of each id, 1 to 16. Two of them may coincide: that row then counts twice.
    hash : {"murmur3", "splitmix64"}, default "murmur3"
        Where the 32-bit keys come from. ``murmur3``: the four words of MurmurHash3_x64_128 of the
        id's eight little-endian bytes, the keys of thinc's and spaCy's HashEmbed; every further
        four come from the next seed. ``splitmix64``: the low and high halves of the successive
        outputs of the splitmix64 generator, started at the id xor the mixed seed (the id itself for
        seed 0); cheaper where the ids are hashes already.
    seed : int, default 0
        0 to 2^32 - 1. Tables whose vectors are combined need different seeds. With murmur3, seed 8
        is degenerate: it cancels the length of the id inside the hash, and four keys then tell ids
        apart hardly better than two. It is refused...
    allow_degenerate_seed : bool, default False
        ... unless this is set, which loading spaCy's models takes: 8 is the seed of their first
        table.
    signed : bool, default False
        Multiply a row by -1 where the highest bit of its 32-bit key is set, so that the errors of
        colliding ids cancel on average (Weinberger et al. 2009, "Feature Hashing for Large Scale
        Multitask Learning"). Needs fewer than 2^31 rows.

    Raises
    ------
    TypeError
        If a number is not an int.
    ValueError
        If a value is out of its range, or the seed is degenerate and not allowed.

    Examples
    --------
    >>> TableSpec(1000, num_hashes=2, seed=1)
    TableSpec(num_embeddings=1000, num_hashes=2, hash='murmur3', seed=1, signed=False)
    """

    num_embeddings: int
    num_hashes: int = 4
    hash: str = "murmur3"
    seed: int = 0
    allow_degenerate_seed: bool = dataclasses.field(default=False, compare=False, repr=False)
    signed: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_embeddings", 1, MAX_EMBEDDINGS),
            ("num_hashes", 1, MAX_HASHES),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} to {high}, got {value}")
        if self.signed and self.num_embeddings > MAX_ROWS:
            raise ValueError(
                f"a signed table must have at most {MAX_ROWS} rows, got {self.num_embeddings}"
            )
        if self.hash not in HASHES:
            raise ValueError(f"hash must be one of {', '.join(HASHES)}, got {self.hash!r}")
        seeds_after = -(-self.num_hashes // 4)
        if (
            self.hash == "murmur3"
            and self.seed <= DEGENERATE_SEED < self.seed + seeds_after
            and not self.allow_degenerate_seed
        ):
            raise ValueError(
                f"seed {DEGENERATE_SEED} is degenerate for murmur3 (num_hashes={self.num_hashes} "
                f"from seed {self.seed} on uses it): take another, or set allow_degenerate_seed to "
                "load tables made with it"
            )

    @property
    def family(self) -> int:
        """Number of the hash, as the operators take it."""
        return HASHES.index(self.hash)

    def composition(self, dim: int, combine: str = "sum") -> Composition:
        """Return the same rows as parts of a table of ``dim`` columns.

        With ``combine="concat"``, each of the ``num_hashes`` rows is ``dim`` wide and they stand
        side by side.
        """
        concat = combine == "concat"
        parts = tuple(
            Part(
                self.num_embeddings, dim, self.hash, a=self.seed, b=j,
                column=j * dim if concat else 0, signed=self.signed,
            )
            for j in range(self.num_hashes)
        )  # fmt: skip
        return Composition(parts, "sum" if concat else combine)

    def to_json(self) -> str:
        """Return the specification as text, to be stored beside the table."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> TableSpec:
        """Read the text of :meth:`to_json`; ValueError if another version has written it."""
        fields = json.loads(text)
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f"table specification must have format {FORMAT}, got {text}")
        return cls(**fields)
