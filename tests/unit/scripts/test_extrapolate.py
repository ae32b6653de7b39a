"""The step beyond a round of training: elementwise against the formula in float64, and what is refused."""

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

_SPEC = importlib.util.spec_from_file_location("extrapolate", Path(__file__).parents[3] / "scripts/extrapolate.py")
assert _SPEC and _SPEC.loader
script: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)
EMBEDDING, OUTPUT, INDEX, SINGLE = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors.index.json", "model.safetensors"
ALPHA = 0.3


def make_checkpoint(folder: Path, seed: int, dtype: torch.dtype = torch.float32, tied: bool = False, hidden: int = 16) -> Path:
    """A random Qwen2 in several files, with the files that come with a model."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=67, hidden_size=hidden, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size="8KB")
    (folder / "tokenizer.json").write_text(f'{{"seed": {seed}}}')
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def rounds(tmp_path: Path) -> tuple[Path, Path, Path]:
    """trained, previous, output."""
    return make_checkpoint(tmp_path / "trained", 2), make_checkpoint(tmp_path / "previous", 1), tmp_path / "output"


def run(trained: Path, previous: Path, output: Path, *more: str) -> int:
    return script.main(["--trained", str(trained), "--previous", str(previous), "--output", str(output), *more])


def nearest_bfloat16(value: float) -> float:
    """Round half to even at 8 significant bits, without torch."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(float(np.rint(mantissa * 2**8)), exponent - 8)


