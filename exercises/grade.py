"""Grades answers: your own, or those of a class.

    $ python exercises/grade.py                                 # exercises/: what passes, what is next
    $ python exercises/grade.py submissions --csv grades.csv    # each folder in submissions/ that has ex*.py

An exercise is worth as many points as its difficulty, times the share of its tests that pass. Answers are
programs: run those of a class in a container, or as a user without rights.
"""
import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
STUBS = sorted(Path(__file__).parent.glob("ex*_*.py"))
POINTS = {stub.stem: int(re.search(r"difficulty (\d)", stub.read_text()).group(1)) for stub in STUBS}
TROUBLE = "the tests do not run"


def grade(folder, timeout=300):
    """{exercise: (tests passed, tests, first complaint)} of a folder of answers."""
    env = os.environ | {"OSV_IMPL": str(Path(folder).resolve()), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        try:
            run = subprocess.run([sys.executable, "-m", "pytest", "tests/test_exercises.py", "--tb=no",
                                  f"--junitxml={report}"], cwd=ROOT, env=env, timeout=timeout, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired:
            return {name: (0, 1, f"{TROUBLE} within {timeout} s") for name in POINTS}
        if not report.exists():
            return {name: (0, 1, f"{TROUBLE}:\n{run.stdout[-1000:]}") for name in POINTS}
        cases = [case for case in ElementTree.parse(report).iter("testcase") if case.find("skipped") is None]
    result = {}
    for name in POINTS:
        mine = [case for case in cases if case.get("name").startswith(f"test_{name[:4]}_")]
        bad = [problem for case in mine for problem in case if problem.tag in ("failure", "error")]
        complaint = bad[0].get("message").removeprefix("Failed: ") if bad else ""
        result[name] = len(mine) - len(bad), len(mine), complaint
    return result


def points(result):
    return sum(POINTS[name] * passed / tests for name, (passed, tests, _) in result.items())


def show(folder):
    result = grade(folder)
    for name, (passed, tests, _) in result.items():
        print(f"{name:20}{'#' * passed + '.' * (tests - passed):9}{passed} of {tests}")
    print(f"{points(result):.1f} of {sum(POINTS.values())} points")
    left = [(name, complaint) for name, (passed, tests, complaint) in result.items() if passed < tests]
    if left:
        name, complaint = left[0]
        print(f"\nnext, {name}.py: {'to be written' if 'NotImplementedError' in complaint else complaint}")
        where = os.path.relpath(folder, ROOT)
        print(f"OSV_IMPL={where} python -m pytest tests/test_exercises.py -x -k {name[:4]}")
    else:
        print("\nall done: python exercises/capstone.py")


def main():
    parser = argparse.ArgumentParser(description="Grade the exercises.", allow_abbrev=False)
    parser.error = lambda message: sys.exit(print(f"grade.py: {message}", file=sys.stderr) or 2)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent,
                        help="answers (default: exercises/), or with --csv a folder of such folders")
    parser.add_argument("--csv", type=Path, help="grade each folder in it into this file, a row each")
    args = parser.parse_args()
    if not args.csv:
        if not list(args.folder.glob("ex*_*.py")):
            parser.error(f"{args.folder}: no ex*.py in it; a folder of such folders needs --csv")
        return show(args.folder)
    folders = sorted({file.parent for file in args.folder.glob("*/ex*_*.py")})
    if not folders:
        parser.error(f"{args.folder}: no folder in it has ex*.py")
    with open(args.csv, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["student", *POINTS, "points", "of"])
        for folder in folders:
            result = grade(folder)
            shares = [f"{passed}/{tests}" for passed, tests, _ in result.values()]
            rows.writerow([folder.name, *shares, f"{points(result):.1f}", sum(POINTS.values())])
            trouble = {text for _, _, text in result.values() if text.startswith(TROUBLE)}
            print(f"{folder.name:30}{points(result):5.1f}", *trouble, flush=True)


if __name__ == "__main__":
    main()
