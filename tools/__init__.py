"""Commands around runs: series of them, step times, and work on finished ones."""

import pytorch  # noqa: F401  # before a command's modules: see there
