"""Processes that train together: a strategy that does not wrap the module, and what they tell each other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from redoubt.errors import UserError
from redoubt.training import processes
from redoubt.training.stopping import STOPPING, Stopped, requests
from redoubt.training.vigil import Lost, Vigil

#: This rank's watch over the others, while there are others.
watch: list[Vigil] = []


class PlainDDP(DDPStrategy):
    """Lightning's process group, with the module left as it is.

    The module averages its own gradients (`redoubt.defenses.gradients`); under a wrapping
    DistributedDataParallel, gradients taken by ``torch.autograd.grad`` are never averaged.
    """

    def setup(self, trainer: Trainer) -> None:
        # Lightning asks in every step, by a broadcast that it waits for, whether rank 0 was told to stop.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Weights of rank 0 to all; they are equal already where every rank drew them from the same seed."""
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.data, src=0)

    def _register_ddp_hooks(self) -> None:  # there is no wrapper to register them on
        return None

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        meet()


def ranks() -> tuple[int, int]:
    """(rank, world size) of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


# ---- together -----------------------------------------------------------------------------------------------------


@contextmanager
def together(facts: Mapping[str, str]) -> Iterator[None]:
    """Inside, ranks see each other fail, stop and hang (`redoubt.training.vigil`), and none outlives the others.

    The process group is there already, and is destroyed at the end: without that two processes on a CPU were seen to
    abort at exit. With a single process nothing happens.

    Args:
        facts: What must be the same on every rank, by name.

    Raises:
        UserError: They differ, or another rank failed.
        Stopped: Another rank was told to stop.
    """
    try:
        if ranks()[1] == 1:
            yield
            return
        with requests.heard(*STOPPING):
            _begin_watch()
            try:
                same(facts)
                yield
                meet()
            except BaseException as error:
                cause = _told(error)
                if cause is not error:
                    raise cause from error
                raise
    finally:
        leave()


def _begin_watch() -> None:
    _rounds[:] = [0, 0]
    elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    vigil = Vigil(_store(), ranks()[0], gather(processes.place()), elsewhere)
    meet()
    watch[:] = [vigil]
    vigil.start()


def _told(error: BaseException) -> BaseException:
    """Tells the others why this rank ends; the cause where it is theirs."""
    (vigil,) = watch
    if isinstance(error, Lost) or (isinstance(error, Stopped) and error.agreed):
        vigil.end_here()
        return error
    if _of_connection(error) and (cause := vigil.cause(error)) is not error:
        return cause
    vigil.report(error)
    return error


def _of_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave() -> None:
    """Ends the process group, and the watch over it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    for vigil in watch:
        vigil.leave()
    watch.clear()


def same(facts: Mapping[str, str]) -> None:
    """Refuses, on every rank, what differs between ranks.

    Args:
        facts: By name; kept short, they go through the store.

    Raises:
        UserError: The line names the ranks and what differs there.
    """
    told = [json.loads(text) for text in gather(json.dumps(dict(facts)))]
    found = []
    for rank, other in enumerate(told):
        differing = [name for name in {**told[0], **other} if other.get(name) != told[0].get(name)]
        if differing:
            found.append(f"rank {rank} has another {', '.join(differing[:8])}{', ...' * (len(differing) > 8)}")
    if found:
        raise UserError(f"{'; '.join(found)} than rank 0: start every rank by the same command, with the same code")


# ---- what ranks tell each other, outside of steps --------------------------------------------------------------------

#: Of this process group: how often the ranks met, and told each other something.
_rounds = [0, 0]


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def meet() -> None:
    """Waits for every rank, through the store: unlike in a collective, signals are heard and lost ranks are noticed."""
    rank, world = ranks()
    if world == 1:
        return
    _rounds[0] += 1
    store, key, pause = _store(), f"redoubt/meet/{_rounds[0]}", 0.001
    with _broken():
        here = store.add(key, 1)
        while here < world:
            for vigil in watch:
                vigil.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            here = store.add(key, 0)
        if rank == 0:
            store.delete_key(f"redoubt/meet/{_rounds[0] - 1}")  # all have left that one


def gather(text: str) -> list[str]:
    """A short text of every rank, on every rank."""
    rank, world = ranks()
    if world == 1:
        return [text]
    _rounds[1] += 1
    store, key = _store(), f"redoubt/told/{_rounds[1]}"
    with _broken():
        store.set(f"{key}/{rank}", text)
        meet()
        found = [told.decode() for told in store.multi_get([f"{key}/{r}" for r in range(world)])]
        store.delete_key(f"redoubt/told/{_rounds[1] - 1}/{rank}")
    return found


def broadcast(value: Any) -> Any:
    """Rank 0's value, of what JSON can say, on every rank."""
    return json.loads(gather(json.dumps(value) if ranks()[0] == 0 else "null")[0])


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    world = ranks()[1]
    if world == 1:
        return [value]
    meet()
    found: list[Any] = [None] * world
    with _broken():
        dist.all_gather_object(found, value)
    return found


# ---- within steps --------------------------------------------------------------------------------------------------


def all_reduce(tensor: Tensor) -> None:
    """Sums a tensor over the ranks, in place."""
    for vigil in watch:
        vigil.entered += 1
    with _broken():
        dist.all_reduce(tensor)


@contextmanager
def _broken() -> Iterator[None]:
    """A connection that broke: the error of whoever broke it is raised."""
    try:
        yield
    except RuntimeError as error:
        if watch and _of_connection(error) and (cause := watch[0].cause(error)) is not error:
            raise cause from error
        raise


def stop_here(step: int, asked: int | None) -> int | None:
    """The signal, where every rank stops after ``step``; None where this rank goes on.

    Hosts are not in step with each other: on a GPU one may be many steps ahead in what it has launched. So a rank that
    was asked waits at the end of its step until it knows of every rank that it waits at the end of the same one; where
    one is further, or within a further step (and may wait for this one there), it goes on to that one's end. A rank
    has heard of the request within two rounds of the watch; nothing is asked of the store before.

    Args:
        step: The step that is done, not the epoch's last.
        asked: The signal that this rank was asked by, or has heard of.
    """
    rank, world = ranks()
    if world == 1 or asked is None:
        return asked
    (vigil,) = watch
    store, keys = _store(), [f"redoubt/at/{r}" for r in range(world)]
    with _broken():
        store.set(keys[rank], f"{step} {asked}")
        while True:
            waiting = [_at(store, key) for key in keys]
            if any(beat.begun > step for beat in vigil.beats) or any(at and at[0] > step for at in waiting):
                return None
            if all(at is not None and at[0] == step for at in waiting):
                return max(at[1] for at in waiting if at is not None)
            vigil.check()
            time.sleep(0.01)


def _at(store: Any, key: str) -> tuple[int, int] | None:
    if not store.check([key]):
        return None
    step, asked = store.get(key).split()
    return int(step), int(asked)
