"""Every objective against a naive NumPy float64 transcription of methods.md 1 to 4."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from redoubt.build import build_module
from redoubt.config import compose
from redoubt.errors import UserError
from redoubt.objectives import MART, PGDAT, TRADES, Standard
from redoubt.objectives.base import Objective, kl_per_example, margin, wrong_label

# ---- the oracle: NumPy, one example at a time ------------------------------------------------------------


def log_p(z):
    z = np.asarray(z, dtype=np.float64)
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def ce(z, y, s=0.0):
    k = len(z)
    target = np.full(k, s / k)
    target[y] += 1 - s
    return -(target * log_p(z)).sum()


def kl(z, z_other):
    lp, lq = log_p(z), log_p(z_other)
    return (np.exp(lp) * (lp - lq)).sum()


def naive_wrong(z, y):
    order = [k for k in np.argsort(-np.asarray(z), kind="stable") if k != y]
    return order[0]


def naive_standard(adv, y, clean, beta, s):
    return {"ce": np.mean([ce(a, t, s) for a, t in zip(adv, y, strict=True)])}


def naive_trades(adv, y, clean, beta, s):
    return {
        "ce": np.mean([ce(c, t, s) for c, t in zip(clean, y, strict=True)]),
        "kl": beta * np.mean([kl(c, a) for c, a in zip(clean, adv, strict=True)]),
    }


def naive_mart(adv, y, clean, beta, s):
    first, boost, weighted = [], [], []
    for a, t, c in zip(adv, y, clean, strict=True):
        p_adv, p_nat = np.exp(log_p(a)), np.exp(log_p(c))
        first.append(ce(a, t, s))
        boost.append(-np.log(1.0001 - p_adv[naive_wrong(a, t)] + 1e-12))
        entries = [p * (lp - np.log(q + 1e-12)) for p, lp, q in zip(p_nat, log_p(c), p_adv, strict=True)]
        weighted.append(sum(entries) * (1.0000001 - p_nat[t]))
    return {"ce": np.mean(first), "margin": np.mean(boost), "kl": beta * np.mean(weighted)}


CASES = {
    "standard": (lambda s: Standard(label_smoothing=s), naive_standard, 0.0),
    "at": (lambda s: PGDAT(label_smoothing=s), naive_standard, 0.0),
    "trades": (lambda s: TRADES(beta=6.0, label_smoothing=s), naive_trades, 6.0),
    "mart": (lambda s: MART(beta=5.0, label_smoothing=s), naive_mart, 5.0),
}
each_objective = pytest.mark.parametrize("name", list(CASES))


def draw(seed, k, dtype, scale=3.0, b=6):
    g = torch.Generator().manual_seed(seed)
    adv, clean = (scale * torch.randn(b, k, generator=g, dtype=torch.float64) for _ in range(2))
    y = torch.randint(k, (b,), generator=g)
    return adv.to(dtype), y, clean.to(dtype)


def compare(name, adv, y, clean, s=0.0, rtol=1e-6, atol=1e-6):
    make, naive, beta = CASES[name]
    terms = make(s).outer(adv, y, clean)
    wanted = naive(adv.double().numpy(), y.numpy(), clean.double().numpy(), beta, s)
    assert set(terms) == set(wanted)
    for key, value in wanted.items():
        assert terms[key].dim() == 0
        assert terms[key].dtype == adv.dtype
        np.testing.assert_allclose(terms[key].item(), value, rtol=rtol, atol=atol, err_msg=key)


# ---- outer -----------------------------------------------------------------------------------------------


@each_objective
@pytest.mark.parametrize("k", [2, 10, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outer_is_the_transcription(name, k, dtype, seed):
    compare(name, *draw(seed, k, dtype))


@each_objective
@pytest.mark.parametrize("s", [0.1, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outer_with_label_smoothing(name, s, dtype):
    compare(name, *draw(3, 10, dtype), s=s)


@each_objective
@pytest.mark.parametrize("scale", [30.0, 500.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outer_at_extreme_logits(name, scale, seed):
    compare(name, *draw(seed, 10, torch.float64, scale=scale))


@each_objective
@pytest.mark.parametrize("scale", [30.0, 500.0])
def test_outer_at_extreme_float32_logits(name, scale):
    # 1.0001 - p in float32 has 1.7e-4 of relative error at p = 1, in the authors' code too.
    compare(name, *draw(4, 10, torch.float32, scale=scale), rtol=1e-5, atol=3e-4)


@each_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_at_extreme_logits(name, dtype):
    adv, y, clean = draw(5, 10, dtype, scale=500.0)
    adv.requires_grad_()
    clean.requires_grad_()
    loss = sum(CASES[name][0](0.0).outer(adv, y, clean).values())
    for g in torch.autograd.grad(loss, [adv, clean], allow_unused=True):
        assert g is None or g.isfinite().all()


@each_objective
@pytest.mark.parametrize("s", [0.0, 0.3])
def test_gradient_is_that_of_numerical_differences(name, s):
    adv, y, clean = draw(6, 5, torch.float64, scale=1.5)
    objective = CASES[name][0](s)
    h = 1e-5
    for moved, kept in ((adv, clean), (clean, adv)):
        if moved is clean and not objective.needs_clean:
            continue

        def loss(z, moved=moved, kept=kept):
            pair = (z, kept) if moved is adv else (kept, z)
            return torch.stack(list(objective.outer(pair[0], y, pair[1]).values())).sum()

        z = moved.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z), z)
        for i in range(z.shape[0]):
            for j in range(z.shape[1]):
                e = torch.zeros_like(moved)
                e[i, j] = h
                slope = (loss(moved + e) - loss(moved - e)).item() / (2 * h)
                assert gradient[i, j].item() == pytest.approx(slope, abs=1e-8, rel=1e-6)


def test_flags_of_what_is_needed():
    assert not Standard.needs_clean
    assert not Standard.inner_needs_clean
    assert not PGDAT.needs_clean
    assert not PGDAT.inner_needs_clean
    assert TRADES.needs_clean
    assert TRADES.inner_needs_clean
    assert MART.needs_clean
    assert not MART.inner_needs_clean


# ---- inner -----------------------------------------------------------------------------------------------


@each_objective
@pytest.mark.parametrize("k", [2, 10, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_inner_per_example_and_never_smoothed(name, k, dtype, scale):
    adv, y, clean = draw(7, k, dtype, scale=scale)
    found = CASES[name][0](0.3).inner(adv, y, clean)
    a, c = adv.double().numpy(), clean.double().numpy()
    wanted = [kl(c[i], a[i]) if name == "trades" else ce(a[i], y[i].item()) for i in range(len(y))]
    assert found.shape == (len(y),)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)


# ---- TRADES ----------------------------------------------------------------------------------------------


def test_trades_gradient_flows_through_both_in_closed_form():
    adv, y, clean = draw(8, 7, torch.float64)
    b, beta = len(y), 6.0
    adv.requires_grad_()
    clean.requires_grad_()
    loss = sum(TRADES(beta=beta).outer(adv, y, clean).values())
    to_adv, to_clean = torch.autograd.grad(loss, [adv, clean])
    p, q = clean.detach().softmax(1), adv.detach().softmax(1)
    ratio = (p / q).log()
    onehot = torch.eye(7, dtype=torch.float64)[y]
    wanted = (p - onehot) / b + beta / b * p * (ratio - (p * ratio).sum(1, keepdim=True))
    torch.testing.assert_close(to_adv, beta / b * (q - p), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(to_clean, wanted, rtol=1e-9, atol=1e-12)


def test_trades_loss_is_cross_entropy_when_adv_is_clean():
    _, y, clean = draw(9, 10, torch.float64)
    terms = TRADES(beta=6.0).outer(clean, y, clean)
    assert terms["kl"].abs() < 1e-14
    assert terms["ce"].item() == pytest.approx(np.mean([ce(z, t) for z, t in zip(clean.numpy(), y, strict=True)]))


@pytest.mark.parametrize("objective", [TRADES, MART])
def test_beta_scales_the_kl_term_alone(objective):
    batch = draw(10, 10, torch.float64)
    one, three = objective(beta=1.0).outer(*batch), objective(beta=3.0).outer(*batch)
    for name in one:
        assert three[name].item() == pytest.approx((3 if name == "kl" else 1) * one[name].item(), rel=1e-12)


@pytest.mark.parametrize("objective", [TRADES, MART])
def test_negative_beta_is_refused(objective):
    with pytest.raises(UserError, match="beta"):
        objective(beta=-0.1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_only_two_clean_forwards_can_be_asked_for(count):
    assert TRADES().clean_forwards == 1
    assert TRADES(clean_forwards=2).clean_forwards == 2
    with pytest.raises(UserError, match=rf"base\.clean_forwards={count}: take 2"):
        TRADES(clean_forwards=count)


@pytest.mark.parametrize("base", ["standard", "at", "mart"])
@pytest.mark.parametrize("plus", ["", "+"])
def test_bases_without_a_second_clean_forward_refuse_it(base, plus):
    with pytest.raises(UserError, match=r"base\.clean_forwards") as error:
        build_module(compose([f"base={base}", "model=cnn_small", f"{plus}base.clean_forwards=2"]))
    assert "\n" not in str(error.value)


# ---- MART ------------------------------------------------------------------------------------------------


def test_mart_second_term_is_zero_where_adv_is_clean():
    _, y, clean = draw(11, 10, torch.float64)
    assert MART(beta=5.0).outer(clean, y, clean)["kl"].abs() < 1e-9


def test_mart_weight_is_not_detached():
    adv, y, clean = draw(12, 6, torch.float64)
    b, beta = len(y), 5.0
    clean.requires_grad_()
    (found,) = torch.autograd.grad(MART(beta=beta).outer(adv, y, clean)["kl"], clean)
    p, log_ratio = clean.detach().softmax(1), (clean.detach().softmax(1) / (adv.softmax(1) + 1e-12)).log()
    per = (p * log_ratio).sum(1, keepdim=True)
    p_y = p.gather(1, y[:, None])
    through_kl = (1.0000001 - p_y) * p * (log_ratio - per)
    through_weight = -per * p_y * (torch.eye(6, dtype=torch.float64)[y] - p)
    torch.testing.assert_close(found, beta / b * (through_kl + through_weight), rtol=1e-8, atol=1e-10)
    assert not torch.allclose(found, beta / b * through_kl, atol=1e-4)


# ---- shared functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 10, 200])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_wrong_label_is_never_y_and_the_prediction_where_it_is_wrong(k, scale):
    z, y, _ = draw(13, k, torch.float32, scale=scale, b=300)
    found = wrong_label(z, y)
    assert (found != y).all()
    assert not found.requires_grad
    missed = z.argmax(1) != y
    assert torch.equal(found[missed], z.argmax(1)[missed])
    chosen = z.gather(1, found[:, None])[:, 0]
    for i in range(len(y)):
        assert chosen[i] == max(z[i, j] for j in range(k) if j != y[i])


def test_margin_is_true_minus_best_other():
    z, y, _ = draw(14, 10, torch.float64, b=50)
    wanted = [z[i, y[i]] - max(z[i, j] for j in range(10) if j != y[i]) for i in range(50)]
    torch.testing.assert_close(margin(z, y), torch.stack(wanted))
    assert torch.equal(margin(z, y) < 0, z.argmax(1) != y)


def test_kl_is_zero_on_itself_and_positive_otherwise():
    a, _, c = draw(15, 10, torch.float64)
    assert kl_per_example(a, a).abs().max() < 1e-14
    assert (kl_per_example(c, a) > 0).all()


@pytest.mark.parametrize("s", [-0.1, 1.0, 2.0])
def test_label_smoothing_out_of_range_is_refused(s):
    with pytest.raises(UserError, match="label_smoothing"):
        PGDAT(label_smoothing=s)


def test_an_objective_without_outer_says_so():
    z, y, _ = draw(16, 3, torch.float32)
    with pytest.raises(TypeError, match="Objective"):
        Objective().outer(z, y)
