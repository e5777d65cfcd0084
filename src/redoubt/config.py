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
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from redoubt import allowed, schema
from redoubt.composed import checked
from redoubt.errors import UserError
from redoubt.secrets import from_environment
from redoubt.units import as_number, height_width

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
    for name, function in (
        ("ratio", _ratio),
        ("rounded", _rounded),
        ("by_norm", _by_norm),
        ("oc.env", _env),
        ("class_folders", _class_folders),
    ):
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


def _class_folders(root: str) -> int:
    """How many classes a folder of images has."""
    for split in ("train", "test", "val"):
        folder = Path(root).expanduser() / split
        if folder.is_dir():
            found = sum(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())
            if found < 2:
                raise UserError(f"data.root={root}: {folder} has {found} class folders; it takes two or more")
            return found
    raise UserError(
        f"data.root={root}: there is no folder {root}/train nor {root}/test; put images into one for each class"
    )


def _env(name: str, *default: Any) -> Any:
    """OmegaConf's own, with its values kept out of what is stored."""
    return from_environment(oc.env(name, *default))


def compose(overrides: Sequence[str], config_name: str = "train") -> DictConfig:
    """The config that the command line ``overrides`` would give, with its axes noted.

    Raises:
        UserError: An override names what does not exist.
    """
    from redoubt.explain import check_words, explain  # which compose their hints

    register_resolvers()
    check_words(overrides)
    extra = [f"hydra.searchpath=[{','.join(f'file://{p}' for p in search_path)}]"] if search_path else []
    state = GlobalHydra.instance()
    outer = state.hydra
    state.clear()
    try:
        with checked(search_path), initialize_config_dir(config_dir(), version_base="1.3"):
            cfg = hydra_compose(config_name, [*overrides, *extra], return_hydra_config=True)
    except Exception as error:
        raise UserError(explain(error, root=config_name)) from error
    finally:
        state.clear()
        if outer is not None:
            state.initialize(outer)
    choices = dict(cfg.hydra.runtime.choices)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return with_axes(cfg, choices)


def ready(overrides: Sequence[str], config_name: str = "train") -> DictConfig:
    """Composed, looked through and resolved, as a command would have it.

    Raises:
        UserError: See `compose`, `complete` and `resolve`.
    """
    cfg = compose(overrides, config_name)
    complete(cfg, config_name)
    return resolve(cfg)


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
        UserError: See `resolved`.
    """
    found = OmegaConf.create(resolved(cfg))
    OmegaConf.set_struct(found, True)
    return found


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """What `resolve` gives, as plain data.

    Raises:
        UserError: A value is missing, an interpolation fails, or a value is none or out of its range.
    """
    from redoubt.explain import explain

    try:
        tree = _container(cfg)
    except OmegaConfBaseException as error:
        if (ours := _of_ours(error)) is not None:
            raise ours from error
        raise UserError(explain(error, _failing(cfg))) from error
    assert isinstance(tree, dict)
    allowed.check({str(key): value for key, value in tree.items()}, search_path)
    allowed.check_plain(tree, "")
    _evaluate_fractions(tree, "")
    tree = schema.checked({str(key): value for key, value in tree.items()})
    if tree["evaluation"]["weights"] is None:
        tree["evaluation"]["weights"] = "student" if tree["ema"]["decay"] is None else "ema"
    _agree(tree)
    if tree.get("axes", {}).get("data") == "folder":  # by which runs are called
        tree["axes"]["folder"] = Path(tree["data"]["root"]).expanduser().resolve().name
    return tree


def _of_ours(error: BaseException | None) -> UserError | None:
    """What a resolver of ours has said, which OmegaConf wraps."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _container(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException:
        try:
            missing = OmegaConf.missing_keys(cfg)
        except OmegaConfBaseException:  # a resolver wants what is missing
            missing = {"data.root"} if OmegaConf.is_missing(cfg.data, "root") else set()
        if missing:
            raise UserError(f"{sorted(missing)[0]} is missing: give it on the command line") from None
        raise


def _failing(cfg: DictConfig, prefix: str = "") -> str | None:
    """The key whose interpolation fails; where others refer to it, the one that is nearest to the top."""
    found = []
    for key in map(str, cfg):
        try:
            value = cfg[key]
        except OmegaConfBaseException:
            found.append(f"{prefix}{key}")
        else:
            inner = _failing(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else None
            found += [inner] if inner else []
    return min(found, key=lambda name: name.count("."), default=None)


#: Keys whose value is a text, even where it looks like a fraction; and all that is under them.
_TEXTS = ("paths", "run", "extend", "checkpoint", "rescore", "to", "root", "pretrained", "name")


def _evaluate_fractions(tree: Any, prefix: str) -> None:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if key in _TEXTS:
            continue
        if isinstance(value, (dict, list)):
            _evaluate_fractions(value, f"{prefix}{key}.")
        elif isinstance(value, str) and _FRACTION.fullmatch(value):
            tree[key] = as_number(value, f"{prefix}{key}")


def _agree(tree: dict[str, Any]) -> None:
    """Rejects values that, together, would train or attack something else than what was meant.

    Raises:
        UserError: Names the keys.
    """
    height, width = height_width(tree["data"]["image_size"])
    for owner in ("threat", "inner", "attack"):
        section = tree[owner]
        norm = section.get("norm", tree["threat"]["norm"])
        if owner == "attack" and section["eps"] is None:  # corruptions
            continue
        eps = section["eps"] = as_number(section["eps"], f"{owner}.eps")
        largest = 1.0 if norm == "linf" else (3.0 * height * width) ** 0.5
        if not 0.0 <= eps <= largest:
            raise UserError(
                f"{owner}.eps={eps:g} is outside [0, {largest:.4g}], the range of {norm} distances between images "
                "with pixels in [0, 1]: eps is in pixel units, as 8/255"
            )
    if tree["ema"].get("warmup") and tree["ema"]["decay"] is None:
        raise UserError("ema.warmup=true needs ema.decay, which switches averaging on: give it too, or ema=warmup")
    awp = tree.get("awp") or {}
    if awp.get("warmup") is not None and awp.get("rho") is None:
        raise UserError("awp.warmup needs awp.rho, which switches it on: give it too, as awp.rho=0.005")
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


def complete(cfg: DictConfig, command: str) -> None:
    """Looks whether a freshly composed config holds what its command reads, and nothing else.

    Raises:
        UserError: A key is missing, or one is there that does not exist.
    """
    tree = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(tree, dict)
    schema.complete({str(key): value for key, value in tree.items()}, command)
