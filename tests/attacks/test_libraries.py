"""AutoAttack, torchattacks and foolbox through the Judge: example by example the libraries' own results."""

from __future__ import annotations

import contextlib
import logging
import random
import sys

import numpy as np
import pytest
import torch
from tests.conftest import refused
from torch import nn

from redoubt.attacks import AutoAttack, Foolbox, TorchAttacks
from redoubt.attacks import libraries as adapters
from redoubt.attacks.base import library_seed
from redoubt.errors import UserError
from redoubt.evaluation.suite import Suite
from redoubt.evaluation.verdicts import Judge, distances

pyautoattack = pytest.importorskip("pyautoattack")
torchattacks = pytest.importorskip("torchattacks")
foolbox = pytest.importorskip("foolbox")

CPU = torch.device("cpu")
EPS = {"linf": 0.02, "l2": 0.2}


class Net(nn.Module):
    """A small net with kinks, and gradients that are not those of a linear one."""

    format = torch.contiguous_format
    folded = staticmethod(contextlib.nullcontext)

    def __init__(self, k=5, size=8):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6 * ((size - 1) // 2) ** 2, k)
        self.requires_grad_(False)

    def logits(self, x):
        return 4 * self.fc(torch.relu(4 * self.conv(x - 0.5)).flatten(1))

    def forward(self, x):
        return self.logits(x)


def pictures(net, n, size=8):
    """Images and the labels that the net gives them, every fourth wrong."""
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 3, size, size), generator=g, dtype=torch.uint8)
    z = net.logits(images.float() / 255)
    labels = z.argmax(1)
    labels[::4] = (labels[::4] + 1) % z.shape[1]
    return images, labels


def judged(attack, k=5, n=7, chunk=3, norm="linf", seed=5, bounded=True, eps=None):
    """The Judge's verdicts, what the attack returned chunk by chunk, images, labels, the Judge."""
    net = Net(k)
    images, labels = pictures(net, n)
    returned = []

    class Watched(type(attack)):
        def __call__(self, logits, x, y, draws):
            found = super().__call__(logits, x, y, draws)
            returned.append((found[0] if isinstance(found, tuple) else found).detach().clone())
            return found

    attack.__class__ = Watched
    suite = Suite(attacks={"a": attack}, norm=norm, eps=EPS[norm] if eps is None else eps, bounded=bounded)
    judge = Judge(net, suite, chunk=chunk, seed=seed, device=CPU, progress=False)
    return judge(images, labels)["a"], returned, images, labels, judge


def chunks(images, labels, chunk):
    for number, start in enumerate(range(0, len(labels), chunk)):
        yield number, images[start : start + chunk].float() / 255, labels[start : start + chunk]


def seeded(seed, function):
    """As every chunk begins, then everything as it was."""
    with torch.random.fork_rng(devices=[]):
        states = random.getstate(), np.random.get_state()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        found = function()
        random.setstate(states[0])
        np.random.set_state(states[1])
    return found


# ---- AutoAttack -------------------------------------------------------------------------------------------------


def autoattack_by_hand(net, images, labels, k, chunk, norm, seed, prepare=lambda attack: None, **options):
    right, advs = [], []
    for number, x, y in chunks(images, labels, chunk):
        attack = pyautoattack.AutoAttack(
            net,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            eps=EPS[norm],
            seed=library_seed(seed, number),
            device="cpu",
            **options,
        )
        if k < 10:
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = k - 1
        prepare(attack)
        adv, label = seeded(0, lambda a=attack, x=x, y=y: a.run_standard_evaluation(x, y, batch_size=chunk))
        right.append(label == y)
        advs.append(adv)
    return torch.cat(right).numpy(), advs


@pytest.mark.parametrize(("k", "norm"), [pytest.param(5, "linf", marks=pytest.mark.slow), (10, "linf"), (10, "l2")])
def test_autoattack_standard_is_pyautoattack_on_each_chunk(k, norm):
    """With 10 classes nothing at all is set by hand but norm, eps and seed."""
    found, returned, images, labels, judge = judged(
        AutoAttack(eps=EPS[norm], norm=norm, queries=5000 if k == 10 else 150), k, norm=norm
    )
    prepare = (lambda a: None) if k == 10 else (lambda a: setattr(a.square, "n_queries", 150))
    wanted, advs = autoattack_by_hand(Net(k), images, labels, k, 3, norm, 5, prepare, version="standard")
    np.testing.assert_array_equal(found, wanted)
    assert [len(adv) for adv in returned] == [3, 3, 1]
    assert all(torch.equal(a, b) for a, b in zip(returned, advs, strict=True))
    assert (distances(torch.cat(advs), images.float() / 255, norm) > 0).any()
    assert judge.outside == {"natural": 0, "a": 0}


