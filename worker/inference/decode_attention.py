"""Attention of single positions over paged keys and values on a CPU: each page is read where it lies, once for each query head.

PyTorch has no operator for it: gathering the pages into one tensor takes four times as long. numba compiles the loops below at
first use and keeps what it compiled beside this file or in the user's cache.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.inference.compiled import compiled

_SIGNATURE = "void(f4[:,:,::1], f4[:,:,:,::1], f4[:,:,:,::1], i4[:,::1], i4[::1], f4, i8, f4[:,:,::1])"


def _attend(
    query_BHD: NDArray[np.float32],
    keys_NKPD: NDArray[np.float32],
    values_NKPD: NDArray[np.float32],
    tables_BJ: NDArray[np.int32],
    lengths_B: NDArray[np.int32],
    scaling: np.float32,
    window: int,
    out_BHD: NDArray[np.float32],
) -> None:
    """Softmax in one pass over the pages, rescaled whenever a larger score comes (Milakov and Gimelshein, 2018)."""
    rows, heads, width = query_BHD.shape
    kv_heads, size = keys_NKPD.shape[1], keys_NKPD.shape[2]
    scores_P = np.empty(size, np.float32)
    sum_D = np.empty(width, np.float32)
    for row in range(rows):
        length = lengths_B[row]
        first = max(length - window, 0)
        for head in range(heads):
            kv_head, query_D = head // (heads // kv_heads), query_BHD[row, head]
            top, mass = np.float32(-np.inf), np.float32(0)
            sum_D[:] = 0
            for place in range(first // size, (length + size - 1) // size):
                keys_PD, values_PD = keys_NKPD[tables_BJ[row, place], kv_head], values_NKPD[tables_BJ[row, place], kv_head]
                begin, end = max(first - place * size, 0), min(length - place * size, size)
                highest = top
                for at in range(begin, end):
                    score = np.float32(0)
                    for axis in range(width):
                        score += query_D[axis] * keys_PD[at, axis]
                    scores_P[at] = score * scaling
                    highest = max(highest, scores_P[at])
                shrink = np.exp(top - highest)
                top, mass = highest, mass * shrink
                for axis in range(width):
                    sum_D[axis] *= shrink
                for at in range(begin, end):
                    weight = np.exp(scores_P[at] - top)
                    mass += weight
                    for axis in range(width):
                        sum_D[axis] += weight * values_PD[at, axis]
            for axis in range(width):
                out_BHD[row, head, axis] = sum_D[axis] / mass


attend: Any = compiled(_SIGNATURE, _attend)
"""Queries [B, H, D] over pages [N, K, P, D]: row b sees the last `window` of `lengths[b]` positions, which lie in the pages that
`tables[b]` lists. Writes [B, H, D]. All float32; pages are counted in int32."""
