"""Hydra's composing, with its own part of the tree checked before Hydra acts on it.

Hydra makes callbacks, loggers, sweepers and launchers of a config before it calls us. Its loader is where every config
comes from: of the command line, of each job of a sweep, in a worker of a launcher, of `redoubt.config.compose`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal import config_loader_impl, defaults_list, hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, _create_interpolation_map, create_defaults_list
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, Node, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from redoubt.allowed import DEEPEST, check, listed, locate, nodes
from redoubt.errors import UserError
from redoubt.secrets import redacted

#: What Hydra makes things of.
_MADE = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging")
#: What a logging section may name; a file could be any file.
_LOGGING = ("logging.StreamHandler", "ext://sys.stdout", "ext://sys.stderr")
#: Hydra's keys that would run what they say, or write down what nobody may read.
_REFUSED = {
    "hydra.job.env_set": "set the environment in the shell",
    "hydra.job.env_copy": "set the environment in the shell",
    "hydra.output_subdir": "a run's folder holds its config, without secrets",
}
#: Folders that Hydra makes; runs and sweeps lie under paths.outputs.
_FOLDERS = {
    "run.dir": ".", "sweep.dir": "${paths.outputs}/sweeps", "sweep.subdir": ".", "job.chdir": False,
    "launcher.submitit_folder": "${paths.outputs}/sweeps/.submitit/%j",
}  # fmt: skip
#: What a file may say of a launcher. Anything else, as setup or srun_args, may run what it says.
_LAUNCHER = {
    "account", "array_parallelism", "backend", "batch_size", "comment", "constraint", "cpus_per_gpu", "cpus_per_task",
    "exclude", "gpus_per_node", "gpus_per_task", "gres", "max_num_timeout", "mem_gb", "mem_per_cpu", "mem_per_gpu",
    "n_jobs", "name", "nodes", "partition", "pre_dispatch", "qos", "signal_delay_s", "stderr_to_stdout",
    "submitit_folder", "tasks_per_node", "timeout_min", "verbose", "_target_",
}  # fmt: skip


@contextmanager
def checked(folders: Sequence[str]) -> Iterator[None]:
    """Inside, what Hydra composes is checked.

    Args:
        folders: The user's own folders of configs, whose ``redoubt.allow`` counts.
    """
    module: Any = hydra
    before, module.ConfigLoaderImpl = module.ConfigLoaderImpl, partial(Loader, folders=folders)
    try:
        yield
    finally:
        module.ConfigLoaderImpl = before


class Loader(ConfigLoaderImpl):
    """Hydra's loader of configs; a launcher's workers get it with its folders."""

    def __init__(self, config_search_path: ConfigSearchPath, folders: Sequence[str]) -> None:
        super().__init__(config_search_path)
        self.folders = list(folders)
        self.repository = Files(config_search_path)  # of which Hydra makes a copy for each config

    def load_configuration(self, config_name: Any, overrides: list[str], *rest: Any, **options: Any) -> DictConfig:
        """See Hydra.

        Raises:
            UserError: The config names what is not allowed.
        """
        from redoubt.explain import explain

        try:
            cfg = super().load_configuration(config_name, overrides, *rest, **options)
        except yaml.YAMLError as error:
            raise UserError(explain(error)) from error
        except RecursionError as error:
            raise UserError("a config refers to itself: write it out") from error
        if not options.get("validate_sweep_overrides", True):
            return cfg  # Hydra only looks for hydra.mode, and composes once more for all the rest
        tree = opened(cfg)
        check(tree, self.folders)
        self._check_hydra(tree["hydra"], overrides)
        for key, ours in _FOLDERS.items():
            section, _, name = key.partition(".")
            as_written: Any = OmegaConf.to_container(cfg.hydra[section])
            if as_written.get(name) not in (None, ours):
                raise UserError(f"hydra.{key} is not taken: runs and sweeps lie where paths.outputs says")
        if "submitit" in str(tree["hydra"].get("launcher")):
            as_given: Any = OmegaConf.to_container(cfg)
            hydras = as_given.pop("hydra")
            _check_secrets([as_given, {"hydra": hydras}, {"hydra": {"sweeper": tree["hydra"].get("sweeper")}}])
        with read_write(cfg.hydra), open_dict(cfg.hydra):
            for name in _MADE:  # as checked: ${now:} and the like may be another thing the next time
                cfg.hydra[name] = tree["hydra"][name]
        return cfg

    def _load_configuration_impl(self, *arguments: Any, **options: Any) -> DictConfig:
        module: Any = config_loader_impl
        lists: Any = defaults_list
        true, module.create_defaults_list = module.create_defaults_list, self._defaults_list
        choices, lists._create_interpolation_map = lists._create_interpolation_map, _choices_if_asked_for
        try:
            return super()._load_configuration_impl(*arguments, **options)
        finally:
            module.create_defaults_list, lists._create_interpolation_map = true, choices

    def _defaults_list(self, repo: Any, config_name: Any, overrides_list: list[Override], **options: Any) -> Any:
        """Hydra's list of the files to merge; an empty one where the same files were merged before."""
        chosen = Overrides(repo, overrides_list)
        sources = [(source.provider, source.path) for source in repo.get_sources()]
        groups = (chosen.override_choices, chosen.append_group_defaults, chosen.deletions)
        self._groups: str | None = repr((sources, config_name, groups))
        merged = _MERGED.get(self._groups)
        if merged is not None and all(repo.delegate.state(name) == state for name, state in merged.files.items()):
            chosen.known_choices = dict(merged.choices)
            return DefaultsList([], cast(Any, None), chosen.config_overrides, chosen)
        _MERGED.pop(self._groups, None)
        skips = options.pop("skip_missing")  # as Hydra does where it only looks which mode is asked for: then once more
        try:
            found = create_defaults_list(repo, config_name, overrides_list, **options, skip_missing=False)
        except ConfigCompositionException:
            if not skips:
                raise
            self._groups = None
            return create_defaults_list(repo, config_name, overrides_list, **options, skip_missing=True)
        self._choices = dict(found.overrides.known_choices)
        return found

    def _compose_config_from_defaults_list(self, defaults: Any, repo: Any) -> DictConfig:
        """The merged files, before the command line's values are set."""
        merged = _MERGED.get(self._groups)
        if merged is not None:
            return copied(merged.config)  # whoever gets it changes it
        hydras = [*takewhile(lambda default: default.config_path.startswith("hydra/"), defaults)]
        key = repr([(default, repo.delegate.state(default.config_path)) for default in hydras])
        if key not in _HYDRAS:
            _HYDRAS[key] = super()._compose_config_from_defaults_list(hydras, repo)
        self._hydras = copied(_HYDRAS[key])
        begun: list[Any] = [None, *defaults[len(hydras) :]]
        cfg = super()._compose_config_from_defaults_list(begun, repo)
        if self._groups is not None:
            _MERGED[self._groups] = Merged(repo.delegate.asked, self._choices, copied(cfg))
        return cfg

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        if default is None:  # what Hydra's own files came to stands for them
            return ConfigResult(provider="hydra", path="", config=self._hydras, header={})
        return super()._load_single_config(default, repo)

    def _check_hydra(self, tree: Mapping[str, Any], overrides: Sequence[str]) -> None:
        values = {f"hydra.{key}": value for key, value in nodes(tree)}
        for key, instead in _REFUSED.items():
            if values.get(key):
                raise UserError(f"{key} is not taken: {instead}")
        typed = tuple(o.lstrip("+").partition("=")[0] for o in overrides)
        for section in ("launcher", "sweeper"):
            if not isinstance(tree.get(section), Mapping):
                raise UserError(f"hydra.{section} is a group of keys: choose one by hydra/{section}=...")
        for name in tree["launcher"].keys() - _LAUNCHER:
            key = f"hydra.launcher.{name}"
            said = any(f"{word}.".startswith(f"{key}.") for word in typed)
            if tree["launcher"][name] and not said and key not in listed(self.folders):
                raise UserError(
                    f"{key} may hold commands: give it on the command line, or allow it by a line {key} of a file "
                    "redoubt.allow in your --config-dir"
                )
        for key, value in values.items():
            section, _, name = key.removeprefix("hydra.").partition(".")
            last = name.rpartition(".")[2]
            if section not in _MADE:
                continue
            if isinstance(value, str) and "${" in value:
                raise UserError(f"{key} is {value!r}, which cannot be evaluated here: write what it stands for")
            named = last in ("()", "class") or str(value).startswith(("ext://", "cfg://"))
            if section.endswith("_logging") and named and value not in _LOGGING:
                raise UserError(f"{key}: {value!r} is not allowed: take hydra/{section}=none")
            if section == "launcher" and "\n" in f"{name}{value}":  # each becomes a line of a script
                raise UserError(f"{key} must be one line")
            if last == "_target_" and name != last and value is not None:
                locate(value, key, self.folders)

    def _process_config_searchpath(self, config_name: Any, parsed_overrides: list[Override], repo: Any) -> None:
        for override in parsed_overrides:  # pkg://name would import it
            if override.get_key_element() == "hydra.searchpath" and "pkg://" in str(override.value()):
                raise UserError(f"{override.input_line}: packages are not taken: give a folder, as --config-dir")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


