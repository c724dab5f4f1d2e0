"""Errors that a user can reach, by the command line where it is short, and no other test asks for.

    python -m pytest -q tests/test_errors.py
"""

import json
import os
import signal

import pytest
import torch
from test_api import openai, quick, reply, serve  # noqa: F401
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
    train.save_checkpoint(tmp_path, optimizer, {"step": 1})
    with pytest.raises(ValueError, match="of 1 processes, not 2: use --nproc_per_node 1"):
        train.load_checkpoint(tmp_path, optimizer, infer.Processes(0, 2))


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
    assert prompts.is_api_model("gpt-4") and not prompts.is_api_model("gpt-mine")


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
    assert "is nobody" in capsys.readouterr().err


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
    stopped = KeyboardInterrupt("2 are kept")
    monkeypatch.setattr(prompts.Client, "ask", lambda *_: (_ for _ in ()).throw(stopped))
    assert infer.main(query(tiny_dir, tmp_path, serve(lambda prompt, n: reply()))) == 130
    assert capsys.readouterr().err == "2 are kept\n"


# ---- A query over HTTP ----


def result_of(out):
    rows = [json.loads(line) for line in (out / "predictions_test.jsonl").read_text().splitlines()]
    return json.loads((out / "metrics_test.json").read_text()), rows


def error_of(capsys):
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "rror: " in line)
    return error


@pytest.mark.parametrize("more, words", [
    (["--extra", "messages=[]"], "messages"), (["--extra", "seed"], "is not KEY=VALUE"),
    (["--extra", "stream=true"], "stream"), (["--extra", "temperature=1"], "temperature"),
    (["--extra", "model=x"], "model"), (["--extra", "seed=1", "seed=2"], "is given twice"),
    (["--reasoning_effort", "huge"], "invalid choice: 'huge'"),
    (["--chat_template"], "without a meaning here"), (["--max_tokens", "0"], "is not a whole number above")])
def test_flags_that_no_server_is_asked_with_are_one_line(
        tiny_dir, tmp_path, serve, capsys, more, words):  # noqa: F811
    server = serve(lambda prompt, n: reply())
    with pytest.raises(SystemExit) as stopped:
        infer.main(query(tiny_dir, tmp_path / "out", server, *more))
    assert stopped.value.code == 2 and words in error_of(capsys) and not server.seen


def test_flags_of_a_server_are_none_of_a_local_model(tiny_dir, tmp_path, capsys):
    for flag in (["--reasoning_effort", "low"], ["--extra", "seed=1"], ["--cache_from", "x"]):
        with pytest.raises(SystemExit) as stopped:
            infer.main(["--method", "q0s", "--model", f"{tiny_dir}/models/mistral", *flag])
        assert stopped.value.code == 2 and f"{flag[0]}: without a meaning here" in error_of(capsys)


@pytest.mark.parametrize("more, words", [
    (["--price_in", "1"], "give --price_in and --price_out"), (["--max_length", "20"], "--max_length 20"),
    (["--cache_from", "/nowhere"], "--cache_from: no /nowhere/answers.jsonl")])
def test_a_users_mistake_about_a_server_is_one_line(
        tiny_dir, tmp_path, serve, capsys, more, words):  # noqa: F811
    server = serve(lambda prompt, n: reply())
    assert infer.main(query(tiny_dir, tmp_path / "out", server, *more)) == 2
    assert words in error_of(capsys) and not server.seen


def test_a_key_with_a_space_and_a_base_that_answers_with_a_page_are_one_line(
        tiny_dir, tmp_path, serve, capsys, monkeypatch):  # noqa: F811
    server = serve(lambda prompt, n: (200, {"Content-Type": "text/html"}, b"<html><body>Welcome"))
    assert infer.main(query(tiny_dir, tmp_path / "out", server)) == 2
    assert "a web page: does --api_base lack a /v1" in error_of(capsys) and len(server.seen) == 1
    monkeypatch.setenv("OPENAI_API_KEY", "sk a b c")
    assert infer.main(query(tiny_dir, tmp_path / "other", server)) == 2
    assert "OPENAI_API_KEY holds a space" in error_of(capsys) and len(server.seen) == 1


def test_what_a_server_refuses_or_cuts_is_counted_and_never_scored_as_labels(
        tiny_dir, tmp_path, serve, capsys):  # noqa: F811
    bad = []

    def play(prompt, n):
        if len(server.seen) == 3:
            bad.append(prompt)
        flagged = 403, {}, {"error": {"message": "joy: your input was flagged"}}
        return flagged if prompt in bad else reply("joy", "length" if len(server.seen) == 5 else "stop")

    server = serve(play)
    arguments = query(tiny_dir, tmp_path / "out", server, "--concurrency", "1")
    arguments[arguments.index("--limit") + 1] = "12"
    assert infer.main(arguments) == 0
    result, rows = result_of(tmp_path / "out")
    refused = [row for row in rows if row["refused"]]
    assert refused and all(row["refused"] == "joy: your input was flagged" for row in refused)
    assert all(row["predicted"] == [] and row["response"] is None and not row["none"] for row in refused)
    assert result["share_refused"] == len(refused) / len(rows) and result["share_empty_answers"] == 0
    assert result["share_truncated"] == sum(row["truncated"] for row in rows) / len(rows) > 0
    assert result["usage"]["refused"] == 1 and "share_refused" in capsys.readouterr().out
    assert result["f1_per_label"]["joy"] == pytest.approx(2 * sum(
        row["predicted"] == ["joy"] and "joy" in row["gold"] for row in rows) / (
        sum("joy" in row["gold"] for row in rows) + len(rows) - len(refused)))


