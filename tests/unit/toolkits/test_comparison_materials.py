"""The commands that make a pair set, against the stage that is to understand them."""

from pathlib import Path

import pytest
from toolkit_helpers import read_jsonl, record, sampled, write_jsonl

from toolkits.loss_comparison import materials
from toolkits.loss_comparison.plan import PairSet
from toolkits.lpo_data_preprocessing import select

DEFAULTS = {"method": "lppc", "chosen": "answer", "n": 1, "noise_ratio": None, "max_pairs_per_prompt": 1, "swap_fraction": 0.0,
            "scores": False, "seed": 1}  # fmt: skip
ROWS = [record(i, f"q{i}", chosen=f"one two three\n#### {i}", candidates=sampled("#### 1000", f"#### {i}")) for i in range(50)]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a pair set: (stages that the data job was asked for, the training records). Only select really runs."""

    def run(**given) -> tuple[list[str], list[dict]]:
        asked = []

        def stand_in(command, **environment):
            if "STAGES" in environment:
                asked.append(environment["STAGES"])
                for stage in environment["STAGES"].split():
                    name = {"normalise": "records", "candidates": "candidates"}.get(stage)
                    if name:
                        rows = ROWS if name == "candidates" else [{k: v for k, v in row.items() if k != "candidates"} for row in ROWS]
                        Path(environment["OUTPUT"]).mkdir(parents=True, exist_ok=True)
                        write_jsonl(Path(environment["OUTPUT"]) / f"{name}.jsonl", rows)
            else:
                assert command[2] == "toolkits.lpo_data_preprocessing.select" and select.main(command[3:]) == 0

        monkeypatch.setattr(materials, "_run", stand_in)
        prefix = materials._make_pair_set("a", PairSet(**DEFAULTS | given), tmp_path / "quickstart", "weights", tmp_path / "out")
        return asked, read_jsonl(prefix.with_suffix(".jsonl"))

    return run


def test_samples(make) -> None:
    stages, rows = make()
    assert stages == ["normalise candidates", "build_pairs reference_logps"]
    assert all(row["rejected"] == ["#### 1000"] and row["chosen"].startswith("one") for row in rows) and 35 < len(rows) < 50


def test_right_samples_against_wrong_ones_with_exchanged_labels(make) -> None:
    _, rows = make(method="verify-math", chosen="sampled", swap_fraction=0.5)
    swapped = [row for row in rows if row.get("swapped")]
    assert 5 < len(swapped) < len(rows) - 5 and all(row["chosen"] == "#### 1000" for row in swapped)


def test_perturbed_answers_need_no_samples(make) -> None:
    stages, rows = make(method="perturb", n=3, max_pairs_per_prompt=3, noise_ratio=1.0)
    assert stages == ["normalise", "build_pairs reference_logps"]
    assert max(len(row["rejected"]) for row in rows) == 3
    assert all(len(text.split()) % 2 == 0 for row in rows for text in row["rejected"])  # at ratio 1 no word stays alone
    _, others = make(method="perturb", n=3, max_pairs_per_prompt=3, noise_ratio=1.0, seed=2)
    assert [row["id"] for row in others] == [row["id"] for row in rows], "the split is not the noise's"
    assert [row["rejected"] for row in others] != [row["rejected"] for row in rows]
