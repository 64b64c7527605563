"""Refuse `pip install .`, which would put `data`, `pytorch` and `tools` beside everyone's packages."""

from setuptools import setup
from setuptools.command.build_py import build_py


class RefuseCopies(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            raise SystemExit("This benchmark runs from its clone: sh quickstart.sh, or pip install --editable .")
        super().run()


setup(cmdclass={"build_py": RefuseCopies})