def test_every_element_follows_the_formula(rounds, monkeypatch):
    monkeypatch.setattr(script, "BLOCK_ELEMENTS", 100)  # several blocks a tensor, the last one shorter
    assert run(*rounds) == 0
    new, old, out = map(tensors, rounds)
    assert out.keys() == new.keys()
    for name, tensor in out.items():
        expected = new[name].double().numpy() + ALPHA * (new[name].double().numpy() - old[name].double().numpy())
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_bf16_is_rounded_once_and_the_other_folder_may_be_float32(tmp_path):
    trained = make_checkpoint(tmp_path / "trained", 2, torch.bfloat16)
    previous, output = make_checkpoint(tmp_path / "previous", 1), tmp_path / "output"
    assert run(trained, previous, output, "--alpha", "0.25") == 0
    new, old, out = tensors(trained), tensors(previous), tensors(output)
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
    found = torch.cat([tensor.flatten() for tensor in out.values()]).double()
    exact = torch.cat([1.25 * new[name].double().flatten() - 0.25 * old[name].double().flatten() for name in out])
    rounded = torch.tensor([nearest_bfloat16(value) for value in exact.tolist()], dtype=torch.float64)
    assert (found != rounded).double().mean() < 1e-3, "only where float32 arithmetic falls on the other side of a tie"
    assert ((found - exact).abs() <= 2**-8 * exact.abs() * 1.001 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_alpha_zero_keeps_the_bytes_of_every_tensor(tmp_path, dtype):
    trained, previous = (make_checkpoint(tmp_path / name, seed, dtype) for name, seed in (("trained", 2), ("previous", 1)))
    for file in trained.glob("*.safetensors"):
        held = load_file(file)
        next(iter(held.values())).view(-1)[0] = -0.0
        save_file(held, file, metadata={"format": "pt"})
    assert run(trained, previous, tmp_path / "output", "--alpha", "0") == 0
    new, out = tensors(trained), tensors(tmp_path / "output")
    assert any((tensor.view(-1)[0] == 0).item() for tensor in new.values())
    assert all(torch.equal(out[name].view(torch.uint8), new[name].view(torch.uint8)) for name in new)


def test_files_config_and_tokenizer_are_those_of_the_trained_folder(rounds):
    trained, _, output = rounds
    (trained / "training_args.bin").write_text("of the training, not of the model")
    assert run(*rounds) == 0
    for name in ("config.json", "tokenizer.json", "generation_config.json", INDEX):
        assert (output / name).read_bytes() == (trained / name).read_bytes()
    assert not (output / "training_args.bin").exists()
    files = sorted(file.name for file in trained.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(file.name for file in output.glob("*.safetensors"))
    assert all(load_file(trained / file).keys() == load_file(output / file).keys() for file in files)
    assert json.loads((output / "export.json").read_text()) == {"trained": str(trained), "previous": str(rounds[1]), "alpha": ALPHA}


@pytest.mark.parametrize("repeated", [False, True], ids=["once", "twice"])
def test_tied_embeddings_stay_tied(tmp_path, repeated):
    trained, previous = (make_checkpoint(tmp_path / name, seed, tied=True) for name, seed in (("trained", 2), ("previous", 1)))
    for folder in (trained, previous) if repeated else ():
        held = tensors(folder)
        for file in [*folder.glob("*.safetensors"), folder / INDEX]:
            file.unlink()
        save_file({**held, OUTPUT: held[EMBEDDING].clone()}, folder / SINGLE, metadata={"format": "pt"})
    assert run(trained, previous, tmp_path / "output") == 0
    out = tensors(tmp_path / "output")
    assert (OUTPUT in out) == repeated and torch.equal(out.get(OUTPUT, out[EMBEDDING]), out[EMBEDDING])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, out[EMBEDDING])


def test_its_own_output_is_replaced_whole(rounds):
    assert run(*rounds) == 0
    (rounds[2] / "left-over").write_text("")
    assert run(*rounds, "--alpha", "0.5") == 0
    assert json.loads((rounds[2] / "export.json").read_text())["alpha"] == 0.5
    assert not (rounds[2] / "left-over").exists()


def drop_a_tensor(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    held = load_file(file)
    held.popitem()
    save_file(held, file)


def cut_a_file(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-4])


def set_an_element(folder: Path, value: float) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    held = load_file(file)
    next(iter(held.values())).view(-1)[-1] = value
    save_file(held, file)


def mix_types(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)


def another_model(folder: Path) -> None:
    shutil.rmtree(folder)
    make_checkpoint(folder, 1, hidden=32)


def trained_model_as_output(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("output"))
    (folder.with_name("output") / "export.json").write_text('{"source": "sft", "dtype": "float32"}')


BAD_INPUT = {
    "no folder": (lambda f: shutil.rmtree(f["trained"]), (), "no config.json"),
    "no weights": (lambda f: [file.unlink() for file in f["previous"].glob("*.safetensors")], (), "safetensors files missing"),
    "tensor missing": (lambda f: drop_a_tensor(f["previous"]), (), "missing: "),
    "truncated": (lambda f: cut_a_file(f["trained"]), (), "truncated or damaged"),
    "another model": (lambda f: another_model(f["previous"]), (), "are different models: hidden 16 and 32, head_dim 4 and 8"),
    "several types": (lambda f: mix_types(f["trained"]), (), "tensors of type F16, F32"),
    "not finite": (lambda f: set_an_element(f["previous"], math.nan), (), "is not finite after the step"),
    "alpha negative": (lambda f: None, ("--alpha=-0.1",), "alpha = -0.1 is out of range"),
    "alpha nan": (lambda f: None, ("--alpha", "nan"), "alpha = nan is out of range"),
    "foreign output": (lambda f: (f["output"].mkdir(), (f["output"] / "thesis.tex").write_text("")), (), "it is not overwritten"),
    "trained model as output": (lambda f: trained_model_as_output(f["trained"]), (), "holds a trained model"),
    "output is a file": (lambda f: f["output"].write_text(""), (), "it is not overwritten"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(rounds, capsys, name):
    spoil, flags, message = BAD_INPUT[name]
    folders = dict(zip(("trained", "previous", "output"), rounds, strict=True))
    spoil(folders)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folders["trained"].parent.rglob("*") if path.is_file()}
    assert run(*rounds, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("[error] extrapolate: ") and error.count("\n") == 1 and message in error
    assert {path: path.read_bytes() for path in folders["trained"].parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("same", ["previous", "output"])
def test_one_folder_in_two_roles_is_refused(rounds, capsys, same):
    folders = dict(zip(("trained", "previous", "output"), rounds, strict=True))
    assert run(**{**folders, same: folders["trained"] / ".." / "trained"}) == 2
    assert "three different folders" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_and_the_earlier_output_whole(rounds, capsys, monkeypatch):
    assert run(*rounds) == 0
    before = {path.name: path.read_bytes() for path in rounds[2].iterdir()}

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(script, "copy_companions", full)
    assert run(*rounds, "--alpha", "0.5") == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in rounds[2].iterdir()} == before
    assert sorted(path.name for path in rounds[2].parent.iterdir()) == ["output", "previous", "trained"]


def test_help_tells_the_papers_recipe(capsys):
    with pytest.raises(SystemExit, match="0"):
        script.parse(["--help"])
    text = capsys.readouterr().out
    assert all(words in text for words in ("2410.06293", "alpha is 0.3", "three rounds", "is not extrapolated", "anchored losses"))
