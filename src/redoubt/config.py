"""Composing, checking and reading configs; no torch here, so that ``--help`` answers at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers import oc

from redoubt import allowed
from redoubt.composed import checked
from redoubt.errors import UserError, did_you_mean
from redoubt.secrets import from_environment
from redoubt.units import as_number, as_whole

#: The axes of the grid, each a config group.
AXES = ("model", "defense", "base", "data", "attack")

_FRACTION = re.compile(r"\s*[-+\d.eE]+\s*/\s*[-+\d.eE]+\s*")

#: Further folders of configs (``--config-dir``), as the process was started with.
search_path: list[str] = []

#: The root config of this process's command and the options that it chose: hints are of their keys.
root: str = "train"
chosen: list[str] = []


def config_dir() -> str:
    """The folder ``conf/``: inside an installed package, else at the top of the source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parents[1] / "conf")


def register_resolvers() -> None:
    """``${ratio:a,b}`` is a / b; ``${rounded:x,a,b}`` is b where x equals a, else x; ``${by_norm:norm,linf,l2}``."""
    for name, function in (("ratio", _ratio), ("rounded", _rounded), ("by_norm", _by_norm), ("oc.env", _env)):
        OmegaConf.register_new_resolver(name, function, replace=True)


def _ratio(a: float | str, b: float | str) -> float:
    return as_number(a, "ratio") / as_number(b, "ratio")


def _rounded(x: float | str, a: float | str, b: float | str) -> float | str:
    try:
        same = abs(as_number(x, "eps") - as_number(a, "eps")) < 1e-9
    except UserError:
        return x  # no number: the check that follows names the key
    return as_number(b, "eps") if same else x


def _by_norm(norm: str, linf: float | str, l2: float | str) -> float | str:
    return l2 if norm == "l2" else linf


def _env(name: str, *default: Any) -> Any:
    """OmegaConf's own, with its values kept out of what is stored."""
    return from_environment(oc.env(name, *default))


def compose(overrides: Sequence[str], config_name: str = "train") -> DictConfig:
    """The config that the command line ``overrides`` would give, with its axes noted.

    Raises:
        UserError: An override names what does not exist.
    """
    register_resolvers()
    extra = [f"hydra.searchpath=[{','.join(f'file://{p}' for p in search_path)}]"] if search_path else []
    state = GlobalHydra.instance()
    outer = state.hydra
    state.clear()
    try:
        with checked(search_path), initialize_config_dir(config_dir(), version_base="1.3"):
            cfg = hydra_compose(config_name, [*overrides, *extra], return_hydra_config=True)
    except Exception as error:
        raise UserError(explain(error)) from error
    finally:
        state.clear()
        if outer is not None:
            state.initialize(outer)
    choices = dict(cfg.hydra.runtime.choices)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return with_axes(cfg, choices)


def with_axes(cfg: DictConfig, choices: Mapping[str, Any]) -> DictConfig:
    """Notes under ``axes`` which option of each axis was chosen, and the recipe files that were found."""
    OmegaConf.set_struct(cfg, False)
    cfg.axes = {name: str(choices[name]) for name in AXES if choices.get(name)}
    # in the order in which they win over each other
    order = (
        *("recipe/data", "recipe/base", "recipe/defense", "recipe/defense_base", "recipe/defense_data", "recipe/cell"),
        *("schedule", "experiment"),
    )
    cfg.axes.recipes = [f"{group}/{choices[group]}" for group in order if _exists(group, choices.get(group))]
    OmegaConf.set_struct(cfg, True)
    return cfg


def _exists(group: str, choice: Any) -> bool:
    if choice in (None, "default"):
        return False
    return any((Path(folder) / group / f"{choice}.yaml").is_file() for folder in (config_dir(), *search_path))


def resolve(cfg: DictConfig) -> DictConfig:
    """A copy with every interpolation resolved, fractions as floats and derived defaults filled in.

    Raises:
        UserError: A value is missing, an interpolation fails, or a value is out of its range.
    """
    try:
        missing = OmegaConf.missing_keys(cfg)
        if missing:
            raise UserError(f"{sorted(missing)[0]} is missing: give it on the command line")
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    assert isinstance(tree, dict)
    allowed.check({str(key): value for key, value in tree.items()}, search_path)
    allowed.check_plain(tree, "")
    _evaluate_fractions(tree, "")
    if tree["evaluation"]["weights"] is None:
        tree["evaluation"]["weights"] = "student" if tree["ema"]["decay"] is None else "ema"
    check({str(key): value for key, value in tree.items()})
    resolved = OmegaConf.create(tree)
    OmegaConf.set_struct(resolved, True)
    return resolved


