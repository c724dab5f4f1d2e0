"""The path on CUDA without a GPU: tests/fake_cuda.py on a tiny model of each architecture.

    python -m pytest -q tests/test_cuda.py
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIMULATION = Path(__file__).with_name("fake_cuda.py")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the simulated device's guard")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA's own devices")
def test_no_tensor_is_on_a_wrong_device_or_of_a_wrong_dtype_on_a_simulated_card(tiny_dir):
    """Load, LoRA, probe, loss, backward, clip, step, validation, scores or decoding. A step of any number of
    micro-batches waits once for the card; T5's masks of transformers wait in each forward, too."""
    done = subprocess.run(
        [sys.executable, str(SIMULATION), "steps", f"{tiny_dir}/models", f"{tiny_dir}/goemotions"],
        capture_output=True, text=True, timeout=240)
    waits = dict(re.findall(r"^(\w+) .*: (\d+) waits", done.stdout, re.MULTILINE))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert waits.keys() == {"mistral", "phi", "neox", "t5"}
    assert {waits[name] for name in ("mistral", "phi", "neox")} == {"1"}
