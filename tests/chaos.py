"""Kills what runs long, at random moments and in the middle of writes, and looks whether anything is lost.

    python tests/chaos.py [--kills 60] [--seconds 900] [--seed 0] [--rows NAME ...] [--results FILE]

Each row is a kind of victim, started again by the same command until it is finished. What it leaves must
equal, byte for byte, what an undisturbed one leaves. The exit status is 1 if anything was lost: runs that end
different, starts refused although nobody killed them (or hung), partial files under a final name, requests
repeated although the file of answers held a whole line for them.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

import test_api  # noqa: E402
import tiny  # noqa: E402
from measure import append  # noqa: E402

CORPUS = random.Random(0).randbytes(300_000)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "no_proxy": "*",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else new workers call the dead ones' ports: pytorch#135712
}


def send_corpus(handler):
    """GET: CORPUS, or the rest of it that is asked for, in about a second."""
    start = int(handler.headers.get("Range", "bytes=0-")[len("bytes="): -1])
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(CORPUS) - start))
    handler.end_headers()
    for k in range(start, len(CORPUS), 4096):
        handler.wfile.write(CORPUS[k: k + 4096])
        time.sleep(0.015)


def answer(prompt, n):
    """POST: a chat completion, the same whenever a prompt is asked."""
    time.sleep(0.2)
    return test_api.reply(random.Random(prompt).choice(("joy", "anger, love", "I cannot say.")))


# ---- How a victim is struck: each returns whether it was, False if it ended before ----


def workers(process):
    """The children of torchrun."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill_all(process):
    """SIGKILL to a process and to its workers, which a signal to its group does not reach."""
    for pid in (*workers(process), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_over(process, seconds):
    """Waits; True if the process ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def at_random(process, out, rng, lasts):
    if is_over(process, rng.uniform(0.2, 1.0) * lasts):
        return False
    number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    kill_all(process) if number == signal.SIGKILL else process.send_signal(number)
    return True


def in_a_write(process, out, rng, lasts):
    """Strikes while a temporary file of lora.write_atomically is there."""
    before = {*out.rglob("*.tmp")}
    if is_over(process, rng.uniform(0.2, 0.9) * lasts):
        return False
    while process.poll() is None:
        if {*out.rglob("*.tmp")} - before:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            if {*out.rglob("*.tmp")} - before:
                process.kill()
                return True
            process.send_signal(signal.SIGCONT)  # the file was renamed before the process stopped
    return False


def one_worker(process, out, rng, lasts):
    """Strikes one of two workers; torchrun ends the other one and starts both again."""
    if is_over(process, rng.uniform(0.2, 1.0) * lasts) or not (alive := workers(process)):
        return False
    os.kill(rng.choice(alive), signal.SIGKILL)
    return True


# ---- The rows ----

MODEL = "--model {inputs}/models/mistral --data_dir {inputs}/goemotions --out {out}"
TRAIN = (f"{ROOT}/train.py --method clsp {MODEL} --dtype fp32 --batch_size 16 --max_steps 40 --validations "
         "10 --lora_r 4 --learning_rate 1e-3")
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2"
QUERY = f"{ROOT}/infer.py {MODEL} --method"
DOWNLOAD = ('-c "import sys, pathlib, data; data.download(*sys.argv[1:3], pathlib.Path(sys.argv[3]))" {url} '
            f"{hashlib.sha1(b'blob %d' % len(CORPUS) + bytes(1) + CORPUS).hexdigest()} {{out}}/corpus")
PREDICTIONS = ("predictions_test.jsonl",)
TRAINED = (*PREDICTIONS, "metrics_test.json", "metrics_val.json", "adapter_model.safetensors")
ROWS = {  # victim: (command behind `python`, how it is struck, files that must be equal)
    "train": (TRAIN, at_random, TRAINED),
    "train, two processes": (f"{TORCHRUN} {TRAIN}", at_random, TRAINED),
    "train, in a write": (TRAIN, in_a_write, TRAINED),
    "train, one of two workers": (f"{TORCHRUN} --max-restarts 3 {TRAIN}", one_worker, TRAINED),
    "query of a model": (f"{QUERY} q0s --dtype fp32", at_random, PREDICTIONS),
    "query of a server": (f"{QUERY} q1s --api_base {{url}}/v1", at_random, PREDICTIONS),
    "download": (DOWNLOAD, at_random, ("corpus",)),
}
COLUMNS = ("kills", "runs", "different", "refused", "partial", "repeated")


def contents(out, names):
    """The files' bytes, less the seconds and the place of a run, and the checksums of what holds them."""
    return [re.sub(rb'"(seconds|out|run.json|figures)": .*', b"", (out / name).read_bytes())
            for name in names if (out / name).exists()]


def is_whole(path):
    """False for a file under its final name that is cut; what is appended to may end anywhere."""
    try:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json" or path.name.startswith("predictions"):
            [*map(json.loads, re.split(r"\n(?=\{)", path.read_text()))]
    except (ValueError, SafetensorError):
        return False
    return path.name != "corpus" or path.read_bytes() == CORPUS


def received(path):
    """The prompts that a file of answers answers in whole lines."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else ()
    return {json.loads(line)["request"]["messages"][0]["content"] for line in lines if line.endswith(b"}")}


def campaign(command, strike, results, start, asked, work, rng, kills, deadline):
    """Strikes victims of a row `kills` times, or until the deadline; returns {column: number}."""
    began, whole, out, counted = time.monotonic(), work / "whole", work / "out", dict.fromkeys(COLUMNS, 0)
    assert start(command, whole).wait() == 0, "the undisturbed victim failed"
    lasts = time.monotonic() - began
    deadline = max(deadline, began + 4 * lasts)  # a slow machine, too, gets its kills
    while counted["kills"] < kills and time.monotonic() < deadline:
        code = refused = None
        while code != 0 and not refused:
            answered, mark, struck = received(out / "answers.jsonl"), len(asked), False
            fresh, began, process = not out.exists(), time.monotonic(), start(command, out)
            if counted["kills"] < kills and time.monotonic() < deadline:
                struck = strike(process, out, rng, lasts)
            if hung := not is_over(process, 60 + 20 * lasts):
                kill_all(process)
            code = process.wait()
            refused = hung or code != 0 and (strike is one_worker or not struck)  # torchrun replaces a worker
            if fresh and not struck:  # load comes and goes
                lasts = min(lasts, time.monotonic() - began)
            counted["kills"] += struck
            counted["partial"] += sum(not is_whole(path) for path in out.rglob("*"))
            counted["repeated"] += len(answered & {*asked[mark:]})
        counted["runs"] += 1
        counted["refused"] += refused
        counted["different"] += not refused and contents(out, results) != contents(whole, results)
        shutil.rmtree(out)
    shutil.rmtree(whole)
    return counted


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--kills", type=int, default=60, help="in all (default: %(default)s)")
    add("--seconds", type=float, default=900, help="end about then (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="(default: all)")
    add("--results", type=Path, help="a file that gets a JSON line per row")
    args = parser.parse_args(argv)
    rng, end, work = random.Random(args.seed), time.monotonic() + args.seconds, Path(tempfile.mkdtemp())
    if args.rows != ["download"]:
        tiny.write_corpora(work, 0, "mini")
        tiny.write_model(work / "models" / "mistral", "mistral")
    server, test_api.Handler.do_GET = test_api.Server(answer), send_corpus
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored, by all

    def start(command, out):
        out.mkdir(exist_ok=True)
        words = shlex.split(command.format(inputs=work, out=out, url=server.base.removesuffix("/v1")))
        return subprocess.Popen([sys.executable, *words], env=os.environ | ENVIRONMENT,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    print(f"{'victim':<26}" + "".join(f"{name:>10}" for name in COLUMNS), flush=True)
    kills = lost = 0
    for left, name in zip(range(len(args.rows), 0, -1), args.rows, strict=True):
        share, now = math.ceil((args.kills - kills) / left), time.monotonic()
        counted = campaign(*ROWS[name], start, server.seen, work, rng, share, now + (end - now) / left)
        kills, lost = kills + counted["kills"], lost + sum(counted[column] for column in COLUMNS[2:])
        print(f"{name:<26}" + "".join(f"{counted[column]:>10}" for column in COLUMNS), flush=True)
        if args.results:
            append(args.results, counted | {
                "what": f"kills: {name}", "injected": counted["kills"], "seed": args.seed,
                "lost": sum(counted[column] for column in COLUMNS[2:]),
                "note": f"{counted['runs']} runs, each ended as an undisturbed one",
                "command": f"python tests/chaos.py --kills {args.kills} --seconds {args.seconds:.0f}"})
    server.die()
    shutil.rmtree(work)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
