"""Audit: checks that a robust accuracy is the net's, not the attack's weakness (false robustness, masked gradients).

After Athalye et al. (2018), Carlini et al. (2019) and FSR's supplement (Figure S2). Each check measures one quantity
and holds it against a threshold of the config; all of them stand in ``audit.json``.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import redoubt
from redoubt import deadline
from redoubt.attacks import PGD, Attack, AutoAttack, WhiteBox
from redoubt.attacks.base import Draws
from redoubt.attacks.geometry import BALLS
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.evaluation.kept import crc_of
from redoubt.evaluation.suite import Suite
from redoubt.evaluation.verdicts import correct, difference, full_precision, logits_of, own_randomness
from redoubt.nets import attack_mode
from redoubt.rng import generator
from redoubt.runs.files import read_json, write_json
from redoubt.training.progress import Counter


@dataclass
class Check:
    """One check: what was measured, what it may be at most, and whether it passed (None: it does not apply here).

    Args:
        name: As in the table.
        rule: What must hold, in words.
        value: What was measured.
        limit: The largest value that passes.
        passed: Whether it does.
        details: Whatever explains the value.
        seconds: What it took.
    """

    name: str
    rule: str
    value: float | None = None
    limit: float | None = None
    passed: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def judged(self, value: float, limit: float, **details: Any) -> Check:
        """The check with its measurement; what is not a number fails."""
        self.value, self.limit, self.passed = float(value), float(limit), bool(value <= limit)
        self.details |= details
        return self

    def skipped(self, why: str, failed: bool = False) -> Check:
        """The check where it cannot be made; ``failed`` where that itself is a failure."""
        self.passed = False if failed else None
        self.details["why"] = why
        return self


def radius(suite: Suite) -> float:
    """Of the ball that its attacks stay in; what has none cannot be audited."""
    if not suite.eps or not suite.attacks:
        raise UserError("attack: an audit is of attacks within a ball: take a suite with attacks and an eps above 0")
    return float(suite.eps)


class Audit:
    """The checks over some test images.

    Args:
        module: The net; its weights are those that were evaluated.
        images: uint8 [N, 3, H, W]; labels: int64 [N].
        suite: The attacks whose numbers are audited.
        keys: Thresholds and efforts, the config's ``audit``.
        seed: Of random starts and directions.
        device: Where to compute; the module is there.
        source: The natural twin for transfer, or None.
        progress: Show how far it is.
    """

    def __init__(
        self,
        module: RobustModule,
        images: Tensor,
        labels: Tensor,
        suite: Suite,
        *,
        keys: Mapping[str, Any],
        seed: int,
        device: torch.device,
        source: RobustModule | None = None,
        progress: bool = True,
    ) -> None:
        self.module, self.keys, self.seed, self.device = module, keys, seed, device
        self.source, self.progress = source, progress
        self.x, self.y = images.to(device).float() / 255, labels.to(device)
        self.n = len(labels)
        self.norm, self.eps = suite.norm, radius(suite)
        self.curves: dict[str, dict[str, list[float]]] = {}
        own = {n: a for n, a in suite.attacks.items() if isinstance(a, WhiteBox) and n not in suite.on_source}
        self.pgds = own or {
            f"stand_in_{loss}": WhiteBox(eps=self.eps, norm=self.norm, loss=loss, steps=100, step=0.1)
            for loss in ("ce", "margin")
        }
        self.differentiable = True

    #: Method -> (name, rule, whether it needs a gradient).
    CHECKS: Mapping[str, tuple[str, str, bool]] = {
        "randomness": (
            "randomness", "passes over the same images give the same logits (largest difference, relative)", False,
        ),
        "probabilities": (
            "logits", "outputs are logits: rows in [0, 1] that sum to 1 are probabilities (share of rows)", False,
        ),
        "zero_gradients": (
            "gradients", "cross-entropy has a gradient at the images and at random starts (share without)", False,
        ),
        "white_box": ("white box", "the suite's attacks by gradient run on these images", True),
        "iterations": ("iterations", "they break no more than the suite's strongest PGD (share gained)", True),
        "restarts": ("restarts", "they break no more than it either (share gained)", True),
        "one_step": ("one step", "one step breaks nothing that PGD misses (share of images)", True),
        "noise": ("random noise", "noise in the ball breaks nothing that PGD misses (share of images)", False),
        "eps_curve": ("accuracy over eps", "accuracy rises nowhere as eps grows (largest rise)", True),
        "large_eps": (
            "large eps", "from 128/255 on accuracy is that of a guess at most (the largest class's share)", True,
        ),
        "iterations_curve": ("accuracy over iterations", "accuracy rises nowhere as PGD goes on", True),
        "black_box": ("black box", "Square, which asks for logits only, is no stronger than PGD (share gained)", False),
        "transfer": ("transfer", "examples of the natural twin are not stronger than PGD (share gained)", False),
        "adaptive": ("adaptive", "attacks made for this defense break no more than PGD (share gained)", True),
        "finite_differences": (
            "finite differences", "slopes in float64 are autograd's (share of directions that differ)", True,
        ),
        "landscape": (
            "loss landscape", "gradients a little apart point alike (share of images with a smaller cosine than asked)",
            True,
        ),
        "fsr_criteria": (
            "FSR's criteria", "iterations beat one step, white box beats black, accuracy falls to 0 (missed)", True,
        ),
    }  # fmt: skip

    #: What later checks take from earlier ones: of each image, and of all.
    FLAGS = ("natural", "white", "standing", "left", "single", "queried", "transferred")
    FACTS = ("strongest", "differentiable", "curves")

    def __call__(self, kept: Path | None = None) -> list[Check]:
        """All checks, in the order in which later ones use what earlier ones have found.

        Args:
            kept: A file in which what is done is kept after each check; an audit that finds it there goes on from it,
                with the same results, for each check has random numbers of its own.

        Raises:
            TimeUp: The time is up; asked before each check.
        """
        counter = Counter("auditing", len(self.CHECKS), enabled=self.progress)
        with ExitStack() as stack:
            for context in (counter, full_precision(), attack_mode(self.module)):
                stack.enter_context(context)  # type: ignore[arg-type]
            if self.source is not None:
                stack.enter_context(attack_mode(self.source))
            done = self.restored(kept)
            if not done:
                self.natural = self.right(self.x)
                self.white, self.standing, self.left = (self.natural.clone() for _ in range(3))
            counter.done = len(done)
            for method, (name, rule, needs_gradient) in list(self.CHECKS.items())[len(done) :]:
                deadline.check()
                counter.note(name)
                began = time.monotonic()
                check = Check(name, rule)
                if needs_gradient and not self.differentiable:
                    check.skipped("the logits have no gradient", failed=True)
                else:
                    draws = generator(self.seed, f"audit/{method}", 0, device=self.device)
                    with own_randomness(self.seed, self.device):
                        getattr(self, method)(check, draws)
                check.seconds = time.monotonic() - began
                done.append(check)
                counter.advance()
                if kept is not None:
                    self.keep(kept, done)
        return done

    def keep(self, kept: Path, done: list[Check]) -> None:
        """Writes the checks that are done and what later ones need of them."""
        flags = {name: getattr(self, name).int().tolist() for name in self.FLAGS if hasattr(self, name)}
        facts = {name: getattr(self, name) for name in self.FACTS if hasattr(self, name)}
        checks = [_writable(asdict(check)) for check in done]
        content = {"version": redoubt.__version__, "checks": checks, "flags": flags, "facts": facts}
        write_json(kept, {**content, "crc": crc_of(content)})

    def restored(self, kept: Path | None) -> list[Check]:
        """The checks that an earlier call of this version has kept, with what later ones need of them; none where the
        file is not there or was changed.
        """
        found = read_json(kept) if kept is not None else None
        if found is None or found.pop("crc", None) != crc_of(found) or found["version"] != redoubt.__version__:
            return []
        flags = {n: torch.tensor(f, dtype=torch.bool, device=self.device) for n, f in found["flags"].items()}
        vars(self).update(flags, **found["facts"])
        return [Check(**check) for check in found["checks"]]

    # ---- the net itself -----------------------------------------------------------------------------------------

    def randomness(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["randomness"]
        with torch.no_grad():
            passes = [self.logits(self.x) for _ in range(int(keys["passes"]))]
        spread = max(float((difference(z, passes[0])).nan_to_num(torch.inf)) for z in passes[1:])
        changed = torch.stack([z.argmax(1) != passes[0].argmax(1) for z in passes[1:]]).any(0).sum()
        return check.judged(spread, keys["largest"], predictions_changed=int(changed), passes=len(passes))

    def probabilities(self, check: Check, draws: torch.Generator) -> Check:
        with torch.no_grad():
            z = self.logits(self.x).double()
        are = ((z >= 0) & (z <= 1)).all(1) & ((z.sum(1) - 1).abs() < 1e-3)
        return check.judged(
            float(are.double().mean()), self.keys["probabilities"]["share"], largest=float(z.abs().max())
        )

    def zero_gradients(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["zero_gradients"]
        points = [self.x]
        for _ in range(int(keys["starts"])):
            u = BALLS[self.norm].uniform(self.x.shape, draws, self.x) * self.eps
            points.append((self.x + u).clamp(0, 1))
        shares = []
        for point in points:
            gradient = self.gradient(point)
            if gradient is None:
                self.differentiable = False
                return check.judged(1.0, keys["share"], why="the logits have no gradient at all")
            shares.append(self.share(~(gradient.flatten(1).abs().amax(1) > 0)))  # NaN is no gradient either
        return check.judged(max(shares), keys["share"], at_images=shares[0], at_random_starts=shares[1:])

    def finite_differences(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["finite_differences"]
        net = copy.deepcopy(self.module).double()
        x, y, h = self.x[: int(keys["images"])].double(), self.y[: int(keys["images"])], float(keys["h"])
        x = x.clamp(2 * h, 1 - 2 * h)  # what lies outside [0, 1] is no image

        def loss(v: Tensor) -> Tensor:
            return F.cross_entropy(net.logits(v), y, reduction="none")

        point = x.clone().requires_grad_(True)
        with attack_mode(net), torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(point).sum(), point)
        wrong, total, worst = 0, 0, 0.0
        with attack_mode(net), torch.no_grad():
            for _ in range(int(keys["directions"])):
                d = torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype).sign()
                slope = (gradient * d).flatten(1).sum(1)
                measured = (loss(x + h * d) - loss(x - h * d)) / (2 * h)
                scale = torch.maximum(slope.abs(), measured.abs()).clamp_min(1e-6)  # less is rounding
                error = (slope - measured).abs() / scale
                wrong += int((~(error <= float(keys["tolerance"]))).sum())
                total += len(y)
                worst = max(worst, float(error.max()))
        return check.judged(wrong / total, keys["share"], largest_relative_error=worst, directions=total)

    def landscape(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["landscape"]
        u = BALLS[self.norm].uniform(self.x.shape, draws, self.x) * self.eps * float(keys["radius"])
        here, there = self.gradient(self.x), self.gradient((self.x + u).clamp(0, 1))
        assert here is not None
        assert there is not None
        cosine = F.cosine_similarity(here.flatten(1).double(), there.flatten(1).double(), dim=1, eps=1e-300)
        return check.judged(
            self.share(~(cosine >= float(keys["cosine"]))), keys["share"], median_cosine=float(cosine.median())
        )

    # ---- white box ----------------------------------------------------------------------------------------------

    def white_box(self, check: Check, draws: torch.Generator) -> Check:
        """The suite's PGDs and the strongest of them; the iterative ones are what later checks compare with."""
        found = {name: self.under(attack, name) for name, attack in self.pgds.items()}
        self.strongest = min(found, key=lambda name: int(found[name].sum()))
        for name, right in found.items():
            if self.pgds[name].steps > 1:
                self.white &= right
        self.standing = found[self.strongest]
        self.left = self.standing.clone()
        accuracies = {name: self.share(right) for name, right in found.items()}
        check.passed = True
        check.details = {"natural": self.share(self.natural), **accuracies, "strongest": self.strongest}
        check.details["union"] = self.share(self.white)
        if self.strongest.startswith("stand_in"):
            check.details["why"] = "the suite has no PGD: PGD-100 on cross-entropy and margin stands in"
        return check

    def iterations(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["iterations"]
        steps = int(keys["factor"]) * max(int(keys["least"]), self.reference.steps)
        check.rule = f"{steps} iterations break no more than the suite's strongest PGD (share gained)"
        return self.more(check, f"{self.reference.loss}_{steps}", self.variant(steps=steps), keys)

    def restarts(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["restarts"]
        steps, more = max(int(keys["steps"]), self.reference.steps), int(keys["more"])
        check.rule = f"these iterations and {more} random restarts more break no more than it (share gained)"
        attack = self.variant(steps=steps, start="uniform", restarts=more, step_abs=self.eps * float(keys["step"]))
        return self.more(check, f"{self.reference.loss}_{steps}x{more}", attack, keys)

    def adaptive(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["adaptive"]
        losses = self.module.adaptive(self.x[:1], self.y[:1])
        if not losses:
            return check.skipped("this defense names no attack of its own")
        pgd = PGD(eps=self.eps, norm=self.norm, steps=int(keys["steps"]), step=float(keys["step"]), start="uniform")
        rows = self.white.nonzero()[:, 0]
        union, found = self.white.clone(), {}
        if len(rows):
            x, y = self.x[rows], self.y[rows]
            for name, loss in self.module.adaptive(x, y).items():
                start = pgd.start_point(x, generator=draws)
                right = self.right(pgd(loss, x, start=start), y)
                found[name] = self.share(self.white) - float(right.sum()) / self.n
                union[rows] &= right
        gained = int(self.white.sum()) - int(union.sum())
        return check.judged(gained / self.n, self.allowed(keys), gained=found, union=self.share(union))

    def more(self, check: Check, label: str, attack: WhiteBox, keys: Mapping[str, Any]) -> Check:
        """Whether more effort breaks more than the strongest PGD; what it breaks counts as broken from then on."""
        rows = self.left.nonzero()[:, 0]
        if len(rows):
            self.left[rows] &= self.under(attack, f"{check.name}/{label}", rows)
        self.white &= self.left | ~self.standing
        before, after = self.share(self.standing), self.share(self.left)
        return check.judged(before - after, self.allowed(keys), **{self.strongest: before, label: after})

    # ---- what must not be stronger ----------------------------------------------------------------------------

    def one_step(self, check: Check, draws: torch.Generator) -> Check:
        found = {
            f"{loss}_{step:g}": self.under(
                WhiteBox(eps=self.eps, norm=self.norm, loss=loss, steps=1, step_abs=self.eps * step, start=start),
                f"one_step/{loss}/{step}",
            )
            for loss in ("ce", "margin")
            for step, start in ((1.0, "none"), (0.5, "uniform"), (1.25, "uniform"))
        }
        broken = ~torch.stack(list(found.values())).all(0)
        self.single = found["ce_1"]
        accuracies = {name: self.share(right) for name, right in found.items()}
        return check.judged(self.share(broken & self.white), self.keys["one_step"]["share"], **accuracies)

    def noise(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["noise"]
        left = self.white.clone()
        for i in range(int(keys["draws"])):
            u = BALLS[self.norm].uniform(self.x.shape, draws, self.x)
            if self.norm == "linf" and i % 2:
                u = u.sign()  # the corners of the ball
            left &= self.right((self.x + self.eps * u).clamp(0, 1))
        gained = self.white & ~left
        return check.judged(self.share(gained), keys["share"], images=gained.nonzero()[:, 0].tolist()[:20])

    def black_box(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["black_box"]
        square = AutoAttack(eps=self.eps, norm=self.norm, version=["square"], queries=int(keys["queries"]))
        self.queried = self.under(square, "square")
        return self.weaker(check, "square", self.queried, keys)

    def transfer(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["transfer"]
        self.transferred = self.natural
        if self.source is None:
            return check.skipped("audit.source=null: there is no twin")
        source = self.source
        attack = WhiteBox(eps=self.eps, norm=self.norm, steps=50, step=0.1, keep_best=False)
        adv = attack(lambda v: logits_of(source, v), self.x, self.y, self.draws("transfer"))
        assert isinstance(adv, Tensor)
        self.transferred = self.right(adv) & self.natural
        return self.weaker(check, "transfer", self.transferred, keys)

    def weaker(self, check: Check, name: str, right: Tensor, keys: Mapping[str, Any]) -> Check:
        """Whether an attack that does not see the net leaves at least as many right as PGD."""
        gain = max(0, int(self.white.sum()) - int(right.sum()))
        accuracies = {name: self.share(right), "pgd": self.share(self.white)}
        alone = int((self.white & ~right).sum())
        return check.judged(gain / self.n, float(keys["examples"]) / self.n, **accuracies, broken_by_it_alone=alone)

    # ---- curves: FSR's Figure S2 ----------------------------------------------------------------------------------

    def eps_curve(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["eps_curve"]
        # Another norm's distances are in proportion to its threat model's.
        unit = 1 / 255 if self.norm == "linf" else self.eps / 8
        grid = [float(e) * unit for e in keys["eps"]]
        adv, accuracies = self.x, []
        for eps in grid:
            if eps:
                pgd = PGD(eps=eps, norm=self.norm, steps=int(keys["steps"]), step=float(keys["step"]), start="uniform")
                start = pgd.start_point(self.x, generator=draws) if adv is self.x else adv
                adv = pgd(self.cross_entropy, self.x, start=start)
            accuracies.append(self.share(self.right(adv) & self.natural))
        self.curves["accuracy_over_eps"] = {"eps": grid, "accuracy": accuracies}
        rise = max((b - a for a, b in itertools.pairwise(accuracies)), default=0.0)
        return check.judged(max(0.0, rise), self.allowed(keys), eps=grid, accuracy=accuracies)

    def large_eps(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["eps_curve"]
        accuracies = self.curves["accuracy_over_eps"]["accuracy"]
        late = [a for e, a in zip(keys["eps"], accuracies, strict=True) if float(e) >= float(keys["guessing"])]
        if not late:
            return check.skipped(f"audit.eps_curve.eps has none from {keys['guessing']} on")
        return check.judged(max(late), float(torch.bincount(self.y).max()) / self.n)

    def iterations_curve(self, check: Check, draws: torch.Generator) -> Check:
        keys = self.keys["iterations_curve"]
        pgd = PGD(eps=self.eps, norm=self.norm, steps=max(keys["steps"]), step=float(keys["step"]), start="uniform")
        adv, done, accuracies = self.x, 0, []
        for steps in sorted(int(s) for s in keys["steps"]):
            adv = pgd(self.cross_entropy, self.x, start=adv, steps=steps - done)
            done = steps
            accuracies.append(self.share(self.right(adv) & self.natural))
        self.curves["accuracy_over_iterations"] = {"iterations": sorted(keys["steps"]), "accuracy": accuracies}
        rise = max((b - a for a, b in itertools.pairwise(accuracies)), default=0.0)
        return check.judged(max(0.0, rise), self.allowed(keys), iterations=sorted(keys["steps"]), accuracy=accuracies)

    def fsr_criteria(self, check: Check, draws: torch.Generator) -> Check:
        """FSR's own three: iterative beats one-step, white box beats black box, without a bound nothing stands."""
        keys = self.keys["fsr_criteria"]
        black = self.queried & self.transferred
        last = self.curves["accuracy_over_eps"]["accuracy"][-1]
        met = {
            "iterative_beats_one_step": self.share(self.standing) <= self.share(self.single),
            "white_box_beats_black_box": self.share(self.white) <= self.share(black),
            "accuracy_falls_to_zero": last <= float(keys["unbounded"]),
        }
        return check.judged(
            float(sum(not m for m in met.values())), 0.0, **met, one_step=self.share(self.single),
            iterative=self.share(self.standing), black_box=self.share(black), white_box=self.share(self.white),
            largest_eps=last,
        )  # fmt: skip

    # ---- pieces ----------------------------------------------------------------------------------------------------

    @property
    def reference(self) -> WhiteBox:
        """The strongest PGD of the suite."""
        return self.pgds[self.strongest]

    def variant(self, **changes: Any) -> WhiteBox:
        """The strongest PGD with other options."""
        own = self.reference
        options: dict[str, Any] = {
            "eps": self.eps, "norm": self.norm, "loss": own.loss, "kappa": own.kappa, "steps": own.steps,
            "start": own.pgd.start, "step_abs": min(own.pgd.step_size, self.eps / 4), "eot": own.eot,
            "keep_best": own.keep_best, **changes,
        }  # fmt: skip
        return WhiteBox(**options)

    def logits(self, x: Tensor) -> Tensor:
        return logits_of(self.module, x)

    def cross_entropy(self, x: Tensor) -> Tensor:
        """Of all images, attacked ones [B, 3, H, W] -> [B]."""
        return F.cross_entropy(self.logits(x), self.y, reduction="none")

    def right(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Which images are classified correctly, bool [B]."""
        with torch.no_grad():
            return correct(self.logits(x), self.y if y is None else y)

    def gradient(self, x: Tensor) -> Tensor | None:
        """Gradient of the cross-entropy [B, 3, H, W], or None where the graph is cut."""
        x = x.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            z = self.logits(x)
            if not z.requires_grad:
                return None
            loss = F.cross_entropy(z, self.y[: len(x)], reduction="sum")
            return torch.autograd.grad(loss, x, allow_unused=True)[0]

    def draws(self, name: str) -> Draws:
        return Draws(self.seed, f"audit/{name}", 0, self.device)

    def under(self, attack: Attack, name: str, rows: Tensor | None = None) -> Tensor:
        """Which images (of the rows) an attack leaves right, bool."""
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        with own_randomness(self.draws(name).library_seed, self.device):
            found = attack(self.logits, x, y, self.draws(name))
        adv, broken = found if isinstance(found, tuple) else (found, None)
        natural = self.natural if rows is None else self.natural[rows]
        right = self.right(adv, y) & natural  # what is wrong at x is broken
        return right if broken is None else right & ~broken

    def share(self, flags: Tensor) -> float:
        """Of all images."""
        return int(flags.sum()) / self.n

    def allowed(self, keys: Mapping[str, Any]) -> float:
        """The larger of some points and some examples, as a share."""
        return max(float(keys["points"]) / 100, float(keys["examples"]) / self.n)


def _writable(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become words."""
    if isinstance(value, dict):
        return {k: _writable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_writable(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def summary(checks: list[Check]) -> dict[str, Any]:
    """What audit.json says of the checks."""
    failed = [check.name for check in checks if check.passed is False]
    return {
        "passed": not failed,
        "failed": failed,
        "skipped": [check.name for check in checks if check.passed is None],
        "checks": [_writable(asdict(check)) for check in checks],
    }
