"""A comparison's file: what it means when it is right, and one line with file and key when it is not."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_patch.arguments import PatchArguments, given_losses
from toolkits.loss_comparison import plan
from toolkits.loss_comparison.plan import Comparison, read_comparison

ROOT = Path(__file__).parents[3]
TOP = """title = "t"
preset = "math"
flags = "--seq-length 128"
steps = 9
eval_interval = 3
learning_rates = [1e-5, 2e-5]
seeds = [1, 2]
"""
DPO = '[[runs]]\nname = "DPO"\npreset = "@dpo"\n'
A = DPO + 'pairs = "a"\n[pair_sets.a]\n'
LPO = '[[runs]]\nname = "LPO"\nflags = "--r2 0.2"\nsteps = 5\n'


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(tmp_path: Path, text: str) -> Comparison:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return read_comparison(path)


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    line = str(error.value)
    assert line.startswith(f"{tmp_path}/c.toml: ") and "\n" not in line
    return line.removeprefix(f"{tmp_path}/c.toml: ")


def test_runs_inherit_what_they_do_not_say(tmp_path: Path) -> None:
    comparison = read(tmp_path, TOP + DPO + LPO + "learning_rates = [3e-5]\n")
    dpo, lpo = comparison.runs
    assert (dpo.preset.stem, dpo.flags, dpo.learning_rates, dpo.steps) == ("dpo", ("--seq-length", "128"), (1e-5, 2e-5), 9)
    assert (lpo.preset.stem, lpo.flags) == ("math", ("--seq-length", "128", "--r2", "0.2"))
    assert (lpo.learning_rates, lpo.steps, lpo.pairs, lpo.x) == ((3e-5,), 5, None, None)
    assert comparison.seeds == (1, 2) and comparison.materials == Path("outputs/quickstart") and comparison.baseline is None


def test_a_shared_choice_needs_no_rates(tmp_path: Path) -> None:
    top = TOP.replace("learning_rates = [1e-5, 2e-5]\n", "")
    for text in (TOP + DPO, top + DPO + "learning_rates = [3e-5]\n"):
        assert read(tmp_path, text + LPO + 'rates_from = "DPO"').runs[1].learning_rates == ()


def test_pair_sets(tmp_path: Path) -> None:
    text = TOP + DPO + 'pairs = "noisy"\n[pair_sets.noisy]\nmethod = "verify-math"\nchosen = "sampled"\nn = 4\nswap_fraction = 0.2\n'
    noisy = read(tmp_path, text).pair_sets["noisy"]
    assert (noisy.method, noisy.chosen, noisy.n, noisy.max_pairs_per_prompt, noisy.swap_fraction) == ("verify-math", "sampled", 4, 1, 0.2)
    assert noisy.noise_ratio is None
    assert read(tmp_path, TOP + A + 'method = "perturb"\nnoise_ratio = 0.2').pair_sets["a"].noise_ratio == 0.2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("title = ", "not valid TOML"),
        (TOP, "runs: at least one [[runs]] is needed"),
        (TOP.replace("steps", "stepz") + DPO, "stepz: unknown key (did you mean steps?)"),
        (TOP.replace("seeds = [1, 2]", "") + DPO, "seeds: is missing"),
        (TOP.replace("[1, 2]", "[1, 1]") + DPO, "seeds: holds an entry twice: [1, 1]"),
        (TOP.replace("[1, 2]", '["1"]') + DPO, "seeds: must be a whole number, got '1'"),
        (TOP.replace("[1e-5, 2e-5]", "[0.0]") + DPO, "learning_rates: must be > 0, got 0.0"),
        (TOP.replace("[1e-5, 2e-5]", "1e-5") + DPO, "learning_rates: must be a list with at least one entry, got 1e-05"),
        (TOP.replace("steps = 9", "steps = true") + DPO, "steps: must be a whole number, got True"),
        (TOP.replace("steps = 9\n", "") + DPO, "run 1 (DPO): steps: is missing here and at the top of the file"),
        (TOP.replace("math", "maths") + DPO, "preset: neither a file of flags nor a preset in examples/qwen2_5/presets: 'maths'"),
        (TOP.replace("--seq-length 128", "--lr 1e-5") + DPO, "flags: --lr is set by the comparison itself"),
        (TOP + DPO + 'flags = "--seed=3"', "run 1 (DPO): flags: --seed=3 is set by the comparison itself"),
        (TOP + DPO + DPO, "run 2 (DPO): name: was given to another run already"),
        (TOP + DPO.replace("DPO", "SFT"), "run 1 (SFT): name: stands for the untouched model"),
        (TOP + "[[runs]]\nsteps = 3", "run 1: name: is missing"),
        (TOP + DPO + "lr = 3", "run 1 (DPO): lr: unknown key"),
        (TOP + DPO + 'pairs = "noisy"', "run 1 (DPO): pairs: there is no [pair_sets.noisy]"),
        (TOP + DPO + "x = 1", 'run 1 (DPO): x: the file does not say what x is (x = "..." at its top)'),
        ('x = "r2"\n' + TOP + DPO, "x: no run has a value of x"),
        ('baseline = "IPO"\n' + TOP + DPO, "baseline: there is no run 'IPO'"),
        (TOP + DPO + LPO + 'rates_from = "IPO"', "run 2 (LPO): rates_from: 'IPO' is no run that chooses its own rate"),
        (TOP + DPO + LPO + 'rates_from = "LPO"', "run 2 (LPO): rates_from: 'LPO' is no run that chooses its own rate"),
        (TOP + DPO + LPO + 'learning_rates = [1e-5]\nrates_from = "DPO"', "run 2 (LPO): learning_rates: the run takes its rate from 'DPO'"),
        (TOP + DPO + "[pair_sets.a]\nn = 2", "pair_sets.a: no run uses it"),
        (TOP + A + 'method = "best"', "pair_sets.a.method: must be one of lppc, verify-math, perturb, got 'best'"),
        (TOP + A + 'swap_fraction = 0.2', 'pair_sets.a.swap_fraction: needs chosen = "sampled"'),
        (TOP.replace("steps = 9", "steps = 2") + DPO, "run 1 (DPO): steps: 2 steps end before the first evaluation (eval_interval 3)"),
        (TOP + DPO + 'pairs = "../a"\n[pair_sets."../a"]', "pair_sets.../a: its name is a folder's"),
        (TOP + A + 'candidates = "perturbed"', "pair_sets.a.candidates: unknown key"),
        (TOP + A + 'chosen = "sampled"', 'pair_sets.a.chosen: "sampled" is for method = "verify-math"'),
        (TOP + A + 'noise_ratio = 0.1', 'pair_sets.a.noise_ratio: is for method = "perturb"'),
        (TOP + A + 'method = "perturb"\nnoise_ratio = 0.0', "pair_sets.a.noise_ratio: must lie in (0, 1], got 0.0"),
        (TOP + A + 'swap_fraction = 1', "pair_sets.a.swap_fraction: must lie in [0, 1), got 1"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, line: str) -> None:
    assert complaint(tmp_path, text).startswith(line)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml: No such file or directory"):
        read_comparison(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "examples/qwen2_5/comparisons").glob("*.toml")), ids=lambda path: path.stem)
def test_the_repository_s_comparisons(path: Path) -> None:
    """The protocol's three rates a choice and three seeds."""
    comparison = read_comparison(path)
    assert len(comparison.seeds) == 3
    assert all(len(run.learning_rates) == 3 for run in comparison.runs if run.rates_from is None)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for item in fields(PatchArguments):
        if item.metadata.get("action") != "store_true":
            parser.add_argument("--" + item.name.replace("_", "-"), **{**item.metadata, "default": item.default})
    losses = [given_losses(parser.parse_args(run.flags)) for run in comparison.runs]
    distinct = {(loss, run.pairs) for loss, run in zip(losses, comparison.runs, strict=True)}
    assert len(distinct) == len(comparison.runs), "two runs of a comparison are the same"


def test_the_documented_file_can_be_read(tmp_path: Path) -> None:
    """examples/qwen2_5/comparisons/README.md shows every key."""
    text = (ROOT / "examples/qwen2_5/comparisons/README.md").read_text(encoding="utf-8")
    shown = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    (tmp_path / "shown.toml").write_text(shown)
    read_comparison(tmp_path / "shown.toml")
    keys = {**plan._TOP, **plan._RUN, **plan._PAIR_SET}
    assert not [key for key in keys if f"{key} = " not in shown]
