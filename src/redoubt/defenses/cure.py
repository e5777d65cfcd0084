"""CURE: Conserve, Update, Revise (Gowda et al., ICLR 2024)."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from redoubt.defenses.gradients import Gradient
from redoubt.defenses.module import RobustModule, at_least_float32
from redoubt.errors import UserError
from redoubt.objectives.base import kl_per_example
from redoubt.training.compiling import compiled
from redoubt.units import as_number

#: What is never masked unless ``exempt`` says otherwise: the tensors that the paper's Figure 6 does not list; those of
#: the authors' code for ``joint`` (names with "linear" or "fc"); and for ``soft`` and ``soft_all`` (the stem, names
#: without "conv1").
EXEMPT = {
    "rgp": ("stem", "shortcut", "classifier"),
    "joint": ("classifier",),
    "soft": ("stem", r"^(?!.*conv1)"),
    "soft_all": ("stem", r"^(?!.*conv1)"),
    "none": (),
}
LOSSES = ("base", "rgp", "rgp_old", "rgp_soft")


class CURE(RobustModule):
    """Conserves the weights that matter least for the gradient, updates the others, consults a revision model.

    The loss is ``gamma * [KL(p_rev(x) || p(x)) + KL(p_rev(x_adv) || p(x_adv))]`` (``revision``) added to

    - ``loss="base"``: the base's terms; with ``base=trades base.beta=1`` the paper's,
    - ``loss="rgp"``: ``alpha CE(x) + (1 - alpha) CE(x_adv)`` (authors' mode rgp),
    - ``loss="rgp_old"``: ``alpha CE(x) + (1 - alpha) KL(p(x) || p(x_adv))`` (authors' mode rgp_old, and their rgp_soft
      with gradient "all"),
    - ``loss="rgp_soft"``: ``CE(x) + beta KL(p(x) || p(x_adv))`` (authors' mode rgp_soft, beta 5).

    Every weight gets a score, and in each tensor those below its ``percentile`` are conserved:

    - ``criterion="rgp"``: ``alpha |dCE(x)/dw| + (1 - alpha) |dCE(x_adv)/dw|`` (as printed; two more gradients),
    - ``criterion="joint"``: the absolute gradient of the whole loss (authors' modes rgp and rgp_old; none more),
    - ``criterion="soft"``: the signed gradient of ``alpha CE(x) + (1 - alpha) KL`` (authors' rgp_soft; one more),
    - ``criterion="soft_all"``: the signed gradient of the whole loss (their rgp_soft with gradient "all"; none more),
    - ``criterion="none"``: nothing is conserved.

    ``freeze="gradient"`` zeroes the gradient of what is conserved, as paper and code do: momentum and weight decay
    still move it. ``freeze="update"`` keeps the bits of the weight and of its optimizer state.

    The revision model is a moving average of the student's parameters, with probability ``rate`` per step ``d`` times
    itself plus ``1 - d`` times the student. It moves before the step's losses (``loss="base"``, the printed order) or
    after the step (the authors' losses). As in the authors' code it is forwarded with batch statistics, its own running
    ones follow, and its outputs carry no gradient.

    Args:
        net: Maps pixels [B, 3, H, W] to logits [B, K].
        criterion, loss, freeze: As above.
        alpha: Weight of clean against adversarial images, in [0, 1].
        percentile: p: how many per cent of each tensor are conserved, in [0, 100).
        exempt: What is never masked: ``stem``, ``shortcut``, ``classifier`` or regular expressions searched for in the
            parameters' names; None takes ``EXEMPT``.
        gamma: Weight of the consistency with the revision model.
        beta: Of ``loss="rgp_soft"``.
        rate: Probability r that the revision model moves in a step.
        rate_decay: ``none``; ``linear``: r falls to 0 at the end; ``halving``: r is halved in every step of
            the second half of the epochs (authors' option: after epoch 100 of 200).
        decay: d.
        decay_warmup: Take ``min(1 - 1/(k+1), d)`` in step k = 1, 2, ... (authors' code).
        warmup_epochs: Epochs of plain training on clean images in the same run before all this begins (CURE_Eff); the
            revision model begins as a copy of the student after them. Schedules run on.

    Raises:
        UserError: A value out of range, or a mask without any tensor.
    """

    bases = ("at", "trades", "mart")
    weight_sets = ("student", "ema", "revision")

    def __init__(
        self,
        *,
        net: nn.Module,
        criterion: str = "rgp",
        loss: str = "base",
        freeze: str = "gradient",
        alpha: float = 0.1,
        percentile: float = 30.0,
        exempt: str | Sequence[str] | None = None,
        gamma: float = 1.0,
        beta: float = 5.0,
        rate: float = 0.2,
        rate_decay: str = "none",
        decay: float = 0.999,
        decay_warmup: bool = False,
        warmup_epochs: float = 0.0,
        **rest: Any,
    ) -> None:
        options = {
            "criterion": (criterion, tuple(EXEMPT)),
            "loss": (loss, LOSSES),
            "freeze": (freeze, ("gradient", "update")),
            "rate_decay": (rate_decay, ("none", "linear", "halving")),
        }
        for name, (value, known) in options.items():
            if value not in known:
                raise UserError(f"defense.{name}={value!r} is not known: take one of {', '.join(known)}")
        ranges = {
            "alpha": (alpha, 1.0), "percentile": (percentile, 100.0), "gamma": (gamma, math.inf),
            "beta": (beta, math.inf), "rate": (rate, 1.0), "decay": (decay, 1.0),
            "warmup_epochs": (warmup_epochs, math.inf),
        }  # fmt: skip
        numbers = {name: as_number(number, f"defense.{name}") for name, (number, _) in ranges.items()}
        for name, (_, most) in ranges.items():
            if not 0 <= numbers[name] <= most:
                raise UserError(f"defense.{name}={numbers[name]:g} must lie in [0, {most:g}]")
        if numbers["percentile"] == 100:
            raise UserError("defense.percentile=100 would conserve everything: take less than 100")
        if not isinstance(decay_warmup, bool):
            raise UserError(f"defense.decay_warmup={decay_warmup!r} must be true or false")
        super().__init__(net=net, **rest)
        if numbers["warmup_epochs"] >= self.schedule.max_epochs:
            raise UserError(
                f"defense.warmup_epochs={warmup_epochs} leaves nothing of trainer.max_epochs={self.schedule.max_epochs}"
            )
        if self.weights == "revision" and not numbers["gamma"]:
            raise UserError("evaluation.weights=revision: with defense.gamma=0 the revision model is never forwarded")
        self.criterion = criterion if numbers["percentile"] else "none"
        self.loss_kind, self.freeze_kind, self.rate_decay = loss, freeze, rate_decay
        self.alpha, self.percentile = numbers["alpha"], numbers["percentile"]
        self.gamma, self.beta, self.rate = numbers["gamma"], numbers["beta"], numbers["rate"]
        self.decay, self.decay_warmup, self.warmup_epochs = numbers["decay"], decay_warmup, numbers["warmup_epochs"]
        self.revision = copy.deepcopy(self.net).requires_grad_(False)
        if rest.get("compile"):
            self.revise = compiled(self.revise, rest["compile"])  # type: ignore[method-assign]
        patterns = EXEMPT[self.criterion] if exempt is None else (exempt,) if isinstance(exempt, str) else exempt
        if not isinstance(patterns, Sequence) or not all(isinstance(entry, str) for entry in patterns):
            raise UserError(f"defense.exempt={exempt!r} must be a name, a regular expression or a list of them")
        self.masked = masked_names(self.net, patterns, given=exempt is not None) if self.criterion != "none" else []

    # ---- the revision model -----------------------------------------------------------------------------------

    def revise(self, x: Tensor) -> Tensor:
        """Logits [B, K] of the revision model."""
        return self.revision(x)

    @torch.no_grad()
    def revised(self, x: Tensor) -> Tensor:
        """Its logits in a training forward, without gradient; in float32 at least."""
        for own, students in zip(self.revision.modules(), self.net.modules(), strict=True):
            own.training = students.training
        return at_least_float32(self.revise(x))

    @torch.no_grad()
    def move_revision(self) -> None:
        """With this step's probability: ``theta_rev <- d theta_rev + (1 - d) theta``, parameters only."""
        # Drawn on the host, for there it is decided; the same coin on every rank.
        coin = torch.rand((), generator=self.generator("revision", torch.device("cpu"))).item()
        if coin >= self.rate * self.rate_factor():
            return
        k = self.steps_done - self.warmup_steps + 1
        d = min(1 - 1 / (k + 1), self.decay) if self.decay_warmup else self.decay
        torch._foreach_lerp_(list(self.revision.parameters()), list(self.net.parameters()), 1 - d)

    def adaptive(self, x: Tensor, y: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """By the revision model, whose predictions the student was held to."""
        return {"revision": lambda adv: F.cross_entropy(at_least_float32(self.revise(adv)), y, reduction="none")}

    def rate_factor(self) -> float:
        """What ``rate_decay`` makes of the rate in this step."""
        if self.rate_decay == "linear":
            length = self.schedule.max_epochs * self.steps_per_epoch - self.warmup_steps
            return max(0.0, 1 - (self.steps_done - self.warmup_steps) / length)
        if self.rate_decay == "halving":
            half = self.schedule.max_epochs // 2 * self.steps_per_epoch
            return 0.5 ** min(max(0, self.steps_done + 1 - half), 1000)
        return 1.0

    @property
    def warmup_steps(self) -> int:
        """Steps of plain training at the beginning."""
        return round(self.warmup_epochs * self.steps_per_epoch)

    @property
    def warming(self) -> bool:
        """Whether this step is one of plain training."""
        return self.steps_done < self.warmup_steps

    # ---- one training step ------------------------------------------------------------------------------------

    def craft(self, x: Tensor, y: Tensor) -> Tensor:
        return x if self.warming else super().craft(x, y)

    def terms(self, x: Tensor, adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.warming:
            return {"ce": self.objective.cross_entropy(self.training_logits(x, "clean")[0], y)}
        return self.forwards(x, adv, y)[2]

    def forwards(self, x: Tensor, adv: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
        """Training logits of x (where anything wants them) and of adv [B, K], and the terms of the same forwards."""
        clean = self.training_logits(x, "clean")[0] if self.needs_clean else None
        crafted = self.training_logits(adv, "adv")[0]
        self.clean_again(x)
        self.note_accuracy(crafted, y)
        terms = self.main_terms(clean, crafted, y)
        if self.gamma:
            assert clean is not None
            pairs = ((self.revised(x), clean), (self.revised(adv), crafted))
            consistency = torch.stack([kl_per_example(target, logits).mean() for target, logits in pairs]).sum()
            terms |= {"revision": self.gamma * consistency}
        return clean, crafted, terms

    @property
    def needs_clean(self) -> bool:
        """Whether loss or scores want training logits of the clean images."""
        scores = self.criterion == "soft" or (self.criterion == "rgp" and self.alpha > 0)
        return scores or self.gamma > 0 or self.loss_kind != "base" or self.objective.needs_clean

    def main_terms(self, clean: Tensor | None, crafted: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The terms that ``loss`` names."""
        if self.loss_kind == "base":
            return self.objective.outer(crafted, y, clean)
        assert clean is not None
        ce = self.objective.cross_entropy
        if self.loss_kind == "rgp":
            return {"ce": self.alpha * ce(clean, y), "ce_adv": (1 - self.alpha) * ce(crafted, y)}
        of_ce, of_kl = (self.alpha, 1 - self.alpha) if self.loss_kind == "rgp_old" else (1.0, self.beta)
        return {"ce": of_ce * ce(clean, y), "kl": of_kl * kl_per_example(clean, crafted).mean()}

    def update(self, x: Tensor, adv: Tensor, y: Tensor) -> None:
        """Scores, mask, step; plain training while it warms up."""
        if self.warming:
            super().update(x, adv, y)
            return
        if self.loss_kind == "base":
            self.move_revision()
        params, named = self.trained(), dict(self.net.named_parameters())
        masked = [named[name] for name in self.masked]

        def losses(*batch: Tensor) -> list[Tensor]:
            clean, crafted, terms = self.forwards(*batch)
            return [*self.scored(clean, crafted, batch[2]), self.noted(terms, len(batch[0]))]

        wanted = [*([masked] * self.score_gradients), params]
        with self.traceless() if self.perturbs else nullcontext():
            *found, gradient = self.gradients(losses, wanted, x, adv, y)
        scores = self.scores(found, dict(zip(params, gradient, strict=True)), masked)
        if self.perturbs:
            # Scores belong to the weights as they are; the gradient of the loss there is AWP's ascent.
            with self.perturbed(x, adv, y, ascent=gradient):
                (gradient,) = self.gradients(lambda *batch: [self.loss(*batch)], [params], x, adv, y)
        conserved = {p: score < threshold(score, self.percentile) for p, score in zip(masked, scores, strict=True)}
        for i, (p, g) in enumerate(zip(params, gradient, strict=True)):
            if g is not None and p in conserved:
                gradient[i] = g.masked_fill(conserved[p], 0.0)
        self.note_updates(conserved.values())
        optimizer = self.raw_optimizers()[0]
        with self.kept(optimizer, conserved):
            self.step((optimizer, params, gradient))

    def after_step(self) -> None:
        if self.warming:  # until they part, the revision model is the student
            copies, originals = (list(net.state_dict().values()) for net in (self.revision, self.net))
            torch._foreach_copy_(copies, originals)
        elif self.loss_kind != "base":
            self.move_revision()
        super().after_step()

    # ---- scores and masks -------------------------------------------------------------------------------------

    @property
    def score_gradients(self) -> int:
        """How many gradients the scores need beside the loss's own."""
        return {"rgp": 2 if 0 < self.alpha < 1 else 1, "soft": 1}.get(self.criterion, 0)

    def scored(self, clean: Tensor | None, crafted: Tensor, y: Tensor) -> list[Tensor]:
        """The losses whose gradients make the scores; cross-entropies without label smoothing."""
        if self.criterion == "rgp":
            pairs = ((clean, self.alpha), (crafted, 1 - self.alpha))
            return [F.cross_entropy(logits, y) for logits, weight in pairs if weight and logits is not None]
        if self.criterion == "soft":
            assert clean is not None
            kl = kl_per_example(clean, crafted).mean()
            return [self.alpha * F.cross_entropy(clean, y) + (1 - self.alpha) * kl]
        return []

    def scores(
        self, found: Sequence[Gradient], gradient: Mapping[nn.Parameter, Tensor | None], masked: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """A score for every weight, shaped as ``masked``.

        Args:
            found: Gradients of ``scored``.
            gradient: Gradient of the loss by parameter.
            masked: The parameters to be masked.
        """
        if self.criterion == "joint":
            return [_or_zero(gradient[p], p).abs() for p in masked]
        if self.criterion == "soft_all":
            return [_or_zero(gradient[p], p) for p in masked]
        if self.criterion == "soft":
            return [_or_zero(g, p) for g, p in zip(found[0], masked, strict=True)]
        if self.criterion == "rgp":
            weights = [weight for weight in (self.alpha, 1 - self.alpha) if weight]
            columns = zip(*found, strict=True)
            return [
                torch.stack([w * _or_zero(g, p).abs() for w, g in zip(weights, column, strict=True)]).sum(0)
                for p, column in zip(masked, columns, strict=True)
            ]
        return []

    def note_updates(self, conserved: Iterable[Tensor]) -> None:
        """The share of each tensor that the mask lets through, for the log of the first and the last epoch.

        Not what moves: with ``freeze="gradient"`` that is nearly everything. More than ``1 - percentile`` passes where
        scores tie at the threshold, as those of entries without any gradient do.
        """
        epoch = self.steps_done // self.steps_per_epoch
        if epoch in (math.ceil(self.warmup_epochs), self.schedule.max_epochs - 1):
            for name, mask in zip(self.masked, conserved, strict=True):
                self.tally.add(f"updated/{name}", 1 - mask.float().mean(), 1)

    @contextmanager
    def kept(self, optimizer: Optimizer, conserved: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """With ``freeze="update"``, conserved entries of weights and optimizer state come out as they went in."""
        if self.freeze_kind != "update":
            yield
            return
        before = {p: (p.detach().clone(), {k: v.clone() for k, v in _like(optimizer, p)}) for p in conserved}
        yield
        for p, mask in conserved.items():
            weight, state = before[p]
            p.data.copy_(torch.where(mask, weight, p.data))
            for key, now in _like(optimizer, p):
                now.copy_(torch.where(mask, state.get(key, torch.zeros_like(now)), now))

    # ---- other nets than the student --------------------------------------------------------------------------

    def moving_buffers(self) -> list[Tensor]:
        return super().moving_buffers() + [b for b in self.revision.buffers() if b.is_floating_point()]

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        if self.weights != "revision":
            with super().evaluated_weights():
                yield
            return
        self.net, self.revision = self.revision, self.net
        try:
            yield
        finally:
            self.net, self.revision = self.revision, self.net

    def evaluated_state(self, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        state = super().evaluated_state(checkpoint)
        if self.weights == "revision":
            state |= {f"net.{k[9:]}": v for k, v in state.items() if k.startswith("revision.")}
        return state

    def start_from(self, backbone: nn.Module) -> None:
        """Student and revision model begin from the same trained net."""
        super().start_from(backbone)
        self.revision.load_state_dict(self.net.state_dict())


def threshold(score: Tensor, percentile: float) -> Tensor:
    """The value below which lie the entries under a percentile, as ``score < numpy.percentile(score, p)`` tells them.

    NumPy interpolates linearly between the two order statistics around rank ``p (n - 1) / 100``; below the interpolated
    value lies what is below the upper one. It is taken where the scores are, and of any number of them.

    Args:
        score: Any shape, n entries.
        percentile: In [0, 100).

    Returns:
        A scalar, one of the entries.
    """
    flat = score.flatten()
    k = math.ceil(percentile * (flat.numel() - 1) / 100 - 1e-9) + 1
    # Not kthvalue: quadratic on a CPU for some orders of the entries, and no deterministic mode on a GPU.
    return flat.topk(k, largest=False, sorted=False).values.amax()


def masked_names(net: nn.Module, exempt: Sequence[str], given: bool = True) -> list[str]:
    """Names of the parameters that are masked: those that no entry of ``exempt`` takes out.

    Args:
        net: The net.
        exempt: Words ``stem``, ``shortcut``, ``classifier``, or regular expressions.
        given: Whether they are the user's: then an expression that fits no parameter is an error.
    """
    groups = {"stem": stem(net), "classifier": classifier(net)}
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    out: set[str] = set()
    for entry in exempt:
        if entry == "shortcut":
            found = {n for n in names if re.search(r"(?i)shortcut|downsample", n)}
        elif entry in groups:
            found = {n for n in names if any(n.startswith(f"{module}.") for module in groups[entry])}
        else:
            try:
                found = {n for n in names if re.search(entry, n)}
            except re.error as error:
                raise UserError(f"defense.exempt={entry!r} is no regular expression: {error}") from error
            if given and not found:
                raise UserError(f"defense.exempt={entry!r} fits no parameter of this net, such as {names[0]}")
        out |= found
    left = [name for name in names if name not in out]
    if not left and not given:
        raise UserError(
            f"defense.criterion: of this net no parameter is conserved by default (never masked: {', '.join(exempt)}): "
            f"say what is not to be by defense.exempt, as [stem,classifier]"
        )
    if not left:
        raise UserError(f"defense.exempt={list(exempt)} leaves nothing of this net to be conserved: name less")
    return left


def stem(net: nn.Module) -> list[str]:
    """Names of the first convolution and of a normalisation that directly follows it in the same module."""
    owners = [(name, m) for name, m in net.named_modules() if any(True for _ in m.parameters(recurse=False))]
    for (name, module), (after, follower) in itertools.pairwise(owners):
        if isinstance(module, nn.Conv2d):
            beside = name.rpartition(".")[0] == after.rpartition(".")[0]
            return [name, after] if beside and isinstance(follower, nn.modules.batchnorm._BatchNorm) else [name]
    return []


def classifier(net: nn.Module) -> list[str]:
    """Name of the last linear layer, or of the sequence of layers that it ends."""
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        return []
    parent = linear[-1].rpartition(".")[0]
    return [parent] if parent and isinstance(net.get_submodule(parent), nn.Sequential) else [linear[-1]]


def _or_zero(g: Tensor | None, p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if g is None else g


def _like(optimizer: Optimizer, p: nn.Parameter) -> list[tuple[str, Tensor]]:
    """What the optimizer keeps for every entry of a parameter."""
    return [(k, v) for k, v in optimizer.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape]
