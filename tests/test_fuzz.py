"""A few hundred inputs of every target of tests/fuzz.py, and what its long version has found.

    python -m pytest -q tests/test_fuzz.py
"""

import json
import logging
import shutil

import fuzz
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_api import client_of
from test_metrics import write_run

import data
import infer
import lora
import metrics
import train


@pytest.mark.parametrize("target", fuzz.TARGETS, ids=lambda target: target.__name__)
def test_hostile_inputs_are_read_as_they_are_or_refused_by_a_documented_error(target, monkeypatch):
    monkeypatch.setattr(metrics.resample, "__defaults__", (2, 0))  # the target lowers it: put it back
    counts, failures = fuzz.run(target, max(100, round(1500 * fuzz.TARGETS[target])), seed=1)
    assert not failures, "\n".join(failures)
    assert counts[1] > 0, "no input was hostile"


# ---- What it found ----


def two_checkpoints(directory):
    """step-1 and step-2, as a run leaves them; returns (parameters, optimizer)."""
    _, parameters = fuzz.small_model()
    optimizer = torch.optim.AdamW(parameters)
    for step in (1, 2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = {"step": step, "best_val_loss": 0.5, "best_step": 1, "scale": [1.0, 0, 0]}
        train.save_checkpoint(directory, optimizer, state)
    return parameters, optimizer


@pytest.mark.parametrize("what", ["state", "metadata"])
def test_a_checkpoint_whose_state_is_not_what_was_written_is_broken(tmp_path, capsys, what):
    """The sha256 was over the tensors alone: a flipped bit in the step or the best loss went unseen."""
    parameters, optimizer = two_checkpoints(tmp_path)
    newest = tmp_path / "step-00000002.safetensors"
    if what == "state":
        newest.write_bytes(newest.read_bytes().replace(b"best_val_loss\\\": 0.5", b"best_val_loss\\\": 0.1"))
    else:
        save_file(load_file(newest), newest)
    state = train.load_checkpoint(tmp_path, optimizer, infer.ALONE)
    assert (state["step"], state["best_val_loss"]) == (1, 0.5)
    assert f"{newest} is broken" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    "{}", "[]", "{", '{"arguments": {"follow": []}}', '{"arguments": {"seed": 1}}', "[" * 100_000])
@pytest.mark.parametrize("script", ["infer", "train"])
def test_a_run_json_that_is_none_of_a_run_is_one_line_and_exit_2(
        tiny_dir, tmp_path, capsys, content, script):
    (tmp_path / "run.json").write_text(content)
    if script == "infer":
        assert infer.main(["--run", str(tmp_path)]) == 2
    else:
        model = ["--model", f"{tiny_dir}/models/mistral"]
        assert train.main(["--method", "cls", *model, "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"{tmp_path}/run.json is not the run.json of a run" in errors[0]


@pytest.mark.parametrize("name, change", [
    ("run.json", {"arguments": {"method": "cls", "model": "mistral", "seed": 1}}),
    ("run.json", {"arguments": {"method": "cls", "model": ["mistral"], "dataset": "x", "seed": 1}}),
    ("metrics_test.json", {"f1_macro_tuned": {}}), ("metrics_test.json", {"thresholds": None}),
    ("metrics_test.json", {"f1_per_user": [1]}), ("metrics_test.json", {"f1_macro": float("nan")}),
    ("baselines_test.json", {"user_bias": 3}), ("baselines_test.json", {"user_bias": {"f1_macro": {}}})])
def test_a_run_that_lacks_what_the_tables_show_is_one_line_and_exit_2(tmp_path, capsys, name, change):
    write_run(tmp_path / "run", "cls", "mistral", 0.3, n_texts=3)
    path = tmp_path / "run" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert metrics.main(["tables", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"{tmp_path}/run is no finished run" in errors[0]


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", "{}"), ("tokenizer_config.json", "[]"), ("config.json", '{"model_type": "mistral", '
     '"hidden_size": "x"}'), ("model.safetensors.index.json", "{}"), ("model.safetensors.index.json", "{"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../elsewhere.safetensors"}}')])
def test_a_damaged_json_file_of_a_model_is_one_line_that_names_the_model(tiny_dir, tmp_path, name, content):
    shutil.copytree(tiny_dir / "models" / "mistral", tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}/model") as refused:
        lora.load_tokenizer(str(tmp_path / "model"))
        lora.load_base(str(tmp_path / "model"), "cls")
    assert "\n" not in str(refused.value)


def test_a_label_name_that_would_end_a_response_behind_it_is_refused(tmp_path):
    """Read alone it is itself; in "b, c" what stands behind its `##` is cut off as another prompt."""
    (tmp_path / "a.csv").write_text('text_id,user_id,text,"b\n## ",c\n1,u,a,1,1\n')
    with pytest.raises(ValueError, match="cannot be read back"):
        data.read_annotations([tmp_path / "a.csv"], {"user_id": "user_id", "text": "text"})


def test_the_http_library_prints_no_header_that_it_cannot_read():
    """Its warning quotes the line: a key that a server wrote there would stand on the screen."""
    client_of("tiny", "answers.jsonl", "http://127.0.0.1:9/v1")
    assert not logging.getLogger("urllib3.connection").isEnabledFor(logging.WARNING)
