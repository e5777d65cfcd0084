"""What FSR's suite costs beside the same attacks of torchattacks called in a loop, and AutoAttack beside pyautoattack.

    python benchmarks/suite.py [model=resnet18] [batch=32] [rounds=3] [eps=1/255] [only=cw] [autoattack=false]

Both take turns (A B A B) in one process on the same images and net, in float32; labels are the net's own predictions:
every image is attacked. C&W, which torchattacks does not have in this form, is its PGD with the margin's loss.
Prints the medians, the median of the rounds' ratios, and how many verdicts agree.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import pyautoattack
import torch
import torchattacks
from torch import Tensor, nn

from redoubt import config
from redoubt.attacks.base import library_seed
from redoubt.build import build_module
from redoubt.evaluation.suite import Suite, suite
from redoubt.evaluation.verdicts import judge
from redoubt.runs.identity import plain

CPU = torch.device("cpu")


class Margin(torchattacks.PGD):
    """The C&W of the papers' codes (methods 0.3) in torchattacks' loop."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        adv = images.clone().detach()
        onehot = nn.functional.one_hot(labels, 10)
        for _ in range(self.steps):
            adv.requires_grad = True
            z = self.get_logits(adv)
            real, other = (onehot * z).sum(1), ((1 - onehot) * z - onehot * 10_000).amax(1)
            loss = -(real - other + 50).clamp(min=0).sum()
            grad = torch.autograd.grad(loss, adv)[0]
            adv = adv.detach() + self.alpha * grad.sign()
            adv = torch.clamp(images + torch.clamp(adv - images, -self.eps, self.eps), 0, 1).detach()
        return adv


def timed(call: Callable[[], dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def main() -> None:
    said = {"model": "resnet18", "batch": "32", "rounds": "3", "eps": "1/255", "only": "", "autoattack": "false"}
    said |= dict(a.split("=", 1) for a in sys.argv[1:])
    n = int(said["batch"])
    cfg = config.resolve(config.compose([f"model={said['model']}", "data=cifar10", f"attack.eps={said['eps']}"]))
    module, eps = build_module(cfg).eval(), float(cfg.attack.eps)
    net = module.net
    images = torch.randint(256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = images.float() / 255
    with torch.no_grad():
        for _ in range(3):  # BatchNorm's statistics are of these images, or all predictions would be one class
            net.train()(x)
        net.eval()
        y = net(x).argmax(1)
    chosen = suite(plain(cfg.attack))

    def ours(name: str | None = None) -> dict[str, Tensor]:
        of = chosen if name is None else Suite(attacks={name: chosen.attacks[name]}, norm="linf", eps=eps)
        return {k: torch.from_numpy(v) for k, v in judge(module, images, y, of, chunk=n, seed=0, device=CPU).items()}

    theirs_by_name = {
        "fgsm": lambda: torchattacks.FGSM(net, eps=eps),
        "pgd20": lambda: torchattacks.PGD(net, eps=eps, alpha=eps / 10, steps=20, random_start=False),
        "pgd100": lambda: torchattacks.PGD(net, eps=eps, alpha=eps / 10, steps=100, random_start=False),
        "cw": lambda: Margin(net, eps=eps, alpha=eps / 10, steps=30, random_start=False),
    }

    def theirs(name: str | None = None) -> dict[str, Tensor]:
        found = {}
        for key in theirs_by_name if name is None else [name]:
            adv = theirs_by_name[key]()(x, y)
            with torch.no_grad():
                found[key] = net(adv).argmax(1) == y
        with torch.no_grad():
            found["natural"] = net(x).argmax(1) == y
        return found

    pairs: dict[str, tuple[Callable[[], dict[str, Tensor]], Callable[[], dict[str, Tensor]]]] = {
        **{name: (lambda name=name: ours(name), lambda name=name: theirs(name)) for name in theirs_by_name},
        "fsr_suite": (ours, theirs),
    }
    if said["autoattack"] == "true":
        tree = config.compose(["data=cifar10", "attack=autoattack", f"attack.eps={said['eps']}"])
        standard = suite(plain(config.resolve(tree).attack))

        def by_us() -> dict[str, Tensor]:
            found = judge(module, images, y, standard, chunk=n, seed=0, device=CPU)
            return {"autoattack": torch.from_numpy(found["autoattack"])}

        def by_hand() -> dict[str, Tensor]:
            attack = pyautoattack.AutoAttack(net, eps=eps, seed=library_seed(0, 0), version="standard")
            return {"autoattack": attack.run_standard_evaluation(x, y, batch_size=n)[1] == y}

        pairs["autoattack"] = (by_us, by_hand)
    print(f"{'attack':12} {'ours s':>8} {'theirs s':>9} {'ratio':>6}  verdicts that agree")
    for name in said["only"].split(",") if said["only"] else pairs:
        a, b = pairs[name]
        seconds: list[tuple[float, float]] = []
        for _ in range(int(said["rounds"])):
            (first, mine), (second, other) = timed(a), timed(b)
            seconds.append((first, second))
        agree = sum(int((mine[k] == other[k]).sum()) for k in other)
        total = sum(len(v) for v in other.values())
        standing = int(torch.stack(list(other.values())).all(0).sum())
        ratio = statistics.median(u / v for u, v in seconds)
        medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
        print(
            f"{name:12} {medians[0]:8.2f} {medians[1]:9.2f} {ratio:6.3f}  {agree} of {total}, {standing} stand",
            flush=True,
        )
    print(json.dumps(said | {"threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
