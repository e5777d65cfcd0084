"""``redoubt reproduce``: rows of a published table through the store, in pieces, and what it says of them."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Ended, Shell, everything
from tests.reporting.fakestore import FakeStore
from tests.sweeps.cells import trainings

from redoubt import deadline
from redoubt.attacks import AutoAttack
from redoubt.errors import UserError
from redoubt.evaluation.verdicts import Judge
from redoubt.reporting.cells import Cell, cell, experiments
from redoubt.reporting.collect import Record
from redoubt.reporting.match import composed
from redoubt.reporting.published import find
from redoubt.reporting.reproduced import INVESTIGATE, PATH, Made, label, sheets
from redoubt.reproduce.request import request
from redoubt.reproduce.steps import attempt, steps
from redoubt.runs.store import Run, Store
from redoubt.sweeps import Sweep

SMALL = [
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=30", "data.limit_test=10", "data.batch_size=10", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=2", "natural.trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1",
    "validation.steps=1", "validation.step=1", "runs.keep=all", "evaluation.chunk=5",
]  # fmt: skip
QUICK = [
    "audit.images=8", "audit.noise.draws=2", "audit.iterations={factor: 1, least: 2}", "audit.restarts.steps=2",
    "audit.eps_curve.steps=1", "audit.black_box.queries=2", "audit.adaptive.steps=1", 
    "audit.iterations_curve.steps=[1,2]",
]  # fmt: skip
ROW = ["table=fsr_s4", "rows=after_block4"]
SHORT = ["autoattack=false", "audit=false", "attack.attacks.pgd100.steps=12", "attack.attacks.cw.steps=10"]


def test_rows_by_part_list_and_expression() -> None:
    def rows(*words: str) -> list[str]:
        return [name.removeprefix("fsr/s4_cifar10_resnet18_at_fsr_after_") for name in request(words).rows]

    assert rows("table=fsr_s4") == ["block1", "block2", "block3", "block4", "block3_block4"]
    assert rows("table=fsr_s4", "rows=block1") == ["block1"]
    assert rows("table=fsr_s4", "rows=[block2, after_block4]") == ["block2", "block4"]
    assert rows("table=fsr_s4", "rows=after_block[13]$") == ["block1", "block3"]
    assert list(request(["table=afd_figure_4", "rows=beta=0.1"]).rows)  # rows without a file have a name too


def test_cheap_answers_first() -> None:
    tasks = request(["table=fsr_s4", "rows=[block1,block2]", "seeds=2"]).tasks()
    found = [(s.task.row[-6:], s.task.seed, s.what) for s in steps(tasks)]
    suite, whats = "training, fsr_suite", ("training, fsr_suite", "AutoAttack", "audit")
    assert found == [(row, seed, what) for seed in (0, 1) for what in whats for row in ("block1", "block2")]
    assert found[0] == ("block1", 0, suite)


def test_suites_that_have_autoattack_are_first_run_without_it() -> None:
    (task,) = request(["table=cure_1", "rows=cifar10_resnet18_cure", "attack.eps=0.031"]).tasks()
    first, whole = task.evaluations
    assert first == ("attack=cure_suite", "~attack.attacks.autoattack", "attack.eps=0.031")
    assert whole == ("attack=cure_suite", "attack.eps=0.031")
    (task,) = request(["table=cure_1", "rows=cifar10_resnet18_cure", "autoattack=false", "audit=false"]).tasks()
    assert task.evaluations == (("attack=cure_suite", "~attack.attacks.autoattack"),)
    assert task.audit is None


def test_what_a_row_sets_of_its_net_is_not_set_of_another() -> None:
    (task,) = request(["table=afd_1", "rows=cifar10_resnet18_afd", "model=resnet_small"]).tasks()
    assert "~model.stem_padding" in task.training
    (task,) = request(["table=afd_figure_4", "rows=beta=0.1", "model=resnet_small", "audit=false"]).tasks()
    assert [word for word in task.training if "model" in word] == ["model=resnet_small"]
    assert not [word for word in task.training if word.startswith("attack")]


@pytest.mark.parametrize(
    ("table", "row", "epochs", "plain"),
    [
        ("afd_1", "cifar10_resnet18_pgd_at", 30, None),
        ("afd_1", "cifar10_resnet18_afd", 20, None),  # the published is shorter
        ("afd_1", "cifar10_resnet18_vanilla_aft", 20, None),
        ("cure_4", "CIFAR-10, ResNet-18, CURE_Eff", 30, 11),
    ],
)
def test_the_short_schedule_of_a_row(table: str, row: str, epochs: int, plain: int | None) -> None:
    (task,) = request([f"table={table}", f"rows={row}", "schedule=fast"]).tasks()
    cfg = composed(*task.training)
    assert (cfg.trainer.max_epochs, cfg.schedule.kind) == (epochs, "onecycle")
    assert cfg.defense.get("warmup_epochs") == plain
    (task,) = request([f"table={table}", f"rows={row}", "schedule=fast", "trainer.max_epochs=7"]).tasks()
    assert [word for word in task.training if word.startswith("trainer.max_epochs")] == ["trainer.max_epochs=7"]


def test_rows_that_judge_one_run_otherwise_are_done_side_by_side(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweeps/s")
    (tmp_path / "runs/name").mkdir(parents=True)
    (tmp_path / "runs/name/config.yaml").write_text("{}")
    (tmp_path / "runs/name/status.json").write_text('{"state": "done"}')
    found = list(steps(request(["table=cure_revision"]).tasks()))
    assert len({step.key for step in found if step.name}) == len([step for step in found if step.name])
    first, second = (step for step in found if not step.name)
    assert first.key == second.key
    for step in (first, second):
        attempt(step, sweep, lambda command, cfg, words: [{"run": "name"}], lambda error: str(error))
    assert first.done(sweep)
    assert second.done(sweep)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rows=x"], ["table is missing", "fsr_s4"]),
        (["table=fsr_s9"], ["table=fsr_s9: no such table: did you mean fsr_s7"]),
        (["table=fsr_s4", "rows=blok9"], ["rows=blok9: no row of fsr_s4 is named so", "after_block4"]),
        (["table=fsr_s4", "rows=("], ["rows=( is no regular expression"]),
        (["table=fsr_s4", "rows=[block1,]"], ["rows=: no row of fsr_s4"]),
        (["table=fsr_s4", "seeds=0"], ["seeds='0' must be a whole number of at least 1"]),
        (["table=fsr_s4", "max_minutes=0"], ["max_minutes=0 must be above 0"]),
        (["table=fsr_s4", "max_minutes=soon"], ["max_minutes='soon' is not a number"]),
        (["table=fsr_s4", "audit=maybe"], ["audit=maybe must be true or false"]),
        (["table=fsr_s4", "defense=none"], ["defense: the table says what it is"]),
        (["table=fsr_s4", "attack=pgd20"], ["attack: the table says what it is"]),
        (["table=fsr_s4", "trainer.fast_dev_run=true"], ["trainer.fast_dev_run stores nothing"]),
        (["table=fsr_s4", "plan=true"], ["redoubt report plan table=..."]),
        (["table=fsr_s4", "-m"], ["'-m' is no key=value"]),
    ],
)
def test_mistakes_in_one_line(words: list[str], says: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        request(words)
    for part in says:
        assert part in str(refused.value)


def test_mistakes_of_the_config_before_anything_is_done(shell: Shell) -> None:
    for word, says in (
        ("optimzer.lr=1", "optimzer"),
        ("audit.imgaes=3", "imgaes"),
        ("data.limit_test=x", "limit_test"),
    ):
        ended = shell("reproduce", *ROW, *SMALL, word)
        if word.startswith("data"):  # of no row: said when its turn comes
            assert ended.code == 4
        else:
            assert (ended.code, ended.out) == (2, "")
        assert says in ended.err
        assert "Traceback" not in ended.err
    assert not Store("outputs").list()


def test_all_steps_then_nothing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainings(monkeypatch)
    monkeypatch.setattr(AutoAttack, "__call__", lambda self, net, x, y, draws: x)  # its thousands of steps take seconds
    words = [*ROW, *SMALL, *QUICK, "to=RESULTS.md"]
    Path("RESULTS.md").write_text("# Ours\n\nBy hand.\n")
    first = shell("reproduce", *words)
    assert first.code in (0, 3), first.err  # nobody can say what so small a net's audit finds
    assert [name.rsplit("-", 1)[0] for name in trained] == [
        "fsr-at-cnn_small-digits-s0", "none-standard-cnn_small-digits-s0"
    ]  # fmt: skip
    run = next(run for run in Store("outputs").list() if run.name == trained[0])
    assert sorted(r["axes"]["attack"] for _, r in run.evaluations()) == ["autoattack", "fsr_suite"]
    (audit,) = run.folder.glob("audit/*/audit.json")
    assert "all is done" in first.out

    text = Path("RESULTS.md").read_text()
    assert text.startswith("# Ours\n\nBy hand.\n\n<!-- reproduce table=fsr_s4 -->\n")
    assert text.endswith("<!-- end of table=fsr_s4 -->\n")
    accuracies = {r["axes"]["attack"]: r["metrics"] for _, r in run.evaluations()}
    ours = 100 * accuracies["fsr_suite"]["pgd20"]["accuracy"]
    assert f"| PGD-20 | 52.47 | {ours:.2f}\\* | {ours - 52.47:+.2f} | 1 | fsr_suite, linf 51/255, 10 images" in text
    auto = 100 * accuracies["autoattack"]["autoattack"]["accuracy"]
    assert f"| AutoAttack | - | {auto:.2f}\\* |  | 1 | autoattack" in text
    assert "\n## FSR (Kim et al., CVPR 2023), Table S4, CIFAR-10, ResNet-18: " + PATH in text
    assert "\n### How ours was made" in text
    assert "data=digits" in text
    assert "model=cnn_small" in text
    found = json.loads(audit.read_text())["failed"]
    assert (f"fails {', '.join(found)}" if found else "passed") + " (8 images, " in text
    assert "Command: python src/reproduce.py table=fsr_s4 rows=after_block4 model=cnn_small" in text
    assert first.code == (3 if found else 0)

    def files(outputs: str) -> dict[Path, int]:
        return {p.relative_to(outputs): p.stat().st_mtime_ns for p in Path(outputs, "runs").rglob("*")}

    before = files("outputs")
    shutil.move("outputs", "moved")
    again = shell("reproduce", *words, "paths.outputs=moved")  # on another folder nothing is left to do either
    assert (again.code, len(trained)) == (first.code, 2)
    assert again.err == ""
    lines = Path("RESULTS.md").read_text().replace(" paths.outputs=moved", "").splitlines()
    assert lines == text.splitlines()  # in its place, not once more
    assert files("moved") == before
    assert Path("RESULTS.md").read_text().splitlines()[:12] == text.splitlines()[:12]


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Gives the clock of deadlines: a minute passes each time that it is asked, from the given number of times on."""

    def start(after: float) -> None:
        times = itertools.count()
        monkeypatch.setattr(deadline, "clock", lambda: 0.0 if next(times) < after else 60.0)

    return start