class Files(ConfigRepository):
    """Hydra's files of configs, each read once by a process, which in a sweep composes often.

    Attributes:
        asked: State of each config that was asked for, by name.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.asked: dict[str, Any] = {}

    def __deepcopy__(self, memo: Any) -> Files:
        """Hydra's copy for one config, which it may give another list of folders; the folders never change."""
        other = copy.copy(self)
        other.asked = {}
        return other

    def state(self, config_path: str) -> Any:
        """What tells whether a config is the same as before: its provider, file, time of change and size."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        name = source._normalize_file_name(config_path)
        if source.scheme() == "structured":
            return source.provider, name, _number(ConfigStore.instance()._load(name))
        if source.scheme() != "file":
            return source.provider
        file = Path(source.path, name)
        state = file.stat()
        return source.provider, file, state.st_mtime_ns, state.st_size

    def config_exists(self, config_path: str) -> bool:
        self.asked[config_path] = self.state(config_path)
        return super().config_exists(config_path)

    def load_config(self, config_path: str) -> Any:
        """See Hydra.

        Raises:
            UserError: The file's tree has no end, or as good as none.
        """
        state = self.asked[config_path] = self.state(config_path)
        if not isinstance(state, tuple):
            return super().load_config(config_path)
        if state not in _READ:
            if isinstance(state[1], Path):
                _check_anchors(state[1])
            _READ[state] = super().load_config(config_path)
        read = _READ[state]
        return replace(
            read, config=copied(read.config), header=dict(read.header), defaults_list=copy.deepcopy(read.defaults_list)
        )


@dataclass(frozen=True)
class Merged:
    """What the files of some options of groups came to.

    Args:
        files: State of each config that was asked for, by name.
        choices: Option of each group.
        config: The config, before the command line's values are set.
    """

    files: dict[str, Any]
    choices: dict[str, Any]
    config: DictConfig


#: By the options of groups.
_MERGED: dict[str | None, Merged] = {}
#: What Hydra's own files came to, which are merged first, by their states.
_HYDRAS: dict[str, DictConfig] = {}
#: What the files hold, by their state.
_READ: dict[Any, Any] = {}
#: The nodes of Hydra's own store that were asked for.
_NODES: list[Any] = []


def _number(node: Any) -> int:
    """Of a node of Hydra's own store; one that takes its name has another."""
    for number, other in enumerate(_NODES):
        if other is node:
            return number
    _NODES.append(node)
    return len(_NODES) - 1


