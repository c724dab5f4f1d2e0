"""Errors that a user can reach, by the command line where it is short, and no other test asks for.

    python -m pytest -q tests/test_errors.py
"""

import json
import os
import signal

import pytest
import torch
from test_api import quick, reply, serve  # noqa: F401
from test_train import command

import data
import infer
import lora
import metrics
import prompts
import train


def query(tiny_dir, out, server, *more):
    return ["--method", "q0s", "--model", "gpt-4", "--api_base", server.base, "--limit", "3",
            "--data_dir", f"{tiny_dir}/goemotions", "--out", str(out), *more]


def test_a_split_that_is_left_empty_is_named(tiny_dir, tmp_path, capsys):
    assert train.main(command(tiny_dir, tmp_path / "out", "--unseen_users", 0.99)) == 2
    assert "error: no annotation is left in ['train', 'val']" in capsys.readouterr().err


def test_a_checkpoint_of_another_number_of_processes_says_which(tmp_path):
    parameters = [torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    train.save_checkpoint(tmp_path, parameters, optimizer, {"step": 1})
    with pytest.raises(ValueError, match="of 1 processes, not 2: use --nproc_per_node 1"):
        train.load_checkpoint(tmp_path, parameters, optimizer, infer.Processes(0, 2))


def test_a_run_is_not_resumed_on_other_data(tiny_dir, tmp_path, capsys):
    args = train.parse_args(command(tiny_dir, tmp_path))
    infer.complete(args)
    files = {"goemotions_1.csv": {"blob_id": "0"}}
    config = {"arguments": infer.arguments_of(args), "data": {"files": files}}
    (tmp_path / "run.json").write_text(json.dumps(config))
    assert train.main(command(tiny_dir, tmp_path)) == 2
    assert "the data files are not those that" in capsys.readouterr().err


def test_failed_requests_end_a_query_without_metrics_and_a_dry_run_leaves_nothing(
        tiny_dir, tmp_path, serve, capsys):  # noqa: F811
    server = serve(lambda prompt, n: (500, {}, b""))
    assert infer.main(query(tiny_dir, tmp_path / "dry", server, "--dry_run")) == 0
    assert not (tmp_path / "dry").exists() and not server.seen
    assert infer.main(query(tiny_dir, tmp_path / "out", server, "--max_retries", "1")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "requests failed: the same command asks again" in errors[0]
    assert not (tmp_path / "out" / "metrics_test.json").exists()


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_a_price_is_a_number_of_at_least_0(tiny_dir, tmp_path, serve, price, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        infer.main(query(tiny_dir, tmp_path, serve(lambda prompt, n: reply()), "--max_cost", price))
    assert stopped.value.code == 2 and "is not a number of at least 0" in capsys.readouterr().err


def test_a_directory_whose_name_begins_with_gpt_is_a_local_model(tmp_path, monkeypatch):
    """Else the texts of its users would be sent to a stranger."""
    (tmp_path / "gpt-mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert infer.is_api_model("gpt-4") and not infer.is_api_model("gpt-mine")


def test_a_refused_query_does_not_claim_its_directory(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    query = ["--method", "q0s", "--model", "gpt-4", "--data_dir", f"{tiny_dir}/goemotions"]
    assert infer.main([*query, "--out", str(tmp_path / "out")]) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_mistyped_flag_is_one_line(capsys):
    for main, words in ((train.main, ["--method", "clsp", "--max_grad_norm", "-1"]),
                        (train.main, ["--method", "lm", "--learning_rate", "nan"]),
                        (infer.main, ["--method", "clsp", "--model", "gpt-4"]),
                        (infer.main, ["--method", "q0s", "--limit", "-1"]),
                        (data.main, []), (metrics.main, []), (lora.main, []), (prompts.main, ["x"])):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1, words


def test_unseen_users_that_round_to_nobody_are_refused(tiny_dir, tmp_path, capsys):
    assert train.main(command(tiny_dir, tmp_path / "out", "--unseen_users", 0.001)) == 2
    assert "is nobody; raise it" in capsys.readouterr().err


def test_a_device_without_memory_is_a_line_that_says_what_to_lower(tiny_dir, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried much.")

    monkeypatch.setattr(infer, "build", full)
    words = f"--method q0s --model {tiny_dir}/models/mistral --data_dir {tiny_dir}/goemotions --limit 3"
    query = [*words.split(), "--out", str(tmp_path / "query")]
    for main, arguments, more in ((train.main, command(tiny_dir, tmp_path / "out"),
                                   " or use --gradient_checkpointing"), (infer.main, query, "")):
        assert main(arguments) == 2
        assert capsys.readouterr().err.endswith(f"CUDA out of memory. Lower --micro_batch_tokens{more}\n")


@pytest.mark.parametrize("where", ["load_splits", "evaluate"])
def test_ctrl_c_outside_the_training_loop_is_a_line_and_status_130(
        tiny_dir, tmp_path, capsys, monkeypatch, where):
    with monkeypatch.context() as patch:
        patch.setattr(infer, where, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(command(tiny_dir, tmp_path / "out", "--max_steps", 1)) == 130
    assert "interrupted: the same command goes on" in capsys.readouterr().err
    assert train.main(command(tiny_dir, tmp_path / "out", "--max_steps", 1)) == 0


def test_a_signal_in_the_last_validation_ends_the_run_with_a_line_and_is_resumed(
        tiny_dir, tmp_path, capsys, monkeypatch):
    validate = train.Objective.validate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    arguments = command(tiny_dir, tmp_path / "out", "--max_steps", 1, "--validations", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train.Objective, "validate", interrupted)
        assert train.main(arguments) == 128 + signal.SIGTERM
    assert "stopped at step 1 of 1, which is saved" in capsys.readouterr().err
    assert train.main(arguments) == 0 and "resumed at step 1 of 1" in capsys.readouterr().out


def test_ctrl_c_in_a_query_is_a_line_and_status_130(
        tiny_dir, tmp_path, serve, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(infer, "query_api", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("2 are kept")))
    assert infer.main(query(tiny_dir, tmp_path, serve(lambda prompt, n: reply()))) == 130
    assert capsys.readouterr().err == "2 are kept\n"
