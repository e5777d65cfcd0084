"""Running attacks over test examples: float32, every example once, on any number of processes."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redoubt import deadline
from redoubt.attacks import Attack
from redoubt.attacks.base import Draws
from redoubt.attacks.whitebox import Reached
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.evaluation.kept import SHOWN, Kept, Outcome
from redoubt.evaluation.results import counted, ensemble
from redoubt.evaluation.suite import Suite
from redoubt.nets import attack_mode
from redoubt.training.distributed import gather_objects, ranks
from redoubt.training.progress import Counter

Verdicts = dict[str, np.ndarray]

log = logging.getLogger("redoubt")

#: How much farther than eps a pair of images may be, computed in float64.
SLACK = 1e-6
#: Two passes over the same images may differ by this much, relative to the largest logit: kernels that add in another
#: order do less, noise does more.
SAME = 1e-4


@dataclass(frozen=True)
class Attacked:
    """What an attack made of a chunk.

    Args:
        right: Which images are still classified correctly, bool [B].
        adv: The examples [B, 3, H, W].
        predicted: Their classes, int64 [B].
        outside: How many had left the ball and were undone.
    """

    right: Tensor
    adv: Tensor
    predicted: Tensor
    outside: int = 0


class Judge:
    """Which examples a module still gets right under each attack of a suite.

    Chunks are fixed runs of ``chunk`` examples; process r of n takes chunks r, r + n, ... whole, and a chunk's random
    numbers come from (seed, attack, restart, chunk), so verdicts do not depend on the number of processes.

    Args:
        module: Its ``logits`` are attacked; weights as they are.
        suite: The attacks.
        chunk: Examples attacked together.
        seed: Of random starts.
        device: Where to compute; the module is there.
        source: The net of transfer attacks, where the suite has any.
        skip_broken: Attack only what all attacks before have left standing; then only the Ensemble is a result.
        kept: Verdicts that are there already, and where new ones go; None keeps nothing.
        save: ``uint8``: examples are rounded to 8 bits before they are scored.
        progress: Show how far it is.

    Raises:
        UserError: The suite cannot be run on this net: its forward is random or has no gradient.
    """

    def __init__(
        self,
        module: RobustModule,
        suite: Suite,
        *,
        chunk: int,
        seed: int,
        device: torch.device,
        source: RobustModule | None = None,
        skip_broken: bool = False,
        kept: Kept | None = None,
        save: str | None = None,
        progress: bool = True,
    ) -> None:
        if suite.on_source and source is None:
            raise UserError(f"attack.source is missing: {sorted(suite.on_source)[0]} is crafted on another net")
        self.module, self.source, self.suite = module, source, suite
        self.chunk, self.seed, self.device = chunk, seed, device
        self.skip_broken, self.kept, self.save, self.progress = skip_broken, kept, save, progress
        self.seconds: float = 0.0
        self.outside: dict[str, int] = {}
        # The shorter first: a longer one may go on from it; and the cheaper, of which less is left to the dearer.
        self.order = sorted(suite.attacks, key=lambda name: suite.attacks[name].cost)
        self.files = {name: kept.file(name, self.decisive(name)) for name in self.names} if kept is not None else {}

    @property
    def names(self) -> list[str]:
        """The results of a chunk."""
        return ["natural", *self.suite.attacks]

    @property
    def corruptions(self) -> set[str]:
        """What is no attack."""
        return {name for names in self.suite.groups.values() for name in names}

    def __call__(self, images: Tensor, labels: Tensor) -> Verdicts:
        """Verdicts, as `counted`.

        Args:
            images: uint8 [N, 3, H, W].
            labels: int64 [N].

        Returns:
            ``natural`` and each attack's name -> bool [N], the same on every process; with ``skip_broken``
            ``natural`` and ``ensemble``.
        """
        rank, world = ranks()
        starts = range(0, len(labels), self.chunk)
        mine: dict[int, dict[str, Outcome]] = {}
        counter = Counter("attacking", len(range(rank, len(starts), world)), enabled=self.progress and rank == 0)
        source = attack_mode(self.source) if self.source is not None else nullcontext()
        with counter, full_precision(), attack_mode(self.module), source:
            checked = False
            for i in range(rank, len(starts), world):
                rows = slice(starts[i], starts[i] + self.chunk)
                found = self.stored(i, len(labels[rows]))
                if len(found) < len(self.names):
                    x, y = images[rows].to(self.device).float() / 255, labels[rows].to(self.device)
                    if not checked:
                        with own_randomness(self.seed, self.device):
                            self.examine(x[: max(2, len(x) // 32)])
                        checked = True
                    self.attack(x, y, i, found, counter)
                mine[i] = found
                counter.advance(counted({k: v.right for k, v in found.items()}, self.corruptions))
        everyone = gather_objects(mine)
        chunks = {i: outcomes for part in everyone for i, outcomes in part.items()}
        self.seconds = sum(o.seconds for outcomes in chunks.values() for o in outcomes.values())
        self.outside = {n: sum(chunks[i][n].outside for i in chunks) for n in self.names}
        verdicts = {n: np.concatenate([chunks[i][n].right for i in range(len(starts))]) for n in self.names}
        verdicts = counted(verdicts, self.corruptions)
        if self.suite.ensemble:
            verdicts["ensemble"] = ensemble(verdicts)
        if self.skip_broken:
            verdicts = {n: verdicts[n] for n in ("natural", "ensemble")}
        return verdicts

    # ---- one chunk --------------------------------------------------------------------------------------------

    def attack(self, x: Tensor, y: Tensor, number: int, done: dict[str, Outcome], counter: Counter) -> None:
        """Adds to a chunk's outcomes those that are missing, and keeps them.

        Args:
            x: Images [B, 3, H, W] in [0, 1]; y: labels [B]; number: of the chunk.
            done: What is there already, by name.
        """
        began = time.monotonic()
        paths = {n: a.path for n, a in self.suite.attacks.items() if self.own(n)}
        due = [n for n in self.order if n not in done]
        # The first gradients of all fixed-start attacks, and the clean verdict, are of one forward.
        firsts = {p: self.suite.attacks[n] for n in due if (p := paths.get(n)) is not None}
        with own_randomness(Draws(self.seed, "natural", number, x.device).library_seed, x.device):
            z, gradients = self.look(x, y, list(firsts.values()))
        reached = {p: Reached(0, x, g) for p, g in zip(firsts, gradients, strict=True)}
        standing = correct(z, y)
        if "natural" not in done:
            done["natural"] = self.settle("natural", number, Attacked(standing, x, z.argmax(1)), began)
        for name in self.order:
            if name not in done:
                deadline.check()
                counter.note(name)
                began = time.monotonic()
                rows = standing.nonzero()[:, 0] if self.skip_broken else torch.arange(len(y), device=y.device)
                path = paths.get(name)
                due.remove(name)
                # A rounded example is no iterate of the longer attack.
                longer = path is not None and self.save != "uint8" and path in [paths.get(n) for n in due]
                found = self.run(name, x, y, rows, number, reached, path, longer)
                done[name] = self.settle(name, number, found, began)
            if self.skip_broken:
                standing = standing & torch.from_numpy(done[name].right).to(standing.device)

    def run(
        self,
        name: str,
        x: Tensor,
        y: Tensor,
        rows: Tensor,
        number: int,
        reached: dict[Any, Reached],
        path: Any,
        longer: bool,
    ) -> Attacked:
        """One attack on some rows of a chunk; the others are wrong and as they were.

        Args:
            path: The attack's, or None.
            longer: Whether a longer attack is to go on from its result.
        """
        attack: Any = self.suite.attacks[name]
        draws = Draws(self.seed, name, number, x.device)
        right, adv, predicted = torch.zeros_like(y, dtype=torch.bool), x.clone(), torch.full_like(y, -1)
        if not len(rows):
            return Attacked(right, adv, predicted)
        whole = len(rows) == len(y)
        xs, ys = (x, y) if whole else (x[rows], y[rows])
        start = reached.get(path)
        if start is not None and not whole:
            start = Reached(start.steps, start.adv[rows], start.gradient[rows])
        net, module = (self.logits, self.module) if self.own(name) else (self.source_logits, self.source)
        assert module is not None
        with own_randomness(draws.library_seed, x.device):
            with module.folded(in_format(module, xs)) if attack.folds else nullcontext():
                found = attack(net, xs, ys, draws, **({} if start is None else {"after": start}))
            found, broken = found if isinstance(found, tuple) else (found, None)
            found, outside = self.within(name, attack, found.detach(), xs)
            found = found.to(x.dtype)
            if self.save == "uint8":  # what the attack itself has seen is another image
                found, broken = rounded(found, xs, *self.ball(attack)), None
            z, gradients = self.look(found, ys, [attack] if longer else [])
        verdict = correct(z, ys)
        if broken is not None:  # seen in another batch, in which logits differ by a rounding
            verdict &= ~broken
        right[rows], adv[rows], predicted[rows] = verdict, found, z.argmax(1)
        if longer:
            slopes = torch.zeros_like(x)
            slopes[rows] = gradients[0]
            reached[path] = Reached(attack.steps, adv, slopes)
        return Attacked(right, adv, predicted, outside)

    def look(self, x: Tensor, y: Tensor, attacks: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """Logits of x, and the gradient of each attack's loss there, from one forward."""
        if not attacks:
            with torch.no_grad():
                return self.logits(x), []
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            z = self.logits(x)
            losses = [a.raised(z, y).sum() for a in attacks]
            gradients = [torch.autograd.grad(loss, x, retain_graph=loss is not losses[-1])[0] for loss in losses]
        return z.detach(), gradients

    def within(self, name: str, attack: Attack, adv: Tensor, x: Tensor) -> tuple[Tensor, int]:
        """The examples, with those that an unbounded attack has found outside the ball undone, and their number.

        Raises:
            UserError: Pixels outside [0, 1], or a bounded attack that left its ball.
        """
        wide = adv.double()
        if adv.shape != x.shape or not bool(((wide >= 0) & (wide <= 1)).all()):  # false for NaN too
            raise UserError(f"attack {name}: its images have pixels outside [0, 1] or none: they cannot be scored")
        norm, eps = self.ball(attack)
        if eps is None:
            return adv, 0
        distance = distances(adv, x, norm)
        outside = distance > eps + SLACK
        count = int(outside.sum())
        if count and attack.eps is not None:
            raise UserError(
                f"attack {name}: {count} of {len(x)} images are farther than eps {eps:.6g} "
                f"({norm} {distance.max():.6g}): its result is not one of this threat model"
            )
        return torch.where(outside[:, None, None, None], x, adv) if count else adv, count

    def ball(self, attack: Attack) -> tuple[str, float | None]:
        """Norm and eps that an attack's images are held to: its own, or the suite's where it has none."""
        if attack.eps is not None:
            return attack.norm, attack.eps
        return self.suite.norm, self.suite.eps if self.suite.bounded else None

    # ---- what is there, and what is kept ------------------------------------------------------------------------

    def stored(self, number: int, n: int) -> dict[str, Outcome]:
        """The outcomes of a chunk of n examples that are there."""
        if self.kept is None:
            return {}
        found = {name: self.kept.find(file, number, n) for name, file in self.files.items()}
        return {name: outcome for name, outcome in found.items() if outcome is not None}

    def decisive(self, name: str) -> dict[str, Any]:
        """What decides an attack's verdicts, beside the net and the images."""
        stochastic = self.suite.stochastic or None  # a net that was not asked whether it is random
        if name == "natural":
            return {"stochastic": stochastic}
        # With skip_broken an attack's verdicts depend on those before it.
        before = self.order[: self.order.index(name) + 1] if self.skip_broken else [name]
        return {
            "stochastic": stochastic,
            "skip_broken": self.skip_broken or None,
            "ball": [self.suite.norm, self.suite.eps, self.suite.bounded],
            "attacks": [[self.suite.sections.get(n), self.suite.attacks[n].library] for n in before],
        }

    def settle(self, name: str, number: int, found: Attacked, began: float) -> Outcome:
        """The outcome of an attack on a chunk, kept; here the device is waited for."""
        outcome = Outcome(found.right.cpu().numpy(), found.outside, time.monotonic() - began)
        if self.kept is not None:
            adv = None
            if self.save and name != "natural":
                adv = (bytes_of(found.adv) if self.save == "uint8" else found.adv).cpu().numpy()
            shown = None
            if number == 0:
                shown = {
                    "adv": bytes_of(found.adv[:SHOWN]).cpu().numpy(),
                    "predicted": found.predicted[:SHOWN].cpu().numpy(),
                }
            self.kept.keep(self.files[name], number, outcome, adv, shown)
        return outcome

    # ---- the nets -----------------------------------------------------------------------------------------------

    def own(self, name: str) -> bool:
        """Whether an attack sees the judged net itself."""
        return name not in self.suite.on_source

    def logits(self, x: Tensor) -> Tensor:
        """The judged net's logits."""
        return logits_of(self.module, x)

    def source_logits(self, x: Tensor) -> Tensor:
        """The logits of the net that transfer attacks are crafted on."""
        assert self.source is not None
        return logits_of(self.source, x)

    def examine(self, x: Tensor) -> None:
        """Refuses a net on which the suite's numbers would mean nothing.

        Raises:
            UserError: Two passes over the same images differ, though the suite is not one of random nets; or an attack
                needs a gradient and there is none.
        """
        with torch.no_grad():
            passes = [self.logits(x) for _ in range(3)]
        spread = max(float(difference(z, passes[0])) for z in passes[1:])
        if not self.suite.stochastic and spread > SAME:
            raise UserError(
                f"the net's forward is random (passes over the same images differ by {spread:.3g} of its logits' "
                "range): switch its noise off, or take a suite for such nets: attack=eot"
            )
        wanting = [n for n, a in self.suite.attacks.items() if a.needs_gradients and self.own(n)]
        if wanting:
            with torch.enable_grad():
                if not self.logits(x.clone().requires_grad_(True)).requires_grad:
                    raise UserError(
                        f"attack {wanting[0]} needs gradients, and this net's logits have none: take attacks that only "
                        "ask for logits, as attack=square or attack=nattack"
                    )


