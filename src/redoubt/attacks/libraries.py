"""Attacks of other libraries: AutoAttack (pyautoattack), torchattacks and foolbox, each under our rules.

They get the net as a module in evaluation mode, images as float32 in [0, 1], and the run's own seed; whoever calls an
attack keeps their random numbers apart and scores what they return.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from redoubt.attacks.base import Attack, Draws, Logits
from redoubt.errors import UserError, did_you_mean
from redoubt.evaluation.results import VERSIONS
from redoubt.units import as_number, as_whole

log = logging.getLogger("redoubt")


#: How each is installed. torchattacks asks for a release of ``requests`` with known holes, and never imports it.
INSTALLED_BY = {
    "pyautoattack": "pip install 'redoubt[attacks]'",
    "foolbox": "pip install 'redoubt[foolbox]'",
    "torchattacks": "pip install --no-deps torchattacks==3.5.1",
}


def library(module: str) -> Any:
    """An optional library.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: {INSTALLED_BY[module]}") from error


class Net(nn.Module):
    """Logits as a module, for libraries that want one; it has no parameter to find and no mode to change."""

    def __init__(self, logits: Logits, device: torch.device) -> None:
        super().__init__()
        self.logits = logits
        self.where = nn.Parameter(torch.zeros((), device=device), requires_grad=False)  # some look for the device
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


class AutoAttack(Attack):
    """AutoAttack (Croce and Hein, 2020) by pyautoattack, once per chunk, with a seed from (seed, chunk).

    It stays the library's cascade, in which each member attacks what the earlier ones have left standing. An example's
    verdict is that of ``pyautoattack.AutoAttack(net, norm=..., eps=..., version=...,
    seed=redoubt.attacks.base.library_seed(evaluation.seed, chunk))`` called by hand on the chunk's images with
    ``batch_size=evaluation.chunk`` (of a list: ``version="custom", attacks=[...]``, with the library's 5 restarts of
    APGD and FAB). Of fewer than 10 classes the targeted attacks take all wrong ones (``n_target_classes``), and of
    fewer than 4 the members that are defined run (``attacks_to_run``); see `members`.

    Args:
        eps, norm: The ball.
        version: ``standard`` (apgd-ce, apgd-t, fab-t, square), ``plus``, ``rand`` (for nets with a random forward), or
            a list of attacks.
        queries: Of Square, per image.
    """

    ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
    #: The DLR loss compares three logits, the targeted one four; the other members take any two classes.
    LEAST = {"apgd-dlr": 3, "apgd-t": 4}
    #: Steps of each, roughly, as they are in `standard`.
    COSTS = {"apgd-ce": 100.0, "apgd-dlr": 500.0, "apgd-t": 900.0, "fab": 2500.0, "fab-t": 2700.0, "square": 1700.0}

    def __init__(
        self,
        *,
        eps: float | str,
        norm: str = "linf",
        version: str | Sequence[str] = "standard",
        queries: int = 5000,
    ) -> None:
        library("pyautoattack")
        self.eps, self.norm, self.queries = as_number(eps, "eps"), norm, as_whole(queries, "queries")
        self.library = _version("pyautoattack")
        named = isinstance(version, str) and version in VERSIONS
        listed = version if named or not isinstance(version, str | None) else [str(version)]
        if not isinstance(listed, str):
            for name in listed:
                if name not in self.ATTACKS:
                    raise UserError(f"version={name!r} is not known{did_you_mean(name, [*VERSIONS, *self.ATTACKS])}")
            if not listed:
                raise UserError(f"version=[] names no attack: there are {', '.join(self.ATTACKS)}")
        self.version: str | list[str] = listed if isinstance(listed, str) else list(listed)
        self.needs_gradients = self.version != ["square"]
        self.cost = sum(self.COSTS[n] for n in self.version) if isinstance(self.version, list) else 6000.0

    def members(self, classes: int) -> tuple[str, ...]:
        """The attacks that run on so many classes, in the library's order: all of the version that are defined.

        On 3 classes ``standard`` has apgd-dlr in the place of apgd-t.

        Raises:
            UserError: None of them is.
        """
        listed = VERSIONS[self.version] if isinstance(self.version, str) else tuple(self.version)
        if self.version == "standard" and classes == 3:
            listed = tuple("apgd-dlr" if name == "apgd-t" else name for name in listed)
        defined = tuple(name for name in listed if classes >= self.LEAST.get(name, 2))
        if not defined:
            least = min(self.LEAST.get(name, 2) for name in listed)
            raise UserError(f"version={self.version} needs at least {least} classes, there are {classes}")
        return defined

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """See `Attack`; the flags are pyautoattack's own verdicts."""
        pyautoattack = library("pyautoattack")
        named = isinstance(self.version, list)
        with _warnings_once(), library_errors("pyautoattack"):
            attack = pyautoattack.AutoAttack(
                Net(logits, x.device),
                norm={"linf": "Linf", "l2": "L2"}[self.norm],
                eps=self.eps,
                seed=draws.library_seed,
                device=x.device,
                version="custom" if named else self.version,
                **({"attacks": list(self.version)} if named else {}),
            )
            attack.square.n_queries = self.queries
            with torch.no_grad():
                classes = logits(x[:1]).shape[1]
            for targeted in (attack.apgd_targeted, attack.fab):
                targeted.n_target_classes = min(9, classes - 1)
            attack.attacks_to_run = list(self.members(classes))
            adv, label = attack.run_standard_evaluation(x, y, batch_size=len(x))
        return adv, label != y


