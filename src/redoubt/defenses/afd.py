"""AFD: Adversarial Fine-tuning via Disentanglement (Zhou et al., AAAI 2025)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from redoubt.defenses.gradients import Gradient
from redoubt.defenses.module import RobustModule, at_least_float32
from redoubt.errors import UserError
from redoubt.nets import Backbone, attack_mode, load_weights
from redoubt.objectives.base import wrong_label
from redoubt.training.compiling import compiled
from redoubt.units import as_number

#: (f1, f2, z2): the robust and the non-robust feature [B, d], and the latter's logits [B, K].
Sides = tuple[Tensor, Tensor, Tensor]


class DisentangledHead(nn.Module):
    """The classifier behind two linear maps of the feature f [B, d]: ``z1 = W D1 f + b``, ``z2 = W D2 sg(f) + b``.

    D1 and D2 begin as the identity, so that the net begins as the one that it was. Only z1 is returned; in a training
    forward (``wanted``) ``sides`` holds f1, f2 and z2 of the same forward.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        d, like = linear.in_features, {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.linear = linear
        self.d1 = nn.Linear(d, d, bias=False, **like)
        self.d2 = nn.Linear(d, d, bias=False, **like)
        for layer in (self.d1, self.d2):
            nn.init.eye_(layer.weight)
        self.wanted = False
        self.sides: Sides | None = None

    def forward(self, f: Tensor) -> Tensor:
        f1 = self.d1(f)
        if self.wanted:
            f2 = self.d2(f.detach())
            self.sides = (f1, f2, self.linear(f2))
        return self.linear(f1)

    def merged(self) -> nn.Linear:
        """The plain classifier with weight ``W D1`` [K, d] and the same bias (methods 7.7)."""
        plain = copy.deepcopy(self.linear)
        # The product is rounded once, not once per term.
        plain.weight.data = (self.linear.weight.double() @ self.d1.weight.double()).to(plain.weight.dtype).detach()
        return plain


class AFD(RobustModule):
    """Fine-tunes a natural model: disentangles the non-robust feature, aligns the rest to a frozen teacher's.

    The terms, on the crafted examples of one training forward, with f_T the teacher's feature of the clean images:

    - ``neg``: ``alpha * CE(z2, y')`` with y' the highest-scoring wrong class of z1,
    - ``cos``: ``beta * mean cos(f1, f2)``, signed,
    - ``align``: ``gamma * (1 - mean cos(f1, f_T))``,
    - the base's on z1 (``at``: ``CE(z1, y)``); with ``align`` they are L_rob.

    ``update="accumulated"`` is the authors' (methods 7.5): three optimizers with momentum and decay of their own, whose
    gradients accumulate. D2 steps along neg; then backbone and D1 along cos and the classifier along neg; then backbone
    and D1 along ``cos + L_rob`` and the classifier along ``neg + L_rob``. Here all gradients are taken at the same
    weights; their code, in the old PyTorch that it needs, takes the last ones after the second step.

    ``update="legacy"`` is the same with the weight decay of that PyTorch (before 1.2): its SGD added decay into the
    gradient in place, so that the third step finds the second's there, and decay acts three times per batch on all but
    D2 (methods 13.1).

    ``update="joint"`` is one step of one optimizer: D2 along neg, all else along ``cos + L_rob``; neg trains D2 alone.

    Student and teacher are the same net at the start (``start_from``); from scratch the teacher is the untrained net.
    ``deployed`` is the plain backbone with the classifier ``W D1``.

    Args:
        net: A backbone with a linear classifier (`redoubt.nets.Backbone`).
        alpha, beta, gamma: Weights of the three terms; the authors' code calls beta sigma.
        update: ``accumulated``, ``legacy`` or ``joint``.

    Raises:
        UserError: A value out of range, or a net without a classifier of its own.
    """

    bases = ("at", "trades", "mart")

    def __init__(
        self,
        *,
        net: nn.Module,
        alpha: float = 0.05,
        beta: float = 0.25,
        gamma: float = 25.0,
        update: str = "accumulated",
        **rest: Any,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if as_number(value, f"defense.{name}") < 0:
                raise UserError(f"defense.{name}={value} must not be negative")
        if update not in ("accumulated", "legacy", "joint"):
            raise UserError(f"defense.update={update!r} is not known: take accumulated, legacy or joint")
        if not isinstance(net, Backbone):
            raise UserError("model: AFD needs a net with get_classifier and forward_head (redoubt.nets.Backbone)")
        teacher = copy.deepcopy(net).requires_grad_(False)
        classifier = net.get_classifier()
        head_name = net.head_name
        net.set_submodule(head_name, DisentangledHead(classifier))
        super().__init__(net=net, **rest)
        self.teacher, self.head_name = teacher.to(memory_format=self.format), head_name
        self.alpha, self.beta, self.gamma = float(alpha), float(beta), float(gamma)
        self.joint, self.legacy = update == "joint", update == "legacy"
        if self.legacy and not isinstance(self.make_optimizer([torch.zeros(1, requires_grad=True)]), torch.optim.SGD):
            raise UserError("defense.update=legacy is the weight decay of SGD: take optimizer=sgd, or accumulated")
        if rest.get("compile"):
            self.teach = compiled(self.teach, rest["compile"])  # type: ignore[method-assign]

    @property
    def head(self) -> DisentangledHead:
        """The student's classifier and its maps."""
        head = self.net.get_submodule(self.head_name)
        assert isinstance(head, DisentangledHead)
        return head

    def run(self, x: Tensor, noise: bool | None = None) -> tuple[Tensor, Any]:
        """One forward: (z1, (f1, f2, z2)); the latter only in a training forward."""
        head = self.head
        head.wanted = noise is not None
        try:
            return self.net(x), head.sides or ()
        finally:
            head.wanted, head.sides = False, None

    def draw_noise(self, x: Tensor, purpose: str) -> bool:
        """Nothing random; says that the features are wanted."""
        return True

    def teach(self, x: Tensor) -> Tensor:
        """The teacher's feature [B, d] of images [B, 3, H, W]."""
        return self.teacher.forward_head(self.teacher.forward_features(x), pre_logits=True)

    def terms(self, x: Tensor, adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The base's terms on z1 and the three of AFD; L_rob is all but ``neg`` and ``cos``."""
        clean = self.training_logits(x, "clean")[0] if self.objective.needs_clean else None
        z1, (f1, f2, z2) = self.training_logits(adv, "adv")
        with torch.no_grad(), attack_mode(self.teacher):
            taught = self.teach(x)
        self.clean_again(x)
        self.note_accuracy(z1, y)
        return self.objective.outer(z1, y, clean) | {
            "neg": self.alpha * F.cross_entropy(at_least_float32(z2), wrong_label(z1, y)),
            # The cosine never reaches D2: in the authors' code D2 has stepped before.
            "cos": self.beta * cosine(f1, f2.detach()).mean(),
            "align": self.gamma * (1 - cosine(f1, taught).mean()),
        }

    def shares(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """What is trained: D2; the classifier; backbone and D1."""
        head = self.head
        d2, classifier = list(head.d2.parameters()), list(head.linear.parameters())
        apart = {id(p) for p in (*d2, *classifier)}
        return d2, classifier, [p for p in self.trained() if id(p) not in apart]

    def update(self, x: Tensor, adv: Tensor, y: Tensor) -> None:
        """All gradients at the same weights, then the steps of ``update``."""
        d2, classifier, body = self.shares()

        def losses(*batch: Tensor) -> list[Tensor]:
            terms = self.terms(*batch)
            self.noted(terms, len(batch[0]))
            neg, cos = terms.pop("neg"), terms.pop("cos")
            robust = torch.stack(list(terms.values())).sum()
            return [neg, cos + robust] if self.joint else [neg, cos, robust]

        theta = body + classifier
        params = [d2, theta] if self.joint else [d2 + classifier, body, theta]
        with self.perturbed(x, adv, y):
            neg, *others = self.gradients(losses, params, x, adv, y)
        optimizers = self.raw_optimizers()
        if self.joint:
            self.step((optimizers[0], d2 + theta, neg + others[0]))
            return
        cos, robust = others
        second = cos + neg[1:]
        left = with_decay(optimizers[1], theta, second) if self.legacy else second
        third = [a if b is None else b if a is None else a + b for a, b in zip(left, robust, strict=True)]
        self.step((optimizers[0], d2, neg[:1]), (optimizers[1], theta, second), (optimizers[2], theta, third))

    def configure_optimizers(self) -> list[Any]:
        """In the order of their steps; the second and the third move the same parameters."""
        d2, classifier, body = self.shares()
        if self.joint:
            return [self.optimizer_of(d2 + body + classifier)]
        return [self.optimizer_of(params) for params in (d2, body + classifier, body + classifier)]

    def watched(self, x: Tensor, adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Gaps of the last-layer feature, per image and then averaged.

        ``student``, ``teacher``: each net's own between x and adv; ``across``: teacher on x, student on adv.
        ``linf`` is the largest difference of an entry, ``cos`` is 1 - cosine.
        """
        with torch.no_grad(), attack_mode(self.teacher):
            student, teacher = ([at_least_float32(of(v)) for v in (x, adv)] for of in (self.feature, self.teach))
        pairs = {"student": student, "teacher": teacher, "across": [teacher[0], student[1]]}
        gaps = {}
        for name, (a, b) in pairs.items():
            gaps[f"gap_{name}_linf"] = (a - b).abs().amax(1).mean()
            gaps[f"gap_{name}_cos"] = 1 - cosine(a, b).mean()
        return gaps

    def feature(self, x: Tensor) -> Tensor:
        """f1 [B, d] of images [B, 3, H, W]."""
        return self.run(x, True)[1][0]

    def adaptive(self, x: Tensor, y: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """By the non-robust branch's logits ``W D2 f + b``, and by the distance of the robust feature f1 to x's own."""
        head = self.head

        def branch(adv: Tensor) -> Tensor:
            net = cast(Backbone, self.net)
            features = at_least_float32(net.forward_head(net.forward_features(adv), pre_logits=True))
            return F.cross_entropy(head.linear(head.d2(features)), y, reduction="none")

        with torch.no_grad():
            clean = self.feature(x)
        return {"d2": branch, "feature": lambda adv: (self.feature(adv) - clean).square().sum(1)}

    def start_from(self, backbone: nn.Module) -> None:
        """Teacher and student begin from the same trained net, D1 and D2 as the identity."""
        state, prefix = backbone.state_dict(), f"{self.head_name}."
        load_weights(self.teacher, state, "defense.pretrained")
        renamed = {k.replace(prefix, f"{prefix}linear.", 1) if k.startswith(prefix) else k: v for k, v in state.items()}
        self.net.load_state_dict(self.net.state_dict() | renamed)
        if self.ema is not None:
            self.ema.restart()

    def deployed(self) -> nn.Module:
        """The plain backbone with the classifier ``W D1``; D1, D2 and teacher are gone."""
        net = super().deployed()
        head = net.get_submodule(self.head_name)
        assert isinstance(head, DisentangledHead)
        net.set_submodule(self.head_name, head.merged())
        return net


def with_decay(optimizer: Optimizer, params: Sequence[nn.Parameter], gradient: Gradient) -> Gradient:
    """What SGD before PyTorch 1.2 left in the gradients that it stepped along: each with its weight decay added."""
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return [None if g is None else g + decays[p] * p.detach() for p, g in zip(params, gradient, strict=True)]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between rows [B, d], at least float32 [B]."""
    return F.cosine_similarity(at_least_float32(a), at_least_float32(b), dim=1)
