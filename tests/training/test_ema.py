"""Weight averaging against a NumPy recursion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.conftest import composed
from torch import nn

from redoubt.build import build_module
from redoubt.errors import UserError
from redoubt.training.ema import EMA


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def train(model, seed):
    """Moves parameters, statistics and the batch counter."""
    g = torch.Generator().manual_seed(seed)
    model.train()(torch.randn(8, 4, generator=g))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g))


def floats(model):
    return {k: v.detach().numpy().astype(np.float64) for k, v in model.state_dict().items() if v.is_floating_point()}


def copies(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9995])
def test_average_is_the_recursion(decay, warmup):
    model = net()
    ema, wanted = EMA(model, decay=decay, warmup=warmup), floats(model)
    for s in range(30):
        train(model, s)
        ema.update(s)
        d = min(decay, (s + 1) / (s + 10)) if warmup else decay
        wanted = {k: d * wanted[k] + (1 - d) * v for k, v in floats(model).items()}
    assert set(ema.average) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(ema.average[name].numpy(), value, rtol=1e-5, atol=1e-5)


def test_warmup_sequence_is_afd_s():
    """d = 0.1, 2/11, 3/12, 4/13, ...: read off an average of 0 and live weights of 1."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    ema, found = EMA(model, decay=0.999, warmup=True), []
    for s in range(5):
        nn.init.ones_(model.weight)
        before = ema.average["weight"].item()
        ema.update(s)
        found.append((1 - ema.average["weight"].item()) / (1 - before))
    assert found == pytest.approx([0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14], rel=1e-5)


def test_begins_as_a_copy():
    model = net()
    ema = EMA(model, decay=0.9)
    for name, value in floats(model).items():
        np.testing.assert_array_equal(ema.average[name].numpy(), value.astype(np.float32))
    train(model, 0)
    assert not np.allclose(ema.average["0.weight"].numpy(), floats(model)["0.weight"])


def test_update_leaves_the_live_net():
    model = net()
    ema = EMA(model, decay=0.9)
    train(model, 0)
    before = copies(model)
    ema.update(0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(t.requires_grad for t in ema.average.values())


@pytest.mark.parametrize("fails", [False, True])
def test_applied_swaps_and_restores_bit_for_bit(fails):
    model = net()
    ema = EMA(model, decay=0.7)
    for s in range(3):
        train(model, s)
        ema.update(s)
    live, average = copies(model), {k: v.clone() for k, v in ema.average.items()}
    identities = [id(p) for p in model.parameters()]
    try:
        with ema.applied():
            state = model.state_dict()
            assert all(torch.equal(state[k], v) for k, v in average.items())
            assert torch.equal(state["1.num_batches_tracked"], live["1.num_batches_tracked"])
            model.eval()(torch.ones(2, 4))
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert all(torch.equal(v, live[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in ema.average.items())
    assert identities == [id(p) for p in model.parameters()]


def test_training_goes_on_after_applied():
    """The optimizer's parameters are still the net's, and the average still follows them."""
    model = net()
    ema, optimizer = EMA(model, decay=0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    with ema.applied():
        pass
    before = copies(model)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[3].bias, before["3.bias"])
    ema.update(0)
    torch.testing.assert_close(ema.average["3.bias"], (before["3.bias"] + model[3].bias.detach()) / 2)


def test_load_restores_what_was_saved():
    model = net()
    ema = EMA(model, decay=0.7)
    train(model, 0)
    ema.update(0)
    saved = {k: v.clone() for k, v in ema.average.items()}
    fresh = EMA(net(1), decay=0.7)
    fresh.load(saved)
    assert all(torch.equal(fresh.average[k], v) for k, v in saved.items())
    fresh.update(0)
    assert all(torch.equal(saved[k], v) for k, v in ema.average.items()), "a copy, no view"


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match=r"ema\.decay"):
        EMA(net(), decay=decay)


def test_evaluated_state_is_a_nets_own():
    """``model.normalize``'s mean and std are averaged as any buffer, but are no part of a checkpoint."""
    module = build_module(composed("model=cnn_small", "model.widths=[2,2,2,2]", "data=digits", "ema=wa",
                                   "model.normalize=true"))  # fmt: skip
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    state = module.evaluated_state(checkpoint)
    assert state.keys() == checkpoint["state_dict"].keys()
    module.load_state_dict(state)
