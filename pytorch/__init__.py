"""The timed reference."""

import signal
import sys

# Ctrl-C while a command's modules are imported, which takes seconds, ends it without a traceback; see cli.exit_status.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
