"""The report page as a file: what it holds, what it cannot be made to do, how large it is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import refused
from tests.reporting.stores import CONFIG, add_audit, add_evaluation, add_run, config, curve, nested, some_examples

from redoubt.reporting.page import as_block, html
from redoubt.reporting.payload import thinned
from redoubt.runs.identity import canonical, differences

HOSTILE = "</script><script>alert(1)</script><!-- & ' \" \u2028"


def data(path: Path) -> dict:
    """What the page's script reads."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    assert block is not None
    return json.loads(block[1])


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def verdicts(evaluation: dict) -> dict[str, np.ndarray]:
    """As the page reads them."""
    names = evaluation["verdicts"]["names"]
    rows = np.frombuffer(unpacked(evaluation["verdicts"]["bits"]), np.uint8).reshape(len(names), -1)
    bits = np.unpackbits(np.bitwise_xor.accumulate(rows, axis=0), axis=1)
    return dict(zip(names, bits[:, : evaluation["n"]].astype(bool), strict=True))


def test_data_are_the_store_s(outputs: Path) -> None:
    rng = np.random.default_rng(0)
    found = {s: nested(rng, 101) for s in (0, 1)}
    trees = {s: config(seed=s, sweep={"name": "seeds"}) for s in (0, 1)}
    for s in (0, 1):
        folder = add_run(outputs, trees[s], f"{s:010x}", curve(200), train_seconds=float("nan"))
        add_evaluation(folder, found[s], audited=True, audits=["last-1111111111"])
        add_audit(folder)
    html(outputs=str(outputs))
    page = data(outputs / "report.html")
    first, second = page["runs"]
    assert [r["axes"]["seed"] for r in page["runs"]] == [0, 1]
    assert first["group"] == second["group"]
    assert (first["sweep"], first["train_seconds"]) == ("seeds", None)  # JSON has no NaN
    [evaluation] = first["evaluations"]
    assert evaluation["metrics"]["pgd20"][0] == pytest.approx(found[0]["pgd20"].mean(), abs=1e-6)
    assert evaluation["audit"] == "passed"
    assert evaluation["verdicts"]["of"] == second["evaluations"][0]["verdicts"]["of"]
    for name, bits in verdicts(evaluation).items():
        np.testing.assert_array_equal(bits, found[0][name])
    details = json.loads(unpacked(page["details"]))
    left, right = (d["config"] for d in details)
    differing = sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))
    assert differing == differences(canonical(trees[0]), canonical(trees[1])) == ["data.seed", "seed"]
    lines = {p["title"]: p["series"] for p in details[0]["panels"]}
    of = ", linf eps 8/255 (0.03137)\nof the weights that the run is judged by"
    points = lines[f"Accuracy, training images (fixed subset){of}"]["clean"]
    assert (points[0], points[-1], len(points)) == ([1.0, 0.5], [200.0, 0.9975], 50)
    assert details[0]["audits"][0]["checks"][1]["name"] == "restarts"


def test_other_images_are_another_set(outputs: Path) -> None:
    rng = np.random.default_rng(0)
    for s, index in enumerate((np.arange(50), np.arange(50, 100))):
        add_evaluation(add_run(outputs, config(seed=s), f"{s:010x}"), nested(rng, 50), index=index)
    html(outputs=str(outputs))
    one, other = (r["evaluations"][0]["verdicts"]["of"] for r in data(outputs / "report.html")["runs"])
    assert one != other


def test_examples_come_back_and_share_their_clean_images(outputs: Path) -> None:
    images = some_examples()
    for s in (0, 1):
        folder = add_run(outputs, config(seed=s), f"{s:010x}")
        add_evaluation(folder, nested(np.random.default_rng(s), 50), examples=images)
    html(outputs=str(outputs))
    page = data(outputs / "report.html")
    [clean] = page["clean"].values()
    before = np.frombuffer(unpacked(clean["pixels"]), np.uint8).reshape(clean["shape"])
    np.testing.assert_array_equal(before, images["clean"])
    shown = page["runs"][1]["examples"]
    for attack in ("pgd20", "autoattack"):
        added = np.frombuffer(unpacked(shown["added"][attack]), np.uint8).reshape(clean["shape"])
        np.testing.assert_array_equal(before + added, images[attack])
    assert shown["predicted"]["autoattack"] == ["car", "car", "car"]


def test_of_corruptions_the_means_of_their_groups(outputs: Path) -> None:
    folder = add_run(outputs, config(), "0000000000")
    found = {name: np.ones(20, bool) for name in ("natural", "fog_1", "fog_2")}
    add_evaluation(folder, found, suite="corruptions", eps=None, groups={"weather": 0.75})
    html(outputs=str(outputs))
    [evaluation] = data(outputs / "report.html")["runs"][0]["evaluations"]
    assert list(evaluation["metrics"]) == ["natural", "mean of weather"]


