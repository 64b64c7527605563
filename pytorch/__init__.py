"""The timed reference."""

import os
import signal
import sys

# How long a waiting thread spins before it sleeps; OpenMP reads this when torch is imported. GNU's default, some
# milliseconds, is no faster on an idle machine; on a busy one it keeps cores from the threads that it waits for.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Ctrl-C while a command's modules are imported, which takes seconds, ends it without a traceback; see cli.exit_status.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
