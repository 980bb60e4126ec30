"""Prove that tests can fail: break the code in one place after another and run them.

    python tests/mutate.py [NAME ...] [--jobs N]

Every tests/mutations/NAME.yaml names tests and mutations::

    tests: [tests/methods/test_methods_olora.py]
    mutations:
      - file: treelora_cli/methods/olora.py
        old: "loss + penalty"          # stands in the file exactly once
        new: "loss - penalty"
        what: the penalty's sign flipped

Each mutation is made in a copy of the checkout and undone again. It is killed if a test fails,
survives if all pass, and is broken if the code no longer runs at all: then any test would have
failed. The exit code is 0 if all were killed.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("tests/mutations")
# What tests read of a checkout, and beside it.
COPIED = ("treelora_cli", "tests", "recipes", "pyproject.toml")
BESIDE = "shared"

KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "broken"
FAILED = 1
"""pytest's exit code where tests ran and failed; a higher one means that they did not run."""

# Errors of code that does not run, whatever it was meant to compute.
NONSENSE = (
    r"SyntaxError|IndentationError|NameError|UnboundLocalError|\w*ImportError|\w*NotFoundError"
)
SECONDS = 1800


@dataclass(frozen=True)
class Mutation:
    """One change of the code."""

    file: str
    old: str
    new: str
    what: str


@dataclass(frozen=True)
class Suite:
    """What one file of tests/mutations asks for."""

    name: str
    tests: tuple[str, ...]
    mutations: tuple[Mutation, ...]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutation, or of the tests without one."""

    result: str
    why: str


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the suites and return the exit code."""
    parser = argparse.ArgumentParser(description="Prove that tests can fail.")
    parser.add_argument("names", nargs="*", help="files of tests/mutations, without .yaml; all")
    parser.add_argument("--jobs", type=int, default=1, help="mutations tried at a time")
    options = parser.parse_args(arguments)
    try:
        suites = [read(path) for path in found(root, options.names)]
    except ValueError as error:
        say(str(error))
        return 1
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutate-") as place:
        copies: queue.Queue[Path] = queue.Queue()
        for job in range(max(1, options.jobs)):
            copies.put(copied(root, Path(place) / str(job)))
        with ThreadPoolExecutor(max(1, options.jobs)) as pool:
            for suite in suites:
                counts += run_suite(suite, copies, pool)
    say(", ".join(f"{counts[result]} {result}" for result in (KILLED, SURVIVED, BROKEN)))
    return 0 if set(counts) == {KILLED} else 1


def found(root: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of the suites: all of them, or those named.

    Raises:
        ValueError: there is none, or none of a name.
    """
    present = {path.stem: path for path in sorted((root / FOLDER).glob("*.yaml"))}
    unknown = [name for name in names if name not in present]
    if unknown or not present:
        raise ValueError(f"no {', '.join(unknown) or 'file'} in {FOLDER}; it has {[*present]}")
    return [present[name] for name in names or present]


def read(path: Path) -> Suite:
    """Read a suite.

    Raises:
        ValueError: the file does not have the form that the module's text shows.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        mutations = tuple(Mutation(**entry) for entry in document["mutations"])
        suite = Suite(path.stem, tuple(document["tests"]), mutations)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not of the form that tests/mutate.py shows: {error}") from None
    if not suite.tests or not suite.mutations:
        raise ValueError(f"{path}: it names no tests or no mutations")
    return suite


def copied(root: Path, place: Path) -> Path:
    """Copy what tests need of the checkout; what they read beside it is linked."""
    target = place / "checkout"
    target.mkdir(parents=True)
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copyfile(source, target / name)
    if (root.parent / BESIDE).exists():
        (place / BESIDE).symlink_to(root.parent / BESIDE)
    return target


def run_suite(suite: Suite, copies: queue.Queue[Path], pool: ThreadPoolExecutor) -> Counter[str]:
    """Run the tests as they are, then under each mutation, and print what became of it."""

    def in_a_copy(mutation: Mutation | None) -> Verdict:
        copy = copies.get()
        try:
            return tried(copy, suite.tests, mutation)
        finally:
            copies.put(copy)

    as_it_is = in_a_copy(None)
    if as_it_is.result != SURVIVED:
        say(f"{BROKEN:<9} {suite.name}: the tests do not pass as they are ({as_it_is.why})")
        return Counter({BROKEN: 1})
    counts: Counter[str] = Counter()
    verdicts = pool.map(in_a_copy, suite.mutations)
    for mutation, verdict in zip(suite.mutations, verdicts, strict=True):
        counts[verdict.result] += 1
        why = f" ({verdict.why})" if verdict.why else ""
        say(f"{verdict.result:<9} {suite.name}: {mutation.file}: {mutation.what}{why}")
    return counts


def tried(copy: Path, tests: Sequence[str], mutation: Mutation | None) -> Verdict:
    """Run tests in a copy under a mutation, or without one, and undo it."""
    if mutation is None:
        return judged(copy, tests)
    path = copy / mutation.file
    if not path.is_file():
        return Verdict(BROKEN, "there is no such file")
    before = path.read_text(encoding="utf-8")
    times = before.count(mutation.old)
    if times != 1:
        return Verdict(BROKEN, f"its old text stands there {times} times, not once")
    path.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return judged(copy, tests)
    finally:
        path.write_text(before, encoding="utf-8")


def judged(copy: Path, tests: Sequence[str]) -> Verdict:
    """Run tests and say what their outcome means."""
    results = copy.parent / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    # Byte code is told from its source by size and second: a flipped sign would not be seen.
    settings = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, f"--junitxml={results}", *tests],
            cwd=copy,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict(BROKEN, f"not done after {SECONDS} s")
    if done.returncode == 0:
        return Verdict(SURVIVED, "")
    test, reason = first_failure(results) if results.exists() else ("", done.stderr[-200:])
    if done.returncode != FAILED or re.match(NONSENSE, reason):
        return Verdict(BROKEN, f"exit {done.returncode}: {test}: {reason[:120]}")
    return Verdict(KILLED, test)


def first_failure(results: Path) -> tuple[str, str]:
    """Return the name of the first test that failed, and its error in one line."""
    for case in ElementTree.parse(results).iter("testcase"):
        for trouble in (*case.iter("failure"), *case.iter("error")):
            return case.get("name", ""), " ".join(trouble.get("message", "").split())
    return "", "no test failed"


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