class TorchAttacks(Attack):
    """An attack of torchattacks by its class's name.

    ``eps`` is handed over where the class takes one of the suite's norm; a step size ``alpha`` that nobody gave is
    eps / 4. A class without such a bound (CW, Pixle, DeepFool, ...) searches freely: see ``attack.bounded``.

    Args:
        name: A class of torchattacks, as DIFGSM.
        eps, norm: The ball.
        options: Further arguments of the class.

    Raises:
        UserError: No such class, an option that it does not take, or one that must not be reported.
    """

    #: Not attacks by themselves, or, as AutoAttack with 10 steps for each 100, not what they are called.
    REFUSED = {
        "AutoAttack": "runs 10 steps for each 100 of AutoAttack: take attack=autoattack",
        "MultiAttack": "is a list of attacks: write a suite",
        "LGV": "trains nets of its own",
        "VANILA": "attacks nothing: natural accuracy is in every evaluation",
    }
    NO_GRADIENT = ("Square", "SPSA", "Pixle", "OnePixel", "GN")

    def __init__(
        self, *, name: str, eps: float | str, norm: str = "linf", options: Mapping[str, Any] | None = None
    ) -> None:
        module = library("torchattacks")
        found = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, module.attack.Attack)}
        known = sorted(n for n in found if n not in (*self.REFUSED, "Attack"))
        if name in self.REFUSED:
            raise UserError(f"name={name}: torchattacks' {name} {self.REFUSED[name]}")
        if name not in known:
            raise UserError(f"name={name!r} is no attack of torchattacks{did_you_mean(str(name), known)}")
        self.kind: Any = found[name]
        self.library = _version("torchattacks")
        takes = [p for p in inspect.signature(self.kind.__init__).parameters if p not in ("self", "model")]
        options = _mapping(options)
        given = {str(k): as_number(v, k) if isinstance(v, str) and "/" in v else v for k, v in options.items()}
        for option in given:
            if option not in takes:
                raise UserError(
                    f"options.{option} is not an argument of torchattacks.{name}{did_you_mean(option, takes)}"
                )
        radius = as_number(eps, "eps")
        self.norm, self.eps = norm, None
        for option in ("eps", "max_epsilon", "norm"):
            if option in given:
                raise UserError(f"options.{option}: give attack.eps and threat.norm, by which the images are scored")
        ball = {"linf": "Linf", "l2": "L2"}[norm]
        if "norm" in takes:
            given["norm"] = ball
        bound = next((option for option in ("eps", "max_epsilon") if option in takes), None)
        measured = ball if "norm" in takes else _measure(self.kind)
        if bound is not None and measured != ball:
            raise UserError(f"name={name}: bounded in {measured}, the suite in {ball}: take an attack of that norm")
        if bound is not None:
            self.eps = given[bound] = radius
            if "alpha" in takes:
                given.setdefault("alpha", radius / 4)
        self.name, self.options = name.lower(), given
        self.seeded = "seed" in takes and "seed" not in given
        self.needs_gradients = name not in self.NO_GRADIENT
        try:
            self.cost = float(given.get("steps", given.get("n_queries", _default(self.kind, "steps", "n_queries"))))
            self._made(lambda x: x, torch.device("cpu"), 0)
        except Exception as error:
            raise UserError(f"torchattacks.{name} refuses these options: {_brief(error)}") from error

    def _made(self, logits: Logits, device: torch.device, seed: int) -> Any:
        attack = self.kind(Net(logits, device), **self.options, **({"seed": seed} if self.seeded else {}))
        attack.set_device(device)
        return attack

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """See `Attack`."""
        attack = self._made(logits, x.device, draws.library_seed)
        with torch.enable_grad(), library_errors(f"torchattacks.{self.kind.__name__}"):
            adv: Tensor = attack(x, y)
        return _finite(adv, x)


