"""Interrupts `make reproduce` by Ctrl-C, SIGKILL and Ctrl-C, and compares its tables with a whole one's.

    python tests/interrupts.py [--results FILE]        two reproductions of profile tiny, about 15 minutes

For a checkout without runs/tiny. The exit status is 1 if the tables differ in anything but seconds.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

from measure import append  # noqa: E402

RUNS = ROOT / "runs" / "tiny"
BLOWS = (0, signal.SIGINT), (5, signal.SIGKILL), (11, signal.SIGINT)  # (finished cells, signal)


def start():
    """`make reproduce` in a session of its own, to whose processes Ctrl-C is not ignored."""
    return subprocess.Popen(["make", "reproduce", "PROFILE=tiny"], cwd=ROOT, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def strike(process, number):
    """A signal to the group, as a terminal sends it; SIGKILL to all below, torchrun's workers too."""
    if number == signal.SIGKILL:
        found = [process.pid]
        for pid in found:
            below = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
            found += map(int, below.stdout.split())
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    else:
        os.killpg(process.pid, number)
    process.wait()


def tables():
    text = (RUNS / "tables.md").read_text()
    return [line for line in text.splitlines() if not line.startswith("| seconds")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, help="a file that gets a JSON line")
    args = parser.parse_args(argv)
    assert not RUNS.exists(), f"remove {RUNS} first"
    for cells, number in BLOWS:
        process = start()
        while len([*RUNS.rglob("metrics_test.json")]) < cells or not RUNS.exists():
            assert process.poll() is None, "it ended before it was struck"
            time.sleep(0.5)
        time.sleep(3)
        strike(process, number)
    assert start().wait() == 0, "it did not go on"
    interrupted = tables()
    shutil.rmtree(RUNS)
    began = time.monotonic()
    assert start().wait() == 0
    seconds, same = time.monotonic() - began, tables() == interrupted
    print(f"the same tables: {same}; undisturbed it takes {seconds:.0f} s")
    if args.results:
        append(args.results, {
            "what": "make reproduce: two Ctrl-C and a SIGKILL", "injected": len(BLOWS), "lost": int(not same),
            "note": f"{len([*RUNS.rglob('metrics_test.json')])} cells, {seconds:.0f} s undisturbed",
            "command": "python tests/interrupts.py"})
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
