"""The rows of a run: whole or not there, also on a disk that is full in the middle of one."""

import json

import pytest

from megatron_patch import metrics_file
from tests.small_disk import resize, small_disk


def test_a_row_that_a_full_disk_cuts_leaves_nothing(tmp_path):
    """With room again rows go on where they were, and a run can go on from them."""
    with small_disk(tmp_path / "disk", "8k") as disk:
        done = 0
        with pytest.raises(OSError, match="No space left"):
            while True:
                metrics_file.append(disk, {"iteration": done + 1, "loss": 0.123456789})
                done += 1
        assert 0 < done < 8192 / 30
        resize(disk, "64k")
        metrics_file.append(disk, {"iteration": done + 2, "loss": float("nan")})
        assert [row["iteration"] for row in metrics_file.rows(disk)] == [*range(1, done + 1), done + 2]
        assert metrics_file.rows(disk)[-1]["loss"] is None
        metrics_file.rewind(disk, done)
        assert len(metrics_file.rows(disk)) == done


def test_a_row_that_a_killed_process_cut_is_left_out(tmp_path):
    for step in (1, 2):
        metrics_file.append(tmp_path, {"iteration": step, "eval_loss": 1.5})
    with (tmp_path / metrics_file.FILE).open("a") as stream:
        stream.write('{"iteration": 3, "lo')
    assert [row["iteration"] for row in metrics_file.rows(tmp_path)] == [1, 2]
    assert metrics_file.has_evaluation(tmp_path, 2) and not metrics_file.has_evaluation(tmp_path, 3)
    metrics_file.rewind(tmp_path, 1)
    assert (tmp_path / metrics_file.FILE).read_text() == json.dumps({"iteration": 1, "eval_loss": 1.5}) + "\n"


@pytest.mark.parametrize("line", ['{"iteration": 5, "lo{"iteration": 6}', "[1]", '{"loss": 2}'])
def test_a_line_of_somebody_elses_is_named(tmp_path, line):
    metrics_file.append(tmp_path, {"iteration": 1})
    with (tmp_path / metrics_file.FILE).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a row of metrics: .*remove the line"):
        metrics_file.rewind(tmp_path, 1)


def test_nothing_yet(tmp_path):
    assert metrics_file.rows(tmp_path) == [] and not metrics_file.has_evaluation(tmp_path, 1)
    metrics_file.rewind(tmp_path, 1)
