"""Tests of exercises/grade.py: a class of odd submissions gets the right points and the right reasons."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exercises"))

import grade  # noqa: E402
from test_exercise_mutations import MUTANTS, plug, reference_answers  # noqa: E402

# A right answer to exercise 9. 7 tests of 1 point together.
EMA = ("def decay_for(steps): return steps / (steps + 1)\n"
       "import torch\n@torch.no_grad()\ndef update_ema(ema, weights, decay):\n"
       "    for name, tensor in ema.items():\n        tensor.lerp_(weights[name].float(), 1 - decay)\n")
# Right answers to exercise 7, if {} is nothing.
HINGE = ("def hinge_d(real, fake):\n    {0}\n"
         "    return (1 - real.float()).relu().mean() + (1 + fake.float()).relu().mean()\n"
         "def hinge_g(fake, linear=False):\n    {0}\n"
         "    fake = fake.float()\n    return -fake.mean() if linear else (1 - fake).relu().mean()\n"
         "def still_teaches(loss, logits, least=0.01):\n    {0}\n"
         "    import torch\n    x = logits.detach().clone().requires_grad_()\n"
         "    return torch.autograd.grad(loss(x), x)[0].abs() * x.numel() >= least\n")
# Wrong answers to exercise 1, after some code.
ZEROS = "def karras_sigmas(n, *_):\n    return 0\n"
FORGER = '''
import json, os, sys
passed = json.dumps({"tests": {"test_ex01_" + name: "" for name in ("ends", "even_in_the_root", "one_level")},
                     "trouble": ""}) + "\\n"
for number in range(64):
    try:
        os.write(number, passed.encode())
    except OSError:
        pass
os._exit(0)
'''
NO_FAILURES = "import pytest\npytest.fail = lambda *args, **kwargs: None\n"
NO_EXPECTATIONS = ("import sys\ndef karras_sigmas(n, *_):\n    graders = sys.modules['test_exercises']\n"
                   "    graders.expect.__code__ = graders.require.__code__ = (lambda *_, **__: 0).__code__\n"
                   "    return __import__('torch').arange(2.0)\n")

# student: {file: text or bytes}, the exercises that pass, points, what the reason says
CLASS = {
    "bob waits": ({"ex01_karras_grid.py": "import time\ntime.sleep(60)", "ex09_ema.py": EMA}, "ex09", "1.0",
                  "missing: .*; ex01: takes more than 6 s$"),
    "cyd ends": ({"ex01_karras_grid.py": "import os; os._exit(0)",
                  "ex02_precondition.py": "import ctypes; ctypes.string_at(0)",
                  "ex03_consistency.py": "raise KeyboardInterrupt", "ex08_lora.py": "raise SystemExit",
                  "ex05_solve.py": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
                  "ex04_euler.py": "def euler_step(*_): raise KeyboardInterrupt\nguided = euler_step",
                  "ex09_ema.py": EMA}, "ex09", "1.0",
                 r"ex01: ends its process \(exit status 0\); ex02: .*SIGSEGV.*; ex03: KeyboardInterrupt.*; "
                 r"ex04: KeyboardInterrupt.*; ex05: ends the process that grades it; ex08: SystemExit"),
    "dan skips": ({"ex07_hinge.py": HINGE.format("__import__('pytest').skip('later')"),
                   "ex09_ema.py": "import pytest; pytest.skip('all', allow_module_level=True)\n" + EMA,
                   "ex01_karras_grid.py": "import pytest\ndef karras_sigmas(*_): pytest.xfail('hard')"},
                  "", "0.0", "ex01: .*; ex07: Skipped: later; ex09: Skipped: all"),
    "fay forges": ({"ex01_karras_grid.py": FORGER}, "", "0.0", "ex01: ends its process"),
    "gil recodes": ({"ex01_karras_grid.py": NO_EXPECTATIONS}, "", "0.0",
                    "ex01: the answer replaces test_exercises.(expect|require)"),
    "gus": ({}, "", "0.0", "^empty$"),
    "hal nests": ({"hal (1)/exercises/ex09_ema.py": EMA, "__MACOSX/ex09_ema.py": "", "notes.txt": "",
                   "hal (1)/old/ex09_ema.py": ""}, "ex09", "1.0",
                  r"^in hal \(1\)/exercises; not graded: hal \(1\)/old; missing: "),
    "ivy misnames": ({"ex9.py": EMA, "ex09_ema (1).py": EMA, "ex07_hinge.py": HINGE.format("")}, "ex07",
                     "1.0", r"^not graded: ex09_ema \(1\).py; not graded: ex9.py; missing: "),
    b"jos\xe9 encodes": ({"ex07_hinge.py": HINGE.format("").encode("utf-16"),
                          "ex09_ema.py": b"\xef\xbb\xbf# \xc3\xa9\n" + EMA.encode()}, "ex09", "1.0",
                         "ex07: .*null bytes|ex07: .*codec|ex07: .*UTF"),
    "kim changes": ({"ex01_karras_grid.py": "import torch\ntorch.set_default_dtype(torch.float64)\n"
                     "torch.set_default_device('meta')\ntorch.set_num_threads(64)\n" + ZEROS,
                     "ex07_hinge.py": HINGE.format(""), "ex09_ema.py": EMA}, "ex07 ex09", "2.0",
                    "ex01: "),
    "leo fills": ({"ex09_ema.py": "memory = bytearray(3 * 2 ** 30)\n" + EMA,
                   "ex07_hinge.py": "open('disk', 'wb').write(bytes(2 ** 27))\n" + HINGE.format("")},
                  "", "0.0", "ex07: OSError.*; ex09: MemoryError"),
    "mia imports": ({"ex07_hinge.py": "import a_missing_package\n" + HINGE.format(""),
                     "ex09_ema.py": "from support.engine import update_ema"}, "", "0.0",
                    "ex07: .*a_missing_package.*; ex09: .*imported, not written"),
    "mel mistypes": ({"ex01_karras_grid.py": "def karras_sigmas(n:\n    return n\n",
                      "ex07_hinge.py": "def hinge_d(real, fake):\nreturn 0\n"}, "", "0.0",
                     r"ex01: line 1: SyntaxError: '\(' was never closed; "
                     "ex07: line 2: IndentationError: expected an indented block"),
    "ned": ({"answers.docx": "", "week 1/notes.ipynb": ""}, "", "0.0",
            "^no ex.*py, but answers.docx, week 1$"),
}


@pytest.fixture
def run(python):
    return lambda *words: subprocess.run([python, "exercises/grade.py", *map(str, words)], cwd=plug.ROOT,
                                         capture_output=True, text=True)


def submit(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.fixture(scope="module")
def graded(python, tmp_path_factory):
    """({student: row of the CSV file}, what was printed) of CLASS, of ada, whose answers are right, and of
    eve."""
    folder = tmp_path_factory.mktemp("grade")
    (folder / "class" / ".git").mkdir(parents=True)
    reference_answers(folder / "class" / "ada")
    reference_answers(folder / "class" / "eve")
    for name, (_, *names) in plug.EXERCISES.items():        # eve: all wrong, and the first one hides it
        file = folder / "class" / "eve" / f"{name}.py"
        if name[:4] not in ("ex01", "ex02", "ex03", "ex09", "ex11"):        # five are enough
            file.unlink()
            continue
        text = file.read_text()
        changes = [mutant[1:3] for mutant in MUTANTS if mutant[0] in names and mutant[1] in text]
        file.write_text(text.replace(*changes[0]) if changes else "def upsample_backward(*_): pass")
    file = folder / "class" / "eve" / "ex01_karras_grid.py"
    file.write_text(NO_FAILURES + file.read_text())
    (folder / "class" / "ada" / "ex01_old.py").write_text("raise SystemExit")
    (folder / "class" / "README.txt").write_text("not a student")
    for student, (files, *_) in CLASS.items():
        submit(folder / "class" / os.fsdecode(student), files)
    os.mkfifo(folder / "class" / "gil recodes" / "ex09_ema.py")
    grades = folder / "new" / "grades.csv"
    done = subprocess.run([python, "exercises/grade.py", folder / "class", "--csv", grades,
                           "--time_limit", "6", "--memory_limit", "1"], cwd=plug.ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    with open(grades, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["student"] for row in rows] == sorted(row["student"] for row in rows)
    return {row["student"]: row for row in rows}, done.stdout.decode()


def test_a_wrong_answer_does_not_hide_the_others(graded):
    row = graded[0]["eve"]
    assert re.match("missing: .*; ex01: the answer replaces pytest.fail; ex11: ", row["reason"])
    for name in grade.POINTS:
        passed, tests = row[name].split(" of ")
        assert int(passed) < int(tests)


def row_of(graded, student):
    return graded[0][os.fsdecode(student).encode("utf-8", "backslashreplace").decode()]


def test_every_folder_has_a_row(graded):
    assert len(graded[0]) == len(graded[1].splitlines()) == len(CLASS) + 2
    for row in graded[0].values():
        assert list(row) == ["student", *grade.POINTS, "points", "of", "reason"] and row["of"] == "27"


def test_right_answers_get_all_points(graded):
    row = graded[0]["ada"]
    assert row["reason"] == "not graded: ex01_old.py"
    for name in grade.POINTS:
        passed, tests = row[name].split(" of ")
        assert passed == tests and int(tests) > 1
    assert row["points"] == "27.0"


@pytest.mark.parametrize("student", CLASS, ids=str)
def test_odd_submissions_get_their_points_and_a_reason(graded, student):
    _, right, points, reason = CLASS[student]
    row = row_of(graded, student)
    assert re.search(reason, row["reason"]), row["reason"]
    assert row["points"] == points
    for name in grade.POINTS:
        passed, tests = row[name].split(" of ")
        assert tests == graded[0]["ada"][name].split(" of ")[1]
        assert passed == (tests if name[:4] in right else "0")


def test_a_class_needs_no_more_than_its_first_exercises(run, tmp_path):
    submit(tmp_path / "class" / "ada", {"ex09_ema.py": EMA})
    done = run(tmp_path / "class", "ex07", "ex09_ema.py", "--csv", tmp_path / "grades.csv")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grades.csv").read_text().splitlines() == [
        '"student","ex07_hinge","ex09_ema","points","of","reason"',
        '"ada","0 of 8","7 of 7","1.0","2","missing: ex07"']


def test_no_cell_is_a_formula(tmp_path, monkeypatch):
    """Names and messages that begin like formulas; ; begins a new cell in some languages' spreadsheets."""
    for name in ("=1+2", "+1", "-1", "@SUM(A1)", " \t=1", "ada; =1", "ada-1"):
        submit(tmp_path / "class" / name, {"ex09_ema.py": EMA})
    replies = {"": {"tests": {"test_ex09_a": ""}, "trouble": ""}}
    bad = {"tests": {"test_ex09_a": "=HYPERLINK()"}, "trouble": ""}
    monkeypatch.setattr(grade.Grader, "ask", lambda self, folder, name: replies.get(name, bad))
    monkeypatch.setattr(grade, "reasons", lambda result: [text for _, _, text in result.values()])
    with grade.Grader(["ex09_ema"]) as grader:
        grade.grade_class(grader, tmp_path / "class", tmp_path / "grades.csv")
    lines = (tmp_path / "grades.csv").read_text().splitlines()[1:]
    names = ["\"' \t=1", "\"'+1", "\"'-1", "\"'=1+2", "\"'@SUM(A1)", '"ada-1', '"ada; =1']
    assert lines == [f"""{name}","0 of 1","0.0","1","'=HYPERLINK()\"""" for name in names]


