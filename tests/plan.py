"""What `make reproduce` is about to do: the cells, what they cost on this machine, what is missing.

    python tests/plan.py PROFILE --data DIR --model M --limit N N N --cells TARGET ...    before
    python tests/plan.py PROFILE --missing                                                 after

A target is the metrics_test.json of a cell. A training step takes 4 FLOP per weight and token: forward, and
the gradient of activations; a generated response counts as 20 tokens. Hours are at 40% of the matrix-product
rate that is measured here and now, a usual share for plain PyTorch.
"""

import argparse
import os
import shutil
import sys
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
SMALL = 0.106  # of SmolLM2-135M; another model of profile small is counted as if it were that one
DATA = {  # corpus -> (annotations in train and test, distinct texts in test, mean tokens of a prompt)
    "goemotions": (146_574, 18_233, 5_389, 184),
    "unhealthy": (168_503, 21_289, 4_425, 163),
}
EPOCHS = 10
USD_PER_REQUEST = {
    "gpt-3.5-turbo": (200 * 0.5 + 10 * 1.5) / 1e6,
    "gpt-4": (200 * 30 + 10 * 60) / 1e6,
}  # 2026-11


def plan_of(profile, todo, limit):
    """The line of the cost: hours only on a machine that can run the cells."""
    flop, usd = map(sum, zip((0, 0), *(cost_of(target, limit) for target in todo), strict=True))
    if profile == "paper" and not torch.cuda.is_available():
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


def cost_of(target, limit):
    """(FLOP, US dollars) of the cell .../DATASET/MODEL/METHOD/SEED/metrics_test.json."""
    dataset, model, method = target.parts[-5:-2]
    n_train, n_test, n_texts, tokens = DATA.get(dataset, (0, 0, 0, 150))
    epochs = EPOCHS
    if limit:
        (n_train, n_test, n_texts), epochs = (limit[0], limit[-1], limit[-1]), 1
    n_asked = n_texts if method == "q0s" else n_test
    if model.startswith("gpt"):
        return 0.0, n_asked * USD_PER_REQUEST[model]
    weights = 1e9 * SIZES.get(model, SMALL)
    trained = 0 if method.startswith("q") else 4 * n_train * epochs
    responses = 0 if method.startswith("cls") else 2 * n_asked * 20
    return weights * (tokens * (trained + 2 * n_asked) + responses), 0.0


def missing(profile, data, model):
    """Yields a line for each thing that the profile wants and this machine lacks."""
    if profile == "paper" and not torch.cuda.is_available():
        yield f"a CUDA GPU; without one the four models are refused. {lora.idle_gpu()}".strip()
    if profile == "paper" and not os.environ.get("OPENAI_API_KEY"):
        yield 'OPENAI_API_KEY; the GPT rows stay "not run"'
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
    parser.add_argument("--cells", type=Path, nargs="*", default=())
    args = parser.parse_args(argv)
    if args.missing:
        if args.profile != "paper":
            print(
                "The full reproduction: make reproduce PROFILE=paper, with CUDA GPUs of 24 GB or more, the "
                "model hub, the corpora (downloaded), and OPENAI_API_KEY for the GPT rows."
            )
        return
    todo = [target for target in args.cells if not target.exists()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU of {os.cpu_count()} cores"
    print(f"profile {args.profile} on {device}: {len(args.cells)} cells, {len(todo)} of them to do")
    if args.profile == "tiny":
        print("cost: up to 10 minutes on 2 cores; nothing is missing or downloaded; synthetic numbers")
    else:
        print(plan_of(args.profile, todo, args.limit if args.profile == "small" else ()))
        print(f"disk: {shutil.disk_usage('.').free / 1e9:.0f} GB free; the paper's models take about 40 GB")
    for line in missing(args.profile, args.data, args.model):
        print(f"missing: {line}")


if __name__ == "__main__":
    sys.exit(main())
