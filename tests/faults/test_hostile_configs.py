"""Configs of a stranger: whatever they name, and by whatever way, nothing of it is imported, called or looked up."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from tests.conftest import Ended, Shell
from tests.faults.bad_inputs import SMALL

from redoubt import allowed, cli, config

#: The module `hostile_canary`: to be imported is enough.
CANARY = """
import os, pathlib

def fire(*args, **kwargs):
    pathlib.Path(os.environ["CANARY"]).touch()

class Fire:
    def __init__(self, *args, **kwargs):
        fire()

fire()
"""
ROW = "hostile config on the command line, in a file, in Hydra's keys"
SECRET = "s3cret-of-this-machine"


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there once anything of the module `hostile_canary` has run; at the end of each test it is not."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "hostile_canary.py").write_text(CANARY)
    monkeypatch.syspath_prepend(theirs)
    monkeypatch.delitem(sys.modules, "hostile_canary", raising=False)
    monkeypatch.setenv("CANARY", str(tmp_path / "fired"))
    monkeypatch.setenv("HOSTILE_TARGET", "hostile_canary.Fire")
    monkeypatch.setenv("HOSTILE_SECRET", SECRET)
    monkeypatch.setattr(config, "search_path", [])
    yield tmp_path / "fired"
    assert not (tmp_path / "fired").exists()
    assert "hostile_canary" not in sys.modules


class Case(NamedTuple):
    """A hostile config.

    Args:
        says: What the line must name.
        words: Of the command line.
        files: Of the folder that ``--config-dir`` names, by name.
    """

    says: str
    words: tuple[str, ...] = ()
    files: dict[str, str] = {}

    @property
    def label(self) -> str:
        """Of the test."""
        text = " ".join([*self.words, *self.files.values()]).removeprefix("experiment=evil # @package _global_\n")
        return text.encode("ascii", "backslashreplace").decode().replace("\n", " ")[:90]


def target(name: str, section: str = "defense") -> Case:
    """The section's ``_target_`` is the name."""
    return Case(f"{section}._target_", (f"{section}._target_='{name}'",))


def words(says: str, *given: str) -> Case:
    return Case(says, given)


def experiment(says: str, text: str, **more: str) -> Case:
    """Comes as ``experiment=evil``, beside other files."""
    files = {"experiment/evil.yaml": f"# @package _global_\n{text}"} | {f"{k}.yaml": t for k, t in more.items()}
    return Case(says, ("experiment=evil",), files)


NAMES = [
    target("hostile_canary.Fire"),
    target("hostile_canary.fire", "model"),
    target("os.system", "base"),
    target("torch.load", "model"),
    target("torch.hub.load", "model"),
    target("numpy.load", "data"),
    target("pathlib.Path.write_text", "optimizer"),
    target("shutil.copyfile", "inner"),
    target("subprocess.run", "logger"),
    target("builtins.eval"),
    target("builtins.exec"),
    target("functools.partial"),
    target("hydra.utils.instantiate"),
    target("hydra.utils.get_method"),
    target("hydra.utils.get_class"),
    target("hydra._internal.core_plugins.basic_sweeper.BasicSweeper"),
    # what allowed modules hold of others, and of their own that is no part
    target("redoubt.data.cache.os.system"),
    target("redoubt.nets.loading.torch.load"),
    target("redoubt.defenses.module.torch.nn.Linear"),
    target("torch.optim.optimizer.torch.load", "optimizer"),
    target("torch.optim.swa_utils.AveragedModel", "optimizer"),
    target("torch.optim.lr_scheduler.LambdaLR", "optimizer"),
    target("redoubt.nets.loading.load_backbone", "model"),
    target("redoubt.nets.ResNet18.forward", "model"),
    target("redoubt.nets.small.ResNetSmall.__init__.__globals__"),
    target("redoubt.nets.small.ResNetSmall.__class__", "model"),
    target("redoubt.data.cache.load", "data"),
    target("redoubt.data.official._Arrays", "data"),
    target("redoubt.data.source.Source", "data"),
    target("redoubt.evaluation.kept.Kept"),
    target("redoubt.training.recorder.strip"),
    target("redoubt.cli.main"),
    # what only looks like it
    target(" redoubt.defenses.FSR"),
    target("redoubt.defenses.FSR\\n"),
    target("redoubt.defenses.F\u0455R"),
    target("redoubt\uff0edefenses.FSR"),
    target("redoubt.defenses..FSR"),
    target("redoubt.defenses_.Fire"),
    target("redoubtx.defenses.FSR"),
    words("defense._target_", "defense._target_=[hostile_canary.Fire]"),
    words("defense._target_", "defense._target_={a:hostile_canary.Fire}"),
]

