"""Attacks: PGD knows only a loss of x; those of an evaluation know logits and labels. None knows Lightning or a run."""

from redoubt.attacks.base import Attack as Attack
from redoubt.attacks.base import Draws as Draws
from redoubt.attacks.libraries import AutoAttack as AutoAttack
from redoubt.attacks.libraries import Foolbox as Foolbox
from redoubt.attacks.libraries import TorchAttacks as TorchAttacks
from redoubt.attacks.nattack import NAttack as NAttack
from redoubt.attacks.pgd import PGD as PGD
from redoubt.attacks.whitebox import MultiTargeted as MultiTargeted
from redoubt.attacks.whitebox import WhiteBox as WhiteBox