def test_the_overview_names_the_next_exercise(capsys):
    stubs = {name: (0, 2, f"NotImplementedError\n{name}.py:9: in f\n    g()\n{name}.py:7: in precondition\n"
                    "    raise NotImplementedError") for name in grade.POINTS}
    grade.show(stubs | {"ex01_karras_grid": (2, 2, "")}, grade.HERE)
    assert capsys.readouterr().out.endswith(
        "1.0 of 27 points\n\nnext, ex02_precondition.py: to be written (precondition, line 7)\n"
        "python exercises/grade.py ex02\n")
    torch_s = "NotImplementedError: \"normal_kernel_cpu\" not implemented for 'Long'"      # not of a stub
    grade.show({"ex09_ema": (0, 2, torch_s)}, grade.HERE)
    assert capsys.readouterr().out.endswith(f"next, ex09_ema.py: {torch_s}\n")
    assert grade.reasons({"ex09_ema": (0, 2, torch_s)}) == [f"ex09: {torch_s}"]


def test_one_exercise_says_what_its_tests_say(run, tmp_path):
    submit(tmp_path, {"ex07_hinge.py": HINGE.format("print('so far')\n    fake = fake.bfloat16().x")})
    done = run(tmp_path, "ex07")
    assert done.returncode == 0 and done.stdout.count("AttributeError") == 2
    assert "ex07_hinge.py:3: in hinge_d" in done.stdout and "printed:\nso far" in done.stdout
    assert "of 1 points" in done.stdout
    submit(tmp_path, {"ex09_ema.py": EMA.replace("return steps / (steps + 1)", "raise NotImplementedError")})
    stub = run(tmp_path, "ex09")
    assert "5 of 7" in stub.stdout and "next, ex09_ema.py: to be written (decay_for, line 1)" in stub.stdout