PLACES = [
    words("defense.unused._target_", "+defense.unused._target_=hostile_canary.Fire"),
    words("model.a.0.0.b.1._target_", "+model.a=[[{b:[0,{_target_:hostile_canary.Fire}]}]]"),
    words("attack.attacks.evil._target_", "+attack.attacks.evil={_target_:hostile_canary.Fire}"),
    words("natural.optimizer.lr._target_", "natural.optimizer.lr={_target_:hostile_canary.Fire}"),
    words("sweep.cases.0._target_", "sweep.cases=[{_target_:hostile_canary.Fire}]"),
    words("data.augment", "data.augment=hostile_canary.fire"),
    words("data.augment", "data.augment=redoubt.data.cache.load"),
    words("defense._partial_", "+defense._partial_=true"),
    words("model._args_", "+model._args_=[1]"),
    words("data._recursive_", "+data._recursive_=true"),
    words("inner.deep._convert_", "+inner.deep._convert_=all"),
]

INTERPOLATIONS = [
    words("defense._target_", "defense._target_=${natural.evil}", "+natural.evil=hostile_canary.Fire"),
    words("defense._target_", "defense._target_=hostile_canary.${natural.evil}", "+natural.evil=Fire"),
    words("defense._target_", "defense._target_=${oc.env:HOSTILE_TARGET}"),
    words("defense._target_", "defense._target_=${oc.decode:\"'hostile_canary.Fire'\"}"),
    words("defense._target_", "defense._target_=${oc.select:natural.evil,hostile_canary.Fire}"),
    words("defense._target_", "defense._target_=${oc.deprecated:natural.evil}", "+natural.evil=hostile_canary.Fire"),
    words("defense._target_", "defense._target_=${hydra:job.name}"),
    words("defense._target_", "defense._target_=${now:%Y}"),
    words("defense._target_", "defense._target_=${by_norm:linf,hostile_canary.Fire,x}"),
    experiment("defense.more._target_", "defense: {more: '${oc.create:{_target_: hostile_canary.Fire}}'}"),
    experiment("defense.more._target_", "defense: {more: '${oc.decode:\"{_target_: hostile_canary.Fire}\"}'}"),
    words("defense.more.0", "+defense.more=${oc.dict.values:natural.evil}", "+natural.evil.a={_target_:os.system}"),
    words("natural", "+natural.evil={a:{b:${natural.evil},c:${natural.evil}}}"),
    experiment("${oc.create", "defense: {more: '\\${oc.create:{_target_: hostile_canary.Fire}}'}"),
    experiment("defense", "defense: {a: '${defense.b}', b: '${defense.a}'}"),
]

FILES = [
    experiment("defense._target_", "defense: {_target_: hostile_canary.Fire}"),
    experiment("yaml", "seed: !!python/object/apply:hostile_canary.fire []"),
    experiment("yaml", "seed: !!python/name:hostile_canary.fire"),
    experiment("refers to itself", "defense: {a: &x {b: *x}}"),
    experiment("redoubt", "redoubt: {allow: [hostile_canary]}\ndefense: {_target_: hostile_canary.Fire}"),
    experiment("searchpath", "hydra: {searchpath: ['pkg://hostile_canary']}"),
    experiment("optimizer._target_", "defaults:\n  - override /optimizer: evil",
               **{"optimizer/evil": "_target_: hostile_canary.Fire"}),
    experiment("base._target_", "defaults:\n  - override /base: evil",
               **{"base/evil": "# @package _global_\nbase: {_target_: '${natural.evil}'}\nnatural: {evil: os.system}"}),
    Case("model._target_", (),
         {"recipe/defense/none.yaml": "# @package _global_\nmodel: {_target_: hostile_canary.Fire}"}),
    Case("defense._target_", ("+mine=evil",), {"mine/evil.yaml": "# @package defense\n_target_: hostile_canary.Fire"}),
]  # fmt: skip

