"""The timed reference."""

import os
import signal
import sys

# How often a thread looks whether the others have come before it sleeps; OpenMP reads it when torch is imported. GNU's
# own choice, some milliseconds, is no faster alone, and beside other programs keeps cores from those it waits for.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Ctrl-C while a command's modules are imported, which takes seconds, ends it without a traceback; see cli.exit_status.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
