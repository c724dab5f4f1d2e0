"""make reproduce: its cells and their order, one line for each, what it says that it costs."""

import json
import subprocess
import sys
from pathlib import Path

import cell
import plan
import pytest

ROOT = Path(cell.__file__).resolve().parent.parent


def commands(*arguments):
    """The commands of the cells, as make has them."""
    made = subprocess.run(["make", "-n", "cells", *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return [line for line in made.stdout.replace("\\\n", " ").splitlines() if "tests/cell.py" in line]


def test_profile_small_takes_several_files_and_puts_first_what_matters_most():
    lines = commands("PROFILE=small", "CSV=/a/conv.csv b/stud.csv", "MODEL=/m/smol", "DATA=nowhere")
    cells = [line.split("runs/small/")[1].split("/metrics_test.json")[0] for line in lines]
    assert cells[:8] == [f"{corpus}/smol{variant}/{method}/1" for variant in ("", "+unseen")
                         for corpus in ("conv", "stud") for method in ("cls", "clsp")]
    seeds = {name: sorted(own.split("/")[3] for own in cells if own.startswith(f"conv/smol/{name}/"))
             for name in ("cls", "clsp", "lm", "lmp", "q0s", "q1s", "q2s")}
    assert seeds == {"cls": ["1", "2", "3"], "clsp": ["1", "2", "3"], "lm": ["1", "2"], "lmp": ["1", "2"],
                     "q0s": ["1"], "q1s": ["1"], "q2s": ["1"]}
    for name, line in zip(cells, lines, strict=True):
        own = {"conv": "/a/conv.csv", "stud": "b/stud.csv"}[name.split("/")[0]]
        assert f"--dataset {own} " in line and "--limit 4000 500 2000" in line
        assert ("--unseen_users" in line) == ("+unseen" in name)
        trained = name.split("/")[2] in ("cls", "clsp", "lm", "lmp")
        assert ("--epochs 1 --batch_size 16 --lora_r 8 --learning_rate 1e-3" in line) == trained


def test_profile_paper_trains_with_every_seed_and_asks_once():
    cells = [line.split("runs/paper/")[1].split("/metrics_test.json")[0]
             for line in commands("PROFILE=paper", "SEEDS=1 2 3")]
    for name in cells:
        assert len([own for own in cells if own.rpartition("/")[0] == name.rpartition("/")[0]]) == (
            1 if "/q" in name else 3)


@pytest.fixture
def target(tmp_path):
    plans = [tmp_path / name / "1" / "metrics_test.json" for name in ("d/m/cls", "d/m/clsp", "d/m/lm")]
    (tmp_path / "plan.txt").write_text("".join(f"{own}\n" for own in plans))
    return plans[0]


def made(target, code, capfd):
    """(exit status, lines on the screen) of a cell whose command is a line of Python."""
    status = cell.main([str(target), "--", sys.executable, "-c", code])
    return status, capfd.readouterr().out.splitlines()


def test_a_cell_is_one_line_and_a_note_is_shown_once(target, capfd):
    code = (f"import os, pathlib; out = pathlib.Path({str(target)!r})\n"
            "print('note: not official'); print('x'); os.makedirs(out.parent, exist_ok=True)\n"
            "out.write_text('{\"f1_macro\": 0.4567}')")
    status, lines = made(target, code, capfd)
    assert status == 0 and lines[0] == "note: not official" and len(lines) == 2
    assert lines[1] == f"[{'#' * 4:<12}] 1/3 d/m/cls/1: F1 45.7, 0 s; next d/m/clsp/1"
    assert made(target, code, capfd)[1] == [lines[1]]
    assert "x\n" in target.parent.with_suffix(".log").read_text()


def test_a_cell_that_fails_says_why_and_ends_with_the_status_of_its_command(target, capfd):
    code = "import sys; sys.exit(print('error: no such model', file=sys.stderr) or 2)"
    status, lines = made(target, code, capfd)
    assert status == 2 and lines[0] == "error: no such model" and "d/m/cls/1 ended with status 2" in lines[1]


def test_a_cell_passes_a_signal_on_and_waits_for_its_command(target):
    code = ("import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved') or 143))\n"
            "print('ready', flush=True); time.sleep(60)")
    command = [sys.executable, cell.__file__, str(target), "--", sys.executable, "-c", code]
    process = subprocess.Popen(command)
    log = target.parent.with_suffix(".log")
    while not log.exists() or "ready" not in log.read_text():
        assert process.poll() is None
    process.terminate()
    assert process.wait(30) == 143 and "saved" in log.read_text()


def test_the_hours_of_profile_small_are_measured_once_for_each_kind_of_cell(tmp_path, monkeypatch, capsys):
    """0.01 h each: 4,000 trained on, four times 500 / 2 validated, 1,500 answered, 2 ms each, and a start."""
    asked, seconds = [], {"start": 36 - 0.002 * (4000 + 1000 + 1500), "step": 0.002, "answer": 0.002}
    monkeypatch.setattr(plan, "calibrate", lambda kind, runs: asked.append(kind) or seconds)
    names = ("d/m/cls/1", "d/m+unseen/clsp/1", "d/m/clsp/2")
    todo = [tmp_path / name / "metrics_test.json" for name in names]
    assert plan.hours_of(todo, [4000, 500, 1000], 1) == pytest.approx(0.03)
    assert plan.hours_of(todo, [4000, 500, 1000], 1) == pytest.approx(0.03)
    assert asked == [("d", "m", "clsp")] and json.loads((tmp_path / "calibration.json").read_text())
    assert capsys.readouterr().out.count("measuring d m clsp") == 1
