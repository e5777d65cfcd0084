"""Every file of conf/attack: its suite can be built, states its paper's numbers, and each option has an effect."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tests import conftest

from redoubt import config
from redoubt.attacks import AutoAttack, MultiTargeted, NAttack, TorchAttacks, WhiteBox
from redoubt.attacks.base import Draws
from redoubt.attacks.corruptions import GROUPS, KINDS
from redoubt.errors import UserError
from redoubt.evaluation.suite import suite
from redoubt.runs.identity import canonical

pytest.importorskip("pyautoattack")
pytest.importorskip("torchattacks")
pytest.importorskip("foolbox")

CONF = Path(config.config_dir()) / "attack"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))


@functools.cache
def built(name, *options):
    return suite(config.resolved(conftest.composed(f"attack={name}", *options))["attack"])


#: (names in the order of the table, ensemble, stochastic, names on the source)
KNOWN = {
    "afd_suite": (["pgd20", "autoattack"], True, False, []),
    "autoattack": (["autoattack"], False, False, []),
    "blackbox": (
        ["transfer_pgd", "transfer_mi", "transfer_di", "transfer_ti", "square", "nattack"],
        True,
        False,
        ["transfer_pgd", "transfer_mi", "transfer_di", "transfer_ti"],
    ),
    "corruptions": ([f"{kind}_{s}" for kind in KINDS for s in (1, 2, 3, 4, 5)], False, False, []),
    "cure_suite": (["pgd10", "pgd20", "pgd50", "cw", "autoattack"], True, False, []),
    "eot": (["pgd_eot", "cw_eot", "autoattack"], True, True, []),
    "fgsm": (["fgsm"], False, False, []),
    "foolbox": (["foolbox_linfpgd"], False, False, []),
    "fsr_suite": (["fgsm", "pgd20", "pgd100", "cw"], True, False, []),
    "multitargeted": (["multitargeted"], False, False, []),
    "nattack": (["nattack"], False, False, []),
    "none": ([], False, False, []),
    "pgd": (["pgd"], False, False, []),
    "pgd20": (["pgd20"], False, False, []),
    "square": (["square"], False, False, []),
    "standard": (["pgd50", "cw50", "autoattack"], True, False, []),
    "torchattacks": (["torchattacks_pgd"], False, False, []),
}


def test_every_file_is_known_here():
    assert sorted(KNOWN) == NAMES
    assert len(KINDS) == 17


@pytest.mark.parametrize("name", NAMES)
def test_composes_and_builds(name):
    made = built(name)
    names, ensemble, stochastic, on_source = KNOWN[name]
    assert list(made.attacks) == names
    assert (made.ensemble, made.stochastic, sorted(made.on_source)) == (ensemble, stochastic, sorted(on_source))
    assert made.bounded is (name != "corruptions")
    assert made.norm == "linf"
    assert list(made.sections) == names
    assert len({str(section) for section in made.sections.values()}) == len(names)
    if name == "corruptions":
        assert made.eps is None
        assert {g: len(n) for g, n in made.groups.items()} in ({}, {g: 5 * len(k) for g, k in GROUPS.items()})
        return
    assert made.eps == 8 / 255
    for attack in made.attacks.values():
        assert (attack.norm, attack.eps) == ("linf", 8 / 255)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("corruptions", "none")])
def test_eps_and_norm_reach_every_attack(name):
    extra = ["attack.name=L2PGD"] if name == "foolbox" else ["attack.name=PGDL2"] if name == "torchattacks" else []
    if name == "blackbox":  # MI-, DI- and TI-FGSM are of linf
        extra = [f"attack.attacks.transfer_{k}.name=PGDL2" for k in ("mi", "di", "ti")] + ["attack.options={steps: 20}"]
    for options, norm, eps in (
        (["attack.eps=0.05"], "linf", 0.05),
        (["attack.eps=4/255"], "linf", 4 / 255),
        (["threat.eps=0.031"], "linf", 0.031),
        (["threat=l2", *extra], "l2", 0.5),
    ):
        made = built(name, *options)
        assert (made.norm, made.eps) == (norm, eps)
        for key, attack in made.attacks.items():
            assert (attack.norm, attack.eps) == (norm, eps), key
            if isinstance(attack, WhiteBox):
                assert (attack.pgd.norm, attack.pgd.eps) == (norm, eps)
        # and what names the stored verdicts changes with it
        assert made.sections != built(name).sections


# ---- the papers' protocols (methods F.8, 7.8, 8.6) -----------------------------------------------------------------

#: name: (loss, steps, size of a step, start)
EPS = 8 / 255
PROTOCOLS = {
    "fsr_suite": {
        "fgsm": ("ce", 1, EPS, "none"),
        "pgd20": ("ce", 20, EPS / 10, "none"),
        "pgd100": ("ce", 100, EPS / 10, "none"),
        "cw": ("margin", 30, EPS / 10, "none"),
    },
    "afd_suite": {"pgd20": ("ce", 20, 0.003, "uniform")},
    "cure_suite": {
        "pgd10": ("ce", 10, 0.003, "uniform"),
        "pgd20": ("ce", 20, 0.003, "uniform"),
        "pgd50": ("ce", 50, 0.003, "uniform"),
        "cw": ("margin", 20, 0.003, "uniform"),
    },
    "standard": {"pgd50": ("ce", 50, EPS / 10, "uniform"), "cw50": ("margin", 50, EPS / 10, "uniform")},
    "fgsm": {"fgsm": ("ce", 1, EPS, "none")},
    "pgd20": {"pgd20": ("ce", 20, EPS / 10, "none")},
    "eot": {"pgd_eot": ("ce", 50, EPS / 10, "uniform"), "cw_eot": ("margin", 50, EPS / 10, "uniform")},
    "blackbox": {"transfer_pgd": ("ce", 20, EPS / 10, "none")},
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_are_the_papers(name):
    made = built(name)
    white = {n: a for n, a in made.attacks.items() if isinstance(a, WhiteBox)}
    assert list(white) == list(PROTOCOLS[name])
    for key, (loss, steps, size, start) in PROTOCOLS[name].items():
        attack = white[key]
        assert (attack.loss, attack.steps, attack.pgd.start) == (loss, steps, start), key
        assert attack.pgd.step_size == pytest.approx(size, rel=1e-12), key
        assert attack.kappa == 50.0
        assert attack.pgd.clip_start is (name not in ("afd_suite", "cure_suite")), key
        restarts, best, eot = (5, True, 1) if name == "standard" else (1, False, 20 if name == "eot" else 1)
        assert (attack.restarts, attack.keep_best, attack.eot) == (restarts, best, eot), key
    for attack in made.attacks.values():
        if isinstance(attack, AutoAttack) and name != "blackbox":
            assert attack.version == ("rand" if name == "eot" else "standard")
            assert attack.queries == 5000


@pytest.mark.parametrize("name", ["afd_suite", "cure_suite"])
def test_a_printed_step_is_scaled_to_another_eps(name):
    made = built(name, "attack.eps=4/255")
    assert made.attacks["pgd20"].pgd.step_size == pytest.approx(0.0015, rel=1e-12)
    given = built("cure_suite", "attack.step_abs={size: 0.002, eps: 8/255}")
    assert given.attacks["cw"].pgd.step_size == pytest.approx(0.002, rel=1e-12)


@pytest.mark.parametrize("key", ["pgd10", "pgd20", "pgd50", "cw"])
def test_cure_s_attacks_are_those_of_its_authors(key):
    """Transcribed in NumPy, float64: the start leaves [0, 1], and the first gradient is taken there."""
    rng = np.random.default_rng(1)
    w, v = rng.normal(size=(80, 48)), rng.normal(size=(4, 80))
    x = np.clip(rng.normal(0.5, 2.0, size=(6, 48)), 0, 1)  # many pixels at their bounds
    y, rows = rng.integers(0, 4, 6), np.arange(6)
    eps = 8 / 255

    def gradient(p):
        h = p @ w.T - w.sum(1) / 2
        z = np.maximum(h, 0) @ v.T
        if key == "cw":
            others = z.copy()
            others[rows, y] = -np.inf
            slope = np.zeros_like(z)
            slope[rows, y], slope[rows, others.argmax(1)] = -1, 1
            slope *= (z[rows, y] - others.max(1) + 50 > 0)[:, None]
        else:
            slope = np.exp(z - z.max(1, keepdims=True))
            slope /= slope.sum(1, keepdims=True)
            slope[rows, y] -= 1
        return ((slope @ v) * (h > 0)) @ w

    def ascended(clip):
        u = torch.rand(6, 3, 4, 4, dtype=torch.float64, generator=Draws(3, key).generator(0)).numpy().reshape(6, 48)
        p = x + eps * (2 * u - 1)
        p = np.clip(p, 0, 1) if clip else p
        for _ in range(20 if key == "cw" else int(key[3:])):
            p = p + 0.003 * np.sign(gradient(p))
            p = np.clip(np.clip(p - x, -eps, eps) + x, 0, 1)
        return p

    def logits(images):
        h = (images.flatten(1) - 0.5) @ torch.from_numpy(w).T
        return torch.relu(h) @ torch.from_numpy(v).T

    images = torch.from_numpy(x).reshape(6, 3, 4, 4)
    found = built("cure_suite").attacks[key](logits, images, torch.from_numpy(y), Draws(3, key))
    np.testing.assert_allclose(found.numpy().reshape(6, 48), ascended(clip=False), rtol=0, atol=1e-12)
    assert not np.allclose(ascended(clip=True), ascended(clip=False), atol=1e-4)


def test_members_are_a_part_of_an_identity_only_where_more_run_than_in_the_first_version():
    """Verdicts on 2 and 3 classes are others than they were; all others are found again."""
    for name in NAMES:
        made = built(name)
        for classes in (2, 3, 4, 10, 100):
            on, more = made.on_classes(classes), {}
            if "autoattack" in made.attacks and classes < 4:
                more = made.members(classes)
                more.pop("square", None)
            more = {} if (name, classes) == ("eot", 2) else more  # apgd-ce alone, as ever
            assert on.more_members == more, (name, classes)
            assert (canonical(on.sections) == canonical(made.sections)) is not bool(more)
    assert built("standard").on_classes(3).more_members == {"autoattack": ["apgd-ce", "apgd-dlr", "fab-t", "square"]}


def test_fsr_s_attacks_share_a_path():
    attacks = built("fsr_suite").attacks
    assert attacks["pgd20"].path == attacks["pgd100"].path is not None
    assert len({attacks[n].path for n in ("fgsm", "pgd20", "cw")}) == 3
    assert built("pgd20").sections["pgd20"] == built("fsr_suite").sections["pgd20"]  # so that each finds the other's
    assert built("fgsm").sections["fgsm"] == built("fsr_suite").sections["fgsm"]


def test_blackbox_never_sees_a_gradient_of_the_judged_net():
    made = built("blackbox")
    for name, attack in made.attacks.items():
        assert name in made.on_source or not attack.needs_gradients, name
        if isinstance(attack, TorchAttacks):
            assert attack.options["decay"] == 1.0
            assert attack.options["steps"] == 20
            assert attack.options["alpha"] == pytest.approx(2 / 255)
    assert made.attacks["square"].version == ["square"]
    assert [made.attacks[f"transfer_{k}"].kind.__name__ for k in ("mi", "di", "ti")] == ["MIFGSM", "DIFGSM", "TIFGSM"]


# ---- options ----------------------------------------------------------------------------------------------------


def field(name, *path):
    def read(made):
        value = made.attacks[name]
        for part in path:
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        return value

    return read


def of_suite(name):
    return lambda made: getattr(made, name)


#: attack: {option: (value, what it decides, what that then is)}
OPTIONS = {
    "pgd": {
        "stochastic": ("true", of_suite("stochastic"), True),
        "loss": ("dlr", field("pgd", "loss"), "dlr"),
        "kappa": ("0.5", field("pgd", "kappa"), 0.5),
        "steps": ("7", field("pgd", "steps"), 7),
        "step": ("0.2", field("pgd", "pgd", "step_size"), 0.2 * EPS),
        "step_abs": ("1/255", field("pgd", "pgd", "step_size"), 1 / 255),
        "start": ("normal", field("pgd", "pgd", "start"), "normal"),
        "restarts": ("3", field("pgd", "restarts"), 3),
        "eot": ("4", field("pgd", "eot"), 4),
        "keep_best": ("false", field("pgd", "keep_best"), False),
    },
    "autoattack": {
        "stochastic": ("true", of_suite("stochastic"), True),
        "version": ("[apgd-ce,square]", field("autoattack", "version"), ["apgd-ce", "square"]),
        "queries": ("17", field("autoattack", "queries"), 17),
    },
    "multitargeted": {
        "targets": ("3", field("multitargeted", "targets"), 3),
        "steps": ("7", field("multitargeted", "steps"), 7),
        "step": ("0.2", field("multitargeted", "pgd", "step_size"), 0.2 * EPS),
        "restarts": ("3", field("multitargeted", "restarts"), 3),
    },
    "square": {"queries": ("17", field("square", "queries"), 17)},
    "nattack": {"queries": ("17", field("nattack", "queries"), 17)},
    "torchattacks": {
        "bounded": ("false", of_suite("bounded"), False),
        "name": ("DIFGSM", lambda made: list(made.attacks), ["torchattacks_difgsm"]),
        "options": ("{steps: 3}", field("torchattacks_pgd", "options", "steps"), 3),
    },
    "foolbox": {
        "name": ("LinfDeepFoolAttack", lambda made: list(made.attacks), ["foolbox_linfdeepfoolattack"]),
        "options": ("{steps: 3}", field("foolbox_linfpgd", "options"), {"steps": 3}),
    },
    "blackbox": {
        "options": ("{steps: 3}", field("transfer_di", "options", "steps"), 3),
        "queries": ("17", lambda made: (made.attacks["square"].queries, made.attacks["nattack"].queries), (17, 17)),
    },
    "corruptions": {
        "bounded": ("true", of_suite("bounded"), True),
        "kinds": ("[fog,frost]", lambda made: len(made.attacks), 10),
        "severities": ("[2]", lambda made: len(made.attacks), 17),
    },
    "eot": {
        "stochastic": ("false", of_suite("stochastic"), False),
        "eot": ("3", lambda made: (made.attacks["pgd_eot"].eot, made.attacks["cw_eot"].eot), (3, 3)),
    },
    "cure_suite": {"step_abs": ("0.001", field("cw", "pgd", "step_size"), 0.001)},
}
CASES = [(name, option) for name, options in OPTIONS.items() for option in options]


@pytest.mark.parametrize(("name", "option"), CASES, ids=[f"{n}.{o}" for n, o in CASES])
def test_every_option_has_its_effect(name, option):
    value, read, wanted = OPTIONS[name][option]
    made = built(name, f"attack.{option}={value}")
    found = read(made)
    assert found == (pytest.approx(wanted, rel=1e-12) if isinstance(wanted, float) else wanted)
    if option not in ("name",) and (name, option) not in (("torchattacks", "options"), ("blackbox", "options")):
        assert read(built(name)) != found


@pytest.mark.parametrize("name", NAMES)
def test_no_option_is_forgotten_here(name):
    keys = set(yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    elsewhere = {"norm", "eps", "ensemble", "attacks", *(["source"] if name == "blackbox" else [])}
    assert keys - elsewhere == set(OPTIONS.get(name, {}))  # source: tests/evaluation/test_scoring.py


@pytest.mark.parametrize("name", [n for n in NAMES if n != "none"])
def test_ensemble_can_be_switched(name):
    flipped = str(not KNOWN[name][1]).lower()
    assert built(name, f"attack.ensemble={flipped}").ensemble is (not KNOWN[name][1])


class Counted:
    """A linear net that counts how often it was asked."""

    def __init__(self):
        torch.manual_seed(0)
        self.w = torch.randn(48, 10)
        self.calls = self.images = 0

    def __call__(self, x):
        self.calls, self.images = self.calls + 1, self.images + len(x)
        return x.flatten(1) @ self.w


def found_by(name, *options, n=6):
    net = Counted()
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    net.calls = net.images = 0
    (attack,) = built(name, *options).attacks.values()
    found = attack(net, x, y, Draws(0, name, 0, torch.device("cpu")))
    return (found[0] if isinstance(found, tuple) else found).detach(), net


@pytest.mark.parametrize(
    ("option", "base"),
    [
        ("loss=kl", ["keep_best=false"]), ("loss=margin", ["keep_best=false", "kappa=0", "eps=0.3"]),
        ("kappa=0", ["keep_best=false", "loss=margin", "eps=0.3"]), ("steps=3", []), ("step=0.3", []),
        ("step_abs=0.01", []), ("start=normal", []), ("restarts=2", ["eps=0.001"]), ("keep_best=false", []),
    ],
)  # fmt: skip
def test_options_of_pgd_change_its_examples(option, base):
    common = ["attack.steps=5", "attack.eps=0.05", *(f"attack.{b}" for b in base)]
    assert not torch.equal(found_by("pgd", *common)[0], found_by("pgd", *common, f"attack.{option}")[0])


def test_eot_and_restarts_are_passes():
    common = ["attack.steps=5", "attack.eps=0.0001", "attack.keep_best=false"]
    assert found_by("pgd", *common)[1].calls == 5
    assert found_by("pgd", *common, "attack.eot=4")[1].calls == 20
    assert found_by("pgd", *common, "attack.restarts=3")[1].calls == 15 + 2  # and a look before each further one
    targeted = ["attack.steps=5", "attack.eps=0.0001"]
    all_of_them = found_by("multitargeted", *targeted)[1].calls
    assert all_of_them == 1 + 9 * 6 + 8
    assert found_by("multitargeted", *targeted, "attack.targets=2")[1].calls == 1 + 2 * 6 + 1


@pytest.mark.parametrize("name", ["square", "nattack"])
def test_queries_are_images_of_the_net(name):
    few, many = (found_by(name, f"attack.queries={q}", "attack.eps=0.0001", n=2)[1].images for q in (20, 60))
    assert many - few == 2 * 40


def test_kinds_of_attack():
    kinds = {"multitargeted": MultiTargeted, "nattack": NAttack, "pgd": WhiteBox, "autoattack": AutoAttack}
    for name, kind in kinds.items():
        assert type(built(name).attacks[name]) is kind
    assert built("multitargeted").attacks["multitargeted"].keep_best
    assert built("square").attacks["square"].needs_gradients is False


# ---- suites of a user's own ----------------------------------------------------------------------------------------

FGSM = {"_target_": "redoubt.attacks.WhiteBox", "eps": 0.1, "steps": 1, "step": 1.0}


@pytest.mark.parametrize(
    ("attacks", "says"),
    [
        ([FGSM], "attack.attacks must map names to attacks"),
        ({"natural": FGSM}, "attack.attacks.natural: the name natural is taken"),
        ({"ensemble": FGSM}, "ensemble is taken"),
        ({"label": FGSM}, "label is taken"),
        ({"a": {**FGSM, "net": "theirs"}}, "attack.attacks.a.net='theirs' is not known: take own or source"),
        ({"a": {**FGSM, "stepz": 1}}, "attack.attacks.a.stepz is no argument of WhiteBox: did you mean step"),
        ({"a": {**FGSM, "steps": -1}}, "attack.attacks.a: steps=-1"),
        ({"a": {**FGSM, "_target_": "os.system"}}, "'os.system' is not allowed"),
    ],
    ids=str,
)
def test_a_suite_that_cannot_be(attacks, says):
    with pytest.raises(UserError) as error:
        suite({"attacks": attacks, "norm": "linf", "eps": 0.1})
    assert says in str(error.value)
    assert "\n" not in str(error.value)
