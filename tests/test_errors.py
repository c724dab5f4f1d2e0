"""Errors that a user can reach, by the command line where it is short, and no other test asks for.

    python -m pytest -q tests/test_errors.py
"""

import json

import pytest
import torch
from test_api import quick, reply, serve  # noqa: F401
from test_train import command

import infer
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
    (tmp_path / "config.json").write_text(json.dumps(config))
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


def test_ctrl_c_in_a_query_is_a_line_and_status_130(
        tiny_dir, tmp_path, serve, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(infer, "query_api", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("2 are kept")))
    assert infer.main(query(tiny_dir, tmp_path, serve(lambda prompt, n: reply()))) == 130
    assert capsys.readouterr().err == "2 are kept\n"
