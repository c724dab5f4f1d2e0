"""Trains for a long time and looks whether memory or open files grow, or the speed falls.

    python tests/soak.py [--minutes 30] [--results FILE]

The tiny model of tests/tiny.py, with a validation and a checkpoint every 20 steps. Every 10 seconds a sample
of the process is taken; medians of the first third are compared with those of the last. The exit status is 1
if memory grows by more than 5%, the open files by any, or the steps per CPU second fall by more than 25%.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

import tiny  # noqa: E402
from measure import append  # noqa: E402

STEPS = 10_000_000
LIMITS = {"memory_mb": (0, 1.05), "open_files": (0, 1), "steps_per_cpu_s": (0.75, 99)}  # of last / first


def sample(pid, log):
    """What the process holds now; its step is that of the last whole line of the log."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines[-2:] if line.endswith("\n")]
    stat = Path(f"/proc/{pid}/stat").read_text().split()  # 13, 14: ticks of CPU time; 23: resident pages
    return {"s": time.monotonic(), "cpu_s": (int(stat[13]) + int(stat[14])) / os.sysconf("SC_CLK_TCK"),
            "memory_mb": int(stat[23]) * os.sysconf("SC_PAGE_SIZE") / 1e6, "step": max(steps, default=0),
            "open_files": len(os.listdir(f"/proc/{pid}/fd")), "log_mb": sum(map(len, lines)) / 1e6}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, help="a file that gets a JSON line")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        tiny.write_corpora(work, 0, "mini")
        tiny.write_model(f"{work}/models/mistral", "mistral")
        words = (f"{ROOT}/train.py --method clsp --model {work}/models/mistral --data_dir {work}/goemotions "
                 f"--dtype fp32 --batch_size 16 --lora_r 4 --epochs {STEPS} --max_steps {STEPS} "
                 f"--validations {STEPS // 20} --out {work}/out")
        child = subprocess.Popen([sys.executable, *words.split()], stderr=subprocess.DEVNULL,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        end, samples = time.monotonic() + 60 * args.minutes, []
        while time.monotonic() < end:
            time.sleep(10)
            assert child.poll() is None, "training ended"
            if (one := sample(child.pid, Path(work, "out", "log.jsonl")))["step"]:
                samples.append(one)
        child.send_signal(signal.SIGTERM)
        assert child.wait() == 128 + signal.SIGTERM, "a stop by signal was not a clean one"
    for before, one in zip(samples, samples[1:]):
        for clock in ("s", "cpu_s"):
            passed = max(one[clock] - before[clock], 1e-3)  # a process that was stopped used no CPU time
            one[f"steps_per_{clock}"] = (one["step"] - before["step"]) / passed
    first, last = samples[1: 1 + len(samples) // 3], samples[-(len(samples) // 3):]
    assert first, "too short: training had hardly begun"
    hours, result = (last[0]["s"] - first[0]["s"]) / 3600, {"minutes": args.minutes, "failed": []}
    for name in (*LIMITS, "steps_per_s", "log_mb"):  # other work on the machine changes the steps per second
        a, b = (statistics.median(one[name] for one in part) for part in (first, last))
        result[name] = {"first_third": a, "last_third": b, "growth_per_hour": (b - a) / hours}
        low, high = LIMITS.get(name, (0, 1e9))
        result["failed"] += [name] * (not low * a <= b <= high * a)
        print(f"{name:<16} {a:10.2f} {b:10.2f} {(b - a) / hours:+10.2f} an hour")
    print("failed:", *result["failed"])
    if args.results:
        shown = (f"{name} {result[name]['first_third']:.4g} to {result[name]['last_third']:.4g}"
                 for name in ("memory_mb", "open_files", "steps_per_cpu_s", "log_mb"))
        result |= {"what": f"{args.minutes:g} minutes of training: memory, open files, speed",
                   "injected": None, "lost": len(result["failed"]), "note": ", ".join(shown),
                   "command": f"python tests/soak.py --minutes {args.minutes:g}"}
        append(args.results, result)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
