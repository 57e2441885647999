"""The next token of each row. A row's choice depends on its own logits and its own draw, never on its neighbours."""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from worker.inference.sequence import Choice, Sequence

_GREEDY_BELOW = 1e-5  # a smaller temperature only overflows 32-bit floats
_NUCLEUS = 256  # enough of the most likely tokens for most top_p; sorting a whole vocabulary takes milliseconds a row


def choose(logits_BV: Tensor, sequences: SequenceOf[Sequence]) -> list[Choice | None]:
    """One token a row; None where the logits are not finite, so that nobody is answered with noise."""
    logits_BV = logits_BV.float()
    is_plain = [not _is_adjusted(sequence) for sequence in sequences]
    best_B, indices_B = logits_BV.max(dim=-1)
    is_usable, greedy = torch.isfinite(best_B).tolist(), indices_B.tolist()
    return [
        _choice(logits_BV[row], greedy[row] if is_plain[row] else None, sequence) if is_usable[row] else None
        for row, sequence in enumerate(sequences)
    ]


def _choice(logits_V: Tensor, greedy: int | None, sequence: Sequence) -> Choice | None:
    """`greedy` is the likeliest token, if nothing is to be added to the logits."""
    wanted_V = logits_V if greedy is not None else _adjusted(logits_V, sequence)
    if greedy is None:
        best, index = wanted_V.max(dim=-1)
        if not torch.isfinite(best):
            return None
        greedy = int(index)
    token = greedy if sequence.sampling.temperature < _GREEDY_BELOW else _sample(wanted_V, sequence)
    if sequence.sampling.top_logprobs is None:
        return Choice(token)
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    values_N, ids_N = logprobs_V.topk(sequence.sampling.top_logprobs)
    return Choice(token, float(logprobs_V[token]), tuple(zip(ids_N.tolist(), values_N.tolist(), strict=True)))


def _is_adjusted(sequence: Sequence) -> bool:
    asked = sequence.sampling
    return bool(asked.frequency_penalty or asked.presence_penalty or asked.logit_bias or sequence.constraint)


def _adjusted(logits_V: Tensor, sequence: Sequence) -> Tensor:
    """With penalties for what the answer has said, the bias, and nothing but what the schema allows."""
    asked, logits_V = sequence.sampling, logits_V.clone()
    if sequence.said and (asked.frequency_penalty or asked.presence_penalty):
        said_N = torch.tensor(list(sequence.said), device=logits_V.device)
        counts_N = torch.tensor(list(sequence.said.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[said_N] -= asked.frequency_penalty * counts_N + asked.presence_penalty
    for token, bias in asked.logit_bias.items():
        logits_V[token] += bias
    if sequence.constraint:
        logits_V[~torch.from_numpy(sequence.constraint.allowed_V).to(logits_V.device)] = -torch.inf
    return logits_V


def _sample(logits_V: Tensor, sequence: Sequence) -> int:
    """Nucleus sampling (Holtzman et al., 2020): one of the fewest tokens whose probability reaches top_p, by inverse CDF.

    With top_k, of the k likeliest tokens alone.
    """
    asked = sequence.sampling
    if 0 < asked.top_k < len(logits_V):
        values_N, ids_N = logits_V.topk(asked.top_k)
        return int(ids_N[_sample_all(values_N, sequence)])
    return _sample_all(logits_V, sequence)


def _sample_all(logits_V: Tensor, sequence: Sequence) -> int:
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
