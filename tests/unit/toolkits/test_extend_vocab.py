"""The extended checkpoint against transformers: its loader, its `resize_token_embeddings` and its `add_tokens`."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from toolkit_helpers import files

from megatron_patch.checkpoint import hf_rows
from toolkits.lpo_data_preprocessing import extend_vocab
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

KNOWN, ADDED = 313, 512  # tokens of the tiny tokenizer; audio tokens
AUDIO = ["--tokens", str(ADDED), "--pattern", "<|g0r0_{}|>"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CASES = {  # tied, rows of the model, dtype, in several files; rows afterwards
    "tied": (True, KNOWN, torch.float32, False, 832),
    "untied": (False, KNOWN, torch.float32, False, 832),
    "sharded": (False, KNOWN, torch.bfloat16, True, 832),
    "half-padded": (False, 400, torch.bfloat16, False, 832),
    "room-for-all": (True, 901, torch.float32, True, 901),
}


def load(folder, **more):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **more).eval()


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def equal(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def make_source(tiny_qwen, folder, tied, rows, dtype, sharded):
    """Random weights of their own, with the tiny tokenizer and companions."""
    from transformers import AutoConfig, Qwen2ForCausalLM

    config = AutoConfig.from_pretrained(tiny_qwen)
    config.vocab_size, config.tie_word_embeddings = rows, tied
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.5)
    shutil.copytree(tiny_qwen, folder)
    (folder / "model.safetensors").unlink()
    model.to(dtype).save_pretrained(folder, max_shard_size="8KB" if sharded else "1GB")
    (folder / "LICENSE").write_text("terms")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


@pytest.fixture(scope="module", params=CASES)
def extended(request, tiny_qwen, tmp_path_factory):
    """(case, source folder, extended folder)"""
    base = tmp_path_factory.mktemp(request.param)
    *what, _ = CASES[request.param]
    source = make_source(tiny_qwen, base / "source", *what)
    assert extend_vocab.main(["--input", str(source), "--output", str(base / "out"), *AUDIO]) == 0
    return request.param, source, base / "out"


def test_transformers_loads_it_with_the_old_logits(extended):
    case, source, out = extended
    tied, _, dtype, _, rows = CASES[case]
    before, after = load(source), load(out)
    assert after.config.vocab_size == rows and after.dtype == dtype and after.config.tie_word_embeddings == tied
    prompt = torch.randint(0, KNOWN, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(before(prompt).logits[..., :KNOWN], after(prompt).logits[..., :KNOWN])


def test_shapes_and_old_rows_are_those_of_resize_token_embeddings(extended):
    case, source, out = extended
    tied, padded, _, _, rows = CASES[case]
    judge, found = load(source), tensors(out)
    judge.resize_token_embeddings(rows, mean_resizing=False)
    assert found.keys() == tensors(source).keys()
    for name, tensor in judge.state_dict().items():
        if name in (EMBED, HEAD):
            if name in found:
                assert equal(found[name][:KNOWN].contiguous(), tensor[:KNOWN].contiguous()) and found[name].shape == tensor.shape
                assert equal(found[name][KNOWN + ADDED : padded].contiguous(), tensor[KNOWN + ADDED : padded].contiguous())
        else:
            assert equal(found[name], tensor), name
    assert (HEAD in found) is not tied


def test_new_rows_are_the_mean_of_known_rows_and_noise(extended):
    """By hand in float64; 512 draws a column, so the spread is known to some percent. Rows of padding are not known rows."""
    case, source, out = extended
    for name, tensor in tensors(out).items():
        if name in (EMBED, HEAD):
            known, new = tensors(source)[name][:KNOWN].double(), tensor[KNOWN : KNOWN + ADDED].double()
            spread = known.std(0, correction=0)
            assert ((new.mean(0) - known.mean(0)).abs() < 5 * 0.1 * spread / ADDED**0.5 + 2e-3).all()
            assert (new.std(0) / (0.1 * spread)).sub(1).abs().max() < 0.2
            assert len(new.unique(dim=0)) == ADDED
            if CASES[case][-1] > CASES[case][1]:
                assert (tensor[KNOWN + ADDED :].double() - known.mean(0)).abs().max() < 0.1 * 6 * spread.max()


def test_every_other_file_is_there(extended):
    _, source, out = extended
    assert set(files(out)) == set(files(source)) - {"pytorch_model.bin"} | {"extend_vocab.json"}
    edited = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "extend_vocab.json"}
    for name in {n for n in files(out) if not n.endswith(".safetensors")} - edited:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    changed = json.loads((out / "config.json").read_text()) | {"vocab_size": None}
    assert changed == json.loads((source / "config.json").read_text()) | {"vocab_size": None}
    index = out / "model.safetensors.index.json"
    if index.exists():
        content, found = json.loads(index.read_text()), tensors(out)
        assert content["weight_map"] == json.loads((source / index.name).read_text())["weight_map"]
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
        assert content["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in found.values())


def test_a_response_keeps_one_id_for_each_audio_token(extended):
    from transformers import AddedToken, AutoTokenizer

    _, source, out = extended
    judge, chat = AutoTokenizer.from_pretrained(source), ChatTokenizer(out)
    judge.add_tokens([AddedToken(f"<|g0r0_{i}|>", special=False, normalized=False) for i in range(ADDED)])
    assert chat.tokenizer.get_vocab() == judge.get_vocab() and chat.tokenizer.convert_tokens_to_ids("<|g0r0_7|>") not in chat.stop_ids
    numbers = [0, 511, 7, 77, 7]
    text = " so \n" + "".join(f"<|g0r0_{i}|>" for i in numbers) + " é<|g0r0_1|> <|im_end|>"
    ids = chat.response_ids(text, ended=False)
    assert chat.decode(ids) == text and [i - KNOWN for i in ids if i >= KNOWN] == [*numbers, 1]
    assert chat.end_id not in ids  # special tokens are spelled out as before
    assert chat.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert chat.response_ids("12 + 30", ended=False) == ChatTokenizer(source).response_ids("12 + 30", ended=False)
    assert chat.tokenizer.chat_template == judge.chat_template and chat.fingerprint != ChatTokenizer(source).fingerprint


def run(source, out, *more):
    return extend_vocab.main(["--input", str(source), "--output", str(out), *map(str, more)])


def test_without_noise_it_is_transformers_mean_resizing(tiny_qwen, tmp_path):
    """Which draws from a normal distribution with 1e-9 of the covariance. A few rows a block here, so that there are many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_rows, "BLOCK_BYTES", 1000)
        assert run(tiny_qwen, tmp_path / "out", *AUDIO, "--noise", 0, "--multiple-of", 1) == 0
    judge = load(tiny_qwen)
    judge.resize_token_embeddings(KNOWN + ADDED)
    found = tensors(tmp_path / "out")[EMBED]
    assert found.shape == judge.get_input_embeddings().weight.shape
    assert torch.allclose(found[KNOWN:], judge.get_input_embeddings().weight[KNOWN:], atol=1e-5)
    assert len(found[KNOWN:].unique(dim=0)) == 1


