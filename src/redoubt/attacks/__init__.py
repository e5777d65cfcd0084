"""Attacks: they know neither model, nor label, nor Lightning; only a loss of x."""

from redoubt.attacks.pgd import PGD as PGD
