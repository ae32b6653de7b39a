"""Python's fork server, of which a process has one: before it is used it is made to be the one that imported what the user needs."""

from collections.abc import Sequence
from multiprocessing import forkserver

_imported: list[tuple[str, ...]] = []


def use(modules: Sequence[str]) -> None:
    """Have a server that imports `modules` first; one that somebody else started with others is stopped."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    if _imported != [tuple(modules)] or server._preload_modules != list(modules):
        server._stop()
        server.set_forkserver_preload(list(modules))
        _imported[:] = [tuple(modules)]