def test_weights_of_another_form_are_left_out_and_named(tiny_qwen, tmp_path, capsys):
    source = make_source(tiny_qwen, tmp_path / "source", True, KNOWN, torch.float32, True)
    (source / "original").mkdir()
    (source / "original/params.json").write_text("{}")
    (source / "export.json").write_text("{}")  # would say that a training run may replace the folder
    capsys.readouterr()
    assert run(source, tmp_path / "out", *AUDIO) == 0
    summary, *notes = capsys.readouterr().out.splitlines()
    assert "512 tokens added, ids 313 to 824, vocab_size 313 -> 832" in summary
    assert notes == ["  left out  pytorch_model.bin: weights in another form"]
    assert (tmp_path / "out/original/params.json").exists() and not (tmp_path / "out/export.json").exists()


def test_noise_follows_the_seed_and_differs_between_the_two_tensors(tiny_qwen, tmp_path):
    source = make_source(tiny_qwen, tmp_path / "source", False, KNOWN, torch.float32, False)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(source, tmp_path / name, *AUDIO, "--seed", seed) == 0
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert all(equal(a[name], b[name]) and not equal(a[name], c[name]) for name in (EMBED, HEAD))
    standard = [(a[n][KNOWN:] - a[n][:KNOWN].mean(0)) / a[n][:KNOWN].std(0, correction=0) for n in (EMBED, HEAD)]
    assert (standard[0] - standard[1]).abs().max() > 0.1