def verdicts(run: Run) -> dict[str, dict[str, list[bool]]]:
    return {
        folder.name: {k: v.tolist() for k, v in np.load(folder / "verdicts.npz").items()}
        for folder, _ in run.evaluations()
    }


@pytest.mark.slow
def test_in_pieces_on_two_folders_as_in_one(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, ticks: Callable[[float], None]
) -> None:
    words = ["reproduce", *ROW, *SMALL, *SHORT]
    whole = shell(*words, "paths.outputs=whole")
    assert whole.code == 0, whole.err
    (expected,) = Store("whole").list()

    attacked: list[tuple[str, int]] = []
    true = Judge.run
    monkeypatch.setattr(Judge, "run", lambda self, name, x, y, rows, number, *rest: (
        attacked.append((name, number)), true(self, name, x, y, rows, number, *rest))[1])  # fmt: skip
    left, steps_done = [], []
    for piece in range(12):
        place = f"paths.outputs=piece{piece % 2}"
        if piece and Path(f"piece{1 - piece % 2}").exists():
            shutil.move(f"piece{1 - piece % 2}", f"piece{piece % 2}")
        ticks(5)
        ended = shell(*words, "max_minutes=0.5", place)
        assert ended.code == 0, ended.err
        left.append("left: " in ended.out)
        (run,) = Store(f"piece{piece % 2}").list()
        steps_done.append((run.status["state"], run.status["reason"]))
        if "all is done" in ended.out:
            break
        assert f"go on with\npython src/reproduce.py {ROW[0]} rows=after_block4" in ended.out
    assert left == [True] * (len(left) - 1) + [False]
    assert ("interrupted", "the time was up") in steps_done  # in training
    assert len([state for state, _ in steps_done if state == "done"]) >= 3  # and between attacks and chunks
    assert len(set(attacked)) == len(attacked) == 8  # four attacks on two chunks, each once
    assert run.name == expected.name
    assert everything(run.last) == everything(expected.last)
    assert verdicts(run) == verdicts(expected)


