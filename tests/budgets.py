"""The price of complexity in figures: lines of Python in each folder, and what they may come to (CONTRIBUTING.md).

python tests/budgets.py                 exit status 1 if a folder is over its budget
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The aim is 2,300, 3,400 and 3,900. What the lines beyond it buy: in data/, recordings cut short are found by their
# headers, MP3 files by their frames, and all that is wrong with a manifest is told at once; in pytorch/, a result
# survives a full disk, a lost terminal and a nameless user, folders are locked, auto measures, a GPU never waits, lost
# ranks are named on GPUs, and 350 lines of Triton make a step on an H200 2 to 5 times as fast; in tools/, series in the
# report, a run's refusals before it starts, and how long a run will take, in several processes too, before it begins.
BUDGETS = {"data": 2540, "pytorch": 4550, "tools": 4595}


def main() -> int:
    """Print the table; returns the exit status."""
    over = False
    for folder, budget in BUDGETS.items():
        command = ["git", "-C", str(ROOT), "ls-files", f"{folder}/*.py"]
        files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        lines = sum((ROOT / file).read_text(encoding="utf-8").count("\n") for file in files)
        over |= lines > budget
        print(f"{folder:<8} {lines:5,} lines of Python in {len(files):2} files; budget {budget:5,}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
