"""The next token of each row. A row's choice depends on its own logits and its own draw, never on its neighbours."""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from worker.inference.sequence import Sequence

_GREEDY_BELOW = 1e-5  # a smaller temperature only overflows 32-bit floats
_NUCLEUS = 256  # enough of the most likely tokens for most top_p; sorting a whole vocabulary takes milliseconds a row


def choose(logits_BV: Tensor, sequences: SequenceOf[Sequence]) -> list[int | None]:
    """One token id a row; None where the logits are not finite, so that nobody is answered with noise."""
    logits_BV = logits_BV.float()
    best_B, indices_B = logits_BV.max(dim=-1)
    is_usable, greedy = torch.isfinite(best_B).tolist(), indices_B.tolist()
    return [_pick(logits_BV[row], greedy[row], sequence) if is_usable[row] else None for row, sequence in enumerate(sequences)]


def _pick(logits_V: Tensor, greedy: int, sequence: Sequence) -> int:
    return greedy if sequence.sampling.temperature < _GREEDY_BELOW else _sample(logits_V, sequence)


def _sample(logits_V: Tensor, sequence: Sequence) -> int:
    """Nucleus sampling (Holtzman et al., 2020): one of the fewest tokens whose probability reaches top_p, by inverse CDF."""
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / sequence.sampling.temperature, dim=-1)
    if sequence.sampling.top_p == 1:
        return _at(probabilities_V, sequence.draw())
    sorted_N, ids_N = _nucleus(probabilities_V, sequence.sampling.top_p)
    return int(ids_N[_at(sorted_N, sequence.draw())])


def _nucleus(probabilities_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    vocabulary = probabilities_V.shape[-1]
    for size in (min(_NUCLEUS, vocabulary), vocabulary):
        sorted_N, ids_N = probabilities_V.topk(size)
        reached_N = sorted_N.cumsum(-1) >= top_p
        if bool(reached_N[-1]):
            kept = int(reached_N.int().argmax()) + 1
            return sorted_N[:kept], ids_N[:kept]
    return sorted_N, ids_N  # rounding may keep the whole just under top_p


def _at(weights_N: Tensor, draw: float) -> int:
    """The index under which `draw` of the whole mass lies; one of weight zero is never taken."""
    mass_N = weights_N.double().cumsum(-1)
    return int(torch.searchsorted(mass_N, mass_N[-1] * draw, right=True).clamp(max=int(torch.searchsorted(mass_N, mass_N[-1]))))
