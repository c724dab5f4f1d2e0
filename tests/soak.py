"""Trains for a long time and looks whether memory or open files grow, or the speed falls.

    python tests/soak.py [--minutes 30] [--results FILE]

The tiny model of tests/tiny.py, with a validation and a checkpoint every 20 steps. Every 10 seconds a sample
of the process is taken; medians of the first third are compared with those of the last. The exit status is 1
if memory grows by more than 5%, the open files by any, or the speed falls by more than 25%: other work on the
machine counts as a fault.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

STEPS = 10_000_000
# least and most of last / first
LIMITS = {"memory_mb": (0, 1.05), "open_files": (0, 1), "steps_per_s": (0.75, 99), "log_mb": (0, 99)}


def sample(pid, log):
    """What the process holds now; its step is that of the last whole line of the log."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines[-2:] if line.endswith("\n")]
    memory_mb = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return {"time": time.monotonic(), "step": max(steps, default=0), "log_mb": sum(map(len, lines)) / 1e6,
            "memory_mb": memory_mb, "open_files": len(os.listdir(f"/proc/{pid}/fd"))}


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
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        child = subprocess.Popen([sys.executable, *words.split()], env=environment,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end, samples = time.monotonic() + 60 * args.minutes, []
        while time.monotonic() < end:
            time.sleep(10)
            assert child.poll() is None, "training ended"
            samples.append(sample(child.pid, Path(work, "out", "log.jsonl")))
        child.send_signal(signal.SIGTERM)
        assert child.wait() == 128 + signal.SIGTERM, "a stop by signal was not a clean one"
    samples = [one for one in samples if one["step"]]  # training, not starting
    for before, one in zip(samples, samples[1:]):
        one["steps_per_s"] = (one["step"] - before["step"]) / (one["time"] - before["time"])
    third = (len(samples) - 1) // 3
    first, last = samples[1: 1 + third], samples[-third:]
    hours, result = (last[0]["time"] - first[0]["time"]) / 3600, {"minutes": args.minutes, "failed": []}
    for name, (low, high) in LIMITS.items():
        a, b = (statistics.median(one[name] for one in part) for part in (first, last))
        result[name] = {"first_third": a, "last_third": b, "growth_per_hour": (b - a) / hours}
        result["failed"] += [name] * (not low * a <= b <= high * a)
        print(f"{name:<12} {a:10.2f} {b:10.2f} {(b - a) / hours:+10.2f} an hour", flush=True)
    print("failed:", *result["failed"])
    if args.results:
        with args.results.open("a") as file:
            print(json.dumps(result), file=file)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