def _choices_if_asked_for(overrides: Overrides, entries: list[Any], self_added: bool) -> DictConfig | None:
    """Hydra's map of what was chosen, for files that refer to it: most do not, and to make it takes long."""
    asked = any(entry.is_interpolation() for entry in entries)
    return _create_interpolation_map(overrides, entries, self_added) if asked else None


def copied(node: Any, parent: Any = None) -> Any:
    """A deep copy of a config and the same as OmegaConf's own, which takes most of the time that composing takes."""
    new = object.__new__(type(node))
    new.__dict__.update(node.__dict__, _parent=parent, _flags_cache=None)
    metadata = new.__dict__["_metadata"] = object.__new__(type(node._metadata))
    metadata.__dict__.update(node._metadata.__dict__, flags=dict(node._metadata.flags or {}))
    metadata.resolver_cache = copy.deepcopy(metadata.resolver_cache)
    content = node.__dict__.get("_content")
    if isinstance(content, dict):
        new.__dict__["_content"] = {key: copied(value, new) for key, value in content.items()}
    elif isinstance(content, list):
        new.__dict__["_content"] = [copied(value, new) for value in content]
    elif isinstance(content, Node):
        new.__dict__["_content"] = copied(content, new)
    return new


def _check_anchors(file: Path) -> None:
    """Refuses a file whose anchors unfold without end before OmegaConf unfolds them."""
    text = file.read_bytes()
    if b"&" not in text or b"*" not in text:
        return
    try:
        for _ in nodes(yaml.safe_load(text)):
            pass
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError):
        pass  # said where it is read


def _check_secrets(trees: Sequence[Any]) -> None:
    """Refuses secrets where each job is written into a file, config and all; ``${oc.env:...}`` is written as it is."""
    for key, value in (node for tree in trees for node in nodes(tree)):
        name = key.rpartition(".")[2]
        if isinstance(value, str) and "${" not in value and redacted({name: value}) != {name: value}:
            raise UserError(
                f"{key} holds a secret, which this hydra/launcher would write into its files: give it as "
                "${oc.env:NAME}, and a database's password as PGPASSWORD or in ~/.pgpass"
            )


def opened(node: Any, depth: int = 0) -> Any:
    """A composed tree as plain data, interpolations resolved; where that fails, as of ${hydra:...}, the text stays."""
    if depth > DEEPEST:
        raise UserError("this config is nested too deeply, or refers to itself: write it out")
    if not isinstance(node, DictConfig | ListConfig):
        return node
    found: dict[Any, Any] = {}
    inside: Any = node
    for key in inside if isinstance(node, DictConfig) else range(len(node)):
        try:
            found[key] = opened(inside[key], depth + 1)
        except (OmegaConfBaseException, RecursionError):
            found[key] = inside._get_node(key)._value()
    return found if isinstance(node, DictConfig) else list(found.values())
