"""Our flags on Megatron's own parser: the frozen list, presets, what config.json fills in, and how a user's error ends."""

import argparse
import copy
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_patch import arguments
from megatron_patch.arguments import PatchArguments, add_arguments, choose_device, describe_losses, given_losses, requested_device
from megatron_patch.preference.losses import LOSSES, loss_options, loss_sum

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "examples/qwen2_5/presets").glob("*.args"))
SMALLEST = ROOT / "tests/data/qwen2_5_configs/0.5B.json"
# A flag that is renamed or changes its default breaks users' scripts: change this list only on purpose, and say so in CHANGELOG.
FROZEN = {
    "device": "auto", "train_mode": "xpo", "hf_path": None, "export_hf": None, "pair_data": None, "valid_pair_data": None, "epochs": None,
    "best_metric": None, "early_stop_metric": None, "early_stop_patience": 3, "skip_bad_batches": 0, "keep_last": None,
    "continue_on_save_failure": False, "verify_data": False,
    "max_tokens_per_micro_batch": 8192, "share_prompt": False, "pad_micro_batches": False, "logps_chunk_tokens": 1024,
    "loss_type": ("lpo-ste",), "loss_weights": None, "beta": None, "gamma": None, "r1": None, "r2": None, "offset": None,
    "label_smoothing": None, "margin": None, "upper_margin": None, "sft_weight": None, "dpop_lambda": None,
    "alpha": None, "discopop_tau": None, "desirable_weight": None, "undesirable_weight": None, "statistics_decay": None, "anchor": None,
    "anchor_weight": None, "anchor_slack": None, "anchor_power": None, "anchor_value": None, "is_average": None, "add_sft_loss": None,
    "parity_check": True, "allow_reference_mismatch": False, "allow_untested": False, "dry_run": False,
    "gpu_memory_gb": None, "check": False,
}  # fmt: skip


@functools.cache
def built_once():
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def megatron_parser():
    return copy.deepcopy(built_once())  # building it takes much longer


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(SMALLEST.read_text())
    return str(folder)


def parse(words, hf_path):
    words = ["--hf-path", hf_path, "--device", "cpu", *words]
    return add_arguments(megatron_parser(), "cpu", words).parse_args(words)


def options_of(words):
    """The options of a command line's only loss, by our flags alone."""
    (loss,) = losses_of(words)
    return loss.options


def losses_of(words):
    parser = argparse.ArgumentParser()
    for item in dataclasses.fields(PatchArguments):
        if item.metadata.get("action") != "store_true":
            parser.add_argument("--" + item.name.replace("_", "-"), **{**item.metadata, "default": item.default})
    return given_losses(parser.parse_args(words))


def test_flags_and_defaults_are_the_frozen_ones(hf_path):
    assert {item.name: item.default for item in dataclasses.fields(PatchArguments)} == FROZEN
    parsed = vars(parse([], hf_path))
    assert {name: parsed[name] for name in FROZEN} == {**FROZEN, "device": "cpu", "hf_path": hf_path}
    assert all(len(item.metadata["help"]) > 10 for item in dataclasses.fields(PatchArguments))


def test_no_flag_of_ours_is_one_of_megatrons():
    theirs = {word for action in megatron_parser()._actions for word in action.option_strings}
    assert not theirs & {"--" + name.replace("_", "-") for name in FROZEN}


def test_every_default_we_set_is_an_argument_that_megatron_has(hf_path):
    parser = megatron_parser()
    known = {action.dest for action in parser._actions}
    words = ["--hf-path", hf_path, "--device", "cpu", "--save", "s", "--valid-pair-data", "v"]
    add_arguments(parser, "cpu", words)
    ours = {item.name for item in dataclasses.fields(PatchArguments)}
    assert set(parser._defaults) - known - ours == set()
    for device in ("cpu", "cuda"):
        assert set(arguments._device_defaults(device)) <= known


def test_shape_comes_from_config_json(hf_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = json.loads(SMALLEST.read_text())
    args = parse(["--tensor-model-parallel-size", "2"], hf_path)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (24, 896, 4864) == (
        config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])  # fmt: skip
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (14, 2, 64) and args.group_query_attention
    assert (args.vocab_size, args.padded_vocab_size, args.rotary_base) == (151936, 151936, 1_000_000)
    assert args.untie_embeddings_and_output_weights is False and args.add_qkv_bias and not args.add_bias_linear and args.swiglu
    assert args.layernorm_epsilon == config["rms_norm_eps"]
    assert args.attention_dropout == args.hidden_dropout == 0.0 and args.normalization == "RMSNorm"
    assert args.max_position_embeddings == 32768 and args.seq_length == 4096
    assert args.distributed_backend == "gloo" and args.transformer_impl == "local" and args.calculate_per_token_loss


