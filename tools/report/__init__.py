"""One page that shows what happened in one run, or in several side by side."""
