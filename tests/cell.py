"""Makes one cell of `make reproduce`: its output goes to a log, and one line to the screen.

    python tests/cell.py RUNS/DATASET/MODEL/METHOD/SEED/metrics_test.json -- COMMAND ...

The line has a progress bar, F1, seconds and what is next, by RUNS/plan.txt, one cell a line, which
tests/plan.py writes. A note is shown once, not for every cell. The exit status is the command's.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path


def planned(runs):
    """The targets of the plan, in order."""
    path = runs / "plan.txt"
    return [Path(line) for line in path.read_text().splitlines()] if path.exists() else []


def name_of(target):
    return "/".join(target.parts[-5:-1])


def run(command, log):
    """The status of a command whose output is appended to a log; SIGTERM is passed on, it gets Ctrl-C too."""
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        ways = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
        before = {number: signal.signal(number, way) for number, way in ways.items()}
        status = process.wait()
        for number, way in before.items():
            signal.signal(number, way)
    return status if status >= 0 else 128 - status


def new_notes(log, runs):
    """The notes of a log that no cell has shown."""
    text = log.read_text(errors="replace").replace("\n  ", " ")  # a long note is folded
    notes = [line for line in text.splitlines() if line.startswith("note: ")]
    path = runs / "notes.txt"
    shown = path.read_text().splitlines() if path.exists() else []
    new = [line for line in dict.fromkeys(notes) if line not in shown]
    with path.open("a") as file:
        file.writelines(line + "\n" for line in new)
    return new


def main(argv=None):
    target, _, *command = argv or sys.argv[1:]
    target = Path(target)
    runs, log = target.parents[4], target.parent.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if status := run(command, log):
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        print(*[line for line in lines if line.strip()][-3:], sep="\n")
        print(f"{name_of(target)} ended with status {status}: {log}", flush=True)
        return status
    print(*(f"{line}\n" for line in new_notes(log, runs)), sep="", end="")
    plan = planned(runs)
    done, left = sum(cell.exists() for cell in plan), [cell for cell in plan if not cell.parent.exists()]
    bar = f"[{'#' * (12 * done // max(1, len(plan))):<12}] {done:>{len(str(len(plan)))}}/{len(plan)}"
    f1, seconds = 100 * json.loads(target.read_bytes())["f1_macro"], time.monotonic() - started
    after = f"; next {name_of(left[0])}" if left else ""
    print(f"{bar} {name_of(target)}: F1 {f1:.1f}, {seconds:.0f} s{after}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
