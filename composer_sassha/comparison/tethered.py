"""Run a module for as long as the process that started it lives.

`python -m composer_sassha.comparison.tethered MODULE [ARGUMENT ...]` does what `python -m MODULE ...` does.
Its standard input is a pipe whose other end the parent holds and never writes to. However the parent ends, by
SIGKILL too, the system closes that end, and a thread here stops the process: SIGTERM, then SIGKILL.
"""

import os
import runpy
import signal
import sys
import threading
import time

_PATIENCE = 60.0  # seconds, as the parent itself waits


def main() -> None:
    """Run the module that the first argument names, with the others as its own."""
    threading.Thread(target=_stop_with_the_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _stop_with_the_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, which a waiting thread would keep locked at the exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
