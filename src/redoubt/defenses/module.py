"""`RobustModule`: one training step of any objective; it is itself ``defense=none``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from redoubt.attacks import PGD
from redoubt.data import Batch
from redoubt.defenses import gradients as grad
from redoubt.defenses.awp import AWP
from redoubt.defenses.gradients import Gradient, Losses, Share
from redoubt.defenses.tally import Tally, Watch
from redoubt.errors import UserError
from redoubt.nets import Folding, attack_mode, load_weights
from redoubt.objectives import Objective
from redoubt.rng import generator
from redoubt.training.compiling import compiled
from redoubt.training.ema import EMA
from redoubt.training.schedule import Schedule
from redoubt.training.stopping import requests


class RobustModule(LightningModule):
    """Adversarial training of one net by one objective.

    A defense derives from it and overrides what it changes: ``run``, ``draw_noise`` and ``auxiliary`` (more
    losses on the same forward), ``terms``, ``update`` (other gradients or steps) or ``after_step``; and, where it has
    nets of its own, ``start_from``, ``evaluated_weights`` and ``deployed``. Optimisation is manual throughout, so that
    clipping, precision, accumulation, schedules and ranks take one path.

    Args:
        net: Maps pixels [B, 3, H, W] in [0, 1] to logits [B, K].
        objective: The inner loss and the outer terms.
        inner: The attack that crafts training examples; one without steps leaves the images as they are.
        optimizer: Makes the optimizer from parameters; it must be a fused one of torch (its step is called off
            on the device when a loss is not finite).
        schedule: Factor on the learning rate.
        validation: The attack whose accuracy is watched after each epoch.
        num_classes, image_size: Of the data.
        seed: Of every random number drawn here.
        clip: Largest norm of the whole gradient, or None.
        accumulate: Micro-batches per step; BatchNorm sees one micro-batch at a time.
        ema_decay, ema_warmup: Weight averaging; None switches it off.
        awp_rho, awp_warmup: Adversarial weight perturbation and the epochs before it begins; None switches it off.
        weights: Which weights are validated and evaluated, one of ``weight_sets``.
        compile: Whether the net is compiled (torch.compile), or in which mode.
        channels_last: Memory format of net and images.
        fold: Attacks go through convolution and BatchNorm as one; never where the net is compiled.
    """

    #: The names of the classes that it was trained on, in the order of its logits, where they are known.
    classes: list[str] | None = None
    #: The order in which an evaluation takes its logits, where it is not their own.
    columns: list[int] | None = None
    #: Bases that the defense is defined with.
    bases: tuple[str, ...] = ("standard", "at", "trades", "mart")
    #: What ``evaluation.weights`` may name.
    weight_sets: tuple[str, ...] = ("student", "ema")

    def __init__(
        self,
        *,
        net: nn.Module,
        objective: Objective,
        inner: PGD,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
        validation: PGD,
        num_classes: int,
        image_size: int | Sequence[int],
        seed: int = 0,
        clip: float | None = None,
        accumulate: int = 1,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        awp_rho: float | None = None,
        awp_warmup: float | None = None,
        weights: str = "student",
        compile: bool | str = False,
        channels_last: bool = False,
        fold: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if weights not in self.weight_sets or (weights == "ema" and ema_decay is None):
            others = [name for name in self.weight_sets if name != "ema"]
            raise UserError(
                f"evaluation.weights={weights!r}: take {' or '.join(others)}, or ema where ema.decay is set "
                f"(it is {ema_decay})"
            )
        if not isinstance(fold, bool):
            raise UserError(f"fold={fold!r} must be true or false")
        if accumulate < 1:
            raise UserError(f"trainer.accumulate={accumulate} must be at least 1")
        if clip is not None and clip <= 0:
            raise UserError(f"optimizer.clip={clip} must be positive; null switches clipping off")
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=self.format)
        self.objective, self.inner, self.validation = objective, inner, validation
        self.make_optimizer, self.schedule = optimizer, schedule
        self.num_classes, self.image_size, self.seed = num_classes, image_size, seed
        self.clip, self.accumulate, self.weights = clip, accumulate, weights
        self.ema = EMA(self.net, decay=ema_decay, warmup=ema_warmup) if ema_decay is not None else None
        self.awp = AWP(rho=awp_rho, warmup=awp_warmup or 0.0) if awp_rho else None
        self.scale: grad.LossScale | None = None
        self.steps_done = 0
        self.share: Share | None = None
        self.tally, self.watch = Tally(), Watch()
        self.fold, self.folding = fold and not compile, cast(Folding | None, None)
        if compile:
            self.run = compiled(self.run, compile)  # type: ignore[method-assign]

    # ---- what every attack sees -------------------------------------------------------------------------------

    def run(self, x: Tensor, noise: Any = None) -> tuple[Tensor, Any]:
        """One forward of the net: (logits, side outputs). This function is what is compiled.

        Args:
            x: Pixels [B, 3, H, W].
            noise: What ``draw_noise`` gave, in a training forward; None where the forward is deterministic.
        """
        return self.net(x), ()

    def logits(self, x: Tensor) -> Tensor:
        """Deterministic logits [B, K] of pixels [B, 3, H, W], at least float32. What every attack sees."""
        return at_least_float32(self.run(x)[0])

    forward = logits

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Inside, the net holds the weights that are evaluated (``weights``)."""
        with self.ema.applied() if self.weights == "ema" and self.ema else nullcontext():
            yield

    @contextmanager
    def folded(self, x: Tensor) -> Iterator[None]:
        """Inside, forwards in evaluation mode take each convolution and the BatchNorm behind it as one (``fold``).

        Equal but for rounding. What is trained or scored goes through the net as it is.

        Args:
            x: Images such as will go through it [B, 3, H, W].
        """
        if not self.fold:
            yield
            return
        if self.folding is None or self.folding.stale:
            with torch.no_grad():
                self.folding = Folding(self.net, lambda: self.run(x[:1]))
        with self.folding.applied():
            yield

    def evaluated_state(self, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """The checkpoint's ``state_dict`` with the evaluated weights in the net's place.

        Raises:
            UserError: The checkpoint does not hold them.
        """
        state = dict(checkpoint["state_dict"])
        if self.weights == "ema":
            average = checkpoint["redoubt"]["ema"]
            if average is None:
                raise UserError("it holds no averaged weights: take evaluation.weights=student")
            # The average has buffers too that no checkpoint saves: model.normalize's mean and std.
            state |= {f"net.{name}": tensor for name, tensor in average.items() if f"net.{name}" in state}
        return state

    def deployed(self) -> nn.Module:
        """A copy of the evaluated net for use elsewhere, in evaluation mode, without what only training needs."""
        with self.evaluated_weights():
            return copy.deepcopy(self.net).eval().requires_grad_(True)

    def start_from(self, backbone: nn.Module) -> None:
        """Begins from a trained net of the same model (``defense.pretrained``) instead of fresh weights."""
        load_weights(self.net, backbone.state_dict(), "defense.pretrained")
        if self.ema is not None:
            self.ema.restart()

    def adaptive(self, x: Tensor, y: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """Attacks made for this defense, as losses that an attacker who knows it would raise; none here.

        Args:
            x: Clean images [B, 3, H, W]; y: labels [B].

        Returns:
            {name: function of images [B, 3, H, W] to losses [B]}, in the nets' evaluation mode. What they find is
            scored by ``logits``.
        """
        return {}

    # ---- one training step ------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x = batch.x.contiguous(memory_format=self.format)
        self.share = Share(batch.start, len(x), batch.total)
        progress = self.steps_done / self.steps_per_epoch
        for optimizer in self.raw_optimizers():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule.factor(progress)
        adv = torch.cat([self.craft(x[part], batch.y[part]) for part in self.micro_batches()])
        self.update(x, adv, batch.y)
        self.share = None
        self.after_step()

    def craft(self, x: Tensor, y: Tensor) -> Tensor:
        """Training examples [B, 3, H, W]: ``objective.inner`` over ``logits``, raised by the inner attack."""
        steps, size = self.inner.stage(self.steps_done / self.steps_per_epoch / self.schedule.max_epochs)
        if not steps:
            return x
        rows = (self.share.first, self.share.total) if self.share else None
        start = self.inner.start_point(x, generator=self.generator("inner", x.device), rows=rows)
        with attack_mode(self.net), self.folded(x):
            clean = None
            if self.objective.inner_needs_clean:
                with torch.no_grad():
                    clean = self.logits(x)
            return self.inner(
                lambda adv: self.objective.inner(self.logits(adv), y, clean),
                x,
                start=start,
                steps=steps,
                step_size=size,
            )

    def terms(self, x: Tensor, adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Every training forward of the step: {name: weighted loss}, batch means; their sum is the loss."""
        clean = self.training_logits(x, "clean")[0] if self.objective.needs_clean else None
        logits, sides = self.training_logits(adv, "adv")
        self.clean_again(x)
        self.note_accuracy(logits, y)
        return self.objective.outer(logits, y, clean) | self.auxiliary(logits, sides, y)

    def training_logits(self, x: Tensor, purpose: str) -> tuple[Tensor, Any]:
        """Logits [B, K] in training mode, and the side outputs of the same forward.

        Args:
            x: Examples [B, 3, H, W].
            purpose: Which forward of the step this is; names its random numbers.
        """
        logits, sides = self.run(x, self.draw_noise(x, purpose))
        return at_least_float32(logits), sides

    @torch.no_grad()
    def clean_again(self, x: Tensor) -> None:
        """The clean forward once more where the objective says so: BatchNorm's running statistics move, no more."""
        if self.objective.clean_forwards == 2:
            self.training_logits(x, "clean")

    def draw_noise(self, x: Tensor, purpose: str) -> Any:
        """The random numbers of a training forward; none here."""
        return None

    def auxiliary(self, logits: Tensor, sides: Any, y: Tensor) -> dict[str, Tensor]:
        """A defense's own weighted terms on what was crafted; none here."""
        return {}

    def update(self, x: Tensor, adv: Tensor, y: Tensor) -> None:
        """Gradients, clipping, step."""
        params = self.trained()
        with self.perturbed(x, adv, y):
            (gradient,) = self.gradients(lambda *batch: [self.loss(*batch)], [params], x, adv, y)
        self.step((self.raw_optimizers()[0], params, gradient))

    def after_step(self) -> None:
        """What follows the step: averaging, and the module's own count of steps."""
        if self.ema is not None:
            self.ema.update(self.steps_done)
        self.steps_done += 1

    # ---- pieces of the step -----------------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def loss(self, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """The sum of ``terms``, each noted for the epoch's log."""
        return self.noted(self.terms(x, adv, y), len(y))

    def noted(self, terms: Mapping[str, Tensor], count: int) -> Tensor:
        """The sum of terms, each a mean over ``count`` examples and noted for the epoch's log."""
        loss = torch.stack(list(terms.values())).sum()
        for name, value in {"loss": loss, **terms}.items():
            self.tally.add(name, value.detach(), count)
        self.watch.loss(loss.detach())
        return loss

    def note_accuracy(self, logits: Tensor, y: Tensor) -> None:
        """Notes the accuracy on crafted examples for the epoch's log."""
        self.tally.add("accuracy_adv", (logits.detach().argmax(1) == y).float().mean(), len(y))

    def moving_buffers(self) -> list[Tensor]:
        """Floating buffers that training forwards change: BatchNorm's statistics."""
        return [b for b in self.net.buffers() if b.is_floating_point()]

    @property
    def perturbs(self) -> bool:
        """Whether this step's gradients are taken at AWP's weights."""
        return self.awp is not None and self.steps_done >= self.awp.warmup * self.steps_per_epoch

    @contextmanager
    def perturbed(self, x: Tensor, adv: Tensor, y: Tensor, ascent: Gradient | None = None) -> Iterator[None]:
        """Inside, the weights are AWP's, one ascent of the loss away; where AWP is off, nothing happens.

        Args:
            x, adv, y: The batch; adv stays as it was crafted.
            ascent: Gradient of the loss for ``trained()``, where it is already known.
        """
        if self.awp is None or not self.perturbs:
            yield
            return
        params = self.trained()
        if ascent is None:
            with self.traceless():
                (ascent,) = self.gradients(lambda *batch: [self.loss(*batch)], [params], x, adv, y)
        with self.awp.applied(params, ascent):
            yield

    @contextmanager
    def traceless(self) -> Iterator[None]:
        """Inside, training forwards neither count for the log nor move BatchNorm's statistics."""
        buffers = list(self.buffers())
        kept, tally = [b.clone() for b in buffers], self.tally
        self.tally = Tally()
        try:
            yield
        finally:
            self.tally = tally
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(old)

    def gradients(
        self, losses: Losses, params: Sequence[Sequence[nn.Parameter]], x: Tensor, adv: Tensor, y: Tensor
    ) -> list[Gradient]:
        """Gradient of each loss with respect to its own parameters, of the mean over the global batch.

        Args:
            losses: Maps a micro-batch (x, adv, y) to scalars of one graph, each a mean over its examples.
            params: For each loss the parameters that it trains.
            x, adv, y: This rank's share of the global batch.

        Returns:
            For each loss a list like its parameters: unscaled, float32, equal on all ranks; None where no
            gradient reaches.
        """
        if self.scale is None and self.precision_is("16-mixed"):
            self.scale = grad.LossScale(x.device)
        share = self.share or Share(0, len(x), len(x))
        total: list[Gradient] | None = None
        for part, piece in share.split(self.accumulate):
            with self.within(piece):
                values = losses(x[part], adv[part], y[part])
            weight = piece.count / piece.total
            new = grad.differentiate(values, params, weight, None if self.scale is None else self.scale.scale)
            total = new if self.accumulate == 1 else grad.add(total, new)
        assert total is not None
        # BatchNorm's statistics travel along: the ranks never differ, in no step, so neither do their averages,
        # attacks and checkpoints.
        buffers = self.moving_buffers()
        world = grad.sum_over_ranks([self.watch.bad, *buffers, *(g for one in total for g in one if g is not None)])
        if world > 1:
            self.watch.bad.clamp_(max=1.0)
            for buffer in buffers:
                buffer.div_(world)
        return total

    def step(self, *moves: tuple[Optimizer, Sequence[nn.Parameter], Gradient]) -> None:
        """Clips and steps, one move after the other; all are called off, on the device, if anything is not finite.

        Args:
            moves: (optimizer, its parameters, their gradient); each gradient is clipped by its own norm.
        """
        present = [[g for g in gradient if g is not None] for _, _, gradient in moves]
        norms = torch.stack([torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gs))) for gs in present])
        overflow = (~norms.isfinite().all()).float()
        if self.scale is None:
            self.watch.gradient(overflow)
        else:
            self.scale.update(overflow)
        self.tally.add("grad_norm", norms.max(), 1)
        for (optimizer, params, gradient), gs, norm in zip(moves, present, norms, strict=True):
            if self.clip is not None:
                torch._foreach_mul_(gs, (self.clip / (norm + 1e-6)).clamp(max=1.0))
            for p, g in zip(params, gradient, strict=True):
                # torch's fused optimizers go through memory in its order; a compiled net's gradients come in another.
                alike = g is None or (g.stride() == p.stride() and g.dtype == p.dtype)
                p.grad = g if alike else torch.empty_like(p).copy_(cast(Tensor, g))
            # Read by torch's fused optimizers: 1 leaves weights and momentum as they are.
            cast(Any, optimizer).found_inf = torch.maximum(self.watch.bad, overflow)
            optimizer.step()
            for p in params:
                p.grad = None

    def micro_batches(self) -> Iterator[slice]:
        """The micro-batches' rows in turn, with ``share`` set to each while it is worked on."""
        assert self.share is not None
        for part, piece in self.share.split(self.accumulate):
            with self.within(piece):
                yield part

    @contextmanager
    def within(self, piece: Share) -> Iterator[None]:
        """``share`` is ``piece`` inside: which rows of the step's random numbers are taken."""
        whole, self.share = self.share, piece
        try:
            yield
        finally:
            self.share = whole

    def generator(self, purpose: str, device: torch.device, *counters: int) -> torch.Generator:
        """The random numbers of this step for one purpose."""
        return generator(self.seed, purpose, self.steps_done, *counters, device=device)

    def precision_is(self, name: str) -> bool:
        """Whether the attached trainer computes in the precision ``name``."""
        return self._trainer is not None and str(self.trainer.precision) == name

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; 1 outside a fit."""
        return int(self.trainer.num_training_batches) if self._trainer is not None else 1

    # ---- Lightning ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[Optimizer]:
        return [self.optimizer_of(self.trained())]

    def optimizer_of(self, params: Sequence[nn.Parameter]) -> Optimizer:
        """An optimizer of some parameters, as the config says."""
        optimizer = self.make_optimizer(params)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError(
                "optimizer: this one has no fused step, which a loss that is not finite needs to be called off: "
                "take torch.optim.SGD or AdamW with fused: true"
            )
        if isinstance(optimizer, torch.optim.SGD):
            # torch allocates momentum in the first step and, if that one is called off, leaves it unwritten.
            for group in optimizer.param_groups:
                for p in group["params"] if group["momentum"] and not group["dampening"] else ():
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer

    def raw_optimizers(self) -> list[Optimizer]:
        """The optimizers themselves: Lightning's wrappers count each one's step as a global step."""
        found = self.optimizers(use_pl_optimizer=False)
        return list(found) if isinstance(found, list) else [cast(Optimizer, found)]

    def on_fit_start(self) -> None:
        if self.ema is not None:
            self.ema.to(self.device)
        self.watch.start(self.device)

    def on_train_start(self) -> None:
        # Lightning restores a loader's place after a stop within an epoch, but not after one between epochs.
        epoch, position = divmod(self.steps_done, self.steps_per_epoch)
        cast(Any, self.trainer.train_dataloader).load_state_dict({"epoch": epoch, "position": position})

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.watch.look(self.steps_done)

    def on_train_epoch_end(self) -> None:
        self.watch.look(self.steps_done, now=True)
        self.log_dict({f"train/{k}": v for k, v in self.tally.means().items()}, sync_dist=False)
        self.log("lr", self.raw_optimizers()[0].param_groups[0]["lr"])

    def on_validation_start(self) -> None:
        # A loss that was not finite has spoilt BatchNorm's statistics: no metric is made from them.
        if self.trainer.state.fn == "fit":
            self.watch.look(self.steps_done, now=True)
        self._validation = Tally()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not len(batch.x) or requests.pending is not None:  # asked to stop: it is left out, and done anew
            return
        x = batch.x.contiguous(memory_format=self.format)
        with self.evaluated_weights(), attack_mode(self.net):
            with self.folded(x):
                adv = self.validation(lambda v: F.cross_entropy(self.logits(v), batch.y, reduction="none"), x)
            for name, images in (("clean", x), ("pgd", adv)):
                with torch.no_grad():
                    logits = self.logits(images)
                finite = logits.isfinite().all()
                self.watch.bad = torch.maximum(self.watch.bad, (~finite).to(self.watch.bad))
                self._validation.add(name, ((logits.argmax(1) == batch.y) & finite).float().mean(), len(x))
            for name, value in self.watched(x, adv, batch.y).items():
                self._validation.add(name, value, len(x))

    def watched(self, x: Tensor, adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What else a defense shows of the validation images and their attacked ones: {name: mean}; none here."""
        return {}

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "fit":  # the last step may have blown the weights up after a finite loss
            grad.sum_over_ranks([self.watch.bad])
            self.watch.look(self.steps_done, now=True)
        probe = self.trainer.datamodule.probe_name  # type: ignore[attr-defined]
        for name, value in self._validation.means().items():
            label = f"pgd{self.validation.steps}" if name == "pgd" else name
            self.log(f"{probe}/{label}", value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["redoubt"] = {
            "steps_done": self.steps_done,
            "tally": self.tally.over_ranks(),
            "scale": self.scale.state_dict() if self.scale else None,
            "ema": self.ema.average if self.ema else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["redoubt"]
        self.steps_done = state["steps_done"]
        self.tally.go_on_from(state["tally"])
        if state["scale"] is not None:
            self.scale = grad.LossScale(self.device)
            self.scale.load_state_dict(state["scale"])
        if self.ema is not None:
            self.ema.load(state["ema"])


def at_least_float32(t: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; a wider type stays."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
