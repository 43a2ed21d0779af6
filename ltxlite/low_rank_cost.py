"""What a low-rank term costs beside a linear, and what it costs merged into the linear's weight.

Both are counted in floating point operations, with bytes of memory traffic weighed against them.
Source: peers.md, move 9.
"""

from dataclasses import dataclass

# Operations of a tensor core (16 bits in, fp32 sums) in the time of one byte of memory traffic:
# 71 on an RTX 3060, 111 on a 4060, 116 on a 4070, 206 on an H200 (peers.md 5.3). Crossovers move
# by 9 % between the ends of that range, so one value serves every card.
FLOP_PER_BYTE = 100.0


@dataclass(frozen=True, slots=True)
class LowRankWork:
    """One product of a linear that has low-rank terms.

    tokens: T, rows of the input in this call.  columns: K.  rows: N.  rank: r, summed over terms.
    decodes: the linear decodes its weight for this call anyway, into scratch that may be changed;
    otherwise a copy has to be made.  element_bytes: of input, output and scratch.  codes: the
    linear multiplies codes: its input has to be made as values too, or the merged weight into
    codes.
    """

    tokens: int
    columns: int
    rows: int
    rank: int
    decodes: bool
    element_bytes: int = 2
    codes: bool = False

    def beside(self) -> float:
        """Return the cost of x Aᵀ Bᵀ added to the output: 2 T r (K + N) operations.

        Traffic: input and factors read, the small product written and read, the output read and
        written once more.
        """
        tokens, width = self.tokens, self.columns + self.rows
        read = self.columns * (3 if self.codes else 1)  # from the residual stream, as values
        moved = tokens * (read + 2 * self.rank + 2 * self.rows) + self.rank * width
        return 2.0 * tokens * self.rank * width + self._traffic(moved)

    def merged(self) -> float:
        """Return the cost of adding B A to the weight: 2 r K N operations, whatever T is.

        Traffic: scratch read and written, once more if it had to be copied first; factors.
        """
        size = self.columns * self.rows
        moved = size * (2 if self.decodes else 4) + self.rank * (self.columns + self.rows)
        if self.codes:  # written as values instead of codes, read, written as codes
            moved += size * 2
        return 2.0 * self.rank * size + self._traffic(moved)

    def merging_pays(self) -> bool:
        """Tell whether the merged form is the cheaper one."""
        return self.merged() < self.beside()

    def _traffic(self, elements: int) -> float:
        return FLOP_PER_BYTE * self.element_bytes * elements
