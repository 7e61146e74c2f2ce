"""What is saved beside training: a thread writes it, so that the next steps need not wait for the disk."""

from collections.abc import Callable
from threading import Thread

from data.watch import SAVING

PATIENCE = 3.0  # seconds of waiting that need no word


class Saver:
    """Saves one thing at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether something could not be saved, which `wait` raises."""
        return self._error is not None

    def begin(self, save: Callable[[], None]) -> None:
        """Has `save` run beside what follows; `wait` comes first, because of what is still being saved."""
        assert not self._thread
        # a process that is told twice to stop does not wait for it: what it leaves is what one that was killed leaves
        self._thread = Thread(target=self._run, args=(save,), name=SAVING, daemon=True)
        self._thread.start()

    def _run(self, save: Callable[[], None]) -> None:
        try:
            save()
        except BaseException as e:
            self._error = e

    def wait(self, say: Callable[[], object] = lambda: None) -> None:
        """Until all is saved; calls `say` where that takes long. Raises what went wrong, once."""
        if self._thread:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                say()
                self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error