def test_what_the_user_gives_wins(hf_path):
    args = parse(["--seq-length", "65536", "--adam-beta2", "0.9", "--transformer-impl", "transformer_engine", "--save", "out"], hf_path)
    assert args.seq_length == 65536 <= args.max_position_embeddings
    assert args.adam_beta2 == 0.9 and args.transformer_impl == "transformer_engine"
    assert args.tensorboard_dir == os.path.join("out", "tensorboard")
    assert parse(["--save", "out", "--tensorboard-dir", "tb"], hf_path).tensorboard_dir == "tb"
    assert parse([], hf_path).eval_iters == 0 and parse(["--valid-pair-data", "v"], hf_path).eval_iters == 1


def test_impossible_command_lines_are_one_line_errors(hf_path):
    for words, complaint in (
        (["--tensor-model-parallel-size", "4"], "4 does not divide the model's 14 attention heads; sizes that fit: 1, 2"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--train-mode", "dpo"], "invalid choice: 'dpo'"),
        (["--beta", "much"], "invalid float value: 'much'"),
        (["@nowhere.args"], "nowhere.args"),
        (["--epochs", "1", "--train-iters", "5"], "--epochs 1 and --train-iters 5 contradict"),
        (["--epochs", "1"], "--pair-data and --global-batch-size"),
    ):
        with pytest.raises(ValueError, match=complaint) as refusal:
            parse(words, hf_path)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="--hf-path is required"):
        add_arguments(megatron_parser(), "cpu", [])


