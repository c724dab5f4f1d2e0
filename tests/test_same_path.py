"""Training has not changed since the commit of the long runs in the ledger.

results/training_path.json holds what a few steps of that commit gave: python tests/test_same_path.py writes
it anew, and only together with long runs of a new commit.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "results" / "training_path.json"
METHODS = "cls", "clsp", "lm", "lmp"
RECIPE = ("--dtype fp32 --quantize nf4 --limit 48 16 16 --batch_size 16 --lora_r 8 --learning_rate 1e-3 "
          "--epochs 1 --validations 1 --seed 1").split()


def path_of(method, tiny_dir, out):
    """[loss, norm of the gradient] of each step, and the loss of validation."""
    import train

    assert train.main(["--method", method, "--model", f"{tiny_dir}/models/mistral", "--dataset", "goemotions",
                       "--data_dir", f"{tiny_dir}/goemotions", *RECIPE, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    steps = [[line["loss"], line["grad_norm"]] for line in lines if "loss" in line]
    return steps + [[line["val_loss"]] for line in lines if "val_loss" in line]


@pytest.mark.parametrize("method", METHODS)
def test_the_steps_are_those_of_the_commit_of_the_long_runs(method, tiny_dir, tmp_path):
    recorded = json.loads(RECORD.read_text())["steps"][method]
    found = path_of(method, tiny_dir, tmp_path / "run")
    assert [len(step) for step in found] == [len(step) for step in recorded]
    for step, before in zip(found, recorded, strict=True):
        assert step == pytest.approx(before, rel=1e-3)  # CPUs add up in other orders


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny

    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        tiny.write_corpora(Path(scratch), 0, "mini")
        tiny.write_model(Path(scratch, "models", "mistral"), "mistral")
        steps = {method: path_of(method, scratch, Path(scratch, method)) for method in METHODS}
    record = {"commit": commit, "recipe": " ".join(RECIPE), "steps": steps}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
