"""What all tests share: the path of the scripts, and one small copy of the embedded default."""

import os
import signal
import sys
import threading
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # the tests are of the CPU
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

torch.set_num_threads(1)
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())  # its own is shared with forks: one that is killed within would hold it
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits to ignore it


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """goemotions/, unhealthy/ and models/{mistral,phi,neox,t5}/ of tests/tiny.py, not pretrained."""
    import tiny

    directory = tmp_path_factory.mktemp("tiny")
    tiny.write_corpora(directory, 0, "mini")
    for architecture in ("mistral", "phi", "neox", "t5"):
        tiny.write_model(directory / "models" / architecture, architecture)
    return directory
