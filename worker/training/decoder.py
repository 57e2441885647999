"""The forward of a Llama-shaped decoder, and its backward: what is kept between them is chosen by hand.

transformers' modules hold the weights; its own forward keeps, and goes over, several times as much. Every forward here gives what
it computes and its way back, a function from the gradient of that to the gradient of x; adapters' gradients are added on the way.

Axes as in kernels.py. Kept for each token and layer: x before attention and before the MLP, rotated q, k, v, what attention gave,
gate and up; or, where memory asks for it, x before the layer alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from worker.training import kernels
from worker.training.attention import Documents, attend
from worker.training.linear import Projection
from worker.training.workspace import Kept, Workspace

Backward = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor, Kept], tuple[Tensor, Backward]]

_KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


class Decoder:
    """A whole decoder. `model` is transformers', with PEFT's layers in it or without."""

    def __init__(self, model: Any, *, is_checkpointing: bool = False) -> None:
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, Norm(model.norm)
        self._layers = [Layer(module) for module in model.layers]
        self._workspace = Workspace()
        self._is_checkpointing = is_checkpointing

    @torch.no_grad()
    def forward(
        self, rows_N: Tensor, *, tokens_T: Tensor, positions_T: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The last hidden states, normed, of the wanted rows only, [N, D]; and the way back from their gradient."""
        x_TD, kept = self._embed(tokens_T), self._workspace.open(tokens_T.device)
        documents, ways_back = self._documents(x_TD, positions_T, lengths), list[Backward]()
        for layer in self._layers:
            wanted_N = rows_N if layer is self._layers[-1] else None
            forward = partial(layer.forward, documents=documents, wanted_N=wanted_N)
            x_TD, way_back = self._checkpointed(forward, x_TD, kept) if self._is_checkpointing else forward(x_TD, kept)
            ways_back.append(way_back)
        hidden_ND, way_back = self._norm(x_TD)
        ways_back.append(way_back)

        @torch.no_grad()
        def backward(d_x_TD: Tensor, _held: Kept = kept) -> None:  # until then nobody else gets that memory
            while ways_back:
                d_x_TD = ways_back.pop()(d_x_TD)

        return hidden_ND, backward

    def _checkpointed(self, forward: Forward, x_TD: Tensor, kept: Kept) -> tuple[Tensor, Backward]:
        """x alone is kept, from which the backward computes the rest once more (arXiv:1604.06174)."""
        y_TD, _ = forward(x_TD, self._workspace.open(x_TD.device))

        def backward(d_y_TD: Tensor) -> Tensor:
            kept_again = self._workspace.open(x_TD.device)
            _, way_back = forward(x_TD, kept_again)
            return way_back(d_y_TD)

        return kept.empty(tuple(y_TD.shape), y_TD.dtype).copy_(y_TD), backward

    def _documents(self, x_TD: Tensor, positions_T: Tensor, lengths: Sequence[int]) -> Documents:
        cos_1TW, sin_1TW = self._rotary(x_TD.float()[None], positions_T[None])
        half = cos_1TW.shape[-1] // 2
        return Documents(tuple(lengths), cos_1TW[0, :, None, :half].contiguous(), sin_1TW[0, :, None, :half].contiguous())


class Layer:
    """Attention and MLP, with the adapter that is on them."""

    def __init__(self, module: Any) -> None:
        self._attention, self._mlp = Attention(module), Mlp(module)

    def forward(self, x_TD: Tensor, kept: Kept, *, documents: Documents, wanted_N: Tensor | None) -> tuple[Tensor, Backward]:
        """`wanted_N`: the only rows that anybody asks of the last layer; None for all."""
        attended_TD, attention_back = self._attention.forward(x_TD, documents, kept)
        if wanted_N is None:
            y_TD, mlp_back = self._mlp.forward(attended_TD, kept)
            return y_TD, lambda d_y_TD: attention_back(mlp_back(d_y_TD))
        y_ND, mlp_back = self._mlp.forward(attended_TD[wanted_N], kept)

        def backward(d_y_ND: Tensor) -> Tensor:
            return attention_back(torch.zeros_like(attended_TD).index_add_(0, wanted_N, mlp_back(d_y_ND)))

        return y_ND, backward


