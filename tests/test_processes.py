"""Two processes of a run: what differs is refused, and what fails on one of them ends both with its reason.

    python -m pytest -q tests/test_processes.py

The ranks are forked from the tests, which have the modules already. That two ranks compute what one does, and
go on after kills, is in test_train.py.
"""

import multiprocessing
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import command

import data
import train

ROOT = Path(train.__file__).parent


def two_processes(tiny_dir, tmp_path, spoil, limit_s=120):
    """Runs train.main on two ranks, each after spoil(rank, arguments); returns [(exit code, its words)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank_of(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stdout = sys.stderr = open(tmp_path / f"said{rank}", "w", buffering=1)
        arguments = command(tiny_dir, tmp_path / "out", "--max_steps", 4, "--validations", 2)
        spoil(rank, arguments)
        sys.exit(train.main(arguments))

    context, ends = multiprocessing.get_context("fork"), time.monotonic() + limit_s
    ranks = [context.Process(target=rank_of, args=(rank,), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(max(0, ends - time.monotonic()))
        if process.is_alive():
            process.kill()
            pytest.fail("a process hangs")
    return [(process.exitcode, (tmp_path / f"said{rank}").read_text()) for rank, process in enumerate(ranks)]


def at_step(step, change):
    """train.train_step, with change(objective) before the given step."""
    steps, original = [], train.train_step

    def train_step(learner, *args):
        steps.append(1)
        if len(steps) == step:
            change(learner.objective)
        return original(learner, *args)

    return train_step


def test_a_nan_on_one_process_stops_both_with_step_process_and_the_last_good_checkpoint(tiny_dir, tmp_path):
    def spoil(rank, arguments):
        def poison(objective):
            losses = objective.losses
            objective.losses = lambda *args: (loss * float("nan") for loss in losses(*args))

        train.train_step = at_step(3, poison) if rank == 1 else train.train_step

    for code, said in two_processes(tiny_dir, tmp_path, spoil):
        assert code == 2
        assert "step 3: loss nan, gradient norm nan, process [1]; the checkpoint of step 2 is kept in" in said
    assert [path.name for path in tmp_path.glob("out/checkpoint/*")] == ["step-00000002.safetensors"]


@pytest.mark.parametrize("what", ["seed", "data", "code"])
def test_processes_with_other_data_seed_or_code_refuse_to_start(tiny_dir, tmp_path, what):
    def spoil(rank, arguments):
        if rank and what == "seed":
            arguments += ["--seed", "7"]
        elif rank and what == "data":
            read = data.read_annotations

            def read_another(*args):
                annotations, table = read(*args)
                labels = annotations.labels.copy()
                labels[::7] = labels[::7, ::-1]
                return data.Annotations(**vars(annotations) | {"labels": labels}), table

            data.read_annotations = read_another
        elif rank:
            for script in ROOT.glob("*.py"):
                shutil.copy(script, tmp_path)
            (tmp_path / "prompts.py").write_text((ROOT / "prompts.py").read_text() + "# edited here only\n")
            train.__file__ = str(tmp_path / "train.py")

    for code, said in two_processes(tiny_dir, tmp_path, spoil):
        assert code == 2 and "processes [1] hold other data, arguments or code than process 0" in said
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("error, code, words", [
    (OSError("the disk is full"), 2, "error on process 1: the disk is full"),
    (AssertionError("our mistake"), 1, "AssertionError: our mistake"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "or use --gradient_checkpointing")])
def test_an_error_of_one_process_ends_it_at_once_and_the_other_with_a_line(
        tiny_dir, tmp_path, error, code, words):
    """To destroy a group of NCCL flushes and waits for the others, up to its time-out (pytorch#141510)."""
    def fail(objective):
        objective.losses = lambda *args: (_ for _ in ()).throw(error)

    def spoil(rank, arguments):
        train.dist.destroy_process_group = lambda: time.sleep(10**6)
        train.train_step = at_step(2, fail) if rank else train.train_step

    (left, left_said), (failed, said) = two_processes(tiny_dir, tmp_path, spoil, limit_s=60)
    assert (failed, left) == (code, 1) and words in said
    assert "error on process 0: another process of this run ended or cannot be reached (" in left_said


def test_a_process_that_runs_out_of_memory_repeats_its_share_while_the_other_waits(tiny_dir, tmp_path):
    def spoil(rank, arguments):
        def fail_once(objective):
            losses = objective.losses

            def first(*args):
                objective.losses = losses
                yield next(losses(*args))
                raise torch.OutOfMemoryError("CUDA out of memory.")

            objective.losses = first

        train.train_step = at_step(2, fail_once) if rank else train.train_step

    (one, _), (other, said) = two_processes(tiny_dir, tmp_path, spoil)
    assert one == other == 0 and "out of memory on process 1: --micro_batch_tokens" in said


def test_the_process_that_is_left_ends_with_a_reason_when_the_other_dies(tiny_dir, tmp_path):
    def spoil(rank, arguments):
        if rank:
            train.train_step = at_step(2, lambda _: os._exit(9))

    (left, said), (died, _) = two_processes(tiny_dir, tmp_path, spoil)
    assert died == 9 and left == 1
    assert "error on process 0: another process of this run ended or cannot be reached (" in said
    assert "the same command goes on from the last checkpoint" in said and "Traceback" not in said