class Outline(HTMLParser):
    """Scripts, and every address that an element names."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.addresses = 0, []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]


def test_nothing_external_and_no_way_out_of_the_data(outputs: Path) -> None:
    tree = config(defense__tau=HOSTILE, axes={**CONFIG["axes"], "defense": "a<b>"})
    tree["axes"]["data"] = "x&<y"
    add_run(outputs, tree, "0000000000", state="failed", reason=HOSTILE)
    html(outputs=str(outputs))
    text = (outputs / "report.html").read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.scripts == 2
    assert all(a is not None and (a.startswith("#") or a == "data:,") for a in outline.addresses)
    assert "{{" not in text
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert data(outputs / "report.html")["runs"][0]["reason"] == HOSTILE


def test_a_placeholder_in_the_data_stays_text(outputs: Path) -> None:
    add_run(outputs, config(), "0000000000", state="failed", reason="{{script}}")
    html(outputs=str(outputs))
    assert data(outputs / "report.html")["runs"][0]["reason"] == "{{script}}"


def test_the_policy_names_the_only_script_and_style(outputs: Path) -> None:
    add_run(outputs, config(), "0000000000")
    html(outputs=str(outputs))
    text = (outputs / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; ")
    for part in (r"<style>(.*?)</style>", r"<script>(.*?)</script>"):
        found = re.search(part, text, re.S)
        assert found is not None
        assert base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() in policy[1]


@pytest.mark.parametrize("text", [HOSTILE, "</SCRIPT>", "<!--<script>"])
def test_a_block_is_json_without_markup(text: str) -> None:
    block = as_block({text: [text]})
    assert json.loads(block) == {text: [text]}
    assert not set("<>&") & set(block)


def test_a_hundred_runs_are_below_two_megabytes(hundred: Path) -> None:
    path = hundred / "report.html"
    page = data(path)
    assert path.stat().st_size < 2e6
    assert page["left_out"]["verdicts"] == 0
    assert all(len(r["evaluations"][0]["verdicts"]["names"]) == 7 for r in page["runs"])


def test_over_the_limit_the_oldest_stay_out_and_it_is_said(outputs: Path) -> None:
    rng = np.random.default_rng(0)
    noise = {name: rng.random(10_000) < 0.5 for name in ("natural", "pgd20")}  # it cannot be compressed
    for i in range(6):
        folder = add_run(outputs, config(seed=i), f"{i:010x}", started=f"2026-01-0{6 - i}T00:00:00+00:00")
        add_evaluation(folder, noise, examples=some_examples(["pgd20"]) if i in (0, 5) else None)
    html(outputs=str(outputs), limit_mb=0.07)
    page = data(outputs / "report.html")
    there = ["verdicts" in r["evaluations"][0] for r in page["runs"]]
    assert (outputs / "report.html").stat().st_size < 70_000
    assert 0 < sum(there) < 6
    assert there == sorted(there, reverse=True)  # the first is the newest
    assert page["left_out"]["verdicts"] == 6 - sum(there)
    assert page["left_out"]["examples"] == 2  # verdicts come first


def test_damaged_verdicts_are_none(outputs: Path) -> None:
    path = add_evaluation(add_run(outputs, config(), "0000000000"), nested(np.random.default_rng(0), 50))
    (path / "verdicts.npz").write_bytes(b"no zip")
    html(outputs=str(outputs))
    assert data(outputs / "report.html")["runs"][0]["evaluations"][0]["verdicts"] is None


def test_mistakes_are_one_line(outputs: Path) -> None:
    refused(lambda: html(outputs=str(outputs)), "no runs are in it")
    (outputs / "runs").mkdir(parents=True)
    refused(lambda: html(outputs=str(outputs)), "its runs/ is empty")
    add_run(outputs, config(), "0000000000")
    refused(lambda: html(outputs=str(outputs), limit_mb="many"), "limit_mb='many' is not a number")  # type: ignore[arg-type]
    refused(lambda: html(outputs=str(outputs), to=str(outputs / "runs")), "cannot write")


def test_neither_torch_nor_matplotlib_is_needed(outputs: Path) -> None:
    add_run(outputs, config(), "0000000000")
    script = (
        "import sys\nfrom redoubt.reporting.commands import main\nmain(['html', 'paths.outputs=' + sys.argv[1]])\n"
        "print({'torch', 'matplotlib', 'scipy', 'hydra'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script, str(outputs)], capture_output=True, text=True, check=True)
    said, loaded = run.stdout.splitlines()
    assert re.fullmatch(r".*report\.html: 1 run, 0\.\d\d MB", said)
    assert loaded == "set()"


def test_thinned_keeps_the_ends() -> None:
    assert thinned(range(3), 5) == [0, 1, 2]
    kept = thinned(range(1000), 50)
    assert (len(kept), kept[0], kept[-1]) == (50, 0, 999)
    assert kept == sorted(set(kept))


def test_weights_of_files_are_on_the_page(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add_run(outputs, config(), "0000000000")
    rng = np.random.default_rng(0)
    weights = {"checkpoint": "w/theirs.pt", "weights_id": "x"}
    where = add_evaluation(folder, nested(rng, 10), **weights)
    (outputs / "eval").mkdir()
    where.rename(outputs / "eval" / where.name)
    html(outputs=str(outputs))
    assert "1 run, weights of 1 files" in capsys.readouterr().out
    _, theirs = data(outputs / "report.html")["runs"]
    assert theirs["name"].startswith("theirs.pt-")
    assert theirs["state"] == "weights"
    assert (theirs["axes"]["base"], theirs["axes"]["model"]) == ("-", CONFIG["axes"]["model"])
    assert theirs["evaluations"][0]["checkpoint"] == "w/theirs.pt"