HYDRA = [
    words("hydra.callbacks.evil._target_", "+hydra.callbacks.evil={_target_:hostile_canary.Fire}"),
    words("hydra.callbacks.evil._target_", "+hydra.callbacks.evil={_target_:redoubt.nets.loading.load_backbone}"),
    words("hydra.callbacks.evil._target_", "+hydra.callbacks.evil={_target_:torch.optim.optimizer.Callable}"),
    words("hydra.callbacks.evil.a._target_", "+hydra.callbacks.evil={a:{_target_:hostile_canary.Fire}}"),
    words("hydra.callbacks.evil", "+hydra.callbacks.evil=${hydra:job.evil}", "+hydra.job.evil=hostile"),
    experiment("hydra.callbacks.evil._target_",
               "hydra: {callbacks: {evil: '${oc.create:{_target_: hostile_canary.Fire}}'}}"),
    words("hydra.callbacks.evil._target_",
          "+hydra.callbacks.evil={_target_:hydra.experimental.callbacks.PickleJobInfoCallback}"),
    words("hydra.launcher._target_", "-m", "hydra.launcher._target_=hostile_canary.Fire"),
    words("hydra.sweeper._target_", "-m", "hydra.sweeper._target_=hostile_canary.Fire"),
    words("hydra.sweeper._target_", "-m", "hydra.sweeper._target_=hydra_plugins.redoubt_sweeper.sweeps.os.system"),
    words("hydra.sweeper.more._target_", "-m", "+hydra.sweeper.more={_target_:hostile_canary.Fire}"),
    words("hydra.launcher.partition", "-m", "hydra/launcher=slurm", 'hydra.launcher.partition="gpu\nhostile"'),
    words("hydra.job.env_set", "+hydra.job.env_set.LD_PRELOAD=hostile.so"),
    words("hydra.job.env_set", "hydra.job.env_copy=[HOSTILE_SECRET]"),
    words("hydra.output_subdir", "hydra.output_subdir=.hydra"),
    words("hydra.searchpath", "hydra.searchpath=[pkg://hostile_canary]"),
    words("--config-name", "--config-name", "evil"),
    words("--config-path", "--config-path=pkg://hostile_canary"),
    words("--experimental-rerun", "--experimental-rerun", "evil.pickle"),
    experiment("hydra.callbacks.evil._target_", "hydra: {callbacks: {evil: {_target_: hostile_canary.Fire}}}"),
    experiment("hydra.job_logging.handlers.evil.()",
               "hydra: {job_logging: {root: {handlers: [evil]}, handlers: {evil: {(): hostile_canary.Fire}}}}"),
    experiment("hydra.hydra_logging.formatters.evil.class",
               "hydra: {hydra_logging: {root: {handlers: []}, formatters: {evil: {class: hostile_canary.Fire}}}}"),
    experiment("hydra.job_logging.handlers.evil.stream",
               "hydra: {job_logging: {root: {handlers: [evil]}, handlers: {evil: {class: logging.StreamHandler, "
               "stream: 'ext://hostile_canary.fire'}}}}"),
    experiment("hydra.job_logging.handlers.evil.class",
               "hydra: {job_logging: {root: {handlers: [evil]}, handlers: {evil: {class: logging.FileHandler, "
               "filename: '${oc.env:CANARY}'}}}}"),
    experiment("hydra.job.env_set", "hydra: {job: {env_set: {LD_PRELOAD: hostile.so}}}"),
    experiment("hydra.run.dir", "hydra: {run: {dir: '${oc.env:CANARY}'}, job: {chdir: true}}"),
    experiment("hydra.sweep.dir", "hydra: {sweep: {dir: '${oc.env:CANARY}'}}"),
    Case("hydra.launcher.setup", ("-m", "experiment=evil", "hydra/launcher=slurm"),
         {"experiment/evil.yaml": "# @package _global_\nhydra: {launcher: {setup: ['touch ${oc.env:CANARY}']}}"}),
    *(
        Case(f"hydra.launcher.{key}", ("-m", "experiment=evil", "hydra/launcher=slurm"),
             {"experiment/evil.yaml": f"# @package _global_\nhydra: {{launcher: {{{key}: {value}}}}}"})
        for key, value in (
            ("srun_args", "[sh, -c, 'touch ${oc.env:CANARY}']"), ("additional_parameters", "{wrap: touch it}"),
            ("submitit_folder", "'${oc.env:CANARY}'"), ("python", "/tmp/evil"),
        )
    ),
    Case("hydra.sweeper.params", ("-m", "sweep=evil"),
         {"sweep/evil.yaml": "# @package _global_\nhydra: {sweeper: {params: {seed: {_target_: os.system}}}}"}),
    Case("model._target_", ("-m", "sweep=evil"),
         {"sweep/evil.yaml": "# @package _global_\nhydra: {sweeper: {params: {model._target_: 'os.popen,os.kill'}}}"}),
    Case("defense._target_", ("-m", "sweep=evil"),
         {"sweep/evil.yaml": "# @package _global_\nsweep: {cases: ['defense._target_=hostile_canary.Fire seed=1,2']}"}),
    Case("hydra.job.env_set", ("-m", "sweep=evil"),
         {"sweep/evil.yaml": "# @package _global_\nsweep: {cases: ['+hydra.job.env_set.LD_PRELOAD=hostile.so']}"}),
    Case("attack.attacks.a._target_", ("-m", "sweep=evil"),
         {"sweep/evil.yaml": "# @package _global_\nsweep: {evaluations: [['+attack.attacks.a._target_=os.system']]}"}),
]  # fmt: skip

