"""The quick tests on each Python, and on the oldest and newest diffusers that are allowed.

    nox -s tests            # Python 3.11 to 3.13, the newest releases that pyproject.toml allows
    nox -s edges            # Python 3.11, the oldest and the newest diffusers
    nox -s first_hour       # a wheel in a fresh environment: Python 3.11 and 3.13

nox is a tool of its own (`pipx install nox`). Every session installs torch anew: hours on a laptop.
"""

import glob
import os

import nox

TORCH = "torch==2.13.0"  # the only release that is allowed; another one is added here and tested
DIFFUSERS = {"oldest": "diffusers==0.36.0", "newest": "diffusers<0.43"}

nox.options.sessions = ["tests"]


def run_tests(session: nox.Session, *packages: str) -> None:
    """Install the package with its development tools, and run the quick tests."""
    session.install(TORCH, *packages)
    session.install("-e", ".[dev]", *packages)
    session.install("--no-deps", "ca-tome==0.1.3")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The quick tests."""
    run_tests(session)


@nox.session(python="3.11")
@nox.parametrize("diffusers", list(DIFFUSERS.values()), ids=list(DIFFUSERS))
def edges(session: nox.Session, diffusers: str) -> None:
    """The quick tests with one release of diffusers."""
    run_tests(session, diffusers)


@nox.session(python=["3.11", "3.13"])
def first_hour(session: nox.Session) -> None:
    """What a new user does, with nothing but the wheel and what it asks for."""
    folder = session.create_tmp()
    session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ".")
    (wheel,) = glob.glob(f"{folder}/toma_fx-*.whl")
    session.install(TORCH, f"{wheel}[onnx]")
    script = os.path.abspath("tools/first_hour.py")
    session.cd(folder)  # so that what is imported is the wheel
    session.run("python", script, "--folder", "work")
