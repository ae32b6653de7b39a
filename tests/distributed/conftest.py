"""The session's bench: checkpoints, stores and the runs made so far."""

import pytest

from tests.distributed.materials import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Made once; a run that several tests look at is made once too."""
    return Bench.build(tmp_path_factory.mktemp("distributed"))
