"""Bytes that are not what was written, anywhere in the files of a run: named, and never other numbers."""

import functools
import random
import shutil

import pytest
import torch
from test_faults import arguments, error_of

import infer
import lora
import metrics
import train

FILES = ("run.json", "predictions_test.jsonl", "metrics_test.json", "baselines_test.json")


def damages(content, n):
    """Yields n copies of the content: every fourth is cut, each other one has a flipped bit."""
    rng = random.Random(0)
    for k in range(n):
        place = rng.randrange(len(content))
        rest = bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:] if k % 4 else b""
        yield content[:place] + rest


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory):
    """The directory of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    words = f"--model {tiny_dir}/models/mistral --dtype fp32 --quantize none --max_steps 2 --validations 2"
    assert train.main(arguments(tiny_dir, out, "cls", *words.split())) == 0
    return out


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used_whatever_the_byte(tmp_path, capsys):
    """Of the header, too: the step, the loss scale and the best loss stand there."""
    parameters = [torch.nn.Parameter(torch.randn(4, 4))]
    optimizer = torch.optim.AdamW(parameters)
    states = [{"step": k, "best_val_loss": 0.5 / k, "best_step": k, "scale": [1.0, 0, 0]} for k in (1, 2)]
    for state in states:
        parameters[0].grad = torch.randn(4, 4)
        optimizer.step()
        train.save_checkpoint(tmp_path, optimizer, state)
    newest, last = tmp_path / "step-00000002.safetensors", parameters[0].detach().clone()
    for damaged in damages(newest.read_bytes(), 600):
        newest.write_bytes(damaged)
        state = train.load_checkpoint(tmp_path, optimizer, infer.ALONE)
        if f"{newest} is broken" in capsys.readouterr().err:
            assert state["step"] == 1
        else:  # the byte means nothing
            assert state == state | states[1] and torch.equal(parameters[0], last)


def test_a_damaged_adapter_is_named_whatever_the_byte(finished, tiny_dir, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    model = lora.build_model(f"{tiny_dir}/models/mistral", "cls", 28, "none")
    model.last_layer_trains = True
    lora.add_lora(model, 2, 32, 0.05, None, "mistral")
    lora.load_adapter(model, finished)
    expected = {name: tensor.clone() for name, tensor in lora.adapter_state(model).items()}
    for damaged in damages((finished / path.name).read_bytes(), 80):
        path.write_bytes(damaged)
        try:
            lora.load_adapter(model, tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in lora.adapter_state(model).items())


@pytest.mark.parametrize("old, new", [(b'"U8"', b'"I8"'), (b'"F32"', b'"I32"'), (b"[4,4]", b"[2,8]")])
def test_a_checkpoint_whose_header_has_another_dtype_or_shape_is_named(tmp_path, capsys, old, new):
    """The tensors' bytes are whole; 1 in 2,000 spoiled checkpoints ended in a TypeError of its RNG state."""
    parameters = [torch.nn.Parameter(torch.ones(4, 4))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].grad = torch.ones(4, 4)
    optimizer.step()
    train.save_checkpoint(tmp_path, optimizer, {"step": 1})
    (path,) = tmp_path.iterdir()
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match="no checkpoint in"):
        train.load_checkpoint(tmp_path, optimizer, infer.ALONE)
    assert f"{path} is broken" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_run_is_named_or_its_tables_and_arguments_are_those_of_the_whole_one(
        finished, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(metrics, "resample", functools.partial(metrics.resample, resamples=20))
    run = shutil.copytree(finished, tmp_path / "run")
    assert metrics.main(["tables", str(tmp_path)]) == 0
    tables, loaded = capsys.readouterr().out, infer.load_run(run, {})
    for damaged in damages((run / name).read_bytes(), 60):
        (run / name).write_bytes(damaged)
        if metrics.main(["tables", str(tmp_path)]):
            assert str(run) in error_of(capsys)
        else:
            assert capsys.readouterr().out == tables
        for use in (lambda: infer.load_run(run, {}), lambda: infer.claim_out(loaded)[0].close() or loaded):
            try:
                assert use() == loaded
            except ValueError as error:
                assert str(run) in str(error)
