"""Stages started again where something of their output is gone, damaged or somebody's; test_finished.py has every case in miniature."""

import pytest
from toolkit_helpers import files, record, sampled, write_jsonl

from toolkits.lpo_data_preprocessing import build_pairs, extend_vocab, select

STORE = ["s.bin", "s.idx", "s.json", "s.meta.npz", "s.tally.json"]
PROMPTS = [record(i, f"question {i}", candidates=sampled(f"bad {i}")) for i in range(60)]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stages(tiny_qwen, tmp_path):
    """Command lines, by stage, in a folder with their inputs."""
    write_jsonl(tmp_path / "in.jsonl", [record(i, rejected=["1", "2"]) for i in range(5)])
    write_jsonl(tmp_path / "sampled.jsonl", PROMPTS)
    split = ["--valid-fraction", "0.3", "--valid-output", str(tmp_path / "valid.jsonl")]
    places = {"build_pairs": ("in.jsonl", "s"), "select": ("sampled.jsonl", "train.jsonl"), "extend_vocab": (tiny_qwen, "ext")}
    more = {"build_pairs": ["--tokenizer", str(tiny_qwen)], "select": split, "extend_vocab": ["--more", "<a>", "<b>"]}
    mains = {"build_pairs": build_pairs.main, "select": select.main, "extend_vocab": extend_vocab.main}
    return {
        stage: (mains[stage], ["--input", str(tmp_path / input), "--output", str(tmp_path / output), *more[stage]])
        for stage, (input, output) in places.items()
    }


@pytest.mark.parametrize("stage", ["build_pairs", "select", "extend_vocab"])
def test_every_file_is_made_again(stages, tmp_path, capsys, stage):
    """Removed, or four bytes of it overwritten."""
    inputs = contents(tmp_path)
    main, argv = stages[stage]
    assert main(argv) == 0
    whole = contents(tmp_path)
    made = [name for name in whole if name not in inputs and not name.endswith(".plan.json")]
    assert stage != "build_pairs" or sorted(made) == STORE
    assert stage != "extend_vocab" or {"ext/model.safetensors", "ext/extend_vocab.json"} <= set(made)
    for name in made:
        (tmp_path / name).unlink()
        assert main(argv) == 0 and contents(tmp_path) == whole, name
        (tmp_path / name).write_bytes(b"\xff\xff\xff\xff" + whole[name][4:])
        assert main(argv) == 2 and main([*argv, "--update"]) == 0 and contents(tmp_path) == whole, name
    capsys.readouterr()
    assert main(argv) == 0 and "kept" in capsys.readouterr().out


@pytest.mark.parametrize("name", STORE)
def test_somebody_s_file_is_no_part_of_a_store(stages, tmp_path, fails, name):
    (tmp_path / name).write_text("mine")
    before = files(tmp_path)
    main, argv = stages["build_pairs"]
    for more in ([], ["--update"]):
        assert f"{name}: exists already" in fails(main, *argv, *more)
        assert (tmp_path / name).read_text() == "mine" and files(tmp_path) == before
    assert main([*argv, "--overwrite"]) == 0


def test_a_file_added_to_an_extended_checkpoint_is_not_lost(stages, tmp_path, fails):
    main, argv = stages["extend_vocab"]
    assert main(argv) == 0
    (tmp_path / "ext/notes").write_text("mine")
    assert main(argv) == 0
    assert "ext/notes: exists already" in fails(main, *argv, "--seed", 7, "--update")
    assert (tmp_path / "ext/notes").read_text() == "mine"


def test_a_second_split_does_not_replace_the_first(stages, tmp_path, fails):
    main, argv = stages["select"]
    assert main(argv) == 0
    before = contents(tmp_path)
    assert "made with another files, seed" in fails(main, *argv, "--seed", 2, "--valid-output", tmp_path / "valid2.jsonl")
    assert contents(tmp_path) == before


def test_somebody_s_validation_file(stages, tmp_path, fails):
    main, argv = stages["select"]
    assert main(argv) == 0
    (tmp_path / "mine.jsonl").write_text("{}\n")
    assert "mine.jsonl: exists already" in fails(main, *argv, "--valid-output", tmp_path / "mine.jsonl", "--update")
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"


def test_a_validation_side_of_an_earlier_split_does_not_stay(stages, tmp_path):
    """Its prompts are on the other side now."""
    main, argv = stages["select"]
    assert main(argv) == 0 and (tmp_path / "valid.jsonl").exists()
    assert main([*argv[:4], "--update"]) == 0
    assert not (tmp_path / "valid.jsonl").exists() and len((tmp_path / "train.jsonl").read_text().splitlines()) == len(PROMPTS)