@pytest.mark.parametrize("k", [pytest.param(2, marks=pytest.mark.slow), 3, 5])
def test_a_list_of_attacks_has_one_start_each(k):
    attack = AutoAttack(eps=EPS["linf"], version=["apgd-ce", "square"], queries=40)
    assert attack.cost == 1800.0
    found, returned, images, labels, _ = judged(attack, k, n=6)

    def prepare(attack):
        attack.apgd.n_restarts, attack.square.n_queries = 1, 40

    wanted, advs = autoattack_by_hand(
        Net(k), images, labels, k, 3, "linf", 5, prepare, version="custom", attacks=["apgd-ce", "square"]
    )
    np.testing.assert_array_equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(returned, advs, strict=True))


#: What of a version runs on so many classes.
MEMBERS = {
    ("standard", 2): ["apgd-ce", "fab-t", "square"],
    ("standard", 3): ["apgd-ce", "apgd-dlr", "fab-t", "square"],
    ("standard", 4): ["apgd-ce", "apgd-t", "fab-t", "square"],
    ("standard", 100): ["apgd-ce", "apgd-t", "fab-t", "square"],
    ("plus", 2): ["apgd-ce", "fab", "square", "fab-t"],
    ("plus", 3): ["apgd-ce", "apgd-dlr", "fab", "square", "fab-t"],
    ("plus", 4): ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
    ("rand", 2): ["apgd-ce"],
    ("rand", 3): ["apgd-ce", "apgd-dlr"],
    ("fab-t", 2): ["fab-t"],
    ("fab", 3): ["fab"],
}


def test_every_member_that_is_defined_runs():
    for (version, k), members in MEMBERS.items():
        assert list(AutoAttack(eps=0.1, version=version).members(k)) == members, (version, k)
    assert AutoAttack(eps=0.1, version=["square", "apgd-t", "apgd-ce"]).members(3) == ("square", "apgd-ce")
    for version, k, least in (("apgd-dlr", 2, 3), ("apgd-t", 3, 4), (["apgd-t", "apgd-dlr"], 2, 3), ("square", 1, 2)):
        refused(
            lambda v=version, k=k: AutoAttack(eps=0.1, version=v).members(k), f"at least {least} classes", f"are {k}"
        )


def cascade_by_hand(k, images, labels, members):
    """One library object for each member, on what the earlier ones have left standing."""
    net, (_, x, y) = Net(k), next(chunks(images, labels, len(labels)))
    adv, standing = x.clone(), net.logits(x).argmax(1) == y
    for member in members:
        rows = standing.nonzero()[:, 0]
        if not len(rows):
            break
        attack = pyautoattack.AutoAttack(
            net, eps=EPS["linf"], seed=library_seed(5, 0), device="cpu", version="custom", attacks=[member]
        )
        attack.apgd.n_restarts = attack.fab.n_restarts = 1  # as in `standard`
        attack.fab.n_target_classes = attack.apgd_targeted.n_target_classes = min(9, k - 1)
        attack.square.n_queries = 60
        found, label = seeded(0, lambda a=attack, x=x[rows], y=y[rows]: a.run_standard_evaluation(x, y, batch_size=99))
        broken = rows[label != y[rows]]
        adv[broken], standing[broken] = found[label != y[rows]], False
    return standing.numpy(), adv


@pytest.mark.parametrize("k", [2, 3, *(pytest.param(k, marks=pytest.mark.slow) for k in (4, 5, 10))])
def test_standard_is_the_library_s_cascade_for_any_number_of_classes(k):
    found, [returned], images, labels, _ = judged(AutoAttack(eps=EPS["linf"], queries=60), k, n=6, chunk=6)
    wanted, adv = cascade_by_hand(k, images, labels, MEMBERS["standard", k if k < 4 else 4])
    np.testing.assert_array_equal(found, wanted)
    assert torch.equal(returned, adv)


ALONE = [("apgd-dlr", 3), ("fab", 2), ("fab-t", 3), ("fab-t", 5)]


