"""The timed reference."""

import os
import signal
import sys

# How long a waiting thread spins before it sleeps; OpenMP reads this when torch is imported. GNU's default, some
# milliseconds, is no faster on an idle machine; on a busy one it keeps cores from the threads that it waits for.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Where these bind threads, they bind the server that ranks are forked from to one core, and so every rank.
for variable in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"):
    os.environ.pop(variable, None)

# Ctrl-C while a command's modules are imported, which takes seconds, ends it without a traceback; see cli.exit_status.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