def test_max_tokens_is_sent_as_given_and_else_is_enough_for_all_labels_and_some_words(
        tiny_dir, tmp_path, serve):  # noqa: F811
    server = serve(lambda prompt, n: reply("The most fitting labels are: joy"))
    assert infer.main(query(tiny_dir, tmp_path / "a", server, "--max_tokens", "2000")) == 0
    assert infer.main(query(tiny_dir, tmp_path / "b", server)) == 0
    first, last = (json.loads(server.bodies[k][1])["max_tokens"] for k in (0, -1))
    assert first == 2000 and 64 + sum(map(len, prompts.TASKS["goemotions"].label_names)) < last < 500
    assert all(row["response"].endswith("are: joy") and not row["truncated"]
               for row in result_of(tmp_path / "b")[1])


def test_the_dialect_is_in_the_record_of_the_run_and_survives_a_kill(tiny_dir, tmp_path, serve):  # noqa: F811
    server = serve(openai)
    arguments = query(tiny_dir, tmp_path / "out", server, "--max_tokens", "999")
    assert infer.main(arguments) == 0
    dialect = {"max_tokens": "max_completion_tokens", "temperature": None}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["dialect"] == dialect
    (tmp_path / "out" / "metrics_test.json").unlink()
    cache = tmp_path / "out" / "answers.jsonl"
    cache.write_bytes(b"".join(cache.read_bytes().splitlines(keepends=True)[:3]))  # one answer is left
    asked = len(server.seen)
    assert infer.main(arguments) == 0 and asked < len(server.seen)
    assert all("temperature" not in json.loads(raw) for _, raw in server.bodies[asked:])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["dialect"] == dialect


def test_the_same_directory_goes_on_at_another_port_with_the_same_model(
        tiny_dir, tmp_path, serve, capsys):  # noqa: F811
    first, second = serve(lambda prompt, n: reply("joy")), serve(lambda prompt, n: reply("joy"))
    assert infer.main(query(tiny_dir, tmp_path / "out", first)) == 0
    (tmp_path / "out" / "metrics_test.json").unlink()
    assert infer.main(query(tiny_dir, tmp_path / "out", second, "--concurrency", "3")) == 0
    assert not second.seen and f"the same model's answers at {first.base} are used" in capsys.readouterr().out
    other = query(tiny_dir, tmp_path / "out", second)
    other[other.index("gpt-4")] = "gpt-5"
    assert infer.main(other) == 2 and "model 'gpt-4' there, 'gpt-5' here" in error_of(capsys)


def test_a_prompt_loses_the_end_of_its_text_if_max_length_says_how_long(
        tiny_dir, tmp_path, serve, capsys):  # noqa: F811
    server = serve(lambda prompt, n: reply())
    assert infer.main(query(tiny_dir, tmp_path / "a", server)) == 0
    longest = max(len(prompt.encode()) for prompt in server.seen)
    limit = (longest - 8) // 4 + 8  # tokens of 4 bytes, and 8 of the chat format
    server.seen.clear()
    assert infer.main(query(tiny_dir, tmp_path / "b", server, "--max_length", str(limit))) == 0
    assert max(len(prompt.encode()) for prompt in server.seen) <= 4 * (limit - 8) < longest
    assert f"prompts are shortened to about {limit} tokens" in capsys.readouterr().out
    assert all(prompt.endswith("### Response:") for prompt in server.seen)
    assert result_of(tmp_path / "b")[0]["n_shortened"] >= 1


def test_served_models_are_rows_of_their_own_whatever_the_seed_and_the_concurrency(
        tiny_dir, tmp_path, serve, capsys):  # noqa: F811
    server = serve(lambda prompt, n: reply("joy", "length" if prompt.endswith("x") else "stop"))
    for seed, more in ((1, ["--concurrency", "2"]), (2, ["--timeout_s", "9", "--max_retries", "2"])):
        arguments = query(tiny_dir, tmp_path / f"{seed}", server, "--extra", f"seed={seed}", *more)
        arguments[arguments.index("gpt-4")] = "gpt-6-luna"
        assert infer.main(arguments) == 0
    assert infer.main(query(tiny_dir, tmp_path / "3", server, "--extra", "top_p=0.5")) == 0
    table = metrics.tables(tmp_path)
    (row,) = [line for line in table.splitlines() if line.startswith("| gpt-6-luna |")]
    assert "seeds" in row and row.endswith("| 3 | 1, 2 |") and "| share_truncated |" in table
    assert "| gpt-4, shut down 2026-10-23 |" in table