def _evaluate_fractions(tree: Any, prefix: str) -> None:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)):
            _evaluate_fractions(value, f"{prefix}{key}.")
        elif isinstance(value, str) and _FRACTION.fullmatch(value):
            tree[key] = as_number(value, f"{prefix}{key}")


def check(tree: Mapping[str, Any]) -> None:
    """Rejects values that would train or attack something else than what was meant.

    Raises:
        UserError: Unknown top-level key, or a number that is none or out of its range.
    """
    known = top_level_keys()
    for key in tree:
        if key not in known:
            raise UserError(f"{key} is not a key of this config{did_you_mean(key, known)}")
    size = tree["data"]["image_size"]
    for owner in ("threat", "inner", "attack"):
        section = tree[owner]
        norm = section.get("norm", tree["threat"]["norm"])
        if norm not in ("linf", "l2"):
            raise UserError(f"{owner}.norm={norm!r} is not known: take linf or l2")
        if owner == "attack" and section["eps"] is None:  # corruptions
            continue
        eps = section["eps"] = as_number(section["eps"], f"{owner}.eps")
        largest = 1.0 if norm == "linf" else (3.0 * size * size) ** 0.5
        if not 0.0 <= eps <= largest:
            raise UserError(
                f"{owner}.eps={eps:g} is outside [0, {largest:.4g}], the range of {norm} distances between images "
                "with pixels in [0, 1]: eps is in pixel units, as 8/255"
            )
    for key, least in _NUMBERS.items():
        value = _at(tree, key)
        if value is not None and as_number(value, key) < least:
            raise UserError(f"{key}={value} must be at least {least:g}")
    if _at(tree, "awp.warmup") is not None and _at(tree, "awp.rho") is None:
        raise UserError("awp.warmup needs awp.rho, which switches it on: give it too, as awp.rho=0.005")
    for key in _WHOLE:
        value = _at(tree, key)
        if value is not None and (isinstance(value, bool) or as_number(value, key) != int(as_number(value, key))):
            raise UserError(f"{key}={value} must be a whole number")
    if _at(tree, "optimizer.lr") is None:
        raise UserError("optimizer.lr is missing: give it a number")
    for key, choices in _CHOICES.items():
        value = _at(tree, key)
        if value not in choices:
            raise UserError(f"{key}={value!r} is not known: take {' or '.join(_shown(c) for c in choices)}")
    _check_audit(tree.get("audit") or {})
    if tree["evaluation"].get("skip_broken"):
        if not tree["attack"].get("ensemble"):
            raise UserError("evaluation.skip_broken=true leaves only the Ensemble: give attack.ensemble=true too")
        if tree["evaluation"].get("save"):
            raise UserError("evaluation.skip_broken=true has no example of what it skips: leave evaluation.save out")
    if tree["model"].get("num_classes") not in (None, tree["data"]["num_classes"]):
        raise UserError(
            f"model.num_classes={tree['model']['num_classes']}, but data.num_classes={tree['data']['num_classes']}: "
            "leave model.num_classes out, it follows the data"
        )


#: Efforts of the audit; all else there is a limit, which may be any number.
_EFFORTS = ("images", "passes", "starts", "factor", "least", "more", "steps", "draws", "queries", "directions")


def _check_audit(section: Mapping[str, Any], prefix: str = "audit") -> None:
    for name, value in section.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping):
            _check_audit(value, key)
        elif prefix == "audit" and name not in ("images", "source"):
            raise UserError(f"{key}={value} is a group of keys: give one of them, as {key}.share=0.1")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if not value:
                raise UserError(f"{key} is empty: give at least one number")
            for item in value:
                if (as_whole(item, key) if name == "steps" else as_number(item, key)) < 0:
                    raise UserError(f"{key}={list(value)} must hold no negative number")
        elif name in _EFFORTS:
            as_whole(value, key, 2 if name == "passes" else 1)
        elif key != "audit.source":
            positive = name in ("h", "tolerance", "step", "radius")
            if as_number(value, key) <= 0 and positive:
                raise UserError(f"{key}={value} must be above 0")


