"""Products of several adapters on a CPU, each for its own rows only: what stands beside them is neither read nor computed.

PyTorch would need several calls for each adapter and layer, or multiply every row with every adapter. numba compiles the loops
below at first use and keeps what it compiled, as for attention.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from worker.inference.compiled import compiled

_ADAPTERS = "f4[:,::1], f4[:,::1], i8[:,::1], i8[::1], f4[::1]"
_SIGNATURES = [f"void(f4[:,::1], f4[:,::1], {_ADAPTERS})", f"void(u2[:,::1], u2[:,::1], {_ADAPTERS})"]
_NUMBERS, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


@numba.njit
def _widen(row: Any, bits: Any) -> None:
    """Write the row's 32-bit floats to `bits`. Of the branches, one is left when it is compiled for the row's type."""
    if row.itemsize == bits.itemsize:
        bits[: len(row)] = row.view(np.uint32)
    else:
        for axis in range(len(row)):
            bits[axis] = np.uint32(row[axis]) << np.uint32(16)


@numba.njit
def _narrow(bits: Any, row: Any) -> None:
    """The way back, to the nearest, ties to even."""
    if row.itemsize == bits.itemsize:
        row.view(np.uint32)[:] = bits[: len(row)]
    else:
        for axis in range(len(row)):
            one = bits[axis]
            rounded = one + np.uint32(0x7FFF) + ((one >> np.uint32(16)) & np.uint32(1))
            quiet = one | np.uint32(0x400000)  # NaN stays NaN
            row[axis] = np.uint16((quiet if (one & _NUMBERS) > _INFINITE else rounded) >> np.uint32(16))


def _add(
    x_TI: NDArray[Any],
    out_TO: NDArray[Any],
    a_RI: NDArray[np.float32],
    b_RO: NDArray[np.float32],
    groups_G4: NDArray[np.int64],
    rows_E: NDArray[np.int64],
    shares_E: NDArray[np.float32],
) -> None:
    inner_4R = np.empty((4, len(a_RI)), np.float32)
    bits_4I, bits_O = np.empty((4, x_TI.shape[1]), np.uint32), np.empty(out_TO.shape[1], np.uint32)
    x_4I, out_O = bits_4I.view(np.float32), bits_O.view(np.float32)
    for first, end, start, rank in groups_G4:
        for begin in range(first, end, 4):  # four rows at a time: what is read of A serves all of them
            count = min(4, end - begin)
            for place in range(4):
                _widen(x_TI[rows_E[begin + min(place, count - 1)]], bits_4I[place])
            x0_I, x1_I, x2_I, x3_I = x_4I[0], x_4I[1], x_4I[2], x_4I[3]
            for at in range(rank):
                a_I = a_RI[start + at]
                sum0 = sum1 = sum2 = sum3 = np.float32(0)
                for axis in range(len(a_I)):
                    sum0 += x0_I[axis] * a_I[axis]
                    sum1 += x1_I[axis] * a_I[axis]
                    sum2 += x2_I[axis] * a_I[axis]
                    sum3 += x3_I[axis] * a_I[axis]
                inner_4R[0, at], inner_4R[1, at], inner_4R[2, at], inner_4R[3, at] = sum0, sum1, sum2, sum3
            for place in range(count):
                row, inner_R = rows_E[begin + place], inner_4R[place]
                inner_R[:rank] *= shares_E[begin + place]
                _widen(out_TO[row], bits_O)
                for at in range(0, rank - 3, 4):  # and four ranks: each output is read and written once for them
                    i0, i1, i2, i3 = inner_R[at], inner_R[at + 1], inner_R[at + 2], inner_R[at + 3]
                    b0_O, b1_O, b2_O, b3_O = b_RO[start + at], b_RO[start + at + 1], b_RO[start + at + 2], b_RO[start + at + 3]
                    for axis in range(len(out_O)):
                        out_O[axis] += (i0 * b0_O[axis] + i1 * b1_O[axis]) + (i2 * b2_O[axis] + i3 * b3_O[axis])
                for at in range(rank // 4 * 4, rank):
                    i0, b0_O = inner_R[at], b_RO[start + at]
                    for axis in range(len(out_O)):
                        out_O[axis] += i0 * b0_O[axis]
                _narrow(bits_O, out_TO[row])


add: Any = compiled(_SIGNATURES, _add)
"""Adds to outputs [T, O] what adapters make of inputs [T, I], both in 32 bits or both in the 16 of bfloat16; sums are made in 32.

A [R, I] and B [R, O] are those of all adapters. A group (first, end, start, rank) is an adapter, with `rank` ranks from `start`
on, and the rows that it is for: `rows[first:end]`, where it counts `shares[first:end]` times."""
