"""Backbones: pixels in [0,1] in, logits out. What they have in common is in `base`."""

from redoubt.nets.base import Backbone, Normalize
from redoubt.nets.folding import Folding
from redoubt.nets.loading import OtherNet, load_backbone, load_weights
from redoubt.nets.mode import attack_mode

__all__ = [
    "Backbone",
    "Folding",
    "Normalize",
    "OtherNet",
    "attack_mode",
    "load_backbone",
    "load_weights",
]