def _shown(value: Any) -> str:
    """A value as yaml writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


#: Numbers and the least value of each.
_NUMBERS = {
    "seed": float("-inf"),
    "label_smoothing": 0.0,
    "optimizer.lr": 0.0,
    "optimizer.momentum": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip": 0.0,
    "trainer.max_epochs": 1,
    "trainer.num_nodes": 1,
    "trainer.accumulate": 1,
    "trainer.checkpoint_every": 1,
    "data.batch_size": 2,
    "evaluation.chunk": 1,
    "evaluation.seed": float("-inf"),
    "inner.steps": 0,
    "inner.step": 0.0,
    "validation.every": 1,
    "validation.steps": 0,
    "validation.step": 0.0,
    "awp.rho": 0.0,
    "awp.warmup": 0.0,
}
_WHOLE = (
    "seed",
    "trainer.max_epochs",
    "trainer.num_nodes",
    "trainer.accumulate",
    "trainer.checkpoint_every",
    "data.batch_size",
    "evaluation.chunk",
    "evaluation.seed",
    "inner.steps",
    "validation.every",
    "validation.steps",
)
_CHOICES: dict[str, list[Any]] = {
    "runs.keep": ["weights", "all"],
    "evaluation.checkpoint": ["last", "best"],
    "evaluation.save": [None, "float32", "uint8"],
    "evaluation.skip_broken": [False, True],
}


def top_level_keys() -> set[str]:
    """Every key that the root configs and their groups write."""
    keys = {"axes", "run", "checkpoint", "rescore", "audit"}
    for name in ("train", "eval"):
        root = OmegaConf.load(Path(config_dir()) / f"{name}.yaml")
        assert isinstance(root, DictConfig)
        keys |= {str(k) for k in root if k not in ("defaults", "hydra")}
        for entry in root.get("defaults", []):
            if isinstance(entry, DictConfig):
                keys |= {str(k) for k in entry if " " not in str(k)}
    return keys


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's errors in one line that names the key and what exists."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:  # the innermost error names the key
        text = str(cause) or text
        cause = cause.__cause__
    group = re.search(r"Could not find '([^']+)/([^'/]+)'", str(error))
    if group:
        options = re.search(r"Available options in '[^']*':\s*(.*?)\s*Config search path", str(error), re.S)
        names = options.group(1).split() if options else []
        wanted = f"{group[1]}/{group[2]}".removeprefix("experiment/")
        if group[1].split("/")[0] == "experiment":
            return f"experiment={wanted} does not exist{did_you_mean(wanted, _experiments(wanted, names))}"
        return f"{group[1]}={group[2]} does not exist{did_you_mean(group[2], names)}"
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown:
        key = unknown[1]
        where = re.search(r"Key '([^']+)' is not in struct", text)
        return f"{key} is not a key of this config{_siblings(key)}" if where else f"{key}: {_first(text)}"
    if "Error parsing override" in text or "Error parsing override" in str(error):
        return f"{_first(str(error))}: write key=value, and quote values with special characters, as 'key=\"a,b\"'"
    key = getattr(error, "full_key", None)
    first = _first(str(error) if key else text)
    return f"{key}: {first}" if key and key not in first else first


def _experiments(wanted: str, top: Sequence[str]) -> list[str]:
    """The experiments of the folder (a paper's) that was asked for; else those at the top, and the folders."""
    root, folder = Path(config_dir()) / "experiment", wanted.rpartition("/")[0]
    inside = [f"{folder}/{file.stem}" for file in (root / folder).glob("*.yaml")] if folder else []
    return inside or [*top, *(f"{path.name}/..." for path in root.iterdir() if path.is_dir())]


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "the configuration could not be composed"


def _siblings(key: str) -> str:
    """Near names beside a key that does not exist."""
    try:
        cfg = compose(chosen, root)
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig):
            node, leaf = cfg, key.split(".")[0]
        names = [str(k) for k in node if k not in ("_target_", "axes")]
        return "" if leaf in names else did_you_mean(leaf, names)  # a key of the default option, not of the chosen one
    except Exception:  # a hint must never hide the error that it explains
        return ""
