"""Kills training runs at random moments and looks whether anything is lost.

    python tests/chaos.py [--kills 50] [--seconds 600] [--seed 0]

Each run, with one and with two processes, is started again by the same command until it is finished. The
adapter and predictions must equal, byte for byte, an undisturbed run. Prints a row per kind of run.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

RESULTS = ("adapter_model.safetensors", "predictions_test.jsonl", "metrics_val.json")


def start(inputs, out, processes):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = f"--method clsp --model {inputs}/models/mistral --data_dir {inputs}/goemotions --out {out} "
    arguments += (
        "--dtype fp32 --batch_size 16 --max_steps 40 --validations 10 --lora_r 4 --learning_rate 1e-3"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), *arguments.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def results(out):
    """The bytes of what must be equal; of the metrics, all but the seconds they took."""
    metrics = [line for line in (out / RESULTS[2]).read_text().splitlines() if "seconds" not in line]
    return [(out / name).read_bytes() for name in RESULTS[:2]] + metrics


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50, help="in all (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=600, help="end after about this (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, deadline, work = random.Random(args.seed), time.monotonic() + args.seconds, Path(tempfile.mkdtemp())
    tiny.write_corpora(work, 0, "mini")
    tiny.write_model(work / "models" / "mistral", "mistral")
    print(f"{'processes':>9} {'kills':>6} {'runs':>5} {'different':>9} {'refused':>8}")
    lost = 0
    for processes in (1, 2):
        whole = work / f"whole{processes}"
        began = time.monotonic()
        assert start(work, whole, processes).wait() == 0
        lasts, kills, runs, different, refused = time.monotonic() - began, 0, 0, 0, 0
        while kills < args.kills / 2 and time.monotonic() < deadline - args.seconds * (2 - processes) / 2:
            out, code = work / "out", None
            while code != 0:
                process = start(work, out, processes)
                try:
                    code = process.wait(
                        timeout=rng.uniform(0.4, 1.1) * lasts if kills < args.kills / 2 else None
                    )
                    if code:
                        refused, code = refused + 1, 0
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
                    process.wait()
                    kills += 1
            runs += 1
            different += not (out / "metrics_test.json").exists() or results(out) != results(whole)
            shutil.rmtree(out)
        print(f"{processes:>9} {kills:>6} {runs:>5} {different:>9} {refused:>8}", flush=True)
        lost += different + refused
    shutil.rmtree(work)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
