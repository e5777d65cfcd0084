"""Which cell of the grid a published row is, and what measures each of its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from redoubt.errors import UserError
from redoubt.reporting.published import Published, Row, published

DATA = {
    "CIFAR-10": "cifar10",
    "CIFAR-100": "cifar100",
    "SVHN": "svhn",
    "Tiny ImageNet": "tiny_imagenet",
    "Tiny-ImageNet": "tiny_imagenet",
}
MODELS = {"ResNet-18": "resnet18", "WideResNet-34-10": "wrn34_10", "PreActResNet-18": "preact_resnet18"}

#: Tables with a file in conf/experiment/ for every row that we can train.
WITH_EXPERIMENTS = (
    *(f"fsr_s{i}" for i in range(1, 8)),
    *("fsr_slides_features", "fsr_slides_comparison", "afd_1", "afd_2", "cure_1", "cure_2"),
)


@dataclass(frozen=True)
class Measure:
    """How a published metric follows from ours.

    Args:
        parts: Names of our metrics.
        how: ``is`` the one part, or ``mean``, ``sum``, ``nrr`` (2ab / (a + b)) of them.
        suite: Where the parts are measured, if not by the paper's own suite.
    """

    parts: tuple[str, ...]
    how: str = "is"
    suite: str | None = None

    def of(self, accuracies: Mapping[str, float]) -> float:
        """The metric in the unit of the parts' accuracies."""
        values = [accuracies[part] for part in self.parts]
        if self.how == "nrr":
            a, b = values
            return 2 * a * b / (a + b) if a + b else 0.0
        return sum(values) / (len(values) if self.how == "mean" else 1)


@dataclass(frozen=True)
class Cell:
    """A published row as a cell of the grid.

    Args:
        data, model, defense, base: Options of the axes.
        suite: The ``attack`` by which the paper measures.
        settings: Further keys of the config, dotted, as the paper or its code has them.
        experiment: Its file in conf/experiment/, where it has one.
        note: What of the settings is our choice, for that file.
    """

    data: str
    model: str
    defense: str
    base: str
    suite: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    experiment: str | None = None
    note: str = ""

    @property
    def axes(self) -> dict[str, str]:
        """Options of the config groups, the suite among them."""
        names = {"defense": self.defense, "base": self.base, "model": self.model, "data": self.data}
        return {**names, "attack": self.suite}

    def overrides(self, suite: str | None = None) -> tuple[str, ...]:
        """The words of a command line that give this cell without its file, measured by its own or another suite."""
        axes = {**self.axes, "attack": suite or self.suite}
        settings = (f"{key}={_text(value)}" for key, value in self.settings.items())
        return *(f"{group}={option}" for group, option in axes.items()), *settings

    def words(self) -> tuple[str, ...]:
        """The shortest words of a command line that give this cell."""
        return (f"experiment={self.experiment}",) if self.experiment else self.overrides()


