"""attack_mode restores every flag, whatever the mixture and whatever happens inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from redoubt.nets import attack_mode
from redoubt.nets.small import ResNetSmall


def flags(net: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    modes = {name: m.training for name, m in net.named_modules()}
    return modes, {name: p.requires_grad for name, p in net.named_parameters()}


@pytest.fixture
def mixed() -> ResNetSmall:
    """A net in train mode with one BatchNorm kept in eval mode and one layer frozen."""
    net = ResNetSmall(num_classes=10).train()
    net.bn1.eval()
    net.layer2.eval()
    net.layer2[0].conv1.train()
    net.layer1.requires_grad_(False)
    return net


@pytest.mark.parametrize("train", [False, True])
def test_sets_and_restores(mixed, train):
    before = flags(mixed)
    with attack_mode(mixed, train=train):
        modes, learning = flags(mixed)
        assert set(modes.values()) == {train}
        assert not any(learning.values())
    assert flags(mixed) == before


def test_restores_after_an_exception(mixed):
    before = flags(mixed)
    with pytest.raises(RuntimeError, match="inside"), attack_mode(mixed):
        raise RuntimeError("inside")
    assert flags(mixed) == before


def test_nests(mixed):
    before = flags(mixed)
    with attack_mode(mixed, train=True):
        with attack_mode(mixed):
            assert not mixed.training
        assert set(flags(mixed)[0].values()) == {True}
        assert not any(flags(mixed)[1].values())
    assert flags(mixed) == before


def test_input_gradient_only_and_no_trace(mixed):
    """Crafting moves no buffer and leaves gradients as they were; a graph from before still works."""
    x = torch.rand(2, 3, 16, 16)
    clean = mixed(x).sum()
    state = {k: v.clone() for k, v in mixed.state_dict().items()}
    with attack_mode(mixed):
        adv = x.clone().requires_grad_()
        mixed(adv).sum().backward()
    assert adv.grad is not None
    assert adv.grad.abs().sum() > 0
    assert all(p.grad is None for p in mixed.parameters())
    assert all(torch.equal(v, state[k]) for k, v in mixed.state_dict().items())
    clean.backward()
    assert all((p.grad is not None) == p.requires_grad for p in mixed.parameters())
