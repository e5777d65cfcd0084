"""What a run starts from: the natural run of the same model and data, a given run or file, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from redoubt.beforehand import pretrained
from redoubt.build import make
from redoubt.data import ImageData
from redoubt.errors import UserError
from redoubt.nets import Backbone, OtherNet, load_backbone, load_weights
from redoubt.runs.checkpoints import read_checkpoint
from redoubt.runs.files import split_choice
from redoubt.runs.identity import identity, plain
from redoubt.runs.loading import CONSTANTS, constants, load, weights_hash
from redoubt.runs.store import Run, Store, readable_name
from redoubt.runs.twin import twin_config

log = logging.getLogger("redoubt")


@dataclass(frozen=True)
class Start:
    """Trained weights to begin from; of ``auto`` they may still have to be made.

    Args:
        identity: Stands for the weights in the identity of the run that begins from them.
        name: For people.
        twin: Config of the natural run that ``auto`` finds or makes.
        run: The run that was given or found.
        net: The net of the file that was given.
    """

    identity: str
    name: str
    twin: DictConfig | None = None
    run: Run | None = None
    net: nn.Module | None = None


def starting_point(cfg: DictConfig, data: ImageData, fingerprint: str | None = None) -> Start | None:
    """What ``defense.pretrained`` means: ``auto``, a run, a checkpoint file, or None for ``none``. Trains nothing.

    Args:
        cfg: Resolved config of the cell.
        data: Its data.
        fingerprint: Of the training tensors, where it is known.

    Raises:
        UserError: No such run or file, an unfinished run, or a file of another net.
    """
    wanted = cfg.defense.get("pretrained")
    if wanted is None or str(wanted).lower() == "none":
        if cfg.defense.get("replace_head"):
            raise UserError("defense.replace_head=true is of the net that defense.pretrained names: give that too")
        return None
    store = Store(cfg.paths.outputs)
    if wanted == "auto":
        twin = twin_config(cfg, defense="none", base="standard")
        digest = identity(twin, fingerprint or data.fingerprint("train"))
        run = Run(store.folder / f"{readable_name(twin.axes, twin.seed)}-{digest}")
        return Start(digest, run.name, twin=twin, run=run)
    try:
        return _given(str(wanted), cfg, store)
    except UserError as error:
        text = str(error).removeprefix(f"{wanted}: ")
        raise UserError(f"defense.pretrained={wanted}: {text}") from error


def _given(wanted: str, cfg: DictConfig, store: Store) -> Start:
    file, choice = split_choice(wanted)
    if not file.is_file():
        run = pretrained(wanted, store)
    else:
        run = Run(file.resolve().parent.parent)
        if choice or not run.exists() or file.resolve() != run.last.resolve():
            net = _of_file(file, cfg, run, choice)
            return Start(weights_hash(net), file.name, net=net)
    run.must_be_finished()
    return Start(run.hash, run.name, run=run)


def _of_file(file: Path, cfg: DictConfig, run: Run, choice: str) -> nn.Module:
    """The config's net with a file's weights: of our checkpoints those that are evaluated, wherever they lie."""
    if run.exists() and not choice:
        return _of_run(file, cfg, str(file), str(file))
    net = _fresh(cfg)
    if not choice and (ours := _our_weights(file)) is not None:
        _fill(net, ours, cfg, f"{file}: a checkpoint of ours; if its defense changes the net, give its run instead")
        return net
    own = constants(net)
    with _heads_named(net, cfg):
        load_backbone(net, f"{file}::{choice}" if choice else file, _kept(net, cfg))
    _same_first_layer(constants(net), own, str(file))  # of the file it may be the first layer now
    return net


def _of_run(source: Path | Run, cfg: DictConfig, origin: str, name: str) -> nn.Module:
    """The config's net with the weights that a run, or one of its checkpoints, evaluates."""
    net, found = _fresh(cfg), load(source).deployed()
    _fill(net, found.state_dict(), cfg, origin)
    _same_first_layer(constants(found), constants(net), name)
    return net


def _fill(net: Backbone, state: Mapping[str, torch.Tensor], cfg: DictConfig, origin: str) -> None:
    """Loads a state_dict, all of it but the head where the config replaces that."""
    if head := _kept(net, cfg):
        own = {k: v for k, v in net.state_dict().items() if k.startswith(f"{head}.")}
        state = {k: v for k, v in state.items() if not k.startswith(f"{head}.")} | own
    with _heads_named(net, cfg):
        load_weights(net, state, origin)


def _kept(net: Backbone, cfg: DictConfig) -> str:
    """Name of the submodule that keeps its fresh weights; "" for none."""
    if not cfg.defense.get("replace_head"):
        return ""
    if not isinstance(net, Backbone):
        raise UserError("defense.replace_head: needs a net with get_classifier (redoubt.nets.Backbone)")
    return net.head_name


@contextmanager
def _heads_named(net: nn.Module, cfg: DictConfig) -> Iterator[None]:
    """Names the key that helps where weights differ from the net in nothing but the head."""
    try:
        yield
    except OtherNet as error:
        head = f"{net.head_name}." if isinstance(net, Backbone) else None
        if head is None or not all(key.startswith(head) for key in error.keys):
            raise
        raise UserError(f"{error}; or take all but the head's by defense.replace_head=true") from error


def _our_weights(file: Path) -> dict[str, torch.Tensor] | None:
    """The net of a checkpoint of ours, averaged where it is; None where the file is none."""
    try:
        content = read_checkpoint(file)
    except UserError:
        return None
    student = {k[4:]: t for k, t in content["state_dict"].items() if k.startswith("net.")}
    average = content["redoubt"].get("ema") or {}
    if average:
        log.info("%s: takes redoubt.ema (averaged); %s::state_dict.net would take the raw weights", file, file)
    return student | average


def trained_net(start: Start, cfg: DictConfig) -> nn.Module:
    """The plain net of a start whose run is finished.

    Raises:
        UserError: Its net is another one than the config's.
    """
    if start.net is not None:
        return start.net
    assert start.run is not None
    name = f"run {start.run.name}"
    return _of_run(start.run, cfg, f"defense.pretrained: {name}", name)


def _fresh(cfg: DictConfig) -> Backbone:
    """The config's net as it is without a defense, with the fresh weights of its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(cfg.seed))
        return make(plain(cfg.model), "model")


def _same_first_layer(found: dict[str, torch.Tensor], own: dict[str, torch.Tensor], origin: str) -> None:
    """Refuses weights that were trained behind another normalisation than the config's."""
    for name in CONSTANTS:
        mine, theirs = own.get(name), found.get(name)
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None or not torch.allclose(mine, theirs):
            shown = "no normalisation" if theirs is None else f"normalize.{name[10:]} {theirs.flatten().tolist()}"
            raise UserError(f"{origin} was trained with {shown}: set model.normalize, model.mean and model.std so")