def test_a_tied_checkpoint_that_repeats_its_embedding_goes_on_doing_so(tiny_qwen, tmp_path):
    from safetensors.torch import save_file

    source = shutil.copytree(tiny_qwen, tmp_path / "source")
    found = tensors(source)
    save_file(found | {HEAD: found[EMBED].clone()}, source / "model.safetensors", metadata={"format": "pt"})
    assert run(source, tmp_path / "out", *AUDIO) == 0
    found = tensors(tmp_path / "out")
    assert equal(found[HEAD], found[EMBED]) and len(found[HEAD]) == 832


def test_tokens_of_a_file_and_single_ones_come_first(tiny_qwen, tmp_path):
    (tmp_path / "tokens").write_text("<a>\r\n\n<b c>\n")
    config = json.loads((tiny_qwen / "tokenizer_config.json").read_text())
    source = shutil.copytree(tiny_qwen, tmp_path / "source")  # as Qwen2.5 has it: the added tokens once more in other files
    sides = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    old = {"310": {"content": "<|endoftext|>", **sides, "special": True}}
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": old, "chat_template": "{{ 'x' }}"}))
    (source / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 310}))
    more = ["--more", "<|begin|>", "<|end|>", "--tokens-file", tmp_path / "tokens", "--tokens", 2, "--pattern", "<{}>"]
    assert run(source, tmp_path / "out", *more) == 0
    expected = {token: KNOWN + i for i, token in enumerate(["<|begin|>", "<|end|>", "<a>", "<b c>", "<0>", "<1>"])}
    assert {token: ChatTokenizer(tmp_path / "out").tokenizer.get_vocab()[token] for token in expected} == expected
    assert json.loads((tmp_path / "out/added_tokens.json").read_text()) == {"<|endoftext|>": 310} | expected
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ 'x' }}"
    assert {entry["content"]: int(id) for id, entry in written["added_tokens_decoder"].items()} == {"<|endoftext|>": 310} | expected


def test_the_same_again_is_kept_and_another_is_refused(tiny_qwen, tmp_path, capsys, fails):
    out = tmp_path / "out"
    assert run(tiny_qwen, out, *AUDIO) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (tmp_path / "tokens").write_text("".join(f"<|g0r0_{i}|>\n" for i in range(ADDED)))
    capsys.readouterr()
    assert run(tiny_qwen, out, "--tokens-file", tmp_path / "tokens") == 0  # the same tokens, said in another way
    assert "kept" in capsys.readouterr().out and before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "made with another noise" in fails(extend_vocab.main, "--input", tiny_qwen, "--output", out, *AUDIO, "--noise", 0.2)
    assert run(tiny_qwen, out, *AUDIO, "--noise", 0.2, "--overwrite") == 0
    assert json.loads((out / "extend_vocab.json").read_text())["noise"] == 0.2
    assert files(tmp_path) == ["out", "out.plan.json", "tokens"]


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--update"]])
def test_a_folder_of_somebody_is_not_overwritten(tiny_qwen, tmp_path, fails, flag):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    assert "not made by extend_vocab" in fails(extend_vocab.main, "--input", tiny_qwen, "--output", tmp_path / "out", *AUDIO, *flag)
    assert files(tmp_path) == ["out"] and files(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("where", ["_write_small_files", "_write_weights", "check_round_trip"])
def test_interrupted_it_leaves_nothing_or_the_earlier_one(tiny_qwen, tmp_path, monkeypatch, where, earlier):
    if earlier:
        assert run(tiny_qwen, tmp_path / "out", *AUDIO) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def explode(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(extend_vocab if where == "check_round_trip" else extend_vocab.Extension, where, explode)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_qwen, tmp_path / "out", *AUDIO, "--seed", 5, "--overwrite")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files(tmp_path) == (["out", "out.plan.json"] if earlier else [])


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def _too_few_rows(folder):
    _rows(folder, 312)


def _rows(folder, rows):
    model = load(folder)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)