def judge(module: RobustModule, images: Tensor, labels: Tensor, suite: Suite, **options: Any) -> Verdicts:
    """Verdicts of a suite: see `Judge`."""
    return Judge(module, suite, **options)(images, labels)


def logits_of(module: RobustModule, x: Tensor) -> Tensor:
    """Logits [B, K] of images [B, 3, H, W], in the memory format that the module computes in."""
    z, columns = module.logits(in_format(module, x)), getattr(module, "columns", None)
    return z if columns is None else z[:, columns]


def in_format(module: RobustModule, x: Tensor) -> Tensor:
    """Images in the memory format that a module computes in."""
    return x.contiguous(memory_format=module.format)


def correct(z: Tensor, y: Tensor) -> Tensor:
    """Which logits [B, K] name their labels [B]; NaN, which argmax calls class 0, names none."""
    return (z.argmax(1) == y) & z.isfinite().all(1)


def difference(z: Tensor, other: Tensor) -> Tensor:
    """Largest difference of two passes' logits, relative to the largest distance from an image's mean logit.

    Neither a prediction nor the cross-entropy feels an offset of all logits, so an offset hides no noise.
    """
    return (z - other).abs().max() / (other - other.mean(1, keepdim=True)).abs().max().clamp_min(1e-12)


def distances(a: Tensor, b: Tensor, norm: str) -> Tensor:
    """Distance of each pair of images, in pixel units, computed in float64 [B]."""
    order = float("inf") if norm == "linf" else 2
    return torch.linalg.vector_norm((a.double() - b.double()).flatten(1), ord=order, dim=1)


def rounded(adv: Tensor, x: Tensor, norm: str, eps: float | None) -> Tensor:
    """The nearest 8-bit images that are not farther from x than eps.

    Args:
        adv: Examples [B, 3, H, W]; x: what they were made from, on the grid of 8 bits.
    """
    clean = (x.double() * 255).round()
    change = (adv.double() * 255).round() - clean
    if eps is not None and norm == "linf":
        levels = math.floor(eps * 255 + 1e-6)
        change = change.clamp(-levels, levels)
    elif eps is not None:
        far = torch.linalg.vector_norm(change.flatten(1), dim=1) > eps * 255
        towards = (adv.double() * 255 - clean).trunc()
        change = torch.where(far[:, None, None, None], towards, change)
    return ((clean + change) / 255).to(adv.dtype)


def bytes_of(x: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (x * 255).round().to(torch.uint8)


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers as if seeded inside, and as they were outside: libraries draw from them."""
    state, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch's own function also writes down, for a GPU that may be used later, where it was called from.
        (torch.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed)(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numbers)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 without TF32 or autocast inside; everything is as it was afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