OVERRIDES = [*NAMES, *PLACES, *(case for case in INTERPOLATIONS if not case.files)]
FROM_FILES = [*(case for case in INTERPOLATIONS if case.files), *FILES]


def refused(ended: Ended, says: str, code: int = 2) -> None:
    """One line, on stderr, that names it; and nothing of the environment in it."""
    lines = ended.err.strip().splitlines()
    assert (ended.code, len(lines)) == (code, 1), ended
    assert lines[0].startswith("redoubt: ")
    assert says in lines[0]
    assert SECRET not in ended.err + ended.out


def written(case: Case, folder: Path) -> list[str]:
    """The case's files in a folder, and the command line that takes them."""
    for name, text in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    given = [*(["--config-dir", str(folder)] if case.files else []), *case.words]
    options = [word for word in given if "=" not in word or word.startswith("-")]
    small = SMALL[:-1] if "-m" in given else SMALL  # without attack=none, which would win over a sweep's evaluations
    return [*options, *small, *(word for word in given if word not in options)]


def few(cases: list[Case], quick: int) -> list[object]:
    """For pytest: every so many of them, evenly, and the others for `make faults`."""
    return [
        pytest.param(case, id=case.label, marks=[] if i % quick == 0 else [pytest.mark.slow])
        for i, case in enumerate(cases)
    ]


@functools.cache
def small() -> DictConfig:
    return config.compose(SMALL)


@pytest.mark.fault(ROW, "refused")
@pytest.mark.parametrize("case", OVERRIDES, ids=[case.label for case in OVERRIDES])
def test_nothing_of_a_hostile_config_runs(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """From the composed config on, as every job takes it."""
    cfg = copy.deepcopy(small())
    for word in case.words:
        override = OverridesParser.create().parse_override(word)
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False, force_add=True)
    with pytest.raises(Exception) as error:  # noqa: PT011 - what the command line makes of it is looked at
        cli._job("train", cfg, list(case.words))
    code = cli._report(error.value, debug=False)
    refused(Ended(code, *capsys.readouterr()), case.says)


@pytest.mark.slow
@pytest.mark.fault(ROW, "refused")
@pytest.mark.parametrize("case", OVERRIDES[::2], ids=[case.label for case in OVERRIDES[::2]])
def test_nothing_of_a_hostile_command_line_runs(case: Case, tmp_path: Path, shell: Shell) -> None:
    refused(shell("train", *written(case, tmp_path / "conf")), case.says)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.fault(ROW, "refused")
