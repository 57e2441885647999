import pytest
import torch

from worker.training import loss
from worker.training.loss import NO_TARGET, token_losses


@pytest.mark.parametrize("logits_at_once", [1, 100, 10**6])
def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch, logits_at_once: int) -> None:
    monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(0)
    hidden_ND, head_VD, targets_N = torch.randn(13, 8, requires_grad=True), torch.randn(29, 8), torch.randint(29, (13,))
    expected_N = torch.nn.functional.cross_entropy(hidden_ND @ head_VD.T, targets_N, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected_N.sum(), hidden_ND)

    gradient = torch.empty_like(hidden_ND)
    losses_N, is_first_N = token_losses(hidden_ND.detach(), head_VD, targets_N, d_hidden_ND=gradient)

    torch.testing.assert_close(losses_N, expected_N.detach())
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(is_first_N, (hidden_ND @ head_VD.T).argmax(1) == targets_N)


def test_without_gradients_it_is_the_same_loss() -> None:
    hidden_ND, head_VD, targets_N = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, NO_TARGET, 2])
    with_gradient = token_losses(hidden_ND, head_VD, targets_N, d_hidden_ND=torch.empty(3, 4))

    for without, expected in zip(token_losses(hidden_ND, head_VD, targets_N), with_gradient, strict=True):
        assert torch.equal(without, expected)
