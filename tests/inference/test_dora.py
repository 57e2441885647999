"""DoRA beside plain LoRA and the bare base in one forward, on a layer with a bias: each row as PEFT computes it."""

import copy

import peft
import torch
from torch import Tensor, nn

from worker.inference import lora
from worker.inference.lora import Blend, LoraWeights
from worker.inference.lora_layers import LoraLayers
from worker.model import adapter
from worker.model.adapter import AdapterWeights, Dora

INSIDE, OUTSIDE = 8, 6


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(INSIDE, OUTSIDE)

    def forward(self, x_1TI: Tensor) -> Tensor:
        found: Tensor = self.q_proj(x_1TI)
        return found


def tuned(base: Toy, *, rank: int, use_dora: bool) -> peft.PeftModel:
    """With nothing left at its beginning."""
    asked = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["q_proj"], use_dora=use_dora)
    model = peft.get_peft_model(copy.deepcopy(base), asked).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.rand_like(parameter))
    return model


def weights_of(model: peft.PeftModel) -> LoraWeights:
    layer = model.base_model.model.q_proj
    pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    norms = list(adapter.norms_of(model).values())  # of the one layer, or none
    dora = {"q_proj": Dora(layer.lora_magnitude_vector["default"].weight, norms[0])} if norms else {}
    held = AdapterWeights(len(pair[0]), layer.scaling["default"], {"q_proj": pair}, dora)
    return lora.prepare(held, dtype=torch.float32)


def layers_on(model: nn.Module) -> LoraLayers:
    return LoraLayers(model, torch.device("cpu"), dtype=torch.float32)


def only(weights: LoraWeights) -> Blend:
    return ((weights, 1.0),)


@torch.no_grad()
def test_rows_get_their_own_adapter_whatever_kind_the_others_have() -> None:
    torch.manual_seed(5)
    base = Toy().requires_grad_(False)
    models = [tuned(base, rank=2, use_dora=True), tuned(base, rank=4, use_dora=False), tuned(base, rank=2, use_dora=True)]
    first, second, third = (weights_of(model) for model in models)
    x_TI = torch.randn(12, INSIDE)
    expected = torch.cat([models[0](x_TI[:3]), base(x_TI[3:5]), models[1](x_TI[5:9]), models[2](x_TI[9:])])

    layers, alone = layers_on(base), copy.deepcopy(base)
    layers.use([(only(first), 3), ((), 2), (only(second), 4), (only(third), 3)])
    torch.testing.assert_close(base(x_TI[None])[0], expected)
    layers.use([(only(second), 12)])  # the shelf still has the gains of those that left
    torch.testing.assert_close(base(x_TI[None])[0], models[1](x_TI))
    layers.use([(only(first), 12)])
    torch.testing.assert_close(base(x_TI[None])[0], models[0](x_TI))
    layers.use([((), 12)])
    assert torch.equal(base(x_TI[None])[0], nn.functional.linear(x_TI, alone.q_proj.weight, alone.q_proj.bias))


@torch.no_grad()
def test_a_blend_adds_what_each_of_its_adapters_would_change_by_itself() -> None:
    torch.manual_seed(6)
    base = Toy().requires_grad_(False)
    models = [tuned(base, rank=2, use_dora=True), tuned(base, rank=4, use_dora=False)]
    first, second = (weights_of(model) for model in models)
    x_TI = torch.randn(7, INSIDE)
    plain = base(x_TI)
    changes = [model(x_TI) - plain for model in models]

    layers = layers_on(base)
    layers.use([(((first, 0.7), (second, -0.4)), 4), ((), 1), (only(second), 2)])
    expected = torch.cat([(plain + 0.7 * changes[0] - 0.4 * changes[1])[:4], plain[4:5], (plain + changes[1])[5:]])
    torch.testing.assert_close(base(x_TI[None])[0], expected)
