"""The report page in a real browser: sort, filter, compare, keyboard, theme, phone, time to load."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from tests.reporting.browser import CHROMIUM, DRIVER, ENTER, RIGHT, SPACE, TAB, Browser
from tests.reporting.stores import CONFIG, add_audit, add_evaluation, add_run, config, curve, nested, some_examples

from redoubt.reporting.page import html

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")

HOSTILE = "<img src=x onerror=document.title='broken'></script><b>bold</b>"
FSR = "fsr-at-resnet18-cifar10-s0-000000000"
COLUMN = "const k = [...document.querySelectorAll('#table th')].findIndex(t => t.dataset.key === arguments[0]);"
MISSING = "\u2013"
CELLS = COLUMN + "return [...document.querySelectorAll('#table tbody tr')].map(r => r.cells[k].textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def verdicts() -> dict[str, dict[str, np.ndarray]]:
    """Of the runs of `page`, by the last digit of their hash; 1003 images, no multiple of 8."""
    rng = np.random.default_rng(0)
    return {f"{i:x}": nested(rng, 1003) for i in range(8)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, verdicts: dict[str, dict[str, np.ndarray]]) -> Path:
    """FSR at 2 values of tau with 2 seeds each, a plane of AFD's, one that failed with a hostile reason."""
    outputs = tmp_path_factory.mktemp("store")
    trees = [config(seed=s, defense__tau=t) for t in (0.1, 0.5) for s in (0, 1)]
    axes = {**CONFIG["axes"], "defense": "afd"}
    afd = {"_target_": "redoubt.defenses.AFD"}
    trees += [
        config(axes=axes, defense={**afd, "alpha": a, "gamma": g}) for a, g in itertools.product((0.05, 0.1), (5, 25))
    ]
    for i, tree in enumerate(trees):
        folder = add_run(outputs, tree, f"{i:010x}", curve(6, defense=tree["axes"]["defense"]))
        more = {"examples": some_examples(), "audits": ["a"], "audit_failed": ["restarts"]} if i == 0 else {}
        add_evaluation(folder, verdicts[f"{i:x}"], **more)
        add_audit(folder, ["restarts"])
    failed = config(axes={**CONFIG["axes"], "defense": "cure"}, defense={"_target_": "redoubt.defenses.CURE"}, seed=7)
    add_run(outputs, failed, "ffffffffff", curve(3, defense="cure"), state="failed", reason=HOSTILE, epoch=3)
    html(outputs=str(outputs))
    return outputs / "report.html"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    """The page in a fresh window on a desk; it must not complain."""
    browser.size(1280, 900)
    browser.open(page)
    browser.run("try { localStorage.clear() } catch { }")
    yield browser
    assert browser.complaints() == []


def numbers(cells: list[str]) -> list[float]:
    return [float(c.split(" ")[0]) for c in cells if c != MISSING]


def test_all_runs_with_their_numbers_and_the_failed_with_its_reason(opened: Browser, verdicts: dict) -> None:
    assert opened.texts("#count") == ["9 of 9 runs"]
    assert "8 done, 1 failed" in opened.texts("#summary")[0]
    expected = sorted((f"{100 * v['pgd20'].mean():.2f}" for v in verdicts.values()), reverse=True)
    assert sorted(opened.run(CELLS, "pgd20")[:8], reverse=True) == expected
    assert opened.run(CELLS, "state")[-1] == f"failed, epoch 3/100{HOSTILE}"
    assert opened.run("return [document.title, document.querySelectorAll('img, td b').length]") == ["Redoubt: runs", 0]
    assert "failedrestarts" in opened.run(CELLS, "audit")
    assert opened.run(COLUMN + "return document.querySelector('#table tbody tr').cells[k].title", "pgd20").startswith(
        "["
    )


def test_sorted_by_mouse_and_by_keyboard_missing_last(opened: Browser) -> None:
    sort = "return document.querySelector('#table th[data-key=natural]').ariaSort"
    opened.click("#table th[data-key=natural] button")
    found = opened.run(CELLS, "natural")
    assert numbers(found) == sorted(numbers(found), reverse=True)
    assert (found[-1], opened.run(sort)) == (MISSING, "descending")
    opened.press(ENTER)  # the focus has stayed on the button
    found = opened.run(CELLS, "natural")
    assert numbers(found) == sorted(numbers(found))
    assert (found[-1], opened.run(sort)) == (MISSING, "ascending")
    opened.press(TAB, SPACE)
    assert opened.run("return document.activeElement.textContent") == "FGSM"
    assert opened.run(sort) == "none"


