"""What `make reproduce` is about to do: the cells, what they cost on this machine, what is missing.

    python tests/plan.py PROFILE --data DIR --model M --limit N N N --epochs N --cells TARGET ...    before
    python tests/plan.py PROFILE --missing                                                           after

A target is the metrics_test.json of a cell; RUNS/plan.txt gets them in their order. The hours of profile
small are measured: a few steps and answers of each kind of cell on each corpus, by the cell's own command as
make has it, kept in RUNS/calibration.json. Those of profile paper are computed: a training step takes 4 FLOP
per weight and token (forward, and the gradient of activations), a response 20 tokens, at 40% of the
matrix-product rate that is measured here and now, a usual share for plain PyTorch.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import lora  # noqa: E402

SIZES = {  # model -> weights of the linear layers in 1e9, from the models' configs
    "mistral": 6.98,
    "phi-2": 2.52,
    "stablelm": 3.03,
    "flan-t5": 2.67,
}
DATA = {  # corpus -> (annotations in train and test, distinct texts in test, mean tokens of a prompt)
    "goemotions": (146_574, 18_233, 5_389, 184),
    "unhealthy": (168_503, 21_289, 4_425, 163),
}
EPOCHS = 10
USD_PER_REQUEST = {
    "gpt-6-luna": (200 * 0.1 + 10 * 0.5) / 1e6,
    "gpt-5.6-terra": (200 * 2 + 10 * 12) / 1e6,
}  # 2026-11


FAMILY = {"cls": "clsp", "clsp": "clsp", "lm": "lmp", "lmp": "lmp"}  # method -> which is measured for it
SAMPLE = 32, 16, 16  # annotations of train, val, test in a calibration, of 4 steps of 8


def kind_of(target):
    """What a cell is measured as: .../DATASET/MODEL[+VARIANT]/METHOD/SEED/metrics_test.json."""
    dataset, model, method = target.parts[-5:-2]
    return dataset, model.partition("+")[0], FAMILY.get(method, "q2s")


def calibrate(kind, runs):
    """{start, step and answer}: seconds of a start, and per annotation trained on and predicted."""
    target = runs.joinpath(*kind, "1", "metrics_test.json")
    found = subprocess.run(["make", "-n", "--no-print-directory", str(target), "PROFILE=small"],
                           capture_output=True, text=True, check=True)
    words = shlex.split(found.stdout.replace("\\\n", " "))
    command = words[words.index("--") + 1 :]
    with tempfile.TemporaryDirectory() as out:
        more = ["--out", out, "--limit", *map(str, SAMPLE)]
        if kind[2] != "q2s":
            more += ["--batch_size", "8", "--epochs", "1", "--validations", "1"]
        started = time.perf_counter()
        made = subprocess.run(command + more, capture_output=True, text=True, check=False)
        whole = time.perf_counter() - started
        if made.returncode:
            raise ValueError((made.stderr.splitlines() or ["no reason given"])[-1])
        seconds = json.loads(Path(out, "metrics_test.json").read_bytes())["seconds"]
        answer = seconds / (SAMPLE[2] if kind[2] != "clsp" else sum(SAMPLE[1:]))
        log = Path(out, "log.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        rates = [line["samples_per_s"] for line in lines if "samples_per_s" in line]
    step = 1 / max(rates) if rates else 0.0
    return {"start": whole - seconds - step * SAMPLE[0], "step": step, "answer": answer}


def hours_of(todo, limit, epochs):
    """The hours of the cells of profile small, measured; says how they come about."""
    path = todo[0].parents[4] / "calibration.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    n_train, n_val, n_test = limit[0], limit[min(1, len(limit) - 1)], limit[-1]
    total = 0.0
    for target in todo:
        kind = kind_of(target)
        if "/".join(kind) not in measured:
            print(f"measuring {' '.join(kind)} ...", flush=True)
            measured["/".join(kind)] = calibrate(kind, path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measured, indent=1))
        own = measured["/".join(kind)]
        answers = n_test + (n_val if kind[2] == "clsp" else 0)
        trained = epochs * n_train + 4 * n_val / 2  # four validations, without a gradient
        total += own["start"] + own["answer"] * answers + own["step"] * trained
    return total / 3600


def plan_of(profile, todo, limit, epochs):
    """The line of the cost: hours only on a machine that can run the cells."""
    if profile == "small":
        try:
            hours = f"{hours_of(todo, limit, epochs):.1f} hours, measured on this machine"
        except ValueError as error:
            hours = f"not measured ({error})"
        return f"cost: {hours}; it may be interrupted at any time, and goes on where it stopped"
    flop, usd = map(sum, zip((0, 0), *map(cost_of, todo), strict=True))
    if not torch.cuda.is_available():
        return f"cost: {flop:.1e} FLOP on CUDA GPUs, which are not here; {usd:.0f} US dollars for the API"
    rate = measured_flops()
    return (
        f"cost, estimated: {flop:.1e} FLOP, {flop / rate / 0.4 / 3600:.1f} hours at 40% of "
        f"{rate / 1e12:.2f} TFLOP/s; {usd:.0f} US dollars for the API"
    )


def measured_flops():
    """FLOP/s of one bf16 matrix product on this machine's devices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).bfloat16()
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best * max(1, torch.cuda.device_count())


