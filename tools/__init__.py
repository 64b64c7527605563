"""Commands for finished runs."""

import pytorch  # noqa: F401  # before a command's modules: see there