class Attention:
    """x + (norm → q, k, v → attention → o) of x."""

    def __init__(self, module: Any) -> None:
        attention = module.self_attn
        self._head_width: int = attention.head_dim
        self._norm = Norm(module.input_layernorm)
        self._head_norms = [Norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
        self._qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = Projection(attention.o_proj)

    def forward(self, x_TD: Tensor, documents: Documents, kept: Kept) -> tuple[Tensor, Backward]:
        normed_TD, inverse_T1 = self._norm.forward(x_TD)
        qkv_TO, qkv = self._qkv.forward(normed_TD, empty=x_TD.new_empty)
        (q_THW, q_back), (k_TKW, k_back) = map(self._normed_heads, self._head_norms, self._heads(qkv_TO)[:2])
        attended_TI, attention_back = attend(q_THW, k_TKW, self._heads(qkv_TO)[2], documents, kept)
        y_TD, out = self._out.forward(attended_TI, onto_TO=x_TD, empty=kept.empty)

        def backward(d_y_TD: Tensor) -> Tensor:
            d_attended_TI, learn = out.backward(d_y_TD)
            learn(attended_TI)
            d_qkv_TO = d_y_TD.new_empty((len(d_y_TD), sum(self._qkv.widths)))
            d_q_THW, d_k_TKW, d_v_TKW = self._heads(d_qkv_TO)
            attention_back(d_attended_TI, d_q_THW, d_k_TKW, d_v_TKW)
            q_back(d_q_THW)
            k_back(d_k_TKW)
            d_normed_TD, learn = qkv.backward(d_qkv_TO)
            normed_TD, d_x_TD = self._norm.backward(d_normed_TD, x_TD, inverse_T1, d_y_TD)
            learn(normed_TD)
            return d_x_TD

        return y_TD, backward

    def _heads(self, qkv_TO: Tensor) -> list[Tensor]:
        return [x.view(len(x), -1, self._head_width) for x in torch.split(qkv_TO, self._qkv.widths, dim=1)]

    @staticmethod
    def _normed_heads(norm: "Norm | None", x_THW: Tensor) -> tuple[Tensor, Callable[[Tensor], object]]:
        """With norms in heads, or as they are. The way back overwrites the gradient."""
        if norm is None:
            return x_THW, lambda _: None
        normed_THW, back = norm(x_THW)
        return normed_THW, lambda d_THW: d_THW.copy_(back(d_THW))


class Mlp:
    """x + (norm → gate, up → SwiGLU → down) of x."""

    def __init__(self, module: Any) -> None:
        self._norm = Norm(module.post_attention_layernorm)
        self._gate_up, self._down = Projection(module.mlp.gate_proj, module.mlp.up_proj), Projection(module.mlp.down_proj)

    def forward(self, x_TD: Tensor, kept: Kept) -> tuple[Tensor, Backward]:
        normed_TD, inverse_T1 = self._norm.forward(x_TD)
        gate_up_TO, gate_up = self._gate_up.forward(normed_TD, empty=kept.empty)
        y_TD, down = self._down.forward(kernels.swiglu(gate_up_TO), onto_TO=x_TD, empty=kept.empty)

        def backward(d_y_TD: Tensor) -> Tensor:
            d_active_TF, learn = down.backward(d_y_TD)
            d_gate_up_TO = torch.empty_like(gate_up_TO)
            active_TF = kernels.swiglu_backward(d_active_TF, gate_up_TO, *d_gate_up_TO.chunk(2, dim=1))
            learn(active_TF)
            d_normed_TD, learn = gate_up.backward(d_gate_up_TO)
            normed_TD, d_x_TD = self._norm.backward(d_normed_TD, x_TD, inverse_T1, d_y_TD)
            learn(normed_TD)
            return d_x_TD

        return y_TD, backward


class Norm:
    """RMSNorm of a module of transformers; its weight is frozen."""

    def __init__(self, module: Any) -> None:
        self._weight_D: Tensor = module.weight
        self._eps: float = module.variance_epsilon

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The normed rows, and one over each row's root mean square."""
        return kernels.rms_norm(x_TD, self._weight_D, self._eps)

    def backward(
        self, d_normed_TD: Tensor, x_TD: Tensor, inverse_T1: Tensor, d_residual_TD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The normed rows once more, and the gradient of x, added to `d_residual_TD`."""
        return kernels.rms_norm_backward(d_normed_TD, x_TD, inverse_T1, self._weight_D, d_residual_TD)

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Backward]:
        normed_TD, inverse_T1 = self.forward(x_TD)
        return normed_TD, lambda d_normed_TD: self.backward(d_normed_TD, x_TD, inverse_T1)[1]


def knows(model: Any, *, longest: int) -> bool:
    """Whether `Decoder` computes what this model of transformers does, for documents of up to so many tokens."""
    config = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        type(model).__name__ in _KNOWN
        and config.hidden_act == "silu"
        and (window is None or longest <= window)
        and not getattr(config, "attention_dropout", 0.0)
    )
