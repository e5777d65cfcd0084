"""N-ATTACK: black-box search by natural evolution strategies (Li et al., ICML 2019).

The facts are those of the paper and its code (github.com/Cold-Winter/Nattack): a normal distribution over changes of
the image in tanh space is learnt from logits alone. Papers and code print population 300 with learning rate 0.02
for 150 000 queries per image; advertorch's NAttack has population 100, which leaves three times the steps of a budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redoubt.attacks.base import Attack, Draws, Logits
from redoubt.attacks.geometry import BALLS
from redoubt.errors import UserError
from redoubt.objectives.base import margin
from redoubt.units import as_number, as_whole

_FIRST = 1e-3  # standard deviation of the initial mean


class NAttack(Attack):
    """Learns the mean m of normal changes of x under which the margin of the true class is small.

    With ``a = atanh(2x - 1)`` a change v gives the point ``project(x + (tanh(a + v) - tanh(a)) / 2)``, in the ball
    around x and in [0, 1]. From ``m = 0.001 N(0, 1)``, each step queries the point of m, then those of
    ``m + sigma n_k`` with ``n_k ~ N(0, 1)``, k = 1 .. population, and moves m by
    ``lr / (population sigma) sum_k A_k n_k``, where A is the z-score over the population of the reward
    ``-(z_y - max_{j != y} z_j)``. Two things differ from the authors' code. It looks at m alone and only at every tenth
    step; here the first misclassified query of any kind ends an image's search. And it takes pixels 0 and 1 as 5e-7
    and 1 - 5e-7, where tanh is flat, so that they hardly ever move; see ``inset``.

    Args:
        eps: Radius in pixel units, a number or a fraction such as ``"8/255"``.
        norm: ``"linf"`` or ``"l2"``.
        queries: The most images that are classified for one image, x itself included.
        population: Queries from which one step is estimated, at least 2.
        sigma: Standard deviation of the queries around the mean, in tanh space.
        lr: Learning rate of the mean, in tanh space.
        batch: The most images classified at once.
        inset: In a, pixels are clipped to [inset, 1 - inset], so that those near 0 and 1 move too; from 5e-7, the
            authors', to 0.5, which gives every pixel the same slope. Nothing changes for pixels within.

    Raises:
        UserError: A value out of range.
    """

    needs_gradients = False

    def __init__(
        self,
        *,
        eps: float | str,
        norm: str = "linf",
        queries: int = 5000,
        population: int = 100,
        sigma: float = 0.1,
        lr: float = 0.02,
        batch: int = 1000,
        inset: float = 0.1,
    ) -> None:
        if norm not in BALLS:
            raise UserError(f"norm={norm!r} is not known: take one of {', '.join(BALLS)}")
        self.norm = norm
        self.eps = self.radius = as_number(eps, "eps")
        self.sigma, self.lr = as_number(sigma, "sigma"), as_number(lr, "lr")
        self.inset = as_number(inset, "inset")
        if self.radius < 0:
            raise UserError(f"eps={eps} must not be negative")
        for name, value in (("sigma", self.sigma), ("lr", self.lr)):
            if value <= 0:
                raise UserError(f"{name}={value} must be positive")
        if not 5e-7 <= self.inset <= 0.5:
            raise UserError(f"inset={inset} must lie in [5e-7, 0.5]")
        self.queries, self.batch = as_whole(queries, "queries"), as_whole(batch, "batch")
        self.population = as_whole(population, "population", 2)
        self.cost = queries / 3  # forward passes only

    @torch.no_grad()
    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Adversarial examples for x.

        Args:
            logits: Maps pixels [B, C, H, W] to logits [B, K]; no gradient is asked for.
            x: Images [B, C, H, W] in [0, 1].
            y: Their labels [B].
            draws: Random numbers. An image's depend on its place in the chunk, not on how others fare: each normal
                number is drawn for the whole chunk, one member of the population after the other, and drawn again
                for the step rather than kept, so that memory holds one batch of images, not a population of each.

        Returns:
            Of every image the query [C, H, W] that was misclassified (argmax is not y, or a logit is not finite), or
            the one of smallest margin; and flags [B] of those misclassified.
        """
        found = _Found(logits, x, y, self.batch)
        if not len(x):
            return found.adv, found.broken
        found.query(x[None], found.rows)
        generator, spent = draws.generator(), 1

        def noise(rows: Tensor) -> Tensor:
            drawn = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
            return drawn.to(x.device)[rows]

        mean = _FIRST * noise(found.rows)
        center = torch.atanh(2 * x.clamp(self.inset, 1 - self.inset) - 1)
        origin = x - torch.tanh(center) / 2

        def point(rows: Tensor, change: Tensor | float = 0.0) -> Tensor:
            moved = origin[rows] + torch.tanh(center[rows] + mean[rows] + change) / 2
            return BALLS[self.norm].projection(x[rows], self.radius)(moved)

        while spent < self.queries and len(rows := found.standing()):
            found.query(point(rows)[None], rows)
            spent += 1
            members, begin = min(self.population, self.queries - spent), generator.get_state()
            reward, done = x.new_empty(self.population, len(x)), 0
            while done < members and len(rows := found.standing()):
                now = min(members - done, max(1, self.batch // len(rows)))
                points = torch.stack([point(rows, self.sigma * noise(rows)) for _ in range(now)])
                reward[done : done + now, rows] = -found.query(points, rows)
                done += now
            spent += done
            if spent < self.queries and len(rows := found.standing()):
                reward = reward[:, rows]
                score = (reward - reward.mean(0)) / (reward.std(0, correction=0) + 1e-7)
                generator.set_state(begin)
                step = torch.zeros_like(mean[rows])
                for k in range(self.population):
                    step += score[k].view(-1, 1, 1, 1) * noise(rows)
                mean[rows] += self.lr / (self.population * self.sigma) * step
        return found.adv, found.broken


class _Found:
    """What the queries of a chunk have shown: the query to keep of each image, and whether it was misclassified."""

    def __init__(self, logits: Logits, x: Tensor, y: Tensor, batch: int) -> None:
        self.logits, self.y, self.batch = logits, y, batch
        self.adv, self.rows = x.detach().clone(), torch.arange(len(x), device=x.device)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.least = torch.full((len(x),), float("inf"), dtype=x.dtype, device=x.device)

    def standing(self) -> Tensor:
        """Numbers of the images that no query has broken."""
        return self.rows[~self.broken]

    def query(self, points: Tensor, rows: Tensor) -> Tensor:
        """Margins [m, n] of points [m, n, C, H, W], m of each of the images ``rows`` [n], none of them broken."""
        y = self.y[rows].repeat(len(points))
        z = torch.cat([self.logits(part) for part in points.flatten(0, 1).split(self.batch)])
        wrong = ((z.argmax(1) != y) | ~z.isfinite().all(1)).view(points.shape[:2])
        margins = margin(z.to(points.dtype), y).view(points.shape[:2])
        least, first = margins.masked_fill(wrong, float("-inf")).min(0)
        first = torch.where(wrong.any(0), wrong.int().argmax(0), first)  # min may take any of equals
        better = least < self.least[rows]
        self.adv[rows[better]] = points[first, torch.arange(len(rows), device=rows.device)][better]
        self.least[rows] = torch.minimum(self.least[rows], least)
        self.broken[rows] = wrong.any(0)
        return margins