def test_layout_that_does_not_fit_the_job_names_the_flags(hf_path, monkeypatch):
    """Four nodes of eight devices, and a preset's 12 pairs a step."""
    monkeypatch.setenv("WORLD_SIZE", "32")
    with pytest.raises(ValueError, match=r"--global-batch-size 12 is not a multiple of the 32 data-parallel ranks .*; nearest: 32,"):
        parse(["--global-batch-size", "12"], hf_path)
    with pytest.raises(ValueError, match=r"--global-batch-size 71 .*; nearest: 64, 96,"):
        parse(["--global-batch-size", "71"], hf_path)
    with pytest.raises(ValueError, match=r"--pipeline-model-parallel-size 16 .* 24 layers; sizes that do: 1, 2, 3, 4, 6, 8, 12, 24;"):
        parse(["--pipeline-model-parallel-size", "16"], hf_path)
    with pytest.raises(ValueError, match=r"--num-virtual-stages-per-pipeline-rank 4 .* 6 layers of each of 4 .* that do: 1, 2, 3, 6$"):
        parse(["--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "4"], hf_path)
    assert parse(["--pipeline-model-parallel-size", "16", "--decoder-first-pipeline-num-layers", "9"], hf_path).num_layers == 24
    with pytest.raises(ValueError, match=r"32 processes cannot be cut into .* 2 x --pipeline-model-parallel-size 3"):
        parse(["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3"], hf_path)


def test_help_can_be_printed(capsys):
    """Upstream's help texts hold a bare %."""
    with pytest.raises(SystemExit) as left:
        add_arguments(megatron_parser(), "cpu", ["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "--anchor-slack" in shown and "--tensor-model-parallel-size" in shown


def test_preset_lines_hold_several_flags_and_comments(tmp_path, hf_path):
    preset = tmp_path / "mine.args"
    preset.write_text("# the reader's own\n--lr 2e-7 --beta 0.5  # it's small\n\n--pair-data 'a b' c\n--loss-type\nsigmoid\n")
    args = parse([f"@{preset}"], hf_path)
    assert (args.lr, args.beta, args.pair_data, args.loss_type) == (2e-7, 0.5, ["a b", "c"], ["sigmoid"])
    assert parse([f"@{preset}", "--beta", "0.7"], hf_path).beta == 0.7, "what comes later wins"
    preset.write_text("--lr 1 --device cuda  # here\n")
    assert requested_device([f"@{preset}"]) == "cuda"
    assert requested_device([f"@{preset}", "--device=cpu", "--num-layers", "3", "--dev"]) == "cpu" and requested_device([]) == "auto"
    assert requested_device(["--device", "cuda", "--dry-run"]) == "cpu", "a plan for GPUs needs none"
    with pytest.raises(ValueError, match="invalid choice: 'tpu'"):
        requested_device(["--device", "tpu"])


def test_there_are_presets():
    assert {path.stem for path in PRESETS} >= {"general", "math", "tts", "asr", "sft", "dpo"}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_the_papers_numbers(preset, hf_path):
    args = parse([f"@{preset}"], hf_path)
    batches = {"general": 12, "math": 12, "tts": 60, "asr": 12, "sft": 128}
    assert args.global_batch_size == batches.get(preset.stem, args.global_batch_size)
    assert (args.min_lr, args.lr_warmup_iters, args.weight_decay, args.adam_beta1, args.adam_beta2, args.clip_grad) == (
        1e-7, 66, 0.1, 0.9, 0.95, 1.0)  # fmt: skip
    assert args.lr_decay_style == "cosine" and args.train_mode == ("finetune" if preset.stem == "sft" else "xpo")
    if preset.stem == "sft":
        assert args.lr == 9e-6
        return
    ((options, _),) = given_losses(args)
    if preset.stem == "dpo":
        assert (options.loss_type, options.beta, options.length_normalised, options.anchor) == ("sigmoid", 0.1, False, "none")
        return
    assert args.lr == 2e-7 and options.r2 == {"general": 2.0, "math": 0.2, "tts": 0.4, "asr": 1.0}[preset.stem]
    assert (options.loss_type, options.beta, options.anchor_weight, options.r1, options.anchor) == ("lpo-ste", 0.2, 10.0, 1.0, "hinge")


def pretend(monkeypatch, *, sees, files=(), slurm=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    monkeypatch.setattr(arguments.glob, "glob", lambda pattern: list(files))
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if slurm is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", slurm)


def test_device_is_chosen_from_what_torch_and_the_machine_say(monkeypatch):
    pretend(monkeypatch, sees=True)
    assert choose_device("auto") == choose_device("cuda") == "cuda" and choose_device("cpu") == "cpu"
    pretend(monkeypatch, sees=False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU"):
        choose_device("cuda")
    pretend(monkeypatch, sees=False, slurm="0")
    assert choose_device("auto") == "cpu"


@pytest.mark.parametrize("evidence", [{"files": ["/dev/nvidia0"]}, {"slurm": "8"}])
def test_auto_does_not_fall_back_where_there_are_gpus(monkeypatch, evidence):
    pretend(monkeypatch, sees=False, **evidence)
    with pytest.raises(ValueError, match="this machine has GPUs but torch sees none"):
        choose_device("auto")
    assert choose_device("cpu") == "cpu"


def test_loss_options_are_the_defaults_overlaid_by_the_flags_given():
    assert options_of([]) == loss_options("lpo-ste")
    assert options_of(["--r2", "0.2", "--gamma", "3"]) == loss_options("lpo-ste", r2=0.2, anchor_weight=3.0)
    assert options_of(["--loss-type", "sigmoid", "--is-average"]).length_normalised is True
    assert options_of(["--no-is-average"]).length_normalised is False
    assert options_of(["--no-add-sft-loss"]).anchor == "none" and options_of(["--add-sft-loss"]).anchor == "hinge"
    assert options_of(["--loss-type", "sigmoid", "--add-sft-loss"]).anchor == "hinge"
    assert options_of(["--anchor", "hinge", "--add-sft-loss"]).anchor == "hinge"


def test_several_losses_are_a_weighted_sum():
    """As TRL's mixed preference optimisation is spelled, loss_type and loss_weights."""
    words = "--loss-type sigmoid bco sft --loss-weights 0.8 0.2 1 --beta 0.3".split()
    assert losses_of(words) == loss_sum(["sigmoid", "bco", "sft"], [0.8, 0.2, 1.0], beta=0.3)


def test_what_help_shows_of_a_loss_can_be_typed():
    """Each line of flags, given as it stands, is the loss with its defaults."""
    lines = describe_losses().splitlines()
    for name, entry in LOSSES.items():
        line = lines.index(f"{name}: {entry.paper}" + (f", arXiv {entry.arxiv}" if entry.arxiv else ""))
        assert lines[line + 1].strip() == entry.when
        words = lines[line + 2].replace("--offset 1/(2 beta)", "").split()
        assert options_of(["--loss-type", name, *words]) == loss_options(name)
    assert [name for name, entry in LOSSES.items() if not entry.arxiv] == ["stapo"]
    assert all(re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv) for entry in LOSSES.values() if entry.arxiv)
    anchor = next(line for line in lines if "--anchor-power" in line).split()
    assert options_of(["--loss-type", "lpo", "--anchor", "spo", *anchor]) == loss_options("lpo", anchor="spo")


def test_fine_tuning_takes_no_loss():
    assert losses_of(["--train-mode", "finetune"]) == ()
    refused = {"--beta 0.3": "beta", "--loss-type sigmoid": "a --loss-type", "--no-is-average": "length_normalised"}
    for words, what in refused.items():
        with pytest.raises(ValueError, match=f"--train-mode finetune has no preference loss to give {what} to"):
            losses_of(["--train-mode", "finetune", *words.split()])


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--anchor none --add-sft-loss", "--anchor none contradicts --add-sft-loss"),
        ("--anchor hinge --no-add-sft-loss", "--anchor hinge contradicts --no-add-sft-loss"),
        ("--loss-type sigmoid --r2 0.5", "loss sigmoid does not use r2"),
        ("--loss-type sigmoid --gamma 5", "loss sigmoid does not use gamma"),
        ("--loss-type lpo --label-smoothing 0.1", "loss lpo does not use label_smoothing"),
        ("--gamma 5 --anchor-weight 6", "mean the same thing"),
        ("--loss-type lpo-sted", "unknown loss 'lpo-sted' .*did you mean lpo-ste"),
        ("--beta 0", "beta = 0.0 is out of range"),
        ("--no-add-sft-loss --gamma 10", "no effect"),
        ("--loss-type sigmoid sft --loss-weights 1", "loss weights"),
    ],
)
def test_contradictions_and_unused_options_are_refused(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        options_of(words.split())


def test_help_losses_prints_every_loss_and_stops(capsys):
    with pytest.raises(SystemExit) as stop:
        add_arguments(argparse.ArgumentParser(), "cpu", ["--help-losses"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == describe_losses() + "\n"


ERRORS = {
    "user": ("raise ValueError('bad --beta\\n   in two lines')", {}, 2, "[error] bad --beta in two lines\n"),
    "rank 1 before the group": ("raise ValueError('all say it')", {"RANK": "1"}, 2, ""),
    "agreed": ("raise AgreedError('all ranks')", {"RANK": "0"}, 2, "[error] all ranks\n"),
    "rank 1 alone": ("group(); raise ValueError('mine')", {"RANK": "1"}, 2, "[error] mine\n"),
    "rank 1 agreed": ("group(); raise AgreedError('ours')", {"RANK": "1"}, 2, ""),
    "no error": ("print('fine')", {}, 0, ""),
    "a bug": ("raise RuntimeError('bug')", {}, 1, None),
}  # fmt: skip
# One process imports torch and forks a child for each case, which ends as an entry would.
FORKS = """
import json, os, sys
import torch
from megatron_patch.entry import user_errors
from megatron_patch.errors import AgreedError

def group():
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store{os.getpid()}", rank=0, world_size=1)

for i, (code, environment) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for descriptor, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{i}.{suffix}", os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.update(environment)
    with user_errors():
        exec(code)
    sys.exit(0)
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """(standard output, standard error, exit code) of each case."""
    folder = tmp_path_factory.mktemp("endings")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LPO_TRACEBACK")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    cases = json.dumps([(code, extra) for code, extra, _, _ in ERRORS.values()])
    command = [sys.executable, "-c", FORKS, cases]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    texts = [[(folder / f"{i}.{suffix}").read_text() for suffix in ("out", "err")] for i in range(len(ERRORS))]
    return {name: (*text, int(code)) for name, text, code in zip(ERRORS, texts, done.stdout.split(), strict=True)}


@pytest.mark.parametrize("name", ERRORS)
def test_a_users_error_is_one_line_and_exit_code_2(endings, name):
    out, err, code = endings[name]
    _, _, expected_code, expected_err = ERRORS[name]
    assert code == expected_code, err
    if expected_err is None:
        assert "Traceback" in err and err.rstrip().endswith("RuntimeError: bug"), "a bug keeps its traceback"
    else:
        assert err == expected_err
    assert out == ("fine\n" if name == "no error" else "")