@pytest.mark.parametrize("case", few(FROM_FILES, 6))
def test_nothing_of_a_hostile_file_runs(case: Case, tmp_path: Path, shell: Shell) -> None:
    refused(shell("train", *written(case, tmp_path / "conf")), case.says)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.fault(ROW, "refused")
@pytest.mark.parametrize("case", few(HYDRA, 11))
def test_hydra_makes_nothing_of_a_hostile_config(case: Case, tmp_path: Path, shell: Shell) -> None:
    refused(shell("train", *written(case, tmp_path / "conf")), case.says)
    assert not (tmp_path / "outputs/runs").exists()


@pytest.mark.filterwarnings("ignore:Callback Fire")
def test_the_canary_sings(canary: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is checked, Hydra makes the callback: the tests above can fail."""
    monkeypatch.setattr(cli, "checked", lambda folders: contextlib.nullcontext())
    shell("train", *SMALL, "+hydra.callbacks.evil={_target_:hostile_canary.Fire}", "threat.eps=9")
    assert canary.exists()
    canary.unlink()
    del sys.modules["hostile_canary"]


@pytest.mark.slow
@pytest.mark.fault(ROW, "refused")
def test_no_plugin_of_the_folder_is_imported(canary: Path, tmp_path: Path) -> None:
    """Hydra imports every ``hydra_plugins`` that it finds; where the command is started, anybody's may lie."""
    (tmp_path / "hydra_plugins").mkdir()
    shutil.copy(tmp_path / "theirs/hostile_canary.py", tmp_path / "hydra_plugins")
    (tmp_path / "conf").mkdir()
    script = str(Path(config.__file__).parents[1] / "train.py")
    command = [sys.executable, script, "--config-dir", "conf", "nokey=1"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    refused(Ended(ended.returncode, ended.stdout, ended.stderr), "nokey")


# ---- who may add to the list --------------------------------------------------------------------------------------


def test_only_the_users_own_folder_adds_to_the_list(tmp_path: Path, shell: Shell) -> None:
    """Not one that a config, or a word for Hydra, adds to the search path."""
    case = Case("model._target_", ("model=evil",), {"model/evil.yaml": "_target_: hostile_canary.Fire"})
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/redoubt.allow").write_text("hostile_canary\n")
    line = [word for word in written(case, tmp_path / "conf")[2:] if not word.startswith("model.")]
    refused(shell("train", f"hydra.searchpath=[file://{tmp_path}/conf]", *line), case.says)


@pytest.mark.parametrize("how", ["package", "name", "entry point"])
def test_what_the_user_adds_is_called(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "collections.abc.Mapping"
    folder = tmp_path / "conf"
    folder.mkdir()
    with pytest.raises(allowed.UserError, match="is not allowed"):
        allowed.locate(name, "key", [str(folder)])
    if how == "entry point":
        point = EntryPoint("mine", "collections.abc", "redoubt.allow")
        monkeypatch.setattr(allowed, "entry_points", lambda group: [point] if group == "redoubt.allow" else [])
        monkeypatch.setattr(allowed, "_installed", allowed._installed.__wrapped__)
    else:
        line = "collections.abc  # ours" if how == "package" else name
        (folder / "redoubt.allow").write_text(f"# a comment\n\n{line}\n")
    allowed.check({"key": {"_target_": name}}, [str(folder)])
    assert allowed.locate(name, "key", [str(folder)]).__name__ == "Mapping"
    for other in ("collections.OrderedDict", "collections.abcd.Mapping", "collections.abc.sys.exit"):
        with pytest.raises(allowed.UserError, match=r"is not allowed|cannot be imported"):
            allowed.locate(other, "key", [str(folder)])


def test_what_the_configs_of_the_project_name_is_on_the_list() -> None:
    """Every ``_target_`` of conf/, looked up; what Hydra makes is its own."""
    for file in Path(config.config_dir()).rglob("*.yaml"):
        for key, value in allowed.nodes(OmegaConf.to_container(OmegaConf.load(file))):
            if key.rpartition(".")[2] == "_target_" and value is not None and "hydra" not in f"{file.parent}{key}":
                allowed.locate(value, key, [])
