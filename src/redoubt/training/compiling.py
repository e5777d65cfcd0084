"""torch.compile as training uses it: its work is kept between runs, and where it cannot work training goes on."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from redoubt.errors import UserError
from redoubt.training.distributed import watch

#: Of ``compile=``: torch.compile's modes. Those after the first capture CUDA graphs, which a CPU ignores.
MODES = ("default", "reduce-overhead", "max-autotune")
CACHE = "TORCHINDUCTOR_CACHE_DIR"

log = logging.getLogger("redoubt")


def compiled(function: Callable[..., Any], mode: bool | str = True) -> Callable[..., Any]:
    """A function of tensors, compiled at its first call, or as it is where no compiler works.

    Args:
        function: Its first argument is on the device where it computes.
        mode: One of ``MODES``; true is the first.

    Raises:
        UserError: No such mode.
    """
    if mode is True:
        mode = MODES[0]
    if mode not in MODES:
        raise UserError(f"compile={mode!r} is not known: take true, false, {' or '.join(MODES[1:])}")
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE, default_cache_dir()) == default_cache_dir():  # importing torch may have set that
        os.environ[CACHE] = str(folder())
    # Defenses differentiate one graph for several losses: its backward may not reuse what it has saved. Without
    # a tag, a backward that may, left in the cache by another program, would be taken: with wrong gradients.
    from torch._functorch import config as backward
    from torch.compiler import config as compiler

    backward.donated_buffer, compiler.cache_key_tag = False, "redoubt"
    _tell_the_watch()
    fast = torch.compile(function, mode=str(mode))

    @functools.wraps(function)
    def call(x: Tensor, *rest: Any) -> Any:
        if not works(x.device.type):
            return function(x, *rest)
        if mode == MODES[0] or not x.is_cuda:
            return fast(x, *rest)
        # The next replay of a CUDA graph writes over what this one gave. When that may be, torch knows: not while a
        # backward is due, as between the two forwards of TRADES. To mark the steps by hand would overrule it.
        return tree_map_only(Tensor, torch.clone, fast(x, *rest))

    return call


@functools.cache
def _tell_the_watch() -> None:
    """A rank that compiles is not taken for one that hangs."""
    from torch._dynamo.callback import callback_handler

    def told(compiling: bool) -> None:
        for vigil in watch:
            vigil.compiling = compiling

    callback_handler.register_start_callback(lambda _: told(True))
    callback_handler.register_end_callback(lambda _: told(False))


def folder() -> Path:
    """Where compiled code is kept, unless ``TORCHINDUCTOR_CACHE_DIR`` names another place."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redoubt" / "compiled"


@functools.cache
def works(device: str) -> bool:
    """Whether something small compiles and runs on a device; says so once where it does not."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler that is missing or broken raises
        lines = str(error).split("\n\n")[0].split()
        log.warning("compile: torch.compile does not work here, training goes on without it: %s", " ".join(lines)[:200])
        return False
    return True
