"""Sampling in blocks: the same bytes whatever was interrupted, lost or made again."""

import json
import shutil

import pytest
from toolkit_helpers import files, read_jsonl, record, write_jsonl

from megatron_patch.evaluation.generate import generate
from toolkits.lpo_data_preprocessing import candidates
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
    engine = candidates.transformers_engine(args, chat)
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
    assert "prompt_too_long" in capsys.readouterr().out


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
    ],
)
def test_bad_input(tiny_qwen, tmp_path, fails, records, more, message):
    assert message in fails(candidates.main, *command(tmp_path, tiny_qwen, *more, records=records))
    assert files(tmp_path) == ["in.jsonl"]


def test_existing_output(tiny_qwen, tmp_path, fails):
    (tmp_path / "out.jsonl").write_text("mine")
    assert "exists already" in fails(candidates.main, *command(tmp_path, tiny_qwen))