def _text(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


Method = tuple[str, str, Mapping[str, Any]]


@dataclass(frozen=True)
class Paper:
    """What of a paper we can train (printed method -> defense, base, settings) and measure (printed metric)."""

    suite: str
    methods: Mapping[str, Method]
    metrics: Mapping[str, Measure]


def _metrics(**names: str) -> dict[str, Measure]:
    return {printed: Measure((ours,)) for ours, printed in names.items()}


#: FSR's for CIFAR-10, for bases whose own scripts (conf/recipe/base) have another.
_RECIPE = {
    "optimizer.lr": 0.1,
    "optimizer.weight_decay": 5e-4,
    "schedule.epochs": 100,
    "schedule.milestones": [75, 90],
    "schedule.factors": [0.1, 0.01],
}
_NO_RECIPE = "The authors name no recipe for this base and net: that of the table's other rows is our choice."

_FSR: Method = ("fsr", "at", {})
FSR = Paper(
    "fsr_suite",
    {
        "AT": ("none", "at", {}),
        "TRADES": ("none", "trades", {}),
        "MART": ("none", "mart", {}),
        "AT + FSR": _FSR,
        "TRADES + FSR": ("fsr", "trades", {}),
        "MART + FSR": ("fsr", "mart", {}),
        "AT + FSR after Block4": _FSR,
        "AT + FSR after Block1": ("fsr", "at", {"defense.at": "layer1"}),
        "AT + FSR after Block2": ("fsr", "at", {"defense.at": "layer2"}),
        "AT + FSR after Block3": ("fsr", "at", {"defense.at": "layer3"}),
        "AT + FSR after Block3 + Block4": ("fsr", "at", {"defense.at": ["layer3", "layer4"]}),
        "L_sep Mispredicted (Ours)": _FSR,
        "Gumbel mask": _FSR,
        "w/ Separation (Ours)": _FSR,
        "AT+FSR": _FSR,
        "AT+FSR combined f~ = f+ + f~-": _FSR,
    },
    _metrics(natural="Natural", fgsm="FGSM", pgd20="PGD-20", pgd100="PGD-100", cw="C&W", ensemble="Ensemble")
    | {"No attack": Measure(("natural",)), "AutoAttack": Measure(("autoattack",), suite="autoattack")},
)

# ARREST's script in AFD's repository: as AFD's recipe, one optimizer, no averaging.
_AFT = {
    "defense.pretrained": "auto",
    "optimizer.lr": 0.025,
    "schedule.epochs": 20,
    "schedule.milestones": [11, 13, 15, 17, 19],
    "schedule.factors": [0.8, 0.4, 0.2, 0.1, 0.05],
}
_EPOCH_120 = {**_RECIPE, "trainer.max_epochs": 120}
_ONLY_EPOCHS = (
    "No more is known of its recipe than \"epoch 120\", in the names of the authors' checkpoints: FSR's learning rate, "
    "weight decay and milestones, stretched over 120 epochs, are our choice."
)
AFD = Paper(
    "afd_suite",
    {
        "PGD-AT": ("none", "at", _EPOCH_120),
        "TRADES": ("none", "trades", _EPOCH_120),
        "vanilla AFT": ("none", "at", _AFT),
        "AFD": ("afd", "at", {}),
    },
    _metrics(natural="Natural", pgd20="PGD-20", autoattack="AutoAttack")
    | {"Average": Measure(("natural", "pgd20", "autoattack"), "mean")},
)

# By the defaults of CURE's script its natural model trains for 200 epochs.
_NATURAL = {
    "natural.schedule.epochs": 200,
    "natural.schedule.milestones": [100, 150],
    "natural.schedule.factors": [0.1, 0.01],
}
_START = {"defense.pretrained": "auto", **_NATURAL}
CURE = Paper(
    "cure_suite",
    {
        **{name: ("none", name.lower(), {}) for name in ("AT", "TRADES", "MART")},
        **{f"{name} (baseline of Table 2)": ("none", name.lower(), {}) for name in ("AT", "TRADES", "MART")},
        "SAT pretrained": ("none", "at", _START),
        "TRADES pretrained": ("none", "trades", _START),
        "CURE": ("cure", "trades", _NATURAL),
        "CURE training model": ("cure", "trades", _NATURAL),
        "CURE revision model": ("cure", "trades", {**_NATURAL, "evaluation.weights": "revision"}),
        "CURE_Eff": ("cure", "trades", {"defense.pretrained": "none", "defense.warmup_epochs": 79}),
        "RGP + revision": ("cure", "trades", _NATURAL),
        "RGP only": ("cure", "trades", {**_NATURAL, "defense.gamma": 0.0}),
        "revision only": ("cure", "trades", {**_NATURAL, "defense.criterion": "none"}),
    },
    _metrics(natural="Natural", pgd20="PGD-20", cw="C&W", autoattack="AutoAttack")
    | {
        "Natural last": Measure(("natural",)),
        "AutoAttack last": Measure(("autoattack",)),
        "NRR": Measure(("natural", "cw"), "nrr"),
        "NRR (AutoAttack)": Measure(("natural", "autoattack"), "nrr"),
        "SUM (Natural+AutoAttack)": Measure(("natural", "autoattack"), "sum"),
    },
)
PAPERS = {"fsr": FSR, "afd": AFD, "cure": CURE}


def cell(table: Published, row: Row) -> Cell | str:
    """The cell that a row is, or in a few words why our methods cannot train it."""
    paper = PAPERS.get(table.id.split("_")[0])
    if paper is None:
        return "another recipe than ours"
    method = paper.methods.get(row.method) or _sensitivity(table.id, row.method)
    if method is None:
        return "not among our methods"
    data, model = DATA.get(row.dataset), MODELS.get(row.model)
    if data is None or model is None:
        return "not among our data sets" if data is None else "not among our models"
    if not any(value.metric in paper.metrics for value in row.values):
        return "not among our metrics"
    defense, base, settings = method
    note = _ONLY_EPOCHS if settings is _EPOCH_120 else ""
    if paper is AFD and data.startswith("cifar") and model == "resnet18":
        settings = {**settings, "model.stem_padding": 0}  # the authors' net on CIFAR
    if paper is FSR and base in ("trades", "mart") and model == "wrn34_10":
        settings, note = {**settings, **_RECIPE}, _NO_RECIPE
    name = experiment_name(table, row, data, model) if table.id in WITH_EXPERIMENTS else None
    return Cell(data, model, defense, base, paper.suite, dict(settings), name, note)


def measure(table: Published, metric: str) -> Measure | str:
    """How a printed metric of a table is measured here, or why it is not."""
    paper = PAPERS.get(table.id.split("_")[0])
    found = paper and paper.metrics.get(metric)
    if found:
        return found
    return "chosen by test accuracy" if "best" in metric else "not measured here"


def experiment_name(table: Published, row: Row, data: str, model: str) -> str:
    """``fsr/s1_cifar100_resnet18_trades_fsr``: a row as a file under conf/experiment/."""
    paper, _, rest = table.id.partition("_")
    method = re.sub(r"[^a-z0-9]+", "_", row.method.lower()).strip("_")
    return f"{paper}/{'t' if rest[0].isdigit() else ''}{rest}_{data}_{model}_{method}"


def known(table: Published) -> Iterator[tuple[str, Row, Cell]]:
    """The rows of a table that are cells of ours, each with the name of its experiment or what stands for it."""
    for row in table.rows:
        found = cell(table, row)
        if isinstance(found, Cell):
            yield found.experiment or f"{table.id}: {row.dataset}, {row.model}, {row.method}", row, found


def none_of_ours(table: str) -> UserError:
    """Of a table without a cell of ours."""
    return UserError(f"table={table}: none of its rows is a cell of ours; take one of {', '.join(WITH_EXPERIMENTS)}")


def experiments() -> dict[str, tuple[Published, Row, Cell]]:
    """Every published row that has a file in conf/experiment/, by its name there."""
    tables = map(published().__getitem__, WITH_EXPERIMENTS)
    return {name: (table, row, found) for table in tables for name, row, found in known(table)}


def _sensitivity(table: str, method: str) -> Method | None:
    """The coefficients that a sensitivity study prints in the name of a row: ``AFD beta=0.1``, ``p=30 alpha=0.2``."""
    printed = dict(re.findall(r"(\w+)=([\d.]+)", method))
    keys = {"defense.percentile" if key == "p" else f"defense.{key}": float(v) for key, v in printed.items()}
    if table == "afd_figure_4":
        return "afd", "at", keys
    return ("cure", "trades", {**_NATURAL, **keys}) if table == "cure_10" else None
