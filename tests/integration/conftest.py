"""A SLURM of two nodes for the tests of jobs."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a shell that sees two nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    command = ["bash", ROOT / "scripts/local_slurm.sh"]
    up = subprocess.run([*command, "up", folder], capture_output=True, text=True, timeout=600)
    if up.returncode == 3:
        pytest.skip(up.stderr.strip())
    assert up.returncode == 0, up.stderr
    try:
        yield {"SLURM_CONF": up.stdout.strip().removeprefix("export SLURM_CONF="), "LOCAL_SLURM": str(folder)}
    finally:
        subprocess.run([*command, "down", folder], check=True)
