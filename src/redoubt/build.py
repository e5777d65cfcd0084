"""From a resolved config to objects; the only place that instantiates anything."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from redoubt import allowed, config
from redoubt.arguments import fitted
from redoubt.data import ImageData
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.training.schedule import Schedule


def make(section: Mapping[str, Any], key: str, /, **more: Any) -> Any:
    """Calls ``_target_`` of a section with its other keys and ``more``.

    Raises:
        UserError: The target is not allowed or does not exist, or its constructor refuses a value; the message
            begins with the section's key.
    """
    arguments = dict(section)
    target = arguments.pop("_target_", None)
    if target is None:
        raise UserError(f"{key}._target_ is missing: give the name of a class, or leave {key} as its option has it")
    found = locate(target, f"{key}._target_")
    try:
        return found(**fitted(found, arguments, key, tuple(more)), **more)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(f"{key}.") else f"{key}: {text}") from error
    except TypeError as error:
        raise UserError(f"{key}: {target} does not take these arguments: {error}") from error
    except ValueError as error:  # torch's optimizers
        raise UserError(f"{key}: {target}: {error}") from error


def locate(target: Any, key: str) -> Any:
    """What a config's key names, if `redoubt.allowed` has it."""
    return allowed.locate(target, key, config.search_path)


def build_data(cfg: DictConfig) -> ImageData:
    """The data module of a resolved config."""
    augment = cfg.data.get("augment")
    if augment and "." in str(augment):  # a function of the user's own is imported: the same rule holds
        locate(str(augment), "data.augment")
    return make(_plain(cfg.data), "data")


def build_module(cfg: DictConfig, defense: type[RobustModule] | None = None) -> RobustModule:
    """The module of a composed config, with fresh weights drawn from its seed; trains nothing.

    Args:
        cfg: As composed; resolved or not.
        defense: In place of ``defense._target_``: a class that is still being written, as in a notebook. The other
            keys of ``defense`` are its arguments.

    Raises:
        UserError: A value out of range, or a base that the defense is not defined with.
    """
    tree = config.resolved(cfg)
    if defense is not None:
        tree["defense"]["_target_"] = defense
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tree["seed"])
        return _module(tree)


def _module(tree: dict[str, Any]) -> RobustModule:
    for key in ("inner", "base", "optimizer", "model"):  # before any of them is made
        locate(tree[key]["_target_"], f"{key}._target_")
    inner = make(tree["inner"], "inner")
    objective = make(tree["base"], "base")
    optimizer = dict(tree["optimizer"])
    clip = optimizer.pop("clip", None)
    make_optimizer = functools.partial(_make_optimizer, optimizer)
    make_optimizer([torch.zeros(1, requires_grad=True)])  # what it refuses is said now, not when a run has begun
    shape = fitted(Schedule, tree["schedule"], "schedule", ("max_epochs",))
    schedule = Schedule(**shape, max_epochs=int(tree["trainer"]["max_epochs"]))
    defense = locate(tree["defense"]["_target_"], "defense._target_")
    base = tree.get("axes", {}).get("base")
    if base and base in STANDARD_BASES and base not in getattr(defense, "bases", (base,)):
        raise UserError(f"base={base} is not defined for this defense: take one of base={', '.join(defense.bases)}")
    # Where its weights come from is the run's business: nothing is read or trained here.
    section = {key: value for key, value in tree["defense"].items() if key not in ("pretrained", "replace_head")}
    awp = tree.get("awp", {})
    watched = {**tree["threat"], "steps": tree["validation"]["steps"], "step": tree["validation"]["step"]}
    return make(
        section,
        "defense",
        net=make(tree["model"], "model"),
        objective=objective,
        inner=inner,
        optimizer=make_optimizer,
        schedule=schedule,
        validation=make({"_target_": "redoubt.attacks.PGD", **watched, "start": "none"}, "validation"),
        num_classes=tree["data"]["num_classes"],
        image_size=tree["data"]["image_size"],
        seed=tree["seed"],
        clip=clip,
        accumulate=tree["trainer"]["accumulate"],
        ema_decay=tree["ema"]["decay"],
        ema_warmup=tree["ema"]["warmup"],
        awp_rho=awp.get("rho"),
        awp_warmup=awp.get("warmup"),
        weights=tree["evaluation"]["weights"],
        compile=tree["compile"],
        channels_last=tree["channels_last"],
        fold=tree.get("fold", True),
    )


STANDARD_BASES = ("standard", "at", "trades", "mart")


def _make_optimizer(section: dict[str, Any], parameters: Any) -> Any:
    return make(section, "optimizer", params=parameters, **({} if "fused" in section else {"fused": True}))


def _plain(section: DictConfig) -> dict[str, Any]:
    tree = OmegaConf.to_container(section, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
