"""Lightning's Trainer as a run needs it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import DictConfig

from redoubt.errors import UserError
from redoubt.launched import slurm_tasks
from redoubt.runs.checkpoints import CheckpointFiles
from redoubt.training.distributed import PlainDDP


def make_trainer(cfg: DictConfig, folder: Path, callbacks: Sequence[Callback], loggers: Sequence[Any] = ()) -> Trainer:
    """The Trainer of a resolved config.

    Args:
        cfg: Resolved config; ``cfg.trainer`` and ``cfg.validation`` are read.
        folder: Where Lightning may write.
        callbacks: Among them a checkpointing one of ours.
        loggers: Lightning loggers beside metrics.csv.

    Raises:
        UserError: No such accelerator here, or a precision that it does not have.
    """
    t = cfg.trainer
    quiet_lightning()
    check_machine(cfg)
    world = devices(cfg)
    if world > 1 or int(t.num_nodes) > 1 or t.strategy == "ddp":
        strategy: Any = PlainDDP(process_group_backend="gloo" if accelerator(cfg) == "cpu" else "nccl")
    else:
        strategy = "auto"
    # Lightning would take the one task of a Slurm job for all of its processes.
    alone = slurm_tasks() == 1 and not torch.distributed.is_torchelastic_launched()
    try:
        trainer = Trainer(
            plugins=[CheckpointFiles(), *([LightningEnvironment()] if alone else [])],
            accelerator=accelerator(cfg),
            devices=world,
            num_nodes=int(t.num_nodes),
            strategy=strategy,
            precision=t.precision,
            max_epochs=int(t.max_epochs),
            deterministic=bool(t.deterministic),
            sync_batchnorm=bool(t.sync_batchnorm),
            fast_dev_run=bool(t.fast_dev_run),
            check_val_every_n_epoch=int(cfg.validation.every),
            logger=list(loggers) or False,
            callbacks=list(callbacks),
            enable_checkpointing=True,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
            log_every_n_steps=1,
            default_root_dir=str(folder),
        )
    except (
        ValueError,
        RuntimeError,
        TypeError,
    ) as error:  # Lightning's MisconfigurationException is none of ours
        raise UserError(f"trainer: {error}") from error
    # Its handlers broadcast, and save, wherever a rank is: ours are `redoubt.training.stopping`.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def accelerator(cfg: DictConfig) -> str:
    """``cpu`` or ``gpu``, with ``auto`` decided."""
    wanted = str(cfg.trainer.accelerator)
    if wanted == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: no GPU is visible to torch here; take trainer=cpu")
    return wanted


def devices(cfg: DictConfig) -> int:
    """Processes on this machine."""
    wanted = cfg.trainer.devices
    if wanted == "auto":
        return torch.cuda.device_count() if accelerator(cfg) == "gpu" else 1
    count = int(wanted)
    cores = os.cpu_count() or 1
    if accelerator(cfg) == "cpu" and count > max(16, 4 * cores):
        raise UserError(f"trainer.devices={count} processes on {cores} cores: take at most {max(16, 4 * cores)}")
    if accelerator(cfg) == "gpu" and count > torch.cuda.device_count():
        raise UserError(f"trainer.devices={count}, but torch sees {torch.cuda.device_count()} GPUs here")
    return count


def check_machine(cfg: DictConfig) -> None:
    """bf16 on a CPU only where the processor has it; float16 on no CPU (Lightning would take bf16 silently).

    Raises:
        UserError: What is asked for needs another machine.
    """
    if cfg.trainer.sync_batchnorm and accelerator(cfg) == "cpu":
        raise UserError("trainer.sync_batchnorm=true needs GPUs: torch synchronises BatchNorm there only")
    precision = str(cfg.trainer.precision)
    if accelerator(cfg) == "cpu" and precision == "16-mixed":
        raise UserError("trainer.precision=16-mixed needs a GPU: take bf16-mixed or 32-true on a CPU")
    if accelerator(cfg) == "cpu" and precision == "bf16-mixed" and not cpu_has_bf16():
        raise UserError("trainer.precision=bf16-mixed: this processor has no bfloat16 arithmetic; take 32-true")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 (AVX512-BF16 or AMX) rather than emulating it."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool((probe and probe()) or (amx and amx()))


def device_name(cfg: DictConfig) -> str:
    """What computes, for people."""
    if accelerator(cfg) == "gpu":
        return f"{devices(cfg)} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads" + (f", {devices(cfg)} processes" if devices(cfg) > 1 else "")


def quiet_lightning() -> None:
    """Our one log line and progress bar say what Lightning's messages would."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*num_workers.*|.*srun.*|.*lr_scheduler.*")
