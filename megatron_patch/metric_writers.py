"""Writers of metrics that fall silent where they fail: neither a full disk nor a service that died is to end a training.

They live on one rank, and the others would wait for it.
"""

from collections.abc import Callable
from typing import Any


class Tolerant:
    """TensorBoard's or Weights & Biases' writer, of which no call raises.

    Args:
        writer: its methods are called. say: told why the first failed; after that none is called.
    """

    def __init__(self, writer: Any, say: Callable[[str], None]) -> None:
        self._writer, self._say, self._silent = writer, say, False

    def __getattr__(self, name: str) -> Any:
        """A method of the writer, which says why it failed, once."""
        method = getattr(self._writer, name)

        def attempted(*args: Any, **kwargs: Any) -> Any:
            if self._silent:
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:
                self._silent = True
                return self._say(_reason(error))

        return attempted if callable(method) else method


def tolerant(name: str) -> Callable[[Callable, Any], Callable]:
    """For ``loop_hooks.HOOKS``: the one writer that upstream's getter gives, in the same wrapper every time."""

    def make(upstream: Callable, state: Any) -> Callable:
        def get_writer() -> Any:
            """None where this rank has none."""
            if name not in state.writers and (writer := upstream()) is not None:
                state.writers[name] = Tolerant(writer, lambda why: state.console(f"[{state.mode}] {name} writes no more: {why}"))
            return state.writers.get(name)

        return get_writer

    return make


def tolerated(upstream: Callable, state: Any) -> Callable:
    """For ``loop_hooks.HOOKS``: a function whose failure is told and costs nothing else."""

    def attempt(*args: Any, **kwargs: Any) -> None:
        """Never raises."""
        try:
            upstream(*args, **kwargs)
        except Exception as error:
            state.console(f"[{state.mode}] a checkpoint was saved, but not noted in Weights & Biases: {_reason(error)}")

    return attempt


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) and error.errno else f"{type(error).__name__}: {error}"