def test_filtered_by_text_and_by_axis(opened: Browser) -> None:
    opened.type("#search", "afd S0")
    assert opened.texts("#count") == ["4 of 9 runs"]
    opened.choose("#search", "")
    opened.choose("#filters select[data-axis=seed]", "1")
    assert set(opened.run(CELLS, "defense")) == {"fsr"}
    assert opened.texts("#count") == ["2 of 9 runs"]
    opened.choose("#filters select[data-axis=state]", "failed")
    assert opened.texts("#count") == ["0 of 9 runs"]
    opened.run("document.querySelector('a[href=\"#scatter\"]').click()")
    assert opened.texts("#scatter-chart") == ["None of these runs has both accuracies."]


def test_mean_and_deviation_over_seeds(opened: Browser, verdicts: dict) -> None:
    opened.click("#mean")
    assert opened.texts("#count") == ["9 of 9 runs in 7 rows"]
    both = [100 * verdicts[i]["cw"].mean() for i in "01"]
    assert f"{np.mean(both):.2f} ± {np.std(both, ddof=1):.2f} (2)" in opened.run(CELLS, "cw")
    assert "0, 1" in opened.run(CELLS, "seed")


def test_the_scatter_by_keyboard_opens_a_run(opened: Browser) -> None:
    opened.run("document.querySelector('#scatter-chart svg[tabindex]').focus()")
    opened.press(RIGHT)
    [tip] = opened.texts("#scatter-chart .tip")
    assert tip.startswith(("fsr + at, resnet18, cifar10\nNatural 8", "afd + at, resnet18, cifar10\nNatural 8"))
    opened.press(ENTER)
    opened.wait("document.querySelector('#run-details h3')")
    assert opened.run("return location.hash").startswith("#run=")


def test_a_run_by_its_address_with_all_its_parts(browser: Browser, opened: Browser, page: Path) -> None:
    opened.open(page, f"#run={FSR}0")
    opened.wait("document.querySelectorAll('#run-details canvas').length")
    headings = opened.texts("#run-details h3")
    assert headings[0] == f"{FSR}0"
    assert {"Learning curves", "Audits", "Audit: accuracy over eps and iterations"} <= set(headings)
    assert (
        len(opened.texts("#run-details canvas")) == 2 * 3 * 3
    )  # attacks, images, clean and difference and adversarial
    assert "plane → car" in opened.texts("#run-details figcaption span")  # what PGD-20 or AutoAttack made of a plane
    shown = opened.run(
        "return [...document.querySelectorAll('#run-details canvas')[0].getContext('2d').getImageData(0, 0, 8, 8).data]"
    )
    pixels = np.array(shown).reshape(8, 8, 4)[..., :3].transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels, some_examples()["clean"][0])
    assert any(text.startswith("last-1111111111, 256 images: failed: restarts") for text in opened.texts("summary"))
    assert "defense.tau" in opened.texts("#run-details details code")


def test_feature_gaps_and_update_shares(opened: Browser, page: Path) -> None:
    opened.choose("#run", "afd-at-resnet18-cifar10-s0-0000000004")
    opened.wait("[...document.querySelectorAll('h3')].some(h => h.textContent === 'Feature gap')")
    assert opened.texts("#run-details .legend span").count("teacher") == 2
    opened.choose("#run", "cure-at-resnet18-cifar10-s7-ffffffffff")
    opened.wait("[...document.querySelectorAll('h3')].some(h => h.textContent.includes('CURE updates'))")
    assert opened.run("return document.querySelectorAll('#run-details rect').length") == 4 * 3  # layers, epochs


