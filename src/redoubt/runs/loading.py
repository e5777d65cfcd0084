"""A trained net back from its run or its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from redoubt import config
from redoubt.allowed import check_plain
from redoubt.build import build_module
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.nets import load_backbone, load_weights
from redoubt.runs.checkpoints import read_checkpoint
from redoubt.runs.files import split_choice
from redoubt.runs.identity import WITHOUT, deciding, differences
from redoubt.runs.store import Run, Store


def load(
    source: str | Path | Run,
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    compile: bool | None = None,
    outputs: str | Path = "outputs",
) -> RobustModule:
    """The module of a run or of an exported file, in evaluation mode on the CPU.

    Args:
        source: A run, its folder or name, one of its checkpoint files, or a .safetensors file of ``export``.
        checkpoint: ``last`` or ``best``, where ``source`` is a run.
        weights: ``student``, ``ema`` or (CURE) ``revision``; what the run's config evaluates where None.
        compile: Whether the net is compiled; as the run's config says where None.
        outputs: The store in which names are looked up.

    Raises:
        UserError: No such run or file, or a file of another net.
    """
    if isinstance(source, (str, Path)) and Path(source).is_file():
        file = Path(source)
        if file.suffix == ".safetensors":
            return _exported(file)
        run = Run(file.resolve().parent.parent)
        if not run.exists():
            raise UserError(
                f"{file} lies in no run's folder: give eval.py checkpoint={file} with model=... and data=... instead"
            )
    else:
        run = source if isinstance(source, Run) else Store(outputs).find(source)
        file = checkpoint_file(run, checkpoint)
    content = read_checkpoint(file)
    same_config(run, content, file)
    cfg = OmegaConf.create(run.config())
    if "pretrained" in cfg.model:
        cfg.model.pretrained = False  # its weights follow: nothing is downloaded
    if weights is not None:
        cfg.evaluation.weights = weights
    if compile is not None:
        cfg.compile = compile
    module = build_module(cfg)
    module.classes = run.classes()
    restore(module, content, file)
    return module


def is_exported(file: Path) -> bool:
    """Whether a file is one that ``export`` wrote as .safetensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            return "redoubt" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def classes_of(file: Path) -> list[str] | None:
    """The names of the classes that a file of weights was trained on, where it or its run says so."""
    if is_exported(file):
        with safe_open(file, framework="pt") as opened:
            return _names(json.loads(opened.metadata()["redoubt"]))
    run = Run(file.resolve().parent.parent)
    return run.classes() if run.exists() else None


def fill(module: RobustModule, wanted: str) -> Path:
    """Loads the weights that ``file`` or ``file::name`` stands for into a module's net, and the names of its classes.

    Returns:
        The file.
    """
    load_backbone(module.net, wanted)
    file, _ = split_choice(wanted)
    module.classes = classes_of(file)
    return file


def _names(facts: Any) -> list[str] | None:
    """What the facts of an exported file say of the classes; older files say nothing."""
    names = facts.get("classes") if isinstance(facts, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else None


def _exported(file: Path) -> RobustModule:
    """The module of a file that ``export`` wrote, rebuilt from its metadata."""
    cfg = config.compose([])
    cfg.axes = {}  # of the default cell
    try:
        with safe_open(file, framework="pt") as opened:
            facts = json.loads(opened.metadata()["redoubt"])
            check_plain(facts, f"{file}: ")
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        for name in ("model", "defense"):
            if facts[name] is not None:
                cfg[name] = {**facts[name], "_target_": facts[name]["_target_"]}
        for name, key in (("data", "num_classes"), ("data", "image_size"), ("threat", "norm"), ("threat", "eps")):
            size = key == "image_size" and isinstance(facts[name][key], list)
            if isinstance(facts[name][key], list | dict) and not (
                size and [type(s) for s in facts[name][key]] == [int] * 2
            ):
                raise TypeError(key)
            cfg[name][key] = facts[name][key]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is none of export's files, or cut short: give foreign weights to eval.py, as checkpoint={file} "
            "with model=... and data=..."
        ) from error
    if "pretrained" in cfg.model:
        cfg.model.pretrained = False  # as above
    module = build_module(cfg)
    module.classes = _names(facts)
    prefix = getattr(module.net, "key_prefix", "")
    weights = {f"{prefix}{k}": v for k, v in state.items() if k not in CONSTANTS}  # which the metadata has built
    load_weights(module.net, weights, str(file))
    return module.eval()


#: A state_dict lacks them; the weights would be wrong without.
CONSTANTS = ("normalize.mean", "normalize.std")


def constants(net: nn.Module) -> dict[str, Tensor]:
    """The normalisation's mean and std, where the net has one."""
    return {k: b for k, b in net.named_buffers() if k in CONSTANTS}


def portable_state(net: nn.Module) -> dict[str, Tensor]:
    """The state_dict under the names of the library that the net is from, and the normalisation's constants."""
    prefix = getattr(net, "key_prefix", "")
    return constants(net) | {k.removeprefix(prefix): t for k, t in net.state_dict().items()}


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names and bytes of a net's parameters and buffers, those that no checkpoint holds included."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checkpoint_file(run: Run, which: str) -> Path:
    """The file of ``last`` or ``best``."""
    if which not in ("last", "best"):
        raise UserError(f"evaluation.checkpoint={which!r} is not known: take last or best")
    file = run.last if which == "last" else run.best
    if not file.is_file():
        hint = "; train it first"
        if which == "best":
            hint = "; best needs a validation split (data.val_fraction): take last"
        elif run.finished:
            hint = f"; put it back, or remove the run (redoubt runs rm {run.name}) and train it again"
        raise UserError(f"{file} does not exist{hint}")
    return file


def same_config(run: Run, content: Mapping[str, Any], file: Path) -> None:
    """Refuses weights that were trained by another config than the one beside them: it would build another net."""
    trained = content.get("run", {}).get("decides", {}).get("config")
    changed = differences(trained, deciding(run.config(), excluded=WITHOUT)) if trained else []
    if changed:
        raise UserError(
            f"{run.config_file} is not what {file.name} was trained with: it differs in {', '.join(changed)}; "
            "put the values back"
        )


def restore(module: RobustModule, content: Mapping[str, Any], file: Path) -> None:
    """Puts the evaluated weights of a checkpoint's content into the module and sets it to evaluation."""
    try:
        state = module.evaluated_state(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    own = module.state_dict()
    wrong = [k for k in (*own, *state) if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise UserError(
            f"{file} is a checkpoint of another net: {len(set(wrong))} entries differ, the first is {wrong[0]}"
        )
    module.load_state_dict(state)
    if module.ema is not None and content["redoubt"]["ema"] is not None:
        module.ema.load(content["redoubt"]["ema"])
    module.eval()
