"""setup_env.sh in a scratch copy of the repository, with a Python on PATH that only writes down what it was asked to do.

PATH holds that Python and the few tools the script needs, so that this machine's own interpreters cannot be found.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = ("bash", "sh", "dirname", "cat", "sha256sum", "cut", "grep", "sed", "env", "mkdir", "rm", "cp", "touch")
INSTALLED = """numpy==1.26.4
torch==2.11.0a0+abc.nv26.01
transformer_engine==2.20.0
transformer-engine-cu13==2.20.0
flash_attn==2.7.4
nvidia-cublas-cu13==13.0
apex==0.1
tensorboard==2.0
torchmetrics==1.0
setuptools==70
"""
STUB = """#!/bin/sh
echo "PIP_CONSTRAINT=$PIP_CONSTRAINT $*" >>"$RECORD"
case "$*" in
  "-c "*) exit 0 ;;
  *"-m venv"*)
    [ -z "$FAIL_VENV" ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/no_pip; exit 1; }
    rm -rf .venv && mkdir -p .venv/bin .venv/lib && cp "$0" .venv/bin/python
    case "$*" in *--system-site-packages*) answer=true ;; *) answer=false ;; esac
    echo "include-system-site-packages = $answer" >.venv/pyvenv.cfg ;;
  *"-m pip"*)
    [ ! -f .venv/no_pip ] || exit 1
    case "$*" in
      *" list "*) cat "$INSTALLED" ;;
      *" install "*) [ -z "$FAIL_INSTALL" ] || exit 1 ;;
    esac ;;
  --version) echo "Python 3.12.9" ;;
esac
"""


class Scratch:
    """A copy of what setup_env.sh looks at, and a way to run it."""

    def __init__(self, folder: Path) -> None:
        self.repo, self.bin, self.record = folder / "repo", folder / "bin", folder / "record"
        (self.repo / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("requirements.txt", "requirements-dev.txt", "requirements-gpu.txt", "pyproject.toml", "scripts/setup_env.sh"):
            shutil.copy(ROOT / name, self.repo / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        (folder / "installed").write_text(INSTALLED)
        self.environment = {
            "PATH": str(self.bin), "HOME": str(folder), "RECORD": str(self.record), "INSTALLED": str(folder / "installed"),
        }  # fmt: skip

    def add_python(self, name: str = "python3.12") -> None:
        (self.bin / name).write_text(STUB)
        (self.bin / name).chmod(0o755)

    def run(self, *options: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
        """The finished script and what the stub was asked to do (its calls, joined by lines)."""
        self.record.write_text("")
        command = [str(self.bin / "bash"), str(self.repo / "scripts/setup_env.sh"), *options]
        done = subprocess.run(command, env=self.environment | environment, cwd=os.sep, capture_output=True, text=True, timeout=60)
        return done, self.record.read_text()

    @property
    def stamp(self) -> str:
        return (self.repo / ".venv/.setup").read_text()


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    made = Scratch(tmp_path)
    made.add_python()
    return made


def test_without_python_312_it_says_how_to_get_it(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    done, _ = scratch.run()
    assert done.returncode == 2 and done.stdout == ""
    assert "Python 3.12 was not found on PATH, under pyenv or by uv." in done.stderr and "uv python install 3.12" in done.stderr
    assert not (scratch.repo / ".venv").exists()


def test_python_of_pyenv_is_found(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    folder = tmp_path / ".pyenv/versions/3.12.1/bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    done, calls = scratch.run()
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear .venv" in calls


def test_plain_then_an_instant_second_run(scratch: Scratch) -> None:
    done, calls = scratch.run()
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear .venv" in calls and "install --requirement requirements-dev.txt" in calls
    assert scratch.stamp.startswith("mode=plain requirements=")
    done, calls = scratch.run()
    assert (done.returncode, done.stdout, done.stderr, calls) == (0, "", "", "")  # no Python was even started


def test_changed_requirements_are_installed_into_the_same_venv(scratch: Scratch) -> None:
    scratch.run()
    with open(scratch.repo / "requirements.txt", "a") as stream:
        stream.write("# one more\n")
    _, calls = scratch.run()
    assert "-m venv" not in calls and "install --requirement requirements-dev.txt" in calls


def test_system_holds_only_what_is_compiled_against_torch(scratch: Scratch) -> None:
    done, calls = scratch.run("--system", PIP_CONSTRAINT="/etc/pip/constraint.txt")
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear --system-site-packages .venv" in calls
    held = {line.split("==")[0] for line in (scratch.repo / ".venv/constraints.txt").read_text().splitlines()}
    assert held == {"torch", "transformer_engine", "transformer-engine-cu13", "flash_attn", "nvidia-cublas-cu13", "apex"}
    install = next(line for line in calls.splitlines() if " install " in line)
    assert "PIP_CONSTRAINT= -m pip" in install and "--constraint .venv/constraints.txt --editable ." in install
    assert "requirements-dev.txt" not in calls and "scripts/show_environment.py" in calls


def test_no_option_keeps_the_mode(scratch: Scratch) -> None:
    """test.sh and quickstart.sh set up without an option; they must not put another torch over the container's."""
    scratch.run("--system")
    done, calls = scratch.run()
    assert (done.returncode, calls) == (0, "") and scratch.stamp.startswith("mode=system ")
    (scratch.repo / "pyproject.toml").write_text("# changed\n")
    _, calls = scratch.run()
    assert "-m venv" not in calls and "--constraint .venv/constraints.txt" in calls and "requirements-dev.txt" not in calls


@pytest.mark.parametrize(("first", "second"), [("--plain", "--system"), ("--system", "--plain")])
def test_another_mode_makes_the_venv_anew(scratch: Scratch, first: str, second: str) -> None:
    scratch.run(first)
    _, calls = scratch.run(second)
    assert "-m venv --clear" in calls and ("--system-site-packages" in calls) == (second == "--system")
    assert scratch.stamp.startswith(f"mode={second[2:]} ")


def test_a_venv_without_pip_is_made_anew(scratch: Scratch) -> None:
    done, _ = scratch.run(FAIL_VENV="1")
    assert done.returncode == 1 and (scratch.repo / ".venv/bin/python").exists()
    done, calls = scratch.run()
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear .venv" in calls and scratch.stamp.startswith("mode=plain ")


def test_a_broken_off_installation_goes_on_in_its_mode(scratch: Scratch) -> None:
    done, _ = scratch.run("--system", FAIL_INSTALL="1")
    assert done.returncode == 1 and ".venv/constraints.txt" in done.stderr and not (scratch.repo / ".venv/.setup").exists()
    done, calls = scratch.run()
    assert done.returncode == 0 and "--constraint .venv/constraints.txt" in calls and scratch.stamp.startswith("mode=system ")


def test_unknown_option(scratch: Scratch) -> None:
    done, calls = scratch.run("--gpu")
    assert (done.returncode, calls) == (2, "") and "unknown option '--gpu'" in done.stderr
