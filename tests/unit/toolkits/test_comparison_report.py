"""The tables from invented numbers: every rate tried, intervals, and "no difference" where they overlap."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from toolkit_helpers import write_jsonl

from toolkits.loss_comparison.materials import Materials, Store
from toolkits.loss_comparison.plan import Comparison, Run
from toolkits.loss_comparison.plots import curve, draw_accuracies, draw_curves
from toolkits.loss_comparison.protocol import estimate
from toolkits.loss_comparison.report import Findings, as_json, as_markdown, show, table, write_report
from toolkits.loss_comparison.trials import Bench, Trial

METRICS = ("preference_accuracy", "chosen_logratio", "rejected_logratio", "margin", "character_error_rate")


def numbers(accuracy: float) -> dict[str, float]:
    return {"greedy_accuracy": accuracy, **dict.fromkeys(METRICS, 0.25)}


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    """DPO at two rates; LPO, much better; its twin, which takes over LPO's rate and whose interval overlaps LPO's."""
    (tmp_path / "p.args").write_text("")
    dpo, lpo, twin = (
        Run(name, tmp_path / "p.args", ("--a|b",), (1e-5, 2e-5), 10, None, other, x, "")
        for name, other, x in (("DPO", None, None), ("LPO", None, 1.0), ("twin", "LPO", 2.0))
    )
    comparison = Comparison("title", tmp_path, (1, 2, 3), 5, None, None, False, (dpo, lpo, twin), {})
    stores = {split: Store(split, split, 3) for split in ("valid", "heldout")}
    problems = {split: write_jsonl(tmp_path / f"{split}.jsonl", [{}] * 4) for split in stores}
    bench = Bench(tmp_path, Materials(tmp_path, "w", problems, stores, {None: Store("train", "train", 7)}), 5)
    tried = {Trial(run, rate, 1): numbers(rate * 1e4) for run in (dpo, lpo) for rate in run.learning_rates}
    accuracies = {dpo: (0.30, 0.31, 0.32), lpo: (0.80, 0.81, 0.82), twin: (0.78, 0.80, 0.82)}
    rates = {"DPO": 2e-5, "LPO": 2e-5, "twin": 2e-5}
    final = {run.name: {Trial(run, 2e-5, i + 1): numbers(value) for i, value in enumerate(values)} for run, values in accuracies.items()}
    for trials in [tried, *final.values()]:
        for trial in trials:
            folder = bench.folder(trial)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "finished.json").write_text(json.dumps({"configuration": bench.configuration(trial), "seconds": 2.0}))
            names = ("lpo/chosen_logratio", "lpo/rejected_logratio", "lpo/margin", "rewards/accuracies", "loss")
            rows = [{"iteration": step, **{f"eval_{name}": step * trial.seed for name in names}} for step in (5, 10)]
            again = rows[1:] * (trial.seed == 2)  # went on after an interruption
            write_jsonl(folder / "metrics.jsonl", [{"iteration": 1, "loss": 2.0}, *rows, *again])
    return Findings(comparison, bench, tried, rates, final, {split: numbers(0.4) for split in stores})


def lines_of(markdown: str, heading: str) -> list[list[str]]:
    body = markdown.partition(f"## {heading}\n\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()[2:]]


def test_against_the_best(findings: Findings) -> None:
    rows = lines_of(as_markdown(findings, Path("c.toml"), []), "Held-out problems and pairs")
    assert [row[:4] for row in rows] == [
        ["SFT", "—", "0.400", "lower"],
        ["DPO", "2e-05", "0.310 ± 0.025", "lower"],
        ["LPO", "2e-05", "0.810 ± 0.025", "best"],
        ["twin", "2e-05", "0.800 ± 0.050", "no difference"],
    ]
    assert rows[0][4:] == ["—"] * 4 and rows[2][4:] == ["0.250 ± 0.000", *["+0.250 ± 0.000"] * 3]


def test_against_a_baseline(findings: Findings) -> None:
    named = replace(findings, comparison=replace(findings.comparison, baseline="DPO", character_error_rate=True))
    markdown = as_markdown(named, Path("c.toml"), [])
    assert [row[3] for row in lines_of(markdown, "Held-out problems and pairs")] == ["higher", "baseline", "higher", "higher"]
    assert "against DPO" in markdown and lines_of(markdown, "Held-out problems and pairs")[0][-1] == "0.250"
    untouched = replace(findings, comparison=replace(findings.comparison, baseline="SFT"))
    assert [untouched.verdict(name) for name in ("SFT", "DPO", "LPO")] == ["baseline", "lower", "higher"]


def test_every_rate_is_shown(findings: Findings) -> None:
    rows = lines_of(as_markdown(findings, Path("c.toml"), []), "Every rate tried")
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("SFT", "—", "0.400", ""), ("DPO", "1e-05", "0.100", ""), ("DPO", "2e-05", "0.200", "chosen"), ("LPO", "1e-05", "0.100", ""),
        ("LPO", "2e-05", "0.200", "chosen"), ("twin", "2e-05", "—", "taken from LPO"),
    ]  # fmt: skip


def test_a_diverged_rate(findings: Findings) -> None:
    lost = Trial(findings.comparison.runs[0], 1e-5, 1)
    found = replace(findings, tried={trial: None if trial == lost else numbers for trial, numbers in findings.tried.items()})
    row = lines_of(as_markdown(found, Path("c.toml"), []), "Every rate tried")[1]
    assert row == ["DPO", "1e-05", *["—"] * 5, "diverged"]
    report = as_json(found, Path("c.toml"))
    assert report["rates_tried"][0]["valid"] is None and report["trainings"] == 10


def test_json(findings: Findings) -> None:
    report = as_json(findings, Path("c.toml"))
    assert report["trainings"] == 2 + 2 + 3 + 2 + 2 and report["training_seconds"] == 22.0  # a choice is its run's first seed
    assert report["reference"] == "LPO" and report["runs"]["twin"]["verdict"] == "no difference"
    assert report["runs"]["LPO"]["heldout"]["greedy_accuracy"]["values"] == [0.80, 0.81, 0.82]
    assert [row["chosen"] for row in report["rates_tried"]] == [False, True, False, True]
    measured = {"valid problems": 4, "heldout problems": 4, "valid pairs": 3, "heldout pairs": 3}
    assert report["sizes"] == {**measured, "training pairs (quickstart)": 7}


@pytest.mark.parametrize("x", [None, "r2"])
def test_files(findings: Findings, tmp_path: Path, x: str | None) -> None:
    findings = replace(findings, comparison=replace(findings.comparison, x=x, character_error_rate=True))
    for draw, name in ((draw_curves, "curves.png"), (draw_accuracies, "accuracy.png")):
        draw(findings, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000
    write_report(findings, Path("c.toml"), [tmp_path / "curves.png"])
    assert "![curves](curves.png)" in (tmp_path / "comparison.md").read_text()
    assert json.loads((tmp_path / "comparison.json").read_text())["title"] == "title"


def test_curves_start_at_zero_where_policy_is_reference() -> None:
    rows = [[{"iteration": 5, "m": 1.0}, {"iteration": 10, "m": 2.0}], [{"iteration": 5, "m": 3.0}, {"iteration": 10, "m": 4.0}]]
    steps, values = curve(rows, "m", from_zero=True)
    assert steps.tolist() == [0, 5, 10] and values.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert curve(rows, "m", from_zero=False)[0].tolist() == [5, 10]


def test_cells() -> None:
    assert table(("a", "b|c"), [("1", "2")]) == "| a | b\\|c |\n| --- | --- |\n| 1 | 2 |"
    assert show(estimate([0.5])) == "0.500" and show(estimate([-0.1, -0.1]), signed=True) == "-0.100 ± 0.000"