def test_two_runs_compared_on_the_same_examples(opened: Browser, verdicts: dict) -> None:
    opened.choose("#first", f"{FSR}0")
    opened.choose("#second", f"{FSR}2")
    opened.wait("document.querySelectorAll('#comparison table').length == 2")
    rows = opened.run(
        "return [...document.querySelectorAll('#comparison tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    a, b = verdicts["0"], verdicts["2"]
    assert [r[0].split(" (")[0] for r in rows[:7]] == [
        "Natural",
        "FGSM",
        "PGD-20",
        "PGD-100",
        "C&W",
        "AutoAttack",
        "Ensemble",
    ]
    (heading,) = opened.texts("#comparison h4")
    assert heading == "fsr_suite, linf eps 8/255 (0.03137), student weights of last, 1003 images"
    for row, name in zip(rows, a, strict=False):
        only = [int((x & ~y).sum()) for x, y in ((a[name], b[name]), (b[name], a[name]))]
        assert row[1:5] == [str(v) for v in ((a[name] & b[name]).sum(), *only, (~a[name] & ~b[name]).sum())]
        p = binomtest(only[0], sum(only)).pvalue
        assert float(row[6]) == pytest.approx(p, rel=0.06, abs=6e-5)
    assert rows[7:] == [["defense.tau", "0.1", "0.5", "yes"]]


def test_mcnemar_is_scipy_s_exact_binomial(opened: Browser) -> None:
    pairs = [(0, 1), (5, 5), (3, 12), (0, 40), (400, 520), (4000, 6000)]
    found = opened.run("return arguments[0].map(([b, c]) => mcnemar(b, c))", pairs)
    assert found == pytest.approx([binomtest(b, b + c).pvalue for b, c in pairs], rel=1e-9)
    assert opened.run("return mcnemar(0, 0)") == 1


def test_sweeps_are_a_curve_and_a_heat_map(opened: Browser, verdicts: dict) -> None:
    names = opened.texts("#sweep option")
    assert [n.split(":")[0] for n in names] == ["defense.alpha \u00d7 defense.gamma", "defense.tau"]
    cells = opened.texts("#sweep-chart text.dark, #sweep-chart text.light")
    assert sorted(cells) == sorted(f"{100 * verdicts[i]['ensemble'].mean():.2f}" for i in "4567")
    opened.choose("#sweep", "1")
    opened.choose("#sweep-metric", "pgd20")
    opened.run("document.querySelector('#sweep-chart svg').focus()")
    opened.press(RIGHT)
    mean = np.mean([100 * verdicts[i]["pgd20"].mean() for i in "01"])
    assert opened.texts("#sweep-chart .tip")[0].startswith(f"PGD-20: {mean:.2f} % ± ")


def test_theme_follows_the_system_and_the_button(browser: Browser, opened: Browser) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = opened.run(ground)
    opened.size(1280, 900, "dark")
    dark = opened.run(ground)
    assert dark != light
    opened.click("#theme")
    assert (opened.texts("#theme"), opened.run(ground)) == (["Theme: light"], light)
    opened.click("#theme")
    opened.size(1280, 900, "light")
    assert (opened.texts("#theme"), opened.run(ground)) == (["Theme: dark"], dark)


def test_on_a_phone_only_the_table_s_box_scrolls(opened: Browser, page: Path) -> None:
    opened.size(390, 844)
    opened.open(page, f"#run={FSR}0")
    opened.wait("document.querySelectorAll('#run-details canvas').length")
    assert opened.run("return document.documentElement.scrollWidth") == 390
    wider = "return (e => e.scrollWidth > e.clientWidth)(document.querySelector('#runs .scroll'))"
    assert opened.run(wider)
    assert opened.run(
        "return [...document.querySelectorAll('.chart svg')].every(s => s.getBoundingClientRect().right <= 390)"
    )


def test_focus_can_be_seen_and_reaches_the_table(opened: Browser) -> None:
    opened.press(TAB)
    assert opened.run("return document.activeElement.className") == "skip"
    seen = []
    for _ in range(40):
        opened.press(TAB)
        width, name = opened.run(
            "const e = document.activeElement; return [getComputedStyle(e).outlineWidth, e.closest('[id]')?.id]"
        )
        assert width == "3px"
        seen.append(name)
        if name == "table":
            break
    assert {"theme", "search", "protocol", "mean", "runs"} <= set(seen)
    assert seen[-1] == "table"


def test_a_hundred_runs_open_within_two_seconds(browser: Browser, hundred: Path) -> None:
    browser.size(1280, 900)
    browser.open(hundred / "report.html")
    assert browser.texts("#count") == ["100 of 100 runs"]
    milliseconds = browser.wait("performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"loaded in {milliseconds:.0f} ms")
    assert milliseconds < 2000
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.complaints() == []
