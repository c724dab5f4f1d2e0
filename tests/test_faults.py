"""Storage faults: a disk that is full at any write, a directory that is in use or not to be written to."""

import collections
import contextlib
import errno
import os
import re
import resource
from pathlib import Path

import pytest
from test_api import Server, reply
from test_data import CONTENT, blob_id
from test_data import Server as FileServer

import data
import infer
import lora
import train

VOLATILE = (rb'"(seconds|samples_per_s|tokens_per_s|peak_memory_gb|out|cached|requests'
            rb'|run.json|figures)": [^,}\n]*')  # the last two: checksums of what holds the others
OF_A_QUERY = {"run.json", "predictions_test.jsonl", "metrics_test.json"}
WRITTEN = {
    "train": OF_A_QUERY | {
        "log.jsonl", "adapter_model.safetensors", "adapter_config.json", "step-00000001.safetensors",
        "step-00000002.safetensors", "predictions_val.jsonl", "metrics_val.json", "baselines_test.json"},
    "query": OF_A_QUERY, "api": OF_A_QUERY | {"answers.jsonl"}}


def arguments(tiny_dir, out, method, *more):
    words = f"--method {method} --data_dir {tiny_dir}/goemotions --limit 48 16 16 --out {out}"
    return [*words.split(), *more]


@pytest.fixture(scope="module")
def commands(tiny_dir):
    """{name: start(out)} of everything that writes a run; a start returns the exit status."""
    server = Server(lambda prompt, n: reply("joy"))
    model = f"--model {tiny_dir}/models/mistral --dtype fp32".split()
    steps = "--quantize none --batch_size 16 --max_steps 2 --validations 2 --learning_rate 1e-3".split()
    yield {
        "train": lambda out: train.main(arguments(tiny_dir, out, "cls", *model, *steps)),
        "query": lambda out: infer.main(arguments(tiny_dir, out, "q0s", *model)),
        "api": lambda out: infer.main(arguments(tiny_dir, out, "q0s", "--api_base", server.base)),
    }
    server.die()


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
    """{name: directory of a run without faults}."""
    runs = {name: tmp_path_factory.mktemp(name) / "out" for name in commands}
    assert not any(commands[name](out) for name, out in runs.items())
    return runs


def contents(out):
    """{file: content} of a run, less what time and place change."""
    return {path.name: re.sub(VOLATILE, b"", path.read_bytes()) for path in out.rglob("*")
            if path.is_file() and path.name not in (".lock", "answers.jsonl")}


def error_of(capsys):
    """The one line that a failed start prints of its mistake."""
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return error


# ---- A full disk ----


@contextlib.contextmanager
def files_up_to(size):
    """The kernel lets no file of this process grow beyond `size` bytes: a write stops in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    raise OSError(errno.ENOSPC, "nothing was there to be written")


class FullDisk:
    """One write, fsync or rename fails in each start: the first one that has not failed yet."""

    def __init__(self, out, monkeypatch):
        self.out, self.failed, self.struck, self.times = out, set(), None, collections.Counter()
        write_all, append, fsync, rename = lora.write_atomically, train.Log.write, os.fsync, os.replace

        def call(kind, path, size, function, *args, **options):
            if not self.is_full(kind, path):
                return function(*args, **options)
            with files_up_to(size + (path.stat().st_size if kind == "append" and path.exists() else 0)):
                if size:
                    function(*args, **options)

        monkeypatch.setattr(lora, "write_atomically", lambda path, write: write_all(
            path, lambda temporary: call("write", path, 100, write, temporary)))
        monkeypatch.setattr(train.Log, "write", lambda log, *args, **figures: call(
            "append", log.path, 20, append, log, *args, **figures))
        monkeypatch.setattr(os, "fsync", lambda number: call(
            "fsync", os.readlink(f"/proc/self/fd/{number}"), 0, fsync, number))
        monkeypatch.setattr(os, "replace", lambda old, new: call("rename", new, 0, rename, old, new))

    def is_full(self, kind, path):
        operation = kind, re.sub(r"\.\d+\.tmp$", "", Path(path).name)
        self.times[operation] += 1
        operation += self.times[operation], len([*self.out.glob("checkpoint/*.safetensors")])
        if self.struck or operation in self.failed:
            return False
        self.struck = operation
        self.failed.add(operation)
        return True


@pytest.mark.parametrize("name", WRITTEN)
def test_a_disk_that_is_full_at_any_write_costs_one_line_and_the_same_command_goes_on(
        commands, undisturbed, tmp_path, capsys, monkeypatch, name):
    """Each start meets another fault; the last one meets none, and leaves what an undisturbed one leaves."""
    out = tmp_path / "out"
    disk = FullDisk(out, monkeypatch)
    capsys.readouterr()
    while status := commands[name](out):
        assert status == 2 and disk.struck[1] in error_of(capsys), disk.struck
        disk.struck, disk.times = None, collections.Counter()
    assert disk.struck is None and contents(out) == contents(undisturbed[name])
    assert {operation[1] for operation in disk.failed} == WRITTEN[name]


def test_a_disk_that_is_full_in_a_download_is_named_and_the_download_goes_on_from_there(tmp_path):
    path = tmp_path / "file"
    with FileServer() as server:
        with pytest.raises(OSError, match=str(path)), files_up_to(100_000):
            data.download(server.url, blob_id(CONTENT), path)
        assert not path.exists()
        data.download(server.url, blob_id(CONTENT), path)
        server.shutdown()
    assert path.read_bytes() == CONTENT and server.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("name", WRITTEN)
def test_an_out_that_is_in_use_or_that_nobody_can_write_to_is_one_line(
        commands, tiny_dir, tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    assert commands[name](tmp_path / "file" / "out") == 2  # root can write to any directory, but not here
    assert str(tmp_path / "file") in error_of(capsys)
    lock, _ = infer.claim_out(train.parse_args(arguments(tiny_dir, tmp_path / "out", "cls")))
    assert commands[name](tmp_path / "out") == 2
    assert f"{tmp_path / 'out'} is in use by another run" in error_of(capsys)
    lock.close()


def test_a_run_that_is_not_finished_is_not_evaluated_as_if_it_were(commands, tmp_path, capsys, monkeypatch):
    """The metrics of an adapter in the middle of its training would make the run look finished."""
    with monkeypatch.context() as patch:
        patch.setattr(lora, "load_adapter", lambda *args: (_ for _ in ()).throw(OSError("killed here")))
        assert commands["train"](tmp_path) == 2 and "killed here" in error_of(capsys)
    assert infer.main(["--run", str(tmp_path)]) == 2 and "not finished" in error_of(capsys)
    assert not (tmp_path / "metrics_test.json").exists()
