"""When an output is kept, made again, or refused: a stage in miniature that counts how often it works."""

import json
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from toolkits.lpo_data_preprocessing import finished
from toolkits.lpo_data_preprocessing.finished import Ingredients, make_once
from toolkits.lpo_data_preprocessing.records import tally_path

MADE = ("out", "out.more", "out.folder/a", "out.folder/deep/b", "out.tally.json")


class Stage:
    """Writes its input in capitals to files of all sorts: its output, another one, a folder's, its counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.worked = folder, 0
        (folder / "in").write_text("text")

    def __call__(
        self, *, die_at: int = 9, update: bool = False, overwrite: bool = False, also: Sequence[str] = ("out.more", "out.folder"),
        **options: object,
    ) -> str:  # fmt: skip
        args = Namespace(input=str(self.folder / "in"), output=str(self.folder / "out"), update=update, overwrite=overwrite, **options)
        outputs = [self.folder / name for name in ("out", *also)]

        def make() -> str:
            self.worked += 1
            for number, name in enumerate([name for name in MADE if name.split("/")[0] in ("out", "out.tally.json", *also)]):
                if number == die_at:
                    raise KeyboardInterrupt
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text((self.folder / "in").read_text().upper())
            return "made"

        return make_once(args, Ingredients([self.folder / "in"], outputs, {"tokenizer": str(options.get("words", "w"))}), make)

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def contents(self) -> dict[str, str]:
        return {name: (self.folder / name).read_text() for name in self.names()}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files' contents are always looked at, large ones' after they were touched."""
    if request.param == "large":
        monkeypatch.setattr(finished, "SMALL", 0)


def test_the_same_is_kept(stage: Stage) -> None:
    assert stage(n=1) == "made" and stage.names() == sorted(["in", *MADE, "out.plan.json"])
    before = {path: path.stat().st_mtime_ns for path in stage.folder.iterdir()}
    assert stage(n=1) == stage(n=1, update=True) == f"finished before with the same plan, kept -> {stage.folder}/out"
    assert stage.worked == 1 and {path: path.stat().st_mtime_ns for path in stage.folder.iterdir()} == before
    assert stage(n=1, overwrite=True) == "made"


def test_the_output_s_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("text")
    args = Namespace(input=str(tmp_path / "in"), output=str(tmp_path / "a/b/out"), update=False, overwrite=False)
    output = Path(args.output)
    ingredients = Ingredients([tmp_path / "in"], [output], counts=False)
    assert make_once(args, ingredients, lambda: str(output.write_text("made"))) == "4"


def _another_input(stage: Stage) -> None:
    (stage.folder / "in").write_text("other")


def _another_output(stage: Stage) -> None:
    (stage.folder / "out.more").write_text("edited")