@pytest.mark.parametrize(("version", "k"), [("fab-t", 2), *(pytest.param(*a, marks=pytest.mark.slow) for a in ALONE)])
def test_a_member_alone_is_the_library_s_alone(version, k):
    found, returned, images, labels, _ = judged(AutoAttack(eps=EPS["linf"], version=version), k, n=4, chunk=4)
    wanted, advs = autoattack_by_hand(Net(k), images, labels, k, 4, "linf", 5, version="custom", attacks=[version])
    np.testing.assert_array_equal(found, wanted)
    assert torch.equal(returned[0], advs[0])
    assert wanted.any()


def test_two_classes_with_vanishing_gradients_are_attacked_to_the_exact_value():
    """A linear net with huge logits: cross-entropy has no slope, and the ball's worst point is known."""
    w = torch.linspace(-1, 1, 3 * 16).reshape(1, -1)

    class Steep(Net):
        def __init__(self, k=2, size=4):
            nn.Module.__init__(self)
            self.fc = nn.Linear(48, 2, bias=False).requires_grad_(False)
            self.fc.weight.copy_(1e4 * torch.cat([-w, w]))

        def logits(self, x):
            return self.fc(x.flatten(1) - 0.5)

    g = torch.Generator().manual_seed(3)
    images = torch.randint(90, 166, (24, 3, 4, 4), generator=g, dtype=torch.uint8)
    score = ((images.double() / 255 - 0.5).flatten(1) @ w.double().T)[:, 0]
    labels = (score > 0).long()
    exact = score.abs() > EPS["linf"] * w.double().abs().sum()
    judge = [
        Judge(Steep(), Suite(attacks={"a": attack}, eps=EPS["linf"]), chunk=24, seed=0, device=CPU, progress=False)
        for attack in (AutoAttack(eps=EPS["linf"], queries=20), AutoAttack(eps=EPS["linf"], version="apgd-ce"))
    ]
    whole, weak = (j(images, labels)["a"] for j in judge)
    np.testing.assert_array_equal(whole, exact.numpy())
    assert 0 < whole.sum() < weak.sum()


@pytest.mark.parametrize(
    ("version", "k"),
    [
        ("apgd-dlr", 5),
        pytest.param("fab", 5, marks=pytest.mark.slow),
        (["apgd-t", "fab-t"], 5),
        pytest.param("rand", 3, marks=pytest.mark.slow),
        ("square", 5),
    ],
    ids=str,
)
def test_other_versions_run_within_the_ball(version, k):
    attack = AutoAttack(eps=EPS["linf"], version=version, queries=20)
    assert attack.needs_gradients is (version != "square")
    found, returned, images, labels, _ = judged(attack, k, n=4)
    clean = (Net(k).logits(images.float() / 255).argmax(1) == labels).numpy()
    assert not (found & ~clean).any()
    assert (distances(torch.cat(returned), images.float() / 255, "linf") <= EPS["linf"] + 1e-6).all()


def test_queries_are_square_s():
    few, many = (judged(AutoAttack(eps=EPS["linf"], version="square", queries=q), n=24, chunk=24)[0] for q in (2, 400))
    assert many.sum() < few.sum()


def test_another_seed_or_chunk_gives_other_examples():
    base, seed, chunk = (
        judged(AutoAttack(eps=EPS["linf"], version="square", queries=9), n=6, **kw)[1]
        for kw in ({}, {"seed": 6}, {"chunk": 6})
    )
    assert not torch.equal(torch.cat(base), torch.cat(seed))
    assert not torch.equal(torch.cat(base), torch.cat(chunk))


def test_warnings_come_once_and_the_loggers_are_restored(caplog, monkeypatch):
    monkeypatch.setattr(adapters._Once, "seen", set())
    flat = lambda self, x: self.fc(torch.relu(self.conv(x) * 0 - 1).flatten(1))  # noqa: E731
    monkeypatch.setattr(Net, "logits", flat)  # no slope anywhere, of which AutoAttack warns for each batch
    theirs = logging.getLogger("auto-attack")
    before = theirs.propagate, theirs.level, list(theirs.handlers)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            judged(AutoAttack(eps=EPS["linf"], version="apgd-dlr"), n=4, chunk=2)
    said = [r for r in caplog.records if "gradient" in r.getMessage()]
    assert len(said) == 1, [r.getMessage() for r in caplog.records]
    assert said[0].name == "redoubt"
    assert said[0].getMessage().startswith("AutoAttack: ")
    assert all(r.levelno >= logging.WARNING for r in caplog.records)
    assert (theirs.propagate, theirs.level, list(theirs.handlers)) == before


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"version": "standart"}, "did you mean standard"),
        ({"version": ["apgd-ce", "squared"]}, "did you mean square"),
        ({"version": []}, "names no attack"),
        ({"queries": 0}, "queries=0 must be a whole number of at least 1"),
        ({"eps": "x"}, "eps='x'"),
    ],
)
def test_what_autoattack_refuses(wrong, says):
    refused(lambda: AutoAttack(**{"eps": 0.1, **wrong}), says)


