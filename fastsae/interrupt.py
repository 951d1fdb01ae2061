"""SIGTERM and SIGINT ask a run to stop. It notices at its next poll, saves, and leaves with 143 or 130.

    with Interrupt() as interrupt:
        for step in range(steps):
            ...
            if interrupt.requested is not None:     # between steps: save, then leave with exit_code(interrupt.requested)
                break

Long loops elsewhere (filling a buffer, an evaluation) call poll(), which raises Interrupted. Python sees the first signal when
the operation that is running returns to it. From half a second later on, a second one ends the process at once, as if nobody
had handled it, whatever it is doing.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 0.5  # seconds; `timeout` and launchers signal the process and then its group, which is not a second wish

_active: "Interrupt | None" = None


class Interrupted(BaseException):
    """Raised by poll(). A BaseException like KeyboardInterrupt, so that no `except Exception` that retries swallows it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupt:
    """While it is entered, the first SIGTERM or SIGINT sets `requested` to its number instead of ending the process.

    Python lets only the main thread handle signals: entered in another one it changes nothing, and `requested` stays None.
    """

    requested: int | None = None

    def __enter__(self) -> Self:
        global _active
        self._outer, self._former, self._pid = _active, {}, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._former = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
            _active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        global _active
        for signum, handler in self._former.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: a handler that was not set from Python
        _active = self._outer

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker has inherited this handler
            if signum == signal.SIGTERM:  # its parent wants it to end; SIGINT came to the parent too, which decides
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
        elif self.requested is None:
            self.requested = signum
            time.sleep(ECHO)
            for second in SIGNALS:  # by the kernel: a handler in Python would wait for a long operation to end
                signal.signal(second, signal.SIG_DFL)


def poll() -> None:
    """Raise Interrupted if a stop was requested. Cheap, and for any thread."""
    if _active is not None and _active.requested is not None:
        raise Interrupted(_active.requested)


def exit_code(signum: int) -> int:
    """What a shell reports for a process that this signal ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signum