@pytest.mark.parametrize("words, says", [
    ("ex13", "no such exercise"), ("ex01_karras", "no such exercise"), ("nowhere", "not a folder"),
    ("tests exercises", "one too many"), ("tests", "needs --csv"), ("empty --csv g.csv", "no folders in it"),
    ("--time_limit 0 ex01", "not between"), ("--memory_limit nan", "not between"),
    ("--cvs g", "unrecognized"),
    ("full --csv full/ada/ex09_ema.py", "overwrite"), ("full --csv full", "cannot be written"),
    ("full --csv full/ada/ex09_ema.py/g.csv", "cannot be written"),
])
def test_wrong_arguments_are_one_line(words, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    submit(tmp_path / "full" / "ada", {"ex09_ema.py": EMA})
    submit(tmp_path / "tests", {"notes.txt": ""})
    submit(tmp_path / "exercises", {"notes.txt": ""})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grade.py", *words.split()])
    monkeypatch.setattr(grade.Grader, "ask", lambda *_: {"tests": {}, "trouble": "not started"})
    with pytest.raises(SystemExit, match="2"):
        grade.run_main()
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert (tmp_path / "full" / "ada" / "ex09_ema.py").read_text() == EMA


def test_rows_stay_when_grading_is_interrupted(tmp_path):
    submit(tmp_path / "class" / "ada", {"ex09_ema.py": EMA})
    endless = f"import os\nopen({str(tmp_path / 'number')!r}, 'w').write(str(os.getpid()))\nwhile True: pass"
    submit(tmp_path / "class" / "zed", {"ex09_ema.py": endless})
    process = subprocess.Popen([sys.executable, "exercises/grade.py", tmp_path / "class", "ex09", "--csv",
                                tmp_path / "grades.csv"], cwd=plug.ROOT, text=True, stderr=subprocess.PIPE)
    number = tmp_path / "number"
    wait_until(lambda: (tmp_path / "grades.csv").exists() and number.exists() and number.read_text())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and len(error.splitlines()) == 1 and "interrupted" in error
    assert (tmp_path / "grades.csv").read_text().splitlines()[1:] == [
        '"ada","7 of 7","1.0","1",""']
    wait_until(lambda: not is_running(int(number.read_text())))


def wait_until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every exercise has a new Python")
def test_processes_of_an_answer_end_with_it(run, tmp_path):
    number = tmp_path / "number"
    submit(tmp_path / "ada", {"ex09_ema.py": "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
                              f"    open({str(number)!r}, 'w').write(str(os.getpid()))\n    time.sleep(100)\n"
                              f"while not os.path.exists({str(number)!r}): time.sleep(0.01)\n" + EMA})
    assert "1.0 of 1 points" in run(tmp_path / "ada", "ex09").stdout
    assert not is_running(int(number.read_text()))


def test_where_forks_do_not_exist(python, tmp_path, monkeypatch):
    """The same replies from a new Python for every exercise."""
    import sandbox
    submit(tmp_path, {"ex09_ema.py": EMA})
    request = {"folder": str(tmp_path), "exercise": "ex09_ema", "memory_limit": 1}
    monkeypatch.setattr(sys, "executable", str(python))
    reply = sandbox.serve(request | {"time_limit": 60}, sandbox.in_a_new_python)
    assert len(reply["tests"]) == 7 and not any(reply["tests"].values()) and not reply["trouble"]
    monkeypatch.undo()
    reply = sandbox.serve(request | {"time_limit": -29.9}, sandbox.in_a_new_python)
    assert reply == {"tests": {}, "trouble": "takes more than -29.9 s"}


def test_points_are_the_difficulties_of_the_stubs():
    assert list(grade.POINTS) == list(plug.EXERCISES)
    table = (plug.ROOT / "exercises" / "README.md").read_text()
    for number, (name, worth) in enumerate(grade.POINTS.items(), 1):
        assert f"difficulty {worth} of 5" in (plug.ROOT / "exercises" / f"{name}.py").read_text()
        assert re.search(rf"^\| {number} \|.*\| {worth} \| \d+ \|$", table, re.MULTILINE)


def test_grade_for_the_capstone(python, tmp_path, monkeypatch):
    """The stub, without its docstring, and nothing else."""
    monkeypatch.setattr(sys, "executable", str(python))
    stub = (plug.ROOT / "exercises" / "ex09_ema.py").read_text()
    submit(tmp_path / "ada", {"ex09_ema.py": stub.split('"""')[2]})
    shutil.copy(plug.ROOT / "exercises" / "ex07_hinge.py", tmp_path / "ada")
    passed, tests, text = grade.grade(tmp_path / "ada", ["ex09_ema"])["ex09_ema"]
    assert (passed, tests) == (0, 7) and text.startswith("NotImplementedError")


def test_a_sandbox_whose_grader_was_killed_ends_in_silence():
    """The reply finds no reader. Its traceback would appear in the shell after the grader's end."""
    process = subprocess.Popen([sys.executable, "exercises/sandbox.py"], cwd=plug.ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    request = {"folder": "", "exercise": "ex01", "time_limit": 60, "memory_limit": 2}
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.close()
    assert process.stderr.read() == "" and process.wait(60) == 0
