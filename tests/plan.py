"""What `make reproduce` is about to do: the cells, what they cost on this machine, what is missing.

    python tests/plan.py PROFILE TARGET ...      before; a target is the metrics_test.json of a cell
    python tests/plan.py --missing PROFILE       after: what the full reproduction needs

A training step takes 4 FLOP per weight and token: forward, and the gradient of activations.
Hours are at 40% of the matrix-product rate that is measured here and now, a usual share for plain PyTorch.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import torch

SIZES = {  # model -> (weights of the linear layers in 1e9, name), from the models' configs
    "mistral": 6.98,
    "phi-2": 2.52,
    "stablelm": 3.03,
    "flan-t5": 2.67,
    "smollm2": 0.106,
}
DATA = {  # corpus -> (annotations in train and test, distinct texts in test, mean tokens of a prompt)
    "goemotions": (146_574, 18_233, 5_389, 184),
    "unhealthy": (168_503, 21_289, 4_425, 163),
}
EPOCHS = 10
USD_PER_REQUEST = {
    "gpt-3.5-turbo": (200 * 0.5 + 10 * 1.5) / 1e6,
    "gpt-4": (200 * 30 + 10 * 60) / 1e6,
}  # 2026-11


def measured_flops():
    """FLOP/s of one bf16 matrix product on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).bfloat16()
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best * max(1, torch.cuda.device_count())


def cost_of(dataset, model, method):
    """(FLOP, US dollars) of one cell of the paper's tables."""
    n_train, n_test, n_texts, tokens = DATA[dataset]
    if model.startswith("gpt"):
        return 0.0, (n_texts if method == "q0s" else n_test) * USD_PER_REQUEST[model]
    if method.startswith("q"):
        return 2 * SIZES[model] * 1e9 * tokens * (n_texts if method == "q0s" else n_test) * 2, 0.0
    return SIZES[model] * 1e9 * tokens * (4 * n_train * EPOCHS + 2 * 20 * n_test), 0.0


def main(argv):
    if argv[:1] == ["--missing"]:
        if argv[1] != "paper":
            print(
                "The full reproduction: make reproduce PROFILE=paper, with CUDA GPUs of 24 GB or more, the "
                "model hub, the corpora (downloaded), and OPENAI_API_KEY for the GPT rows."
            )
        return
    profile, targets = argv[0], [Path(target) for target in argv[1:]]
    todo = [target for target in targets if not target.exists()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU of {os.cpu_count()} cores"
    print(
        f"profile {profile} on {device}: {len(targets)} cells, {len(todo)} of them to do"
    )
    if profile == "paper":
        costs = [cost_of(*target.parts[-5:-2]) for target in todo]
        flop, usd = sum(c[0] for c in costs), sum(c[1] for c in costs)
        rate = measured_flops()
        print(
            f"{flop:.1e} FLOP, {flop / rate / 0.4 / 3600:.0f} hours at 40% of {rate / 1e12:.0f} TFLOP/s; "
            f"{usd:.0f} US dollars for the API, estimated"
        )
        if not torch.cuda.is_available():
            print("missing: a CUDA GPU; without one the four models are refused")
        if not os.environ.get("OPENAI_API_KEY"):
            print('missing: OPENAI_API_KEY; the GPT rows stay "not run"')
        for dataset in DATA:
            if not Path("data", dataset).is_dir():
                print(f"missing: data/{dataset}; it is downloaded")
        print(f"disk: {shutil.disk_usage('.').free / 1e9:.0f} GB free; the models take about 40 GB")
    elif profile == "tiny":
        print(
            "cost: up to 10 minutes on 2 cores; nothing is missing or downloaded. Its numbers are synthetic."
        )
    else:
        print("cost: 10 to 30 minutes a cell on 2 cores, about one on a GPU")


if __name__ == "__main__":
    main(sys.argv[1:])
