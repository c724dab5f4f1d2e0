"""What the benchmarks share: processes of their own, memory, the machine's peak, and `--results`.

`--results FILE` gets one JSON line per row and unit: `row`, `unit`, `ours` and `peer` (a figure per round),
`ratios` (ours / peer, round by round), `ratio` (their median), `target`, `note`, `device`, `versions`,
`commit`, `arguments`. torch is imported where it is used: some processes are measured without it.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def in_process(function, *args):
    """What `function` returns in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def mib(reset=False, host=False):
    """(MiB now, MiB at the peak since the last reset): allocated on the GPU, if there is one, or resident."""
    import torch

    if torch.cuda.is_available() and not host:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed leaves the process, on both sides
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def matmul_peak(dtype, device, clock):
    """FLOP/s of a square matrix product: the best of many short ones, which other work rarely interrupts."""
    import torch

    n, seconds = 1024 if device.type == "cpu" else 8192, []
    a = torch.randn(n, n, device=device).to(dtype)
    for _ in range(50):
        began = clock()
        (a @ a)[0, 0].item()
        seconds.append(clock() - began)
    return 2 * n**3 / min(seconds)


def device_name():
    """The name of the GPU, or of the CPU with the number of its cores and of the threads that torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else ()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")
    return f"{name} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def provenance():
    """What stands beside every number: the commit of the code and the device."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                            cwd=ROOT, check=False).stdout.strip()
    return {"commit": commit, "device": device_name()}


def append(path, line):
    """Appends a line and its provenance to a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line | provenance()) + "\n")


def add_results(parser):
    """The option of every benchmark."""
    parser.add_argument("--results", type=Path, metavar="FILE", help="append one JSON line per row to it")


def record(args, row, unit=None, ours=(), peer=(), target="", note=""):
    """Appends the line of a row to args.results, if it is given; a row without figures was not run."""
    if not args.results:
        return
    ratios = [a / b for a, b in zip(ours, peer, strict=False)]
    plain = {name: Path(value).name if isinstance(value, (str, Path)) else value  # no paths of this machine
             for name, value in vars(args).items()}
    line = {"row": row, "unit": unit, "ours": list(ours), "peer": list(peer), "ratios": ratios,
            "ratio": statistics.median(ratios) if ratios else None, "target": target, "note": note,
            "arguments": plain,
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")}}
    append(args.results, line)
