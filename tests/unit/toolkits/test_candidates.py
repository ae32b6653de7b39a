"""Sampling in blocks: the same bytes whatever was interrupted, lost or made again."""

import json
import shutil
import subprocess
import sys

import pytest
from toolkit_helpers import ROOT, files, read_jsonl, record, write_jsonl

from megatron_patch.evaluation.generate import generate
from toolkits.lpo_data_preprocessing import candidates, extend_vocab, select
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

FINISHED = ["out.jsonl", "out.jsonl.plan.json", "out.jsonl.tally.json"]
RECORDS = [record(i, task="t") for i in range(10)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(candidates, "BLOCK", 4)


def command(folder, model, *more, records=RECORDS):
    if not (folder / "in.jsonl").exists():
        write_jsonl(folder / "in.jsonl", records)
    sizes = ["-n", "3", "--max-new-tokens", "6", "--device", "cpu"]
    return ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl"), "--model", str(model), *sizes, *map(str, more)]


@pytest.fixture(scope="module")
def whole(tiny_qwen, tmp_path_factory):
    """What an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "BLOCK", 4)
        assert candidates.main(command(folder, tiny_qwen)) == 0
    return folder


def test_output(whole):
    assert files(whole) == ["in.jsonl", *FINISHED]
    rows = read_jsonl(whole / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "candidates"} for row in rows] == RECORDS
    assert all(len(row["candidates"]) == 3 for row in rows)
    texts = [c["text"] for row in rows for c in row["candidates"]]
    assert len(set(texts)) > 25  # a random model at temperature 1 hardly repeats itself
    assert {c["finish_reason"] for row in rows for c in row["candidates"]} <= {"stop", "length"}


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_run_goes_on_byte_for_byte(tiny_qwen, whole, tmp_path, monkeypatch, capsys, after):
    made = []
    real = candidates.make_block

    def until(*args):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(1)
        yield from real(*args)

    monkeypatch.setattr(candidates, "make_block", until)
    with pytest.raises(KeyboardInterrupt):
        candidates.main(command(tmp_path, tiny_qwen))
    assert files(tmp_path / "out.jsonl.blocks") == [f"{i:06d}.jsonl" for i in range(after)] + ["plan.json"]
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(candidates, "make_block", real)
    assert candidates.main(command(tmp_path, tiny_qwen)) == 0
    assert f"{after} found, {3 - after} made" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert files(tmp_path) == ["in.jsonl", *FINISHED]


def test_a_block_made_alone_is_the_same(tiny_qwen, whole):
    chat = ChatTokenizer(tiny_qwen)
    args = candidates.argparse.Namespace(
        model=str(tiny_qwen), device="cpu", dtype="float32", seed=1, temperature=1.0, top_p=1.0, max_new_tokens=6
    )
    engine = candidates.ENGINES["transformers"].load(args, chat)
    assert list(candidates.make_block(RECORDS[4:8], chat, engine, 3, 4096)) == read_jsonl(whole / "out.jsonl")[4:8]


def test_samples_hang_on_seed_and_id_not_on_place(tiny_qwen, whole, tmp_path):
    (tmp_path / "a").mkdir()
    candidates.main(command(tmp_path / "a", tiny_qwen, records=RECORDS[::-1]))
    moved = {row["id"]: row["candidates"] for row in read_jsonl(tmp_path / "a" / "out.jsonl")}
    assert moved == {row["id"]: row["candidates"] for row in read_jsonl(whole / "out.jsonl")}
    (tmp_path / "b").mkdir()
    candidates.main(command(tmp_path / "b", tiny_qwen, "--seed", 2))
    assert (tmp_path / "b" / "out.jsonl").read_bytes() != (whole / "out.jsonl").read_bytes()


def test_nearly_cold_sampling_is_greedy(tiny_qwen, tmp_path):
    from transformers import AutoModelForCausalLM

    candidates.main(command(tmp_path, tiny_qwen, "--temperature", 1e-6))
    chat, model = ChatTokenizer(tiny_qwen), AutoModelForCausalLM.from_pretrained(tiny_qwen)
    greedy = generate(model, [chat.prompt_ids(r["prompt"]) for r in RECORDS], max_new_tokens=6, stop_ids=chat.stop_ids)
    for row, best in zip(read_jsonl(tmp_path / "out.jsonl"), greedy, strict=True):
        assert [c["text"] for c in row["candidates"]] == [chat.decode(best.ids)] * 3


def test_blocks_of_another_plan_are_refused(tiny_qwen, tmp_path, fails, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(candidates, "make_block", stop)
        candidates.main(command(tmp_path, tiny_qwen))
    line = fails(candidates.main, *command(tmp_path, tiny_qwen, "--seed", 5))
    assert "out.jsonl.blocks: holds blocks made with another seed (seed was 1, is 5)" in line
    other = tmp_path / "other-model"
    shutil.copytree(tiny_qwen, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert "another model" in fails(candidates.main, *command(tmp_path, other))
    write_jsonl(tmp_path / "in.jsonl", RECORDS[:-1])
    assert "another input" in fails(candidates.main, *command(tmp_path, tiny_qwen))
    assert candidates.main(command(tmp_path, tiny_qwen, "--overwrite")) == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shards_make_the_same_bytes(tiny_qwen, whole, tmp_path, capsys, fails, order):
    """Each makes its own blocks in the one folder; only --merge makes the output, once none is missing."""
    first, second = order
    assert candidates.main(command(tmp_path, tiny_qwen, "--shard", f"{first}/2")) == 0
    assert files(tmp_path / "out.jsonl.blocks") == [f"{i:06d}.jsonl" for i in range(3) if i % 2 == first] + ["plan.json"]
    missing = 1 + (second == 0)
    assert f"out.jsonl.blocks: {missing} of 3 blocks are missing (00000{second}.jsonl" in fails(
        candidates.main, *command(tmp_path, tiny_qwen, "--merge")
    )
    assert candidates.main(command(tmp_path, tiny_qwen, "--shard", f"{second}/2")) == 0
    assert f"shard {second}/2: 0 blocks found, {missing} made" in capsys.readouterr().out and not (tmp_path / "out.jsonl").exists()
    assert candidates.main(command(tmp_path, tiny_qwen, "--merge")) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert files(tmp_path) == ["in.jsonl", *FINISHED]
    assert candidates.main(command(tmp_path, tiny_qwen, "--shard", "1/2")) == 0 and "kept" in capsys.readouterr().out


def test_a_job_goes_on_with_another_number_of_shards(tiny_qwen, whole, tmp_path, capsys):
    assert candidates.main(command(tmp_path, tiny_qwen, "--shard", "1/3")) == 0
    assert candidates.main(command(tmp_path, tiny_qwen)) == 0
    assert "1 found, 2 made" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("text", "environment", "place"),
    [
        (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, None),  # a batch script has them too
        ("2/3", {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (2, 3)),
        ("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        ("auto", {"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ("auto", {}, (0, 1)),
    ],
)
def test_a_process_s_place(monkeypatch, text, environment, place):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert candidates.shard_of(text) == place


def test_nothing_of_megatron_is_imported(tiny_qwen, tmp_path):
    """The stage runs under an engine's own Python, which need not have it."""
    write_jsonl(tmp_path / "in.jsonl", RECORDS[:1])
    code = (
        "import sys; from toolkits.lpo_data_preprocessing import candidates\n"
        f"assert candidates.main({command(tmp_path, tiny_qwen)!r}) == 0\n"
        "assert 'transformers' in sys.modules and not {'megatron', 'torch.distributed.run'} & set(sys.modules), 'megatron came along'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def refuse_to_sample(*_):
    raise AssertionError("nothing may be sampled again")


def test_a_finished_output_of_the_same_plan_is_kept(tiny_qwen, whole, tmp_path, monkeypatch, capsys, fails):
    """A requeued job comes past the stage again; another plan, or contents that are not the stage's, is an error that shows the way."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(candidates, "make_block", refuse_to_sample)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert candidates.main(command(tmp_path, tiny_qwen)) == 0
    assert "finished before with the same plan, kept" in capsys.readouterr().out
    line = fails(candidates.main, *command(tmp_path, tiny_qwen, "--seed", 5))
    assert "out.jsonl: was made with another seed (seed was 1, is 5); use another OUTPUT" in line
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    with open(tmp_path / "out.jsonl", "a") as stream:
        stream.write("{}\n")
    assert "was changed since it was made" in fails(candidates.main, *command(tmp_path, tiny_qwen))


@pytest.mark.parametrize("killed_at", ["close_stage", "record", "rmtree"])
def test_killed_while_it_ends(tiny_qwen, whole, tmp_path, monkeypatch, killed_at):
    """After the output has appeared, before its tally, its plan, or the end of its blocks: nothing is sampled again."""

    def die(*_, **__):
        raise KeyboardInterrupt

    where = {"close_stage": candidates, "record": candidates.Finished, "rmtree": candidates.shutil}[killed_at]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, killed_at, die)
        candidates.main(command(tmp_path, tiny_qwen))
    assert (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl.blocks").exists()
    monkeypatch.setattr(candidates, "make_block", refuse_to_sample)
    assert candidates.main(command(tmp_path, tiny_qwen)) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    assert files(tmp_path) == ["in.jsonl", *FINISHED]


def test_overwrite_samples_again(tiny_qwen, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert candidates.main(command(tmp_path, tiny_qwen, "--seed", 2, "--overwrite")) == 0
    assert (tmp_path / "out.jsonl").read_bytes() != (whole / "out.jsonl").read_bytes()
    assert json.loads((tmp_path / "out.jsonl.plan.json").read_text())["plan"]["seed"] == 2


def test_long_prompts_are_dropped_and_counted(tiny_qwen, tmp_path, capsys):
    records = [*RECORDS[:3], record(3, "why? " * 200)]
    assert candidates.main(command(tmp_path, tiny_qwen, "--max-prompt-length", 100, records=records)) == 0
    assert [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["r0", "r1", "r2"]
    out = capsys.readouterr().out
    assert "dropped   prompt_too_long" in out and "first     prompt_too_long: r3 (" in out and " tokens)" in out


def test_control_tokens_are_marked(tiny_qwen, tmp_path):
    """What the tokenizer calls special is; tokens added by extend_vocab are not, whatever they look like."""
    speech = tmp_path / "speech"
    argv = ["--input", str(tiny_qwen), "--output", str(speech), "--tokens", "3", "--pattern", "<|g0r0_{}|>", "--more", "<|beginofaudio|>"]
    assert extend_vocab.main(argv) == 0
    texts = ["<|beginofaudio|><|g0r0_2|>", "so <|im_end|> so", "<|endoftext|>", "<|x|>"]
    answers = [{"text": text, "finish_reason": "stop"} for text in texts]
    (row,) = candidates.make_block(RECORDS[:1], ChatTokenizer(speech), lambda _: answers, 4, 4096)
    assert [answer.get("control_token") for answer in row["candidates"]] == [None, "<|im_end|>", "<|endoftext|>", None]
    write_jsonl(tmp_path / "c.jsonl", [row])
    assert select.main(["--input", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "pairs.jsonl")]) == 0
    assert read_jsonl(tmp_path / "pairs.jsonl")[0]["rejected"] == [texts[0], texts[3]]


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([RECORDS[0], "{"], (), "in.jsonl:2: not valid JSON"),
        ([{"id": "a"}], (), "in.jsonl:1: field 'prompt' is missing"),
        ([{"prompt": RECORDS[0]["prompt"]}], (), "in.jsonl:1: field 'id' is missing"),
        ([RECORDS[0], RECORDS[1], RECORDS[0]], (), "in.jsonl:3: id 'r0' was given on line 1 already"),
        ([], (), "in.jsonl: no records"),
        (RECORDS, ("-n", 0), "--n must be at least 1, got 0"),
        (RECORDS, ("--temperature", 0), "temperature must be positive"),
        (RECORDS, ("--top-p", 1.5), "top_p must lie in (0, 1], got 1.5"),
        (RECORDS, ("--model", "/nowhere"), "/nowhere: no such folder"),
        (RECORDS, ("--engine", "magic"), "invalid choice"),
        (RECORDS, ("--engine", "vllm"), "this Python has no vLLM"),
        (RECORDS, ("--engine", "openai"), "--engine openai needs --base-url"),
        (RECORDS, ("--shard", "2/2"), "--shard i/n needs 0 <= i < n, got 2/2"),
        (RECORDS, ("--shard", "half"), "--shard must be i/n or auto, got 'half'"),
        (RECORDS, ("--shard", "0/2", "--merge"), "give one of --shard and --merge"),
        (RECORDS, ("--shard", "0/2", "--overwrite"), "--overwrite: shards would remove each other's blocks"),
    ],
)
def test_bad_input(tiny_qwen, tmp_path, fails, records, more, message):
    assert message in fails(candidates.main, *command(tmp_path, tiny_qwen, *more, records=records))
    assert files(tmp_path) == ["in.jsonl"]


def test_existing_output(tiny_qwen, tmp_path, fails):
    (tmp_path / "out.jsonl").write_text("mine")
    assert "exists already" in fails(candidates.main, *command(tmp_path, tiny_qwen))
