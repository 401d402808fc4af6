"""Grades answers: your own, or those of a class.

    $ python exercises/grade.py                                 # exercises/: what passes, what is next
    $ python exercises/grade.py ex03                            # one exercise, and its first complaint
    $ python exercises/grade.py --show ex03                     # its picture, into out/ex03.png
    $ python exercises/grade.py submissions --csv grades.csv    # a row for each folder in submissions/

An exercise is worth its points times the share of its tests that pass. A test that is skipped or never runs
has not passed. Each exercise has a process of its own, with nothing of the answers in it but its one file,
and limits of time and memory. See sandbox.py for what this cannot prevent: answers are programs, so grade a
class in a container.
"""
import argparse
import csv
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Timer

HERE = Path(__file__).resolve().parent
POINTS = {
    "ex01_karras_grid": 1, "ex02_precondition": 1, "ex03_consistency": 2, "ex04_euler": 2,
    "ex05_solve": 2, "ex06_pseudo_huber": 2, "ex07_hinge": 1, "ex08_lora": 3,
    "ex09_ema": 1, "ex10_tokens": 4, "ex11_gather": 5, "ex12_samplers": 3,
}
STUB, MISSING = "NotImplementedError", "missing"     # complaints about answers that are not written

# CUDA reserves more address space than any sensible limit, and flags of the user could deselect tests.
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "",
                            "PYTEST_PLUGINS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class Problem(Exception):
    """What the user has to change. The message is one line."""


class Grader:
    """Grades the exercises `names`, as many at the same time as there are processors, up to 4.

    time_limit: seconds for the tests of one exercise. memory_limit: GB for them.
    """

    def __init__(self, names=POINTS, time_limit=60.0, memory_limit=2.0):
        self.names, self.limits = names, {"time_limit": time_limit, "memory_limit": memory_limit}
        workers = min(os.cpu_count() or 1, len(names), 4)
        self.threads, self.sandboxes, self.running = ThreadPoolExecutor(workers), queue.LifoQueue(), []
        for _ in range(workers):
            self.sandboxes.put(None)                # started when no other one is idle
        self.listed = self.threads.submit(self.ask, "", "")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.running:
            with suppress(OSError):                 # it may have ended
                process.stdin.close()
        for process in self.running:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()

    def ask(self, folder, name):
        """The reply of a sandbox.py, see there."""
        process = self.sandboxes.get()
        if process is None:
            process = subprocess.Popen([sys.executable, str(HERE / "sandbox.py")], env=ENVIRONMENT,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                                       start_new_session=True)
            self.running.append(process)
        # An answer can stop the process that should end it. Importing torch may take a minute.
        alarm = Timer(self.limits["time_limit"] + 120, process.kill)
        alarm.start()
        try:
            process.stdin.write(json.dumps({"folder": folder, "exercise": name, **self.limits}) + "\n")
            line = process.stdout.readline()
        except OSError:
            line = ""
        alarm.cancel()
        self.sandboxes.put(process if line else None)
        return json.loads(line) if line else {"tests": {}, "trouble": "ends the process that grades it"}

    def run(self, file, name):
        """The reply for the file of an answer, from a copy that is alone in a folder."""
        with tempfile.TemporaryDirectory(prefix="answer", ignore_cleanup_errors=True) as scratch:
            try:
                if not file.is_file() or file.stat().st_size > 2 ** 20:
                    return {"tests": {}, "trouble": "not a text file" if os.path.lexists(file) else MISSING}
                shutil.copyfile(file, Path(scratch) / f"{name}.py")
            except OSError as error:
                return {"tests": {}, "trouble": f"cannot be read ({error.strerror})"}
            return self.ask(os.path.realpath(scratch), name)

    def start(self, folder):
        """Starts to grade a folder; None is one without answers. Returns what finish takes."""
        return {name: folder and self.threads.submit(self.run, folder / f"{name}.py", name)
                for name in self.names}

    def finish(self, started):
        """{exercise: (tests passed, tests, first complaint)} when all tests have run. Raises Problem."""
        listed, result = self.listed.result(), {}
        if not listed["tests"]:
            raise Problem(f"tests/test_exercises.py: no tests ({listed['trouble']})")
        for name, job in started.items():
            reply = job.result() if job else {"tests": {}, "trouble": MISSING}
            tests = [test for test in listed["tests"] if test.startswith(f"test_{name[:4]}_")]
            complaints = [reply["tests"].get(test, "it did not run") for test in tests]
            bad = [reply["trouble"] or text for text in complaints if text]
            result[name] = len(tests) - len(bad), len(tests), bad[0] if bad else ""
        return result