def cost_of(target):
    """(FLOP, US dollars) of the cell .../DATASET/MODEL/METHOD/SEED/metrics_test.json of profile paper."""
    dataset, model, method = target.parts[-5:-2]
    n_train, n_test, n_texts, tokens = DATA[dataset]
    n_asked = n_texts if method == "q0s" else n_test
    if model.startswith("gpt"):
        return 0.0, n_asked * USD_PER_REQUEST[model]
    weights = 1e9 * SIZES[model]
    trained = 0 if method.startswith("q") else 4 * n_train * EPOCHS
    responses = 0 if method.startswith("cls") else 2 * n_asked * 20
    return weights * (tokens * (trained + 2 * n_asked) + responses), 0.0


def missing(profile, data, model):
    """Yields a line for each thing that the profile wants and this machine lacks."""
    if profile == "paper" and not torch.cuda.is_available():
        yield f"a CUDA GPU; without one the four models are refused. {lora.idle_gpu()}".strip()
    if profile == "paper" and not os.environ.get("OPENAI_API_KEY"):
        yield 'OPENAI_API_KEY; no GPT is asked'
    if profile == "small" and not Path(model).is_dir():
        yield f"{model} as a directory; it comes from the model hub"
    for dataset in DATA:
        if profile != "tiny" and not Path(data, dataset).is_dir():
            yield f"{data}/{dataset}" + ("; it is downloaded" if profile == "paper" else "")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("profile", choices=("tiny", "small", "paper"))
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--data", default="data")
    parser.add_argument("--model", default="")
    parser.add_argument("--limit", type=int, nargs="*", default=())
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--cells", type=Path, nargs="*", default=())
    args = parser.parse_args(argv)
    if args.missing:
        if args.profile != "paper":
            print(
                "The full reproduction: make reproduce PROFILE=paper, with CUDA GPUs of 24 GB or more, the "
                "model hub, the corpora (downloaded), and OPENAI_API_KEY for two GPTs of today."
            )
        return
    runs = args.cells[0].parents[4]
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "plan.txt").write_text("".join(f"{target}\n" for target in args.cells))
    todo = [target for target in args.cells if not target.exists()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU of {os.cpu_count()} cores"
    print(f"profile {args.profile} on {device}: {len(args.cells)} cells, {len(todo)} of them to do")
    if args.profile == "tiny":
        print("cost: up to 10 minutes on 2 cores; nothing is missing or downloaded; synthetic numbers")
    else:
        if todo:
            print(plan_of(args.profile, todo, args.limit, args.epochs))
        print(f"disk: {shutil.disk_usage('.').free / 1e9:.0f} GB free; the paper's models take about 40 GB")
    for line in missing(args.profile, args.data, args.model):
        print(f"missing: {line}")


if __name__ == "__main__":
    sys.exit(main())