# ---- torchattacks -----------------------------------------------------------------------------------------------

#: Options that keep them short; alpha as we give it.
BOUNDED = {
    "FGSM": {},
    "PGD": {"steps": 4},
    "MIFGSM": {"steps": 4},
    "DIFGSM": {"steps": 4, "decay": 1.0},
    "TIFGSM": {"steps": 4},
    "NIFGSM": {"steps": 4},
    "VMIFGSM": {"steps": 3, "N": 2},
    "Square": {"n_queries": 30},
    "SPSA": {"nb_iter": 2, "nb_sample": 8},
}
FREE = {"CW": {"steps": 15, "c": 5.0, "lr": 0.02}, "Pixle": {"max_iterations": 3, "restarts": 3}}


def by_hand(name, images, labels, chunk=3, seed=5, **options):
    advs = []
    for number, x, y in chunks(images, labels, chunk):
        digits = library_seed(seed, number)
        own = {"seed": digits} if name in ("Square", "FAB", "APGD") else {}
        attack = getattr(torchattacks, name)(Net().eval(), **options, **own)
        advs.append(seeded(digits, lambda a=attack, x=x, y=y: a(x, y)))
    return torch.cat(advs)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bounded_class_of_torchattacks(name):
    attack = TorchAttacks(name=name, eps="5.1/255", options=BOUNDED[name])
    assert (attack.eps, attack.norm, attack.name) == (0.02, "linf", name.lower())
    assert attack.needs_gradients is (name not in ("Square", "SPSA"))
    found, returned, images, labels, judge = judged(attack, n=11)
    options = {"eps": 0.02, **BOUNDED[name]}
    if ("FGSM" in name and name != "FGSM") or name == "PGD":
        options["alpha"] = 0.005
    wanted = by_hand(name, images, labels, **options)
    assert torch.equal(torch.cat(returned), wanted)
    np.testing.assert_array_equal(found, (Net().logits(wanted).argmax(1) == labels).numpy())
    assert distances(wanted, images.float() / 255, "linf").max() <= 0.02 + 1e-6
    assert judge.outside["a"] == 0
    natural = (Net().logits(images.float() / 255).argmax(1) == labels).numpy()
    assert 0 < found.sum() <= natural.sum()
    if name != "SPSA":
        assert found.sum() < natural.sum()


@pytest.mark.parametrize("name", FREE)
def test_a_free_search_counts_within_the_ball_only(name):
    wide = judged(TorchAttacks(name=name, eps=0.02, options=FREE[name]), n=15, bounded=False)
    found, returned, images, labels, judge = wide
    adv, x = torch.cat(returned), images.float() / 255
    assert torch.equal(adv, by_hand(name, images, labels, **FREE[name]))
    all_count = (Net().logits(adv).argmax(1) == labels).numpy()
    np.testing.assert_array_equal(found, all_count)
    assert judge.outside["a"] == 0
    clean = (Net().logits(x).argmax(1) == labels).numpy()
    far = distances(adv, x, "linf")
    eps = float(far[torch.from_numpy(clean & ~all_count)].median()) + 1e-5  # half of what it breaks is within
    outside = (far > eps).numpy()
    attack = TorchAttacks(name=name, eps=eps, options=FREE[name])
    assert attack.eps is None
    found, _, _, _, judge = judged(attack, n=15, eps=eps)
    np.testing.assert_array_equal(found, np.where(outside, clean, all_count))
    assert judge.outside["a"] == outside.sum() > 0
    assert all_count.sum() < found.sum() < clean.sum()


def test_every_class_that_runs_keeps_its_bound_or_is_refused_in_one_line():
    """Whatever the class: a verdict under the rules of the suite, or one line."""
    kinds = vars(torchattacks)
    names = [n for n, c in kinds.items() if isinstance(c, type) and issubclass(c, torchattacks.attack.Attack)]
    ran, lines = [], []
    for name in sorted({*names} - {*TorchAttacks.REFUSED, "Attack", "SparseFool"}):
        takes = kinds[name].__init__.__code__.co_varnames
        options = {"steps": 2} if "steps" in takes else {"n_queries": 5} if "n_queries" in takes else {}
        try:
            judged(TorchAttacks(name=name, eps=0.02, options=options), n=4, chunk=4)
            ran.append(name)
        except UserError as error:
            lines.append(str(error))
    assert not any("\n" in line for line in lines)
    assert {*BOUNDED, *FREE, "APGD", "FAB", "DeepFool", "BIM", "EOTPGD", "Jitter", "UPGD", "SINIFGSM"} <= {*ran}


