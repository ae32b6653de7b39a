"""What README and presets say is true: files exist, presets parse on Megatron's real parser, run scripts stay small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "examples/qwen2_5/presets").glob("*.args"))


DOCUMENTS = ["README.md", "CONTRIBUTING.md", "examples/qwen2_5/README.md", "docs/install.md", "docs/paper.md", "docs/operations.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_scripts_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", text)) | set(re.findall(r"(?:\./|bash |sbatch )((?:[\w.]+/)*[\w.]+\.sh)", text))
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / document).parent.joinpath(name).exists()]
    assert named or document != "README.md"
    assert not missing


PARSE = """
import argparse, sys
from megatron_patch import cpu_backend
cpu_backend.install()
from megatron.training.arguments import add_megatron_arguments
from megatron_patch.arguments import add_arguments, given_losses
sys.argv = ["train_qwen.py", *sys.argv[1:]]
for preset in sys.argv[2:]:
    argv = ["@" + preset, "--hf-path", sys.argv[1]]
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), "cpu", argv)
    args = parser.parse_args(argv)
    options = given_losses(args)[0].options if args.train_mode == "xpo" else None
    print(preset.rpartition("/")[2], args.train_mode, args.lr, args.min_lr, args.global_batch_size, args.lr_warmup_iters,
          args.adam_beta2, args.clip_grad, args.weight_decay, *(getattr(options, n, "-") for n in ("loss_type", "beta", "r1", "r2",
          "anchor", "anchor_weight", "length_normalised")))
"""


def test_presets_say_what_the_paper_says(tmp_path: Path) -> None:
    """arXiv 2508.14947, Tables 8 and 9; batches in pairs."""
    (tmp_path / "config.json").write_text((ROOT / "tests/data/qwen2_5_configs/7B.json").read_text())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE, str(tmp_path), *map(str, PRESETS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {line.split()[0].removesuffix(".args"): line.split()[1:] for line in done.stdout.splitlines() if ".args" in line}
    schedule = ["66", "0.95", "1.0", "0.1"]
    table = (("general", "12", "2.0"), ("math", "12", "0.2"), ("tts", "60", "0.4"), ("asr", "12", "1.0"))
    loss = {name: ["lpo-ste", "0.2", "1.0", r2, "hinge", "10.0", "True"] for name, _, r2 in table}
    lpo = {name: ["xpo", "2e-07", "1e-07", batch, *schedule, *loss[name]] for name, batch, _ in table}
    assert {name: rows[name] for name in lpo} == lpo
    assert rows["dpo"][:11] == ["xpo", "2e-07", "1e-07", "12", *schedule, "sigmoid", "0.1", rows["dpo"][10]] and rows["dpo"][-1] == "False"
    assert rows["dpo"][-3] == "none"
    assert rows["sft"][:8] == ["finetune", "9e-06", "1e-07", "128", *schedule]


def test_entries_and_run_scripts_stay_small() -> None:
    """The budget: an entry has at most 80 lines, a run script 60."""
    assert len((ROOT / "examples/qwen2_5/train_qwen.py").read_text().splitlines()) <= 80
    for script in (ROOT / "examples/qwen2_5/run_mcore_qwen_xpo.sh", ROOT / "toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh"):
        assert len(script.read_text().splitlines()) <= 60, script


def test_help_losses_through_the_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "examples/qwen2_5/train_qwen.py", "--help-losses"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lpo-ste: Linear Preference Optimization, arXiv 2508.14947" in done.stdout
