import pytest
import torch

from worker.training import loss
from worker.training.loss import NO_TARGET, labelled_loss


@pytest.mark.parametrize("logits_at_once", [1, 100, 10**6])
def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch, logits_at_once: int) -> None:
    monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(0)
    hidden_ND, head_VD, targets_N = torch.randn(13, 8, requires_grad=True), torch.randn(29, 8), torch.randint(29, (13,))
    expected = torch.nn.functional.cross_entropy(hidden_ND @ head_VD.T, targets_N, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, hidden_ND)

    gradient = torch.empty_like(hidden_ND)
    found = labelled_loss(hidden_ND.detach(), head_VD, targets_N, d_hidden_ND=gradient)

    torch.testing.assert_close(found.loss_sum, expected.detach())
    torch.testing.assert_close(gradient, expected_gradient)
    assert int(found.correct) == int(((hidden_ND @ head_VD.T).argmax(1) == targets_N).sum())


def test_without_gradients_it_is_the_same_loss() -> None:
    hidden_ND, head_VD, targets_N = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, NO_TARGET, 2])
    with_gradient = labelled_loss(hidden_ND, head_VD, targets_N, d_hidden_ND=torch.empty(3, 4))

    assert labelled_loss(hidden_ND, head_VD, targets_N) == with_gradient