def grade(folder, names=POINTS, **limits):
    """{exercise: (tests passed, tests, first complaint)} of a folder of answers."""
    with Grader(names, **limits) as grader:
        return grader.finish(grader.start(Path(folder)))


def points(result):
    return sum(POINTS[name] * passed / tests for name, (passed, tests, _) in result.items())


def is_answer(file):
    """Whether a file's name is that of an answer, or was meant to be: ex1.py, ex03_consistency (1).py"""
    return re.fullmatch(r"ex.*\.py", file.name, re.IGNORECASE) is not None


def find_answers(folder):
    """(the folder with answers nearest to `folder`, up to three levels deeper, or None; what is odd)."""
    level = [folder]
    for depth in range(4):
        inside = {place: sorted(place.iterdir()) for place in level}
        found = [place for place in level if any(map(is_answer, inside[place]))]
        if found:
            place = found[0]
            odd = [f"in {place.relative_to(folder)}"] if depth else []
            odd += [f"not graded: {other.relative_to(folder)}" for other in found[1:]]
            odd += [f"not graded: {file.name}" for file in inside[place]
                    if is_answer(file) and file.stem not in POINTS]
            return place, odd
        if depth == 0:
            names = [file.name for file in inside[folder]]
        level = [file for place in level for file in inside[place]
                 if file.is_dir() and not file.is_symlink() and not file.name.startswith((".", "__"))]
    return None, [f"no ex*.py, but {', '.join(names[:3])}" if names else "empty"]


def reasons(result):
    """Why exercises without a single passed test have none, except for stubs."""
    missing = [name[:4] for name, (_, _, text) in result.items() if text == MISSING]
    # A SyntaxError begins with its file, here a temporary copy, and the line of code; the reason comes last.
    reason = lambda text: re.sub(r'^ *File ".*", (line \d+)\n(?: .*\n)*', r"\1: ", text).splitlines()[0][:150]
    other = [f"{name[:4]}: {reason(text)}" for name, (passed, _, text) in result.items()
             if text and not passed and text.partition("\n")[0] not in (MISSING, STUB)]
    return [f"missing: {' '.join(missing)}"] * (0 < len(missing) < len(result)) + other


def cell(text):
    """Text that a spreadsheet shows and does not calculate: students choose the names of their folders, and
    their errors' messages. An apostrophe goes before the first characters of formulas."""
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def grade_class(grader, folder, file):
    """Writes a row for each folder in `folder` to the CSV file, which is complete after every row."""
    students = sorted(path for path in folder.iterdir()
                      if path.is_dir() and not path.name.startswith((".", "__")))
    if not students:
        raise Problem(f"{folder}: no folders in it")
    sys.path.insert(0, str(HERE.parent))
    # Imports torch, in seconds that a single folder need not wait for.
    from support.checkpoint import ModelError, check_writable, refuse_overwriting, replacing
    try:
        refuse_overwriting([file], folder.rglob("*.py"))
        check_writable(file)
    except (ModelError, OSError) as error:
        raise Problem(str(error)) from error
    started = []
    for student in students:
        try:
            place, odd = find_answers(student)
        except OSError as error:
            place, odd = None, [f"cannot be read ({error.strerror})"]
        started.append((student, odd, grader.start(place)))
    rows, total = [["student", *grader.names, "points", "of", "reason"]], sum(map(POINTS.get, grader.names))
    for student, odd, jobs in started:
        result = grader.finish(jobs)
        reason = "; ".join(odd + reasons(result))
        # "3/7" would become a date in a spreadsheet.
        shares = [f"{passed} of {tests}" for passed, tests, _ in result.values()]
        rows.append([cell(student.name), *shares, f"{points(result):.1f}", total, cell(reason)])
        # Bytes that are not UTF-8 in a folder's name are written as \udcff, for example.
        with replacing(file) as part, open(part, "w", newline="", encoding="utf-8",
                                           errors="backslashreplace") as stream:
            csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(rows)
        print(f"{student.name:30}{points(result):5.1f}  {reason}".rstrip(), flush=True)


