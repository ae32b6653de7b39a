"""The distributed tests' bench."""

from tests.distributed.conftest import bench

__all__ = ["bench"]
