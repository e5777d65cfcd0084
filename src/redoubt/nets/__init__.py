"""Backbones: pixels in [0,1] in, logits out. What they have in common is in `base`."""

from redoubt.nets.base import Backbone, Normalize
from redoubt.nets.folding import Folding
from redoubt.nets.loading import load_backbone, load_weights, read_state_dict
from redoubt.nets.mode import attack_mode

__all__ = ["Backbone", "Folding", "Normalize", "attack_mode", "load_backbone", "load_weights", "read_state_dict"]