def show(result, folder):
    for name, (passed, tests, _) in result.items():
        print(f"{name:20}{'#' * passed + '.' * (tests - passed):12}{passed} of {tests}")
    print(f"{points(result):.1f} of {sum(map(POINTS.get, result))} points")
    left = [(name, text) for name, (passed, tests, text) in result.items() if passed < tests]
    if left:
        name, text = left[0]
        # The traceback ends in the function that is a stub. Others of the file may be written.
        stub = re.match(rf"{STUB}\n(?s:.*){name}\.py:(\d+): in (\w+)$", text, re.MULTILINE)
        print(f"\nnext, {name}.py: {f'to be written ({stub[2]}, line {stub[1]})' if stub else text}")
    if left and len(result) > 1:
        where = "" if folder.resolve() == HERE else f"{folder} "
        print(f"python exercises/grade.py {where}{name[:4]}")
    elif len(result) == len(POINTS):
        print("\nall done: python exercises/capstone.py")


def limit(text):
    """The argparse type of a limit."""
    if not 0 < float(text) <= 1e5:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100000")
    return float(text)


def fail(message, status=2):
    sys.stderr.write(" ".join(["grade.py:", *str(message).split()]) + "\n")
    sys.exit(status)


def command_line():
    """(arguments, the names of the exercises, the folder). Ends the program if they are wrong."""
    parser = argparse.ArgumentParser(description="Grade the exercises.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("what", nargs="*", metavar="ex03 | FOLDER",
                        help="exercises (default: all) and a folder of answers (default: exercises/), or "
                             "with --csv a folder of such folders")
    parser.add_argument("--show", action="store_true", help="draw what the answers do, into out/ex03.png")
    parser.add_argument("--csv", type=Path, help="grade each folder in FOLDER into this file, a row each")
    parser.add_argument("--time_limit", type=limit, default=60, help="seconds for an exercise (default: 60)")
    parser.add_argument("--memory_limit", type=limit, default=2, help="GB for an exercise (default: 2)")
    args = parser.parse_args()
    is_name = lambda word: re.fullmatch(r"ex\d\d(_\w+)?(\.py)?", word)
    chosen = [word.removesuffix(".py") for word in args.what if is_name(word)]
    folders = [Path(word) for word in args.what if not is_name(word)] or [HERE]
    for word in chosen:
        if not any(word in (name, name[:4]) for name in POINTS):
            fail(f"{word}: no such exercise; they are {', '.join(POINTS)}")
    if len(folders) > 1 or not folders[0].is_dir():
        fail(f"{folders[-1]}: not a folder, or one too many; give exercises (ex03) and one folder")
    if not args.csv and not any(map(is_answer, folders[0].iterdir())):
        fail(f"{folders[0]}: no ex*.py in it; a folder of such folders needs --csv")
    return args, [name for name in POINTS if not chosen or {name, name[:4]} & {*chosen}], folders[0]


def draw(folder, names):
    """Draws a picture for each exercise, with its answer. An error of the answer keeps its traceback."""
    import show as pictures  # late: it imports torch

    from support.checkpoint import ModelError
    for name in names:
        file = Path("out") / f"{name[:4]}.png"
        try:
            pictures.show(name, pictures.answers_of(folder, name), file)
        except ModelError as error:
            raise Problem(error) from error
        print(f"wrote {file}")


def main():
    args, names, folder = command_line()
    if args.show:
        return draw(folder, names)
    with Grader(names, args.time_limit, args.memory_limit) as grader:
        if args.csv:
            grade_class(grader, folder, args.csv)
        else:
            show(grader.finish(grader.start(folder)), folder)


def run_main():
    """main, whose errors become one line."""
    try:
        main()
    except (Problem, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted", 130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    run_main()
