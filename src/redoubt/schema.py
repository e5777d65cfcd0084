"""Every key of a config that no constructor's signature states, and the values that it takes; no torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from redoubt.errors import UserError, did_you_mean, meant, shown
from redoubt.kinds import Kind, flag, listed, name, number, one_of, optional, positive, text, whole


class Built(dict[str, Kind]):
    """A section that a constructor is called with, which states its keys (`redoubt.arguments`); here are ranges."""


class Free(dict[str, Kind]):
    """A section whose other keys are as its option has them."""


_LENGTH: Kind = optional(number(0.0))
_PLACES = {"outputs": text, "data": text}


def _size(value: Any, key: str) -> Any:
    """One number, or [height, width]; two that are equal are one."""
    side = whole(1, 2048)
    if not isinstance(value, list):
        return side(value, key)
    if len(value) != 2:
        raise UserError(f"{key}={shown(value)}: it takes one number, or [height, width]")
    height, width = (side(part, key) for part in value)
    return height if height == width else [height, width]


TRAIN: dict[str, Any] = {
    "threat": {"norm": one_of("linf", "l2"), "eps": number()},
    "inner": Built(norm=one_of("linf", "l2"), steps=whole(0), step=number(0.0)),
    "ema": {"decay": optional(number(0.0, 1.0)), "warmup": flag},
    "base": Built(),
    "defense": Built(replace_head=optional(flag)),
    "model": Built(),
    "data": Built(root=name, batch_size=whole(2), num_classes=whole(2), image_size=_size, balanced=optional(flag)),
    "optimizer": Built(lr=number(0.0), momentum=number(0.0), weight_decay=number(0.0), clip=optional(positive)),
    "schedule": Built(),
    "attack": Free(norm=one_of("linf", "l2"), ensemble=flag, bounded=flag, stochastic=flag, source=name),
    "evaluation": {
        "checkpoint": one_of("last", "best"),
        "weights": optional(text),
        "chunk": whole(1),
        "seed": whole(),
        "skip_broken": flag,
        "save": one_of(None, "float32", "uint8"),
        "beside": optional(text),
    },
    "trainer": {
        "accelerator": one_of("auto", "cpu", "gpu"),
        "devices": optional(whole(1), "auto"),
        "num_nodes": whole(1),
        "strategy": one_of("auto", "ddp"),
        "precision": one_of("32-true", "bf16-mixed", "16-mixed"),
        "max_epochs": whole(1),
        "accumulate": whole(1),
        "sync_batchnorm": flag,
        "deterministic": flag,
        "fast_dev_run": flag,
        "progress": flag,
        "checkpoint_every": optional(whole(1)),
    },
    "logger": Built(_target_=optional(text)),
    "paths": _PLACES,
    "seed": whole(),
    "label_smoothing": number(0.0, 1.0),
    "awp": {"rho": _LENGTH, "warmup": _LENGTH},
    "compile": optional(text, False, True),
    "channels_last": flag,
    "fold": flag,
    "validation": {"every": whole(1), "steps": whole(0), "step": number(0.0)},
    "natural": {
        "trainer": {"max_epochs": optional(whole(1))},
        "optimizer": dict.fromkeys(("lr", "momentum", "weight_decay", "clip"), _LENGTH),
        "schedule": {
            "kind": optional(text),
            "epochs": optional(positive),
            "milestones": optional(listed(number())),
            "factors": optional(listed(number())),
            "interval": optional(text),
            "warmup": _LENGTH,
        },
    },
    "sweep": {
        "name": optional(name),
        "cases": optional(listed(text)),
        "evaluations": optional(listed(listed(text, 0))),
        "trial": optional(whole(0)),
        "wait": optional(flag),
    },
    "extend": optional(name),
    "plan": flag,
    "runs": {"keep": one_of("weights", "optimizer", "all")},
}
EVAL = {**TRAIN, "run": optional(name), "rescore": optional(name), "checkpoint": optional(name)}
#: Efforts of the audit; what it holds against its limits may be any number.
_FEW, _MANY, _ANY = whole(1), listed(whole(0)), number()
_PGD = {"steps": _FEW, "step": positive}
AUDIT = {
    **EVAL,
    "audit": {
        "images": _FEW,
        "source": optional(name),
        "randomness": {"passes": whole(2), "largest": _ANY},
        "probabilities": {"share": _ANY},
        "zero_gradients": {"starts": _FEW, "share": _ANY},
        "iterations": {"factor": _FEW, "least": _FEW, "points": _ANY, "examples": _ANY},
        "restarts": {"more": _FEW, **_PGD, "points": _ANY, "examples": _ANY},
        "one_step": {"share": _ANY},
        "noise": {"draws": _FEW, "share": _ANY},
        "eps_curve": {"eps": listed(number(0.0)), **_PGD, "points": _ANY, "examples": _ANY, "guessing": _ANY},
        "iterations_curve": {"steps": _MANY, "step": positive, "points": _ANY, "examples": _ANY},
        "black_box": {"queries": _FEW, "examples": _ANY},
        "transfer": {"examples": _ANY},
        "adaptive": {**_PGD, "points": _ANY, "examples": _ANY},
        "finite_differences": {"images": _FEW, "directions": _FEW, "h": positive, "tolerance": positive, "share": _ANY},
        "landscape": {"radius": positive, "cosine": _ANY, "share": _ANY},
        "fsr_criteria": {"unbounded": _ANY},
    },
}
EXPORT: dict[str, Any] = {
    "run": optional(name),
    "to": optional(text),
    "evaluation": {key: TRAIN["evaluation"][key] for key in ("checkpoint", "weights")},
    "paths": _PLACES,
}
COMMANDS = {"train": TRAIN, "eval": EVAL, "audit": AUDIT, "export": EXPORT}


def checked(tree: Mapping[str, Any], schema: Mapping[str, Any] = AUDIT, prefix: str = "") -> dict[str, Any]:
    """The values of a resolved config as the program wants them; keys may be missing, as in a run of an older version.

    Raises:
        UserError: A key that does not exist, or a value that it does not take.
    """
    found = {}
    for key, value in tree.items():
        kind = schema.get(key, text if key == "_target_" else None)
        if (kind is None and isinstance(schema, Built | Free)) or f"{prefix}{key}" == "axes":
            found[key] = value
        elif kind is None:
            raise _unknown(f"{prefix}{key}", [*schema])
        elif not isinstance(kind, Mapping):
            found[key] = kind(value, f"{prefix}{key}")
        elif isinstance(value, Mapping):
            found[key] = checked(value, kind, f"{prefix}{key}.")
        else:
            raise UserError(f"{prefix}{key}={shown(value)} is a group of keys: {_how(f'{prefix}{key}', kind)}")
    return found


def complete(tree: Mapping[str, Any], command: str) -> None:
    """Looks whether a composed config, its interpolations not yet resolved, has each key, and none that nobody reads.

    Raises:
        UserError: A key is missing, or one is there that does not exist for this command.
    """
    schema = COMMANDS[command]
    for key in tree:
        if key not in schema and key != "axes":
            raise _unknown(key, [*schema], tree)
    _complete(tree, schema, "")
    if "attack" not in schema:
        return
    built = {key for key, kind in schema.items() if isinstance(kind, Built) and key != "schedule"}
    for key in [f"{key}._target_" for key in built] + ["optimizer.lr", "attack.norm", "attack.eps", "attack.attacks"]:
        section, _, leaf = key.partition(".")
        if isinstance(tree[section], Mapping) and leaf not in tree[section]:
            raise _missing(key)
    _read_somewhere(tree["attack"], schema["attack"])


def _complete(tree: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> None:
    for key, kind in schema.items():
        value = tree.get(key, "???")
        if value == "???":
            raise _missing(f"{prefix}{key}")
        if isinstance(value, Mapping) and not isinstance(kind, Built | Free) and isinstance(kind, Mapping):
            _complete(value, kind, f"{prefix}{key}.")
        elif isinstance(value, Mapping) and value.get("_target_", "") is None and len(value) > 1:
            odd = next(name for name in value if name != "_target_")
            raise UserError(f"{key}.{odd} is a key of another option: choose it too, as {key}=<option>")


def _read_somewhere(section: Any, known: Mapping[str, Any]) -> None:
    """Refuses keys of ``attack`` that neither the suite nor an attack reads, by their interpolations."""
    if not isinstance(section, Mapping):
        return
    words = {word for inside in re.findall(r"\$\{([^}]*)", str(section)) for word in re.split(r"[^\w]+", inside)}
    for key in section:
        if key not in (*known, "eps", "attacks") and key not in words:
            raise _unknown(f"attack.{key}", [k for k in section if k != key])


def _missing(key: str) -> UserError:
    return UserError(f"{key} is missing: give it a value, and leave ~{key} out")


def _unknown(key: str, names: list[str], tree: Mapping[str, Any] | None = None) -> UserError:
    if key == "experiment":
        return UserError("experiment: its file is not read as one: begin it with the line  # @package _global_")
    others = meant(key, {name: value for name, value in (tree or {}).items() if name != key})
    return UserError(f"{key} is not a key of this config{did_you_mean(key.rpartition('.')[2], names, others)}")


def _how(key: str, section: Mapping[str, Any]) -> str:
    if isinstance(section, Built | Free):
        return f"choose one of its options, as {key}=<option>"
    return f"give one of them, as {key}.{next(iter(section))}=..."
