"""The forward of a Llama-shaped decoder, and its backward: what is kept between them is chosen by hand.

transformers' modules hold the weights; its own forward keeps, and goes over, several times as much. Axes as in kernels.py.
Kept for each token and layer: x before attention and before the MLP, rotated q, k, v, what attention gave, gate and up; or, where
memory asks for it, x before the layer alone, from which the backward computes the rest once more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worker.training import kernels
from worker.training.attention import Documents, attend
from worker.training.linear import Projection
from worker.training.workspace import Kept, Workspace

_KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


class Norm:
    """RMSNorm of a module of transformers; its weight is frozen."""

    def __init__(self, module: Any) -> None:
        self.weight_D: Tensor = module.weight
        self.eps: float = module.variance_epsilon

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.rms_norm(x_TD, self.weight_D, self.eps)

    def backward(self, d_normed_TD: Tensor, x_TD: Tensor, inverse_T1: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.rms_norm_backward(d_normed_TD, x_TD, inverse_T1, self.weight_D)

    def __call__(self, x_TD: Tensor) -> Tensor:
        normed: Tensor = _Normed.apply(x_TD, self)  # type: ignore[no-untyped-call]  # as torch has it, here and below
        return normed


class Layer:
    """One layer of the decoder, with the adapter that is on it."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._width: int = attention.head_dim
        self._before_attention, self._before_mlp = Norm(module.input_layernorm), Norm(module.post_attention_layernorm)
        self._head_norms = [Norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
        self._qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = Projection(attention.o_proj)
        self._gate_up, self._down = Projection(mlp.gate_proj, mlp.up_proj), Projection(mlp.down_proj)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        projections = (self._qkv, self._out, self._gate_up, self._down)
        return tuple(parameter for projection in projections for parameter in projection.parameters)

    def forward(self, x_TD: Tensor, documents: Documents, kept: Kept) -> Tensor:
        return self.mlp(self.attention(x_TD, documents, kept), kept)

    def attention(self, x_TD: Tensor, documents: Documents, kept: Kept) -> Tensor:
        q, k, v = _NormedProjection.apply(x_TD, self._before_attention, self._qkv, *self._qkv.parameters)  # type: ignore[no-untyped-call]
        q_THW, k_TKW, v_TKW = (x.view(len(x), -1, self._width) for x in (q, k, v))
        q_norm, k_norm = self._head_norms
        if q_norm and k_norm:
            q_THW, k_TKW = q_norm(q_THW), k_norm(k_TKW)
        attended = attend(q_THW, k_TKW, v_TKW, documents, kept)
        out: Tensor = _AddedProjection.apply(attended, x_TD, self._out, kept, *self._out.parameters)  # type: ignore[no-untyped-call]
        return out

    def mlp(self, x_TD: Tensor, kept: Kept) -> Tensor:
        parameters = (*self._gate_up.parameters, *self._down.parameters)
        out: Tensor = _AddedMlp.apply(x_TD, self._before_mlp, self._gate_up, self._down, kept, *parameters)  # type: ignore[no-untyped-call]
        return out


class Decoder:
    """A whole decoder. `model` is transformers', with PEFT's layers in it or without.

    `is_checkpointing` keeps about a tenth, for half as much work again, and changes no bit of what comes out.
    """

    def __init__(self, model: Any, *, is_checkpointing: bool = False) -> None:
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, Norm(model.norm)
        self._layers = [Layer(module) for module in model.layers]
        self._workspace, self._is_checkpointing = Workspace(), is_checkpointing

    def hidden_at(self, rows_N: Tensor, *, tokens_T: Tensor, positions_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """The last hidden states, normed, of the wanted rows only: [N, D]."""
        x_TD, kept = self._embed(tokens_T), self._workspace.open(tokens_T.device)
        cos_1TW, sin_1TW = self._rotary(x_TD.float()[None], positions_T[None])
        half = cos_1TW.shape[-1] // 2
        documents = Documents(tuple(lengths), cos_1TW[0, :, None, :half].contiguous(), sin_1TW[0, :, None, :half].contiguous())
        *layers, last = self._layers  # the backward begins with the last: there is nothing to gain by computing it twice
        for layer in layers:
            if self._is_checkpointing:
                x_TD = _Recomputed.apply(x_TD, layer, documents, kept, self._workspace, *layer.parameters)  # type: ignore[no-untyped-call]
            else:
                x_TD = layer.forward(x_TD, documents, kept)
        return self._norm(last.mlp(last.attention(x_TD, documents, kept)[rows_N], kept))


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


class _Recomputed(torch.autograd.Function):
    """A layer of which x alone is kept; what its backward needs is computed once more (checkpointing, arXiv:1604.06174)."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, layer: Layer, documents: Documents, kept: Kept, workspace: Workspace, *_: Tensor
    ) -> Tensor:
        ctx.layer, ctx.documents, ctx.kept, ctx.workspace = layer, documents, kept, workspace
        ctx.save_for_backward(x_TD)
        passing = workspace.open(x_TD.device)  # holds what comes out too, so that it is copied before that goes back
        return kept.empty(tuple(x_TD.shape), dtype=x_TD.dtype).copy_(layer.forward(x_TD, documents, passing))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD,), ctx.kept = ctx.saved_tensors, None
        with torch.enable_grad():
            x_TD = x_TD.detach().requires_grad_()
            out_TD = ctx.layer.forward(x_TD, ctx.documents, ctx.workspace.open(x_TD.device))
        d_x_TD, *d_parameters = torch.autograd.grad(out_TD, [x_TD, *ctx.layer.parameters], gradients[0])
        return d_x_TD, None, None, None, None, *d_parameters


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, norm: Norm) -> Tensor:
        normed_TD, inverse_T1 = norm.forward(x_TD)
        ctx.norm = norm
        ctx.save_for_backward(x_TD, inverse_T1)
        return normed_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.norm.backward(gradients[0], *ctx.saved_tensors)[1], None


class _NormedProjection(torch.autograd.Function):
    """x → norm → q, k, v. Parameters are arguments only so that torch knows them; the projection holds the same."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, norm: Norm, projection: Projection, *_: Tensor) -> tuple[Tensor, ...]:
        normed_TD, inverse_T1 = norm.forward(x_TD)
        outputs = projection.outputs(normed_TD, x_TD.new_empty)
        low_TR = projection.forward(normed_TD, outputs=outputs)
        ctx.norm, ctx.projection = norm, projection
        ctx.save_for_backward(x_TD, inverse_T1, low_TR)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, inverse_T1, low_TR = ctx.saved_tensors
        d_normed_TD, d_low_TR = ctx.projection.backward(d_outputs, low_TR)
        normed_TD, d_x_TD = ctx.norm.backward(d_normed_TD, x_TD, inverse_T1)
        return d_x_TD, None, None, *ctx.projection.gradients(d_outputs, d_low_TR, normed_TD, low_TR)


class _AddedProjection(torch.autograd.Function):
    """residual + x → o."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, residual_TD: Tensor, projection: Projection, kept: Kept, *_: Tensor) -> Tensor:
        (out_TD,) = outputs = projection.outputs(x_TI, kept.empty)
        low_TR = projection.forward(x_TI, onto_TO=residual_TD, outputs=outputs)
        ctx.projection, ctx.kept = projection, kept
        ctx.save_for_backward(x_TI, low_TR)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_TR = ctx.saved_tensors
        ctx.kept = None
        d_x_TI, d_low_TR = ctx.projection.backward(d_outputs, low_TR)
        return d_x_TI, d_outputs[0], None, None, *ctx.projection.gradients(d_outputs, d_low_TR, x_TI, low_TR)


class _AddedMlp(torch.autograd.Function):
    """x + (norm → gate, up → SwiGLU → down) of x."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, norm: Norm, gate_up: Projection, down: Projection, kept: Kept, *_: Tensor) -> Tensor:
        normed_TD, inverse_T1 = norm.forward(x_TD)
        gate_TF, up_TF = outputs = gate_up.outputs(normed_TD, kept.empty)
        low_TR = gate_up.forward(normed_TD, outputs=outputs)
        active_TF = kernels.swiglu(gate_TF, up_TF)
        (out_TD,) = outputs = down.outputs(active_TF, kept.empty)
        down_low_TR = down.forward(active_TF, onto_TO=x_TD, outputs=outputs)
        ctx.norm, ctx.gate_up, ctx.down, ctx.kept = norm, gate_up, down, kept
        ctx.save_for_backward(x_TD, inverse_T1, gate_TF, up_TF, low_TR, down_low_TR)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, inverse_T1, gate_TF, up_TF, low_TR, down_low_TR = ctx.saved_tensors
        ctx.kept = None
        d_active_TF, d_down_low_TR = ctx.down.backward(d_outputs, down_low_TR)
        active_TF, *d_gate_up = kernels.swiglu_backward(d_active_TF, gate_TF, up_TF)
        of_down = ctx.down.gradients(d_outputs, d_down_low_TR, active_TF, down_low_TR)
        d_normed_TD, d_low_TR = ctx.gate_up.backward(d_gate_up, low_TR)
        normed_TD, d_x_TD = ctx.norm.backward(d_normed_TD, x_TD, inverse_T1)
        of_gate_up = ctx.gate_up.gradients(d_gate_up, d_low_TR, normed_TD, low_TR)
        return d_x_TD.add_(d_outputs[0]), None, None, None, None, *of_gate_up, *of_down