CHANGES: dict[str, tuple[Callable[[Stage], None], dict[str, object], str]] = {
    "option": (lambda stage: None, {"n": 2}, r"out: was made with another n \(n was 1, is 2\)"),
    "new option": (lambda stage: None, {"n": 1, "m": 2}, "another m"),
    "fingerprint": (lambda stage: None, {"n": 1, "words": "v"}, "another tokenizer, words"),
    "input": (_another_input, {"n": 1}, "another input"),
    "contents": (_another_output, {"n": 1}, r"out\.more: was changed since it was made"),
    "fewer outputs": (lambda stage: None, {"n": 1, "also": ("out.more",)}, r"another files \(files was \['out', 'out.more', "),
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


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_what_is_missing_is_made_again(stage: Stage, name: str, update: bool) -> None:
    stage(n=1)
    whole = stage.contents()
    (stage.folder / name).unlink()
    assert stage(n=1, update=update) == "made" and stage.contents() == whole
    assert "kept" in stage(n=1)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("name", MADE)
def test_what_is_damaged_is_made_again_with_update(stage: Stage, name: str) -> None:
    """Bytes overwritten, the size the same; without --update it might be somebody's edit."""
    stage(n=1)
    whole = stage.contents()
    time.sleep(0.02)  # the clock of ctime ticks every few milliseconds
    with open(stage.folder / name, "r+") as file:
        file.write("B")
    with pytest.raises(ValueError, match="was changed since it was made; --update makes it again"):
        stage(n=1)
    assert stage(n=1, update=True) == "made" and stage.contents() == whole


@pytest.mark.usefixtures("size")
def test_a_copy_is_as_good(stage: Stage) -> None:
    """In another place, with other times."""
    stage(n=1)
    time.sleep(0.02)
    shutil.copytree(stage.folder, stage.folder / "copy")
    shutil.copy(stage.folder / "out", stage.folder / "copy/out")
    copy = Stage(stage.folder / "copy")
    assert "kept" in copy(n=1)


def test_a_large_file_is_not_read_for_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(n=1)
    monkeypatch.setattr(finished, "SMALL", 0)
    later = time.time_ns() + 10**9
    os.utime(stage.folder / "out.plan.json", ns=(later, later))
    read: list[Path] = []
    monkeypatch.setattr(finished, "sha256_file", lambda path, sha256=finished.sha256_file: read.append(path) or sha256(path))
    assert "kept" in stage(n=1) and read == [stage.folder / "in"]


@pytest.mark.parametrize("name", ["out", "out.more", "out.folder/mine", "out.tally.json"])
def test_somebody_s_file_is_no_output(stage: Stage, name: str) -> None:
    (stage.folder / name).parent.mkdir(exist_ok=True)
    (stage.folder / name).write_text("mine")
    for update in (False, True):
        with pytest.raises(ValueError, match=rf"{name}: exists already"):
            stage(n=1, update=update)
    assert (stage.folder / name).read_text() == "mine" and stage.names() == ["in", name]
    assert stage(n=1, overwrite=True) == "made"


@pytest.mark.parametrize("name", ["out.more", "out.folder/mine"])
def test_nor_is_it_beside_an_output(stage: Stage, name: str) -> None:
    """What the stage made without that file, it may replace; not the file."""
    stage(n=1, also=() if name == "out.more" else ("out.folder",))
    (stage.folder / name).write_text("mine")
    before = stage.contents()
    with pytest.raises(ValueError, match="made with another"):
        stage(n=2)
    with pytest.raises(ValueError, match=rf"{name}: exists already"):
        stage(n=2, update=True)
    assert stage.contents() == before


def test_another_plan_is_another_also_if_a_file_is_missing(stage: Stage) -> None:
    stage(n=1)
    (stage.folder / "out.more").unlink()
    before = stage.contents()
    for options in ({"n": 2}, {"n": 1, "also": ("out.new",)}):
        with pytest.raises(ValueError, match="made with another"):
            stage(**options)
    assert stage.contents() == before and stage.worked == 1


@pytest.mark.parametrize("edited", [False, True])
def test_what_is_made_no_more_goes(stage: Stage, edited: bool) -> None:
    """Unless somebody wrote to it."""
    stage(n=1)
    if edited:
        _another_output(stage)
    assert stage(n=1, update=True, also=("out.folder",)) == "made"
    assert (stage.folder / "out.more").exists() == edited and (stage.folder / "out.folder/a").exists()
    assert "kept" in stage(n=1, also=("out.folder",))


def test_a_file_is_input_or_output_and_that_once(stage: Stage) -> None:
    for also, what in ((["in"], "one of the inputs"), (["out"], "another output"), (["out.tally.json"], "another output")):
        with pytest.raises(ValueError, match=rf"is {what} too"):
            stage(n=1, also=also, overwrite=True)
    assert stage.names() == ["in"]


@pytest.mark.parametrize("die_at", [0, 1, 3])
def test_an_interrupted_one_is_made_again(stage: Stage, die_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage(n=1, die_at=die_at)
    assert stage.names() == (["in"] if die_at == 0 else sorted(["in", *MADE[:die_at], "out.plan.json"]))
    assert stage(n=1) == "made" and "kept" in stage(n=1)


def test_killed_between_output_and_plan(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL leaves what there is: a plan that says "begun", without sizes."""
    for n, update in ((1, False), (2, True)):
        with monkeypatch.context() as patch:
            patch.setattr(finished.Finished, "record", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stage(n=n, update=update)
        assert json.loads((stage.folder / "out.plan.json").read_text())["making"]
        assert stage(n=n, update=update) == "made" and "kept" in stage(n=n)
        assert "making" not in json.loads((stage.folder / "out.plan.json").read_text())


def test_what_is_replaced_stays_finished_until_it_is(stage: Stage) -> None:
    stage(n=1)
    before = stage.contents()
    with pytest.raises(KeyboardInterrupt):
        stage(n=2, update=True, die_at=0)
    assert stage.contents() == before and "kept" in stage(n=1)


def test_what_an_interrupted_replacement_made_is_its_own(stage: Stage) -> None:
    """A new output's name is claimed before it is written, and given up by another plan."""
    stage(n=1, also=())
    with pytest.raises(KeyboardInterrupt):
        stage(n=2, update=True, die_at=2)
    assert (stage.folder / "out.more").exists()
    assert stage(n=3, update=True, also=("out.folder",)) == "made" and not (stage.folder / "out.more").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"plan": 1, "outputs": {}}', '{"plan": {}, "outputs": {"out": "x"}}', "{"])
def test_a_plan_s_file_of_another_kind(stage: Stage, content: str) -> None:
    plan = stage.folder / "out.plan.json"
    plan.write_text(content)
    for update in (False, True):
        with pytest.raises(ValueError, match=r"out\.plan\.json: "):
            stage(n=1, update=update)
    assert plan.read_text() == content and stage.worked == 0
    assert stage(n=1, overwrite=True) == "made"


def test_a_slash_at_the_end_is_the_same_output() -> None:
    assert finished.plan_path("a/out/") == Path("a/out.plan.json") and tally_path("a/out/") == Path("a/out.tally.json")
