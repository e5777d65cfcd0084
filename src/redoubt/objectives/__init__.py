"""Objectives: losses as pure functions of logits and labels; no net, no image."""

from redoubt.objectives.at import PGDAT as PGDAT
from redoubt.objectives.base import Objective as Objective
from redoubt.objectives.mart import MART as MART
from redoubt.objectives.standard import Standard as Standard
from redoubt.objectives.trades import TRADES as TRADES