def test_alpha_norm_and_options_reach_the_class():
    assert TorchAttacks(name="PGD", eps=0.1).options == {"eps": 0.1, "alpha": 0.025}
    given = TorchAttacks(name="DIFGSM", eps="8/255", options={"alpha": "2/255", "steps": 7, "decay": 1.0})
    assert given.options == {"alpha": 2 / 255, "steps": 7, "decay": 1.0, "eps": 8 / 255}
    assert given.cost == 7
    made = given._made(Net(), CPU, 0)
    assert (made.alpha, made.steps, made.decay, made.eps) == (2 / 255, 7, 1.0, 8 / 255)
    assert TorchAttacks(name="APGD", eps=0.2, norm="l2").options["norm"] == "L2"
    assert TorchAttacks(name="PGDL2", eps=0.2, norm="l2").eps == 0.2
    refused(lambda: TorchAttacks(name="PGD", eps=0.2, norm="l2"), "bounded in Linf", "L2")
    assert TorchAttacks(name="PIFGSM", eps=0.2).options["max_epsilon"] == 0.2
    seeded_by_user = TorchAttacks(name="Square", eps=0.1, options={"seed": 3})
    assert seeded_by_user._made(Net(), CPU, 9).seed == 3
    assert TorchAttacks(name="Square", eps=0.1)._made(Net(), CPU, 9).seed == 9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "AutoAttack"}, ["AutoAttack", "attack=autoattack"]),
        ({"name": "MultiAttack"}, ["MultiAttack", "write a suite"]),
        ({"name": "LGV"}, ["LGV", "trains nets"]),
        ({"name": "VANILA"}, ["VANILA", "attacks nothing"]),
        ({"name": "DIFGMS"}, ["name='DIFGMS'", "did you mean DIFGSM", "There are APGD, APGDT, BIM, CW"]),
        ({"name": "Attack"}, ["name='Attack'"]),
        ({"name": "PGD", "options": {"step": 3}}, ["options.step ", "did you mean steps", "alpha"]),
        ({"name": "PGD", "options": {"eps": 0.5}}, ["options.eps", "attack.eps"]),
        ({"name": "PGD", "options": {"alpha": "2/0"}}, ["alpha='2/0'"]),
        ({"name": "PGD", "eps": "much"}, ["eps='much'"]),
    ],
    ids=str,
)
def test_what_torchattacks_refuses(options, says):
    refused(lambda: TorchAttacks(**{"eps": 0.1, **options}), *says)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TorchAttacks(name="PGD", eps=0.1, options={"steps": "abc"}),
        lambda: TorchAttacks(name="PGD", eps=0.1, options={"steps": None}),
        lambda: Foolbox(name="LinfPGD", eps=0.1, options={"steps": "abc"}),
        lambda: AutoAttack(eps=0.1, queries="many"),
        lambda: AutoAttack(eps=0.1, queries=1.5),
        lambda: AutoAttack(eps=0.1, version=None),
    ],
    ids=["torchattacks", "torchattacks, None", "foolbox", "queries", "half a query", "version"],
)
def test_numbers_that_are_none_are_one_line(make):
    refused(make)


def test_an_exception_of_the_library_is_one_line(monkeypatch):
    refused(lambda: judged(TorchAttacks(name="APGDT", eps=0.02), k=5), "torchattacks.APGDT failed", "IndexError")

    def ask_much(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torchattacks.PGD, "forward", ask_much)
    with pytest.raises(torch.OutOfMemoryError):  # that is not the library's fault, and has a line of its own
        judged(TorchAttacks(name="PGD", eps=0.02))
    monkeypatch.setattr(foolbox.attacks.LinfPGD, "run", lambda *a, **k: 1 / 0)
    refused(lambda: judged(Foolbox(name="LinfPGD", eps=0.02)), "foolbox.attacks.Linf", "failed", "ZeroDivisionError")


