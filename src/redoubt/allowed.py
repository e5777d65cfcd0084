"""What a config may have called: a short list, with everything else refused, wherever the config comes from.

A config can be a stranger's: it came in an experiment's file, in a run's folder, in the metadata of a file of weights.
So every ``_target_`` of the whole tree is compared with this list before anything is imported, and what it names is
looked at again before it is called: it must be at home there, and of the kind that the place is for.

The user alone adds to the list: a package, or a single name, as a line of the file ``redoubt.allow`` in the folder that
``--config-dir`` names, or as an entry point of the group ``redoubt.allow`` of an installed package.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from redoubt.errors import UserError

#: Where a config's names may lead, and what must lie there: a subclass of one of these.
KINDS = {
    "redoubt.attacks.": ("redoubt.attacks.Attack", "redoubt.attacks.PGD"),
    "redoubt.objectives.": ("redoubt.objectives.Objective",),
    "redoubt.defenses.": ("redoubt.defenses.RobustModule",),
    "redoubt.nets.": ("torch.nn.Module",),
    "redoubt.data.": ("redoubt.data.ImageData",),
    "torch.optim.": ("torch.optim.Optimizer",),
}
#: Functions that make what a config asks for.
FUNCTIONS = (
    "redoubt.attacks.corruptions.corruptions",
    "redoubt.training.loggers.tensorboard_logger",
    "redoubt.training.loggers.wandb_logger",
)
#: Hydra makes these by itself, of the plugins that are installed and of nothing else.
PLUGINS = ("hydra.launcher._target_", "hydra.sweeper._target_")
PLUGIN = re.compile(
    r"hydra_plugins(\.[a-z]\w*)+\.[A-Z]\w*|hydra\._internal\.core_plugins\.(basic_launcher\.Basic"
    r"Launcher|basic_sweeper\.BasicSweeper)",
    re.ASCII,
)

#: Neither private nor special names, no blanks, no letters that only look like these.
_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)
#: What `hydra.utils.instantiate` obeys beside ``_target_``; our configs have no use for it.
_OBEYED = ("_args_", "_partial_", "_recursive_", "_convert_")
#: A config is smaller than that, unless it refers to itself.
DEEPEST, LARGEST = 40, 50_000


def nodes(tree: Any) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a plain tree.

    Raises:
        UserError: It has no end, or as good as none, as where yaml's anchors refer to each other.
    """
    left: list[tuple[str, Any]] = [("", tree)]
    seen = 0
    while left:
        key, value = left.pop()
        seen += 1
        if key.count(".") > DEEPEST or seen > LARGEST:
            raise UserError(f"{'.'.join(key.split('.')[:3])} is nested too deeply, or refers to itself: write it out")
        yield key, value
        inside: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            inside = value.items()
        elif isinstance(value, list | tuple):
            inside = enumerate(value)
        left += [(f"{key}.{name}" if key else str(name), item) for name, item in inside][::-1]


def check(tree: Mapping[str, Any], folders: Iterable[str]) -> None:
    """Refuses a plain config that names what is not on the list, in any of its sections, used or not.

    Args:
        tree: Resolved.
        folders: The user's own folders of configs.

    Raises:
        UserError: The key, and what it names.
    """
    allowed = listed(folders)
    for key, value in nodes(tree):
        name = key.rpartition(".")[2]
        if name in _OBEYED:
            raise UserError(f"{key} means nothing here: leave it out")
        if name == "_target_" and value is not None and not (key in PLUGINS and _is_plugin(value)):
            _check_name(value, key, allowed)


def check_plain(tree: Any, origin: str) -> None:
    """Refuses data that would be evaluated (``${...}``) if it were taken for a config: it stands for itself.

    Args:
        tree: What a file holds, or what is evaluated already.
        origin: ``<file>: `` for the message.

    Raises:
        UserError: The key.
    """
    for key, value in nodes(tree):
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{origin}{key} is {value[:80]!r}, which is not evaluated here: write what it stands for")


def locate(target: Any, key: str, folders: Iterable[str]) -> Any:
    """The allowed class or function of a dotted name; a class, which only code can give, is itself.

    Its own home must be allowed too: modules hold names of others, ``os`` among them.

    Args:
        target: What a config names.
        key: Where, for the message.
        folders: The user's own folders of configs.

    Raises:
        UserError: It is not allowed, or cannot be imported.
    """
    if inspect.isclass(target):
        return target
    allowed = listed(folders)
    _check_name(target, key, allowed)
    from hydra.utils import get_object  # the run store needs this module without Hydra

    logging.getLogger("hydra.utils").disabled = True  # it logs what it raises
    try:
        found = get_object(target)
    except Exception as error:  # whatever the import of a user's module raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"{key}: {target!r} cannot be imported ({reason}): correct the name, or the module") from error
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise _refusal(target, key)
    home = f"{found.__module__}.{found.__qualname__}"
    kinds = next((kinds for place, kinds in KINDS.items() if home.startswith(place)), ())
    ours = inspect.isclass(found) and issubclass(found, tuple(map(get_object, kinds)))
    if not (ours or home in FUNCTIONS or _within(home, allowed)):
        raise _refusal(target, key)
    return found


def _check_name(target: Any, key: str, allowed: tuple[str, ...]) -> None:
    if isinstance(target, str) and _NAME.fullmatch(target):
        a_class = target.rpartition(".")[2][0].isupper()
        if (a_class and target.startswith(tuple(KINDS))) or target in FUNCTIONS or _within(target, allowed):
            return
    raise _refusal(target, key)


def _within(name: str, places: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{place}.") for place in places)


def _refusal(target: Any, key: str) -> UserError:
    shown = repr(target)
    return UserError(
        f"{key}: {shown if len(shown) < 100 else shown[:97] + '...'} is not allowed: if you trust it, add its package "
        "to a file redoubt.allow in your --config-dir"
    )


def _is_plugin(value: Any) -> bool:
    return isinstance(value, str) and PLUGIN.fullmatch(value) is not None


def listed(folders: Iterable[str]) -> tuple[str, ...]:
    """Packages and names that the user, or what the user has installed, adds."""
    found = [*_installed()]
    for folder in folders:
        listing = Path(folder) / "redoubt.allow"
        if listing.is_file():
            try:
                text = listing.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{listing} cannot be read ({error}): write it in UTF-8, a name per line") from error
            lines = (line.partition("#")[0].strip() for line in text.splitlines())
            found += [line.rstrip(".") for line in lines if line]
    return tuple(found)


@functools.cache
def _installed() -> tuple[str, ...]:
    """What entry points add; they are read and not loaded."""
    return tuple(point.value for point in entry_points(group="redoubt.allow"))
