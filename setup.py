"""Everything is in pyproject.toml; here is one check: no wheel or sdist from a checkout without its links."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist


def require_links() -> None:
    """Stop where ``vssm/scans`` or ``vssm/kernels`` is no folder, as in a Windows checkout without symbolic links."""
    broken = [name for name in ("scans", "kernels") if not Path(__file__).parent.joinpath("vssm", name).is_dir()]
    if broken:
        raise SystemExit(
            f"vssm: the build needs the links vssm/scans and vssm/kernels, and {' and '.join(broken)} is not a folder; "
            "run 'git config core.symlinks true' and 'git checkout -- vssm' (on Windows with developer mode on), "
            "or use 'pip install -e .'"
        )


class BuildPy(build_py):
    def run(self):
        if not self.editable_mode:  # an editable install needs no links: vssm/_layout.py finds the folders
            require_links()
        super().run()


class Sdist(sdist):
    def run(self):
        require_links()
        super().run()


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