def test_a_signal_is_no_deadline(shell: Shell, sigterm_after: Callable[[int | None], None]) -> None:
    sigterm_after(3)
    ended = shell("reproduce", *ROW, *SMALL, *SHORT, "max_minutes=9")
    assert ended.code == 128 + 15
    (run,) = Store("outputs").list()
    assert (run.status["state"], run.status["reason"]) == ("interrupted", "stopped by signal 15")
    assert deadline.left() == math.inf


def test_a_row_that_fails_does_not_keep_the_others(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["reproduce", "table=fsr_s4", "rows=after_block[14]", *SMALL, *SHORT, "to=R.md", "trainer.max_epochs=1"]
    trained = trainings(monkeypatch)
    ended = shell(*words)
    assert ended.code == 4
    failed = [line for line in ended.out.splitlines() if line.startswith("failed: ")]
    assert failed == [
        "failed: fsr/s4_cifar10_resnet18_at_fsr_after_block1 seed=0: training, fsr_suite: defense.at='layer1' is not a "
        "module of this net: take one such as normalize, features, fc"
    ]
    assert "Traceback" not in ended.err
    assert len(trained) == 1
    assert "after Block4" in Path("R.md").read_text()
    text = Path("R.md").read_text()
    assert "after Block1" not in text  # only what was run
    assert "- Missing: fsr/s4_cifar10_resnet18_at_fsr_after_block1 seed=0: training, fsr_suite.\n" in text
    again = shell(*words)
    assert (again.code, len(trained)) == (4, 1)


def test_means_over_seeds_and_how_they_are_marked(tmp_path: Path) -> None:
    store, table = FakeStore(tmp_path / "outputs"), find("fsr_s1")
    at, fsr = (experiments()[f"fsr/s1_cifar100_resnet18_{method}"] for method in ("at", "at_fsr"))

    def made(entry, *words: str, **accuracies: float) -> Made:
        runs = []
        for seed in (0, 1):
            folder = store.run(f"experiment={entry[2].experiment}", *words, seed=seed)
            store.evaluate(folder, **{metric: value + seed for metric, value in accuracies.items()})
            runs.append(Record(Run(folder)))
        return Made(entry[1], entry[2], tuple(runs))

    first, second = sheets(table, [made(at, natural=58.0, pgd20=21.0), made(fsr, "schedule=fast", natural=40.0)], "c")
    text = first.markdown()
    natural = next(v.number for v in at[1].values if v.metric == "Natural")
    assert f"| AT | Natural | {natural:.2f} | 58.50 ± 0.71 | {58.5 - natural:+.2f} | 2 | fsr_suite, linf 8/255" in text
    measured = "fsr_suite, linf 8/255, 10000 images, 100 epochs, student weights of last"
    assert f"| -2.89 | 2 | {measured} | {INVESTIGATE} |" in text
    assert INVESTIGATE + ": first what paper and code say otherwise: the separation loss" in text
    assert text.count(INVESTIGATE) == 2  # neither of the natural accuracy nor of the short schedule
    assert "| AT | PGD-100 | 23.43 | missing |  |  |  |  |" in text
    assert "| AT + FSR | Natural | 58.23 | 40.50 ± 0.71\\* | -17.73 | 2 |" in text
    assert "\\*: CIFAR-100 ResNet-18 AT + FSR: a first answer by a short schedule, not the published recipe: " in text
    assert "schedule=fast" in text
    assert PATH not in text
    assert len(second.rows) == 4


def test_labels() -> None:
    assert label([]) == ""
    assert label(["trainer.precision"]) == "not the published recipe"
    assert label(["schedule=fast", "trainer.max_epochs"]).startswith("a first answer by a short schedule")
    for key in ("model=resnet_small", "data=svhn", "data.limit_train", "data.limit_test", "data.source"):
        assert label(["schedule=fast", key]) == PATH


def test_every_table_s_rows_have_names_of_their_own() -> None:
    for table in ("fsr_s1", "cure_8", "afd_figure_4", "cure_revision"):
        cells = [row for row in find(table).rows if isinstance(cell(find(table), row), Cell)]
        assert len(request([f"table={table}"]).rows) == len(cells)


def test_help_without_torch(shell: Shell) -> None:
    ended: Ended = shell("reproduce", "--help")
    assert ended.code == 0
    assert "max_minutes" in ended.out