REFUSED = {
    "known": (["--more", "<|im_end|>"], None, "--more: token '<|im_end|>' is known already (id 312 in "),
    "known-byte": (["--more", "!"], None, "token '!' is known already (id 0"),
    "twice": (["--more", "<a>", "<b>", "<a>"], None, "--more: token '<a>' was given before (--more)"),
    "twice-in-file": (["--tokens-file", "{}/tokens", "--more", "<b>"], None, "tokens:2: token '<b>' was given before (--more)"),
    "spaces": (["--more", " a"], None, "spaces at its ends, got ' a'"),
    "letters": (["--more", "<ä>"], None, "token '<ä>' does not survive"),  # a byte-level decoder takes ä for a byte
    "no-place": (["--tokens", "3", "--pattern", "<a>"], None, "--pattern must have {} once"),
    "no-number": (["--pattern", "<{}>"], None, "--tokens and --pattern belong together"),
    "none": (["--tokens", "0", "--pattern", "<{}>"], None, "--tokens must be at least 1, got 0"),
    "nothing": ([], None, "no tokens to add"),
    "no-file": (["--tokens-file", "{}/absent"], None, "absent: no such file"),
    "noise": ([*AUDIO, "--noise", "-1"], None, "--noise at least 0, got 64 and -1"),
    "weights": (AUDIO, _no_weights, "safetensors files missing: model.safetensors"),
    "tokenizer": (AUDIO, _no_tokenizer, "no tokenizer.json"),
    "rows": (AUDIO, _too_few_rows, "ids up to 312, the checkpoint only 312 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_line_and_leave_nothing(tiny_qwen, tmp_path, fails, case):
    argv, spoil, message = REFUSED[case]
    source = shutil.copytree(tiny_qwen, tmp_path / "source")
    (tmp_path / "tokens").write_text("<a>\n<b>\n")
    if spoil:
        spoil(source)
    before = files(tmp_path)
    words = [word.replace("{}", str(tmp_path)) if word.startswith("{}/") else word for word in argv]
    assert message in fails(extend_vocab.main, "--input", source, "--output", tmp_path / "out", *words)
    assert files(tmp_path) == before


def test_a_full_disk_is_said_before_anything_is_written(tiny_qwen, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(extend_vocab.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10_000_000))
    line = fails(extend_vocab.main, "--input", tiny_qwen, "--output", tmp_path / "out", *AUDIO)
    assert "0.1 GB are needed, 0.0 GB are free" in line and files(tmp_path) == []


def test_tensors_are_read_in_small_pieces(tiny_qwen, tmp_path, monkeypatch):
    """What is written at once is a block, whatever the tensor's size."""
    told = []
    monkeypatch.setattr(hf_rows, "BLOCK_BYTES", 1000)
    writer = hf_rows.RowWriter(tiny_qwen)
    rows = hf_rows.plan_rows(KNOWN, 5, writer.shape, multiple_of=64, noise=0.0, seed=0)
    writer.write(tmp_path, rows, told.append)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert max(told) <= 1000 < size and abs(writer.bytes_needed(rows) - size) < 100
