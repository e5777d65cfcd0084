"""Defenses: one LightningModule per file; `RobustModule` is itself ``defense=none``."""

from redoubt.defenses.afd import AFD as AFD
from redoubt.defenses.cure import CURE as CURE
from redoubt.defenses.fsr import FSR as FSR
from redoubt.defenses.module import RobustModule as RobustModule