def test_a_search_that_ends_in_nan_has_found_nothing(monkeypatch):
    true = torchattacks.FGSM.forward
    monkeypatch.setattr(torchattacks.FGSM, "forward", lambda self, x, y: true(self, x, y) * float("nan"))
    found, returned, images, labels, _ = judged(TorchAttacks(name="FGSM", eps=0.02))
    assert torch.equal(torch.cat(returned), images.float() / 255)
    np.testing.assert_array_equal(found, (Net().logits(images.float() / 255).argmax(1) == labels).numpy())


# ---- foolbox ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm", "options"),
    [
        ("LinfPGD", "linf", {"steps": 20}),
        ("LinfDeepFoolAttack", "linf", {"steps": 10}),
        ("L2PGD", "l2", {"steps": 6}),
        ("L2DeepFoolAttack", "l2", None),
    ],
)
def test_a_class_of_foolbox(name, norm, options):
    eps = EPS[norm]
    attack = Foolbox(name=name, eps=eps, norm=norm, options=options)
    assert (attack.eps, attack.norm, attack.name) == (eps, norm, name.lower())
    found, returned, images, labels, judge = judged(attack, n=11, norm=norm)
    wanted = []
    for number, x, y in chunks(images, labels, 3):
        net = foolbox.PyTorchModel(Net().eval(), bounds=(0, 1), device="cpu")
        kind = getattr(foolbox.attacks, name)(**(options or {}))
        wanted.append(seeded(library_seed(5, number), lambda k=kind, n=net, x=x, y=y: k(n, x, y, epsilons=eps)[1]))
    wanted = torch.cat(wanted)
    assert torch.equal(torch.cat(returned), wanted)
    np.testing.assert_array_equal(found, (Net().logits(wanted).argmax(1) == labels).numpy())
    natural = (Net().logits(images.float() / 255).argmax(1) == labels).sum()
    assert 0 < found.sum() < natural
    assert distances(wanted, images.float() / 255, norm).max() <= eps + 1e-6
    assert judge.outside["a"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "LinfPGD", "norm": "l2"}, ["name=LinfPGD", "Linf", "suite l2"]),
        ({"name": "L2DeepFoolAttack"}, ["name=L2DeepFoolAttack", "L2", "of that norm"]),
        ({"name": "LinfPDG"}, ["name='LinfPDG'", "did you mean LinfPGD", "LinfDeepFoolAttack"]),
        ({"name": "LinfPGD", "options": {"stepz": 1}}, ["LinfPGD", "stepz"]),
        ({"name": "LinfPGD", "eps": "x"}, ["eps='x'"]),
    ],
    ids=str,
)
def test_what_foolbox_refuses(options, says):
    refused(lambda: Foolbox(**{"eps": 0.1, **options}), *says)


# ---- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "module", "by"),
    [
        (lambda: AutoAttack(eps=0.1), "pyautoattack", "pip install 'redoubt[attacks]'"),
        (lambda: TorchAttacks(name="PGD", eps=0.1), "torchattacks", "pip install --no-deps torchattacks==3.5.1"),
        (lambda: Foolbox(name="LinfPGD", eps=0.1), "foolbox", "pip install 'redoubt[foolbox]'"),
    ],
    ids=["pyautoattack", "torchattacks", "foolbox"],
)
def test_a_library_that_is_not_there(make, module, by, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    refused(make, f"{module} is not installed: {by}")


@pytest.mark.parametrize(
    "attack",
    [
        AutoAttack(eps=0.02, version=["apgd-ce", "square"], queries=5),
        TorchAttacks(name="PGD", eps=0.02, options={"steps": 1}),
        TorchAttacks(name="Pixle", eps=0.02, options=FREE["Pixle"]),
        Foolbox(name="LinfPGD", eps=0.02, options={"steps": 1}),
    ],
    ids=lambda a: getattr(a, "name", "autoattack"),
)
def test_nobody_s_random_numbers_are_touched(attack):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    net = Net()
    images, labels = pictures(net, 4)
    modes = net.training, net.conv.training
    torch.set_rng_state(before[0])
    Judge(net, Suite(attacks={"a": attack}, eps=0.02), chunk=3, seed=0, device=CPU, progress=False)(images, labels)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    for a, b in zip(before[2], np.random.get_state(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert modes == (net.training, net.conv.training)
    # And nothing outside decides what they find.
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    again = [Judge(Net(), Suite(attacks={"a": attack}, eps=0.02), chunk=3, seed=0, device=CPU, progress=False)
             for _ in range(2)]  # fmt: skip
    np.testing.assert_array_equal(*[j(images, labels)["a"] for j in again])
