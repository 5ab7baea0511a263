"""The first lines of each program, before the imports that take seconds.

    if __name__ == "__main__":
        import startup

        startup.begin()

From there on Ctrl-C ends the program with exit code 130 and without a traceback, and no file that
is opened gets the number of a standard stream that is closed. The garbage collector rests while
modules are imported. `command_line.run_program` continues.
This file imports nothing that takes time.
"""

import gc
import os
import signal
from types import FrameType

INTERRUPTED = 130  # exit codes as of a shell: 128 and the number of the signal
TERMINATED = 143


def begin() -> None:
    """Prepare the process. For the main thread of a program, never for an import."""
    signal.signal(signal.SIGINT, end_at_once)
    fill_standard_descriptors()
    gc.disable()


def end_imports() -> None:
    """Let the garbage collector work again, on what is made from now on.

    Imports make hundreds of thousands of objects that live until the end. To look for garbage among
    them again and again takes 0.2 of 1.4 seconds (benchmarks/README.md).
    """
    gc.freeze()
    gc.enable()


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process: nothing has been computed, and an import would print a traceback."""
    os._exit(INTERRUPTED)


def fill_standard_descriptors() -> None:
    """Open the null device as stdin, stdout and stderr where these are closed.

    The next file would get their number otherwise, and with it what libraries in C print.
    `sys.stdout` and the others stay None, by which a closed stream is recognized.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def handle_signals() -> None:
    """Make Ctrl-C a KeyboardInterrupt, and SIGTERM a SystemExit with exit code 143.

    Both unwind the program: a record that is being written is finished, and no temporary file and
    no lock stays.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)


def terminate(number: int, frame: FrameType | None) -> None:
    """Raise SystemExit, as the handler of SIGTERM."""
    raise SystemExit(TERMINATED)


def ignore_interrupts() -> None:
    """Ignore Ctrl-C: the program is about to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