class Foolbox(Attack):
    """An attack of foolbox by its class's name (``foolbox.attacks``), run at one epsilon.

    Args:
        name: A class of foolbox.attacks, as LinfDeepFoolAttack.
        eps, norm: The ball; the class must be of this norm.
        options: Arguments of the class.
    """

    def __init__(
        self, *, name: str, eps: float | str, norm: str = "linf", options: Mapping[str, Any] | None = None
    ) -> None:
        module = library("foolbox").attacks
        base = importlib.import_module("foolbox.attacks.base").Attack
        classes = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
        known = sorted(n for n, c in classes.items() if not inspect.isabstract(c))
        if name not in known:
            raise UserError(f"name={name!r} is no attack of foolbox{did_you_mean(str(name), known)}")
        self.kind: Any = getattr(module, name)
        self.options, self.library = _mapping(options), _version("foolbox")
        try:
            attack = self.kind(**self.options)
            self.cost = float(getattr(attack, "steps", 100) or 1)
        except Exception as error:
            raise UserError(f"foolbox {name} refuses these options: {_brief(error)}") from error
        self.norm, self.eps = norm, as_number(eps, "eps")
        distance = {"linf": "linf", "l2": "l2"}[norm]
        measured = str(getattr(attack, "distance", None))
        if distance not in measured.lower():
            raise UserError(
                f"name={name}: it measures {measured}, the suite {norm}: take an attack of that norm, or another threat"
            )
        self.name = name.lower()
        self.needs_gradients = not any(word in name for word in ("Noise", "Boundary", "HopSkipJump", "Genetic", "Blur"))

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """See `Attack`."""
        foolbox = library("foolbox")
        net = foolbox.PyTorchModel(Net(logits, x.device), bounds=(0, 1), device=x.device)
        with torch.enable_grad(), library_errors(f"foolbox.attacks.{self.kind.__name__}"):
            _, adv, _ = self.kind(**self.options)(net, x, y, epsilons=self.eps)
        return _finite(adv, x)


def _finite(adv: Tensor, x: Tensor) -> Tensor:
    """The examples; x where a search failed in its own arithmetic, for then it has found nothing."""
    return torch.where(adv.isfinite().flatten(1).all(1)[:, None, None, None], adv, x)


def _version(package: str) -> str:
    return f"{package} {metadata.version(package)}"


def _mapping(options: Any) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"options={options!r} must be a mapping: write it in quotes, as 'attack.options={{steps:20}}'")
    for name in ("steps", "n_restarts", "n_queries"):  # with a negative one the libraries do nothing, without a word
        if options and options.get(name) is not None:
            as_whole(options[name], f"options.{name}")
    return dict(options or {})


def _measure(kind: type) -> str | None:
    """The norm that a class of torchattacks bounds, as its docstring says."""
    found = re.search(r"Distance Measure\s*:\s*(\w+)", kind.__doc__ or "")
    return found[1] if found else None


def _default(kind: type, *names: str) -> float:
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    found = [parameters[n].default for n in names if n in parameters]
    return float(found[0]) if found and isinstance(found[0], (int, float)) else 1.0


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Says whose error it is, in one line."""
    try:
        yield
    except UserError:
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{name} failed on this net: {type(error).__name__}: {_brief(error)}") from error


class _Once(logging.Handler):
    """Passes each warning on once."""

    seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        text = re.sub(r"^there are \d+ points", "there are points", text).split(" See ")[0]
        if record.levelno >= logging.WARNING and text not in self.seen:
            self.seen.add(text)
            log.warning("AutoAttack: %s", text)


@contextmanager
def _warnings_once() -> Iterator[None]:
    """AutoAttack says something per batch: its warnings come through once, the rest not at all."""
    theirs = logging.getLogger("auto-attack")
    handler, kept = _Once(), (theirs.propagate, theirs.level)
    theirs.propagate = False
    theirs.setLevel(logging.WARNING)
    theirs.addHandler(handler)
    try:
        yield
    finally:
        theirs.removeHandler(handler)
        theirs.propagate, theirs.level = kept
