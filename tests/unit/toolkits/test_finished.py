"""When an output is kept, made again, or refused: a stage in miniature that counts how often it works."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkits.lpo_data_preprocessing.finished import Ingredients, make_once


class Stage:
    """Writes its input in capitals to out and out.more."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.worked = folder, 0
        self.files = [folder / "out", folder / "out.more"]
        (folder / "in").write_text("text")

    def __call__(self, *, die_at: int = 9, update: bool = False, overwrite: bool = False, **options: object) -> str:
        args = Namespace(input=str(self.folder / "in"), output=str(self.folder / "out"), update=update, overwrite=overwrite, **options)

        def make() -> str:
            self.worked += 1
            for number, path in enumerate(self.files):
                if number == die_at:
                    raise KeyboardInterrupt
                path.write_text((self.folder / "in").read_text().upper())
            return "made"

        return make_once(args, Ingredients([self.folder / "in"], self.files, {"tokenizer": str(options.get("words", "w"))}), make)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_the_same_is_kept(stage: Stage) -> None:
    assert stage(n=1) == "made" and stage.names() == ["in", "out", "out.more", "out.plan.json"]
    before = {path: path.stat().st_mtime_ns for path in stage.folder.iterdir()}
    assert stage(n=1) == stage(n=1, update=True) == f"finished before with the same plan, kept -> {stage.folder}/out"
    assert stage.worked == 1 and {path: path.stat().st_mtime_ns for path in stage.folder.iterdir()} == before
    assert stage(n=1, overwrite=True) == "made"


def test_the_output_s_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("text")
    args = Namespace(input=str(tmp_path / "in"), output=str(tmp_path / "a/b/out"), update=False, overwrite=False)
    output = Path(args.output)
    assert make_once(args, Ingredients([tmp_path / "in"], [output]), lambda: str(output.write_text("made"))) == "4"


def _another_input(stage: Stage) -> None:
    (stage.folder / "in").write_text("other")


def _another_output(stage: Stage) -> None:
    (stage.folder / "out.more").write_text("edited")


CHANGES: dict[str, tuple[Callable[[Stage], None], dict[str, object], str]] = {
    "option": (lambda stage: None, {"n": 2}, r"out: was made with another n \(n was 1, is 2\)"),
    "new option": (lambda stage: None, {"n": 1, "m": 2}, "another m"),
    "fingerprint": (lambda stage: None, {"n": 1, "words": "v"}, "another tokenizer, words"),
    "input": (_another_input, {"n": 1}, "another input"),
    "contents": (_another_output, {"n": 1}, "out: was changed since it was made"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_is_refused_or_made(stage: Stage, change: str) -> None:
    stage(n=1)
    do, options, message = CHANGES[change]
    do(stage)
    with pytest.raises(ValueError, match=message):
        stage(**options)
    assert stage(update=True, **options) == "made" and stage.worked == 2
    assert "kept" in stage(**options)


def test_somebody_s_file_is_no_output(stage: Stage) -> None:
    (stage.folder / "out.more").write_text("mine")
    for update in (False, True):
        with pytest.raises(ValueError, match=r"out\.more: exists already"):
            stage(n=1, update=update)
    assert (stage.folder / "out.more").read_text() == "mine" and stage.names() == ["in", "out.more"]
    assert stage(n=1, overwrite=True) == "made"


@pytest.mark.parametrize("die_at", [0, 1])
def test_an_interrupted_one_is_made_again(stage: Stage, die_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage(n=1, die_at=die_at)
    assert stage.names() == (["in"] if die_at == 0 else ["in", "out", "out.plan.json"])
    assert stage(n=1) == "made" and "kept" in stage(n=1)


def test_killed_between_output_and_plan(stage: Stage) -> None:
    """SIGKILL leaves what there is: a plan that says "begun"."""
    stage(n=1)
    plan = stage.folder / "out.plan.json"
    finished = plan.read_text()
    plan.write_text(json.dumps(json.loads(finished) | {"outputs": None}))
    assert stage(n=1) == "made" and plan.read_text() == finished


def test_what_is_replaced_stays_finished_until_it_is(stage: Stage) -> None:
    stage(n=1)
    with pytest.raises(KeyboardInterrupt):
        stage(n=2, update=True, die_at=0)
    assert "kept" in stage(n=1)
