import torch
import torch.nn.functional as F

from resnet_bk.ops.loss import cross_entropy, shift_targets


def test_targets_are_the_next_tokens():
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    assert shift_targets(labels).tolist() == [[6, 7, -100], [-100, 9, -100]]


def test_the_loss_is_the_mean_over_real_targets():
    logits, targets = torch.randn(2, 3, 11), torch.tensor([[1, -100, 3], [4, 5, -100]])
    log_p = F.log_softmax(logits.double(), dim=-1)
    expected = -torch.stack([log_p[0, 0, 1], log_p[0, 2, 3], log_p[1, 0, 4], log_p[1, 1, 5]]).mean()
    assert torch.allclose(cross_entropy(logits, targets).double(), expected, rtol=1e-6)


def test_half_precision_logits_lose_nothing_in_the_loss():
    logits, targets = torch.randn(2, 3, 11).bfloat16(), torch.randint(11, (2, 3))
    assert cross_entropy(logits, targets).dtype == torch.float32
    assert torch.equal(cross_entropy(logits, targets), cross_entropy(logits.float(), targets))
