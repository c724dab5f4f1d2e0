"""Prediction: scores, greedy and constrained decoding, runs that are shown or queried; the README map."""

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import method_map
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import brentq
from sklearn.metrics import log_loss

import data
import infer
import lora
import metrics
import train
from prompts import METHODS, TASKS, build_prompt, build_response, neutral_task

ARCHITECTURES = ("mistral", "phi", "neox", "t5")


def command(tiny_dir, method, *more):
    """The arguments of a run or a query on the tiny data and model."""
    arguments = f"--method {method} --model {tiny_dir}/models/mistral --data_dir {tiny_dir}/goemotions"
    return [*arguments.split(), "--dtype", "fp32", *map(str, more)]


@pytest.fixture(scope="module")
def prompts(tiny_dir):
    """(model, tokenizer, Encoded of 7 LM-P prompts of different lengths) of an architecture, in fp32."""

    def prepare(architecture):
        name = f"{tiny_dir}/models/{architecture}"
        tokenizer, model = lora.load_tokenizer(name), lora.build_model(name, "lm", 0, "none")
        texts = [
            "That game hurt.",
            "a",
            "the dog came near the river ...",
            "fond",
            "x y z",
            "overjoyed!",
            "the cat",
        ]
        n, task = len(texts), TASKS["goemotions"]
        asked = data.Annotations(
            texts,
            texts,
            ["4", "37"],
            np.arange(n),
            np.arange(n) % 2,
            np.zeros((n, 28), bool),
            task.label_names,
        )
        return model, tokenizer, data.encode(tokenizer, task, METHODS["lmp"], asked, 512)

    return prepare


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_responses_equal_those_of_transformers_generate(prompts, architecture):
    """Left padding, the shared prefix and batch mates change nothing."""
    model, tokenizer, encoded = prompts(architecture)
    names = TASKS["goemotions"].label_names
    found, _ = infer.generate(model, tokenizer, encoded, names, 4096)
    limit = infer.longest_response(tokenizer, names)
    for m, response in enumerate(found):
        ids = torch.from_numpy(encoded.prompt(m).astype(np.int64))[None]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
        )
        start = 0 if model.config.is_encoder_decoder else ids.shape[1]
        assert response == tokenizer.decode(out[0, start:], skip_special_tokens=True), m


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_constrained_responses_are_distinct_labels_in_sorted_order(prompts, architecture):
    model, tokenizer, encoded = prompts(architecture)
    names = TASKS["goemotions"].label_names
    responses, steps = infer.generate(model, tokenizer, encoded, names, 4096, constrain=True)
    for response in responses:
        labels = response.strip().split(", ")
        assert set(labels) <= set(names) and labels == sorted(set(labels))
    written = max(len(tokenizer(response, add_special_tokens=False)["input_ids"]) for response in responses)
    if architecture != "t5":  # the line end and the commas are forced
        assert steps < written + 1, (steps, responses)


def test_predictions_go_on_in_halves_where_memory_runs_out(prompts, monkeypatch):
    model, tokenizer, encoded = prompts("mistral")
    arguments = (model, tokenizer, encoded, TASKS["goemotions"].label_names, 4096)
    expected, _ = infer.generate(*arguments)
    decode, most, rows_of = infer.decode, 2, []

    def limited(model, prompts, *more):
        rows_of.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(model, prompts, *more)

    monkeypatch.setattr(infer, "decode", limited)
    assert infer.generate(*arguments)[0] == expected and rows_of == [7, 3, 1, 2, 4, 2, 2]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        infer.generate(*arguments)


@pytest.mark.parametrize("none", [False, True])
def test_the_automaton_accepts_exactly_the_sorted_label_sequences(tiny_dir, none):
    """Brute force over a label that begins as another one does; all subsets, and the empty one if asked."""
    tokenizer = lora.load_tokenizer(f"{tiny_dir}/models/mistral")
    names = ("generalisation", "generalisation_unfair", "hostile", "joy")
    sequences = infer.LabelSequences(tokenizer, names, none)
    accepted, frontier = set(), [((), sequences.start)]
    while frontier:
        written, state = frontier.pop()
        for token, after in sequences.allowed(state).items():
            if token == sequences.end:
                accepted.add(written)
            else:
                frontier.append(((*written, token), after))
    subsets = [c for k in range(not none, 5) for c in itertools.combinations(names, k)]
    expected = {
        tuple(tokenizer("\n" + build_response(c), add_special_tokens=False)["input_ids"]) for c in subsets
    }
    assert accepted == expected


def test_generated_text_says_none_where_annotations_have_no_label(tiny_dir, tmp_path):
    """A file with one 0/1 column, through training, constrained decoding and the predictions file."""
    rows = [f"u{u},text {k},{int(k % 4 == u)}" for k in range(40) for u in range(3)]
    (tmp_path / "a.csv").write_text("\n".join(["user_id,text,x", *rows]) + "\n")
    arguments = command(tiny_dir, "lmp", "--max_steps", 2, "--out", tmp_path / "out", "--constrain")
    arguments += ["--dataset", str(tmp_path / "a.csv")]
    assert train.main(arguments) == 0
    rows = metrics.read_predictions(tmp_path / "out" / "predictions_test.jsonl")
    assert {row["response"].strip() for row in rows} <= {"none", "x"}
    for row in rows:
        assert row["none"] == (row["response"].strip() == "none") == (row["predicted"] == [])
        assert row["text_hash"] == row["text_id"] and not row["not_understood"]
    found = json.loads((tmp_path / "out" / "metrics_test.json").read_text())
    assert found["share_empty_answers"] == found["share_not_understood"] == 0 and found["n_texts"] == 4
    args = train.parse_args(arguments)
    task, splits, _ = data.load(args)
    tokenizer = lora.load_tokenizer(args.model)
    encoded = data.encode(tokenizer, task, METHODS["lmp"], splits["train"], 512)
    data.add_responses(encoded, tokenizer)
    targets = {tokenizer.decode(encoded.response(k)) for k in range(len(encoded.response_offsets) - 1)}
    assert targets == {f"\nnone{tokenizer.eos_token}", f"\nx{tokenizer.eos_token}"}


@pytest.mark.parametrize("model", ["mistral", "t5"])
def test_scores_do_not_depend_on_batches_processes_or_duplicates(tiny_dir, model):
    args = train.parse_args(command(tiny_dir, "cls", "--quantize", "none"))
    args.model = f"{tiny_dir}/models/{model}"
    task, splits, _ = infer.load_splits(args)
    encoded = infer.encode_split(args, lora.load_tokenizer(args.model), task, splits, "val")
    network, _ = infer.build(args, len(task.label_names), "cpu")
    whole = infer.predict_scores(network, encoded, 10**6)
    parts = [infer.predict_scores(network, encoded, 150, infer.Processes(rank, 3)) for rank in range(3)]
    assert np.abs(sum(parts) - whole).max() < 1e-5
    n = encoded.prompt_index[5]
    ids = torch.from_numpy(encoded.prompt(n).astype(np.int64))[None]
    alone = torch.sigmoid(network.eval()(ids, torch.tensor([ids.shape[1]]))).detach().numpy()
    assert np.abs(whole[5] - alone).max() < 1e-5
    assert len(encoded.lengths) < len(encoded.prompt_index)  # each distinct prompt once


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory):
    """{method: --out of a short training run}."""
    runs = {}
    for method in ("cls", "clsp", "lmp"):
        runs[method] = tmp_path_factory.mktemp("runs") / method
        more = "--batch_size 16 --max_steps 6 --validations 3 --unseen_users 0.2 --learning_rate 0.5"
        code = train.main(command(tiny_dir, method, "--out", runs[method], *more.split()))
        assert code == 0
    return runs


def test_the_adapter_of_the_best_validation_is_the_one_that_is_kept(tiny_dir, tmp_path):
    """[choice.T7] The log-loss on val of the kept adapter is the least that was logged; tolerance 1e-4."""
    more = "--batch_size 16 --max_steps 6 --validations 6 --learning_rate 1"  # the first step is of rate 0
    assert train.main(command(tiny_dir, "clsp", "--out", tmp_path, *more.split())) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["val_loss"] for entry in log if "val_loss" in entry]
    best = min(losses)
    assert best < losses[-1], "the rate is high enough to overshoot: the last is not the best"
    assert json.loads((tmp_path / "metrics_val.json").read_text())["log_loss"] == pytest.approx(
        best, abs=1e-4
    )


def test_users_held_out_of_training_are_reported_apart(finished):
    config = json.loads((finished["clsp"] / "run.json").read_text())
    metrics = json.loads((finished["clsp"] / "metrics_test.json").read_text())
    unseen = config["data"]["unseen_users"]
    assert unseen and metrics["unseen"]["n_users"] == len(unseen)
    assert metrics["seen"]["n_annotations"] + metrics["unseen"]["n_annotations"] == metrics["n_annotations"]


def test_baselines_of_a_cls_run_stand_beside_it(finished):
    baselines = json.loads((finished["cls"] / "baselines_test.json").read_text())
    rows = [
        json.loads(line) for line in (finished["cls"] / "predictions_test.jsonl").read_text().splitlines()
    ]
    names = TASKS["goemotions"].label_names
    share = np.array([[name in row["gold"] for name in names] for row in rows]).mean(axis=0)
    expected = np.mean([2 * p / (1 + p) for p in share])  # precision p, recall 1
    assert baselines["always_all"]["f1_macro"] == pytest.approx(expected, abs=1e-9)
    assert set(baselines) == {"always_all", "user_frequencies", "user_bias"}


def some_annotations(labels, n_texts, users):
    """Every user labels every text."""
    users_of = np.tile(np.arange(len(users)), n_texts)
    texts = [f"text {k}" for k in range(n_texts)]
    return data.Annotations(texts, texts, users, np.repeat(np.arange(n_texts), len(users)), users_of, labels,
                            ("anger", "joy"))


def test_the_bias_is_fitted_on_validation_with_the_strength_that_other_folds_prefer():
    """Where all scores are 0.5, the bias b of n answers y has l2 b = sum(y - sigmoid(b)): by bisection."""
    generator, users = np.random.default_rng(0), ["4", "37", "5"]
    habits = np.tile([[0.9, 0.1], [0.2, 0.6], [0.5, 0.5]], (20, 1))
    splits = {name: some_annotations(generator.random((60, 2)) < habits, 20, users)
              for name in ("train", "val", "test")}
    splits["train"].labels[:] = True  # on what the model was trained on, no bias is left to learn
    val, scores = splits["val"], {name: np.full((60, 2), 0.5) for name in ("val", "test")}

    def fitted(l2, rows):
        bias = np.zeros((3, 2))
        for user, label in itertools.product(range(3), range(2)):
            y = val.labels[rows & (val.user_index == user), label]
            bias[user, label] = brentq(lambda b, y=y: l2 * b - (y - 1 / (1 + np.exp(-b))).sum(), -50, 50)
        return 1 / (1 + np.exp(-bias[val.user_index]))

    losses = {}
    for l2 in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
        held_out = np.zeros((60, 2))
        for fold in range(5):
            own = val.text_index % 5 == fold
            held_out[own] = fitted(l2, ~own)[own]
        losses[l2] = log_loss(val.labels.ravel(), held_out.ravel())
    encoded = SimpleNamespace(hashes=[""] * 60, prompt_index=np.arange(60))
    found = infer.evaluate_baselines(splits, scores, encoded)["user_bias"]
    assert found["strength"] == min(losses, key=losses.get) and 0.1 < found["strength"] < 100
    expected = fitted(found["strength"], val.user_index >= 0)
    assert np.array(found["scores"]) == pytest.approx(expected, abs=1e-5)
    assert found["disagreement_auc"] > 0.5


def test_evaluating_a_run_again_gives_its_metrics(finished, capsys):
    before = json.loads((finished["clsp"] / "metrics_test.json").read_text())
    assert infer.main(["--run", str(finished["clsp"])]) == 0
    after = json.loads((finished["clsp"] / "metrics_test.json").read_text())
    assert after["f1_macro"] == before["f1_macro"] and after["log_loss"] == pytest.approx(
        before["log_loss"], abs=1e-5
    )


@pytest.mark.parametrize("method", ["clsp", "lmp"])
def test_a_text_is_shown_to_users_and_strangers_are_named(finished, capsys, method):
    config = json.loads((finished[method] / "run.json").read_text())
    rows = [
        json.loads(line) for line in (finished[method] / "predictions_test.jsonl").read_text().splitlines()
    ]
    known = next(row["user_id"] for row in rows if row["user_id"] not in config["data"]["unseen_users"])
    assert (
        infer.main(["--run", str(finished[method]), "--text", "so {braces} ###", "--users", known, "nobody"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "unseen in training, so only a guess: users nobody" in lines
    table = lines[lines.index("so {braces} ###") + 1 :]
    assert table[0].split() == ["user", known, "nobody"]
    assert [line.split()[0] for line in table[1:]] == list(TASKS["goemotions"].label_names)
    assert all(re.fullmatch(r"\w+ +[01]\.\d\d +[01]\.\d\d", line) for line in table[1:])


@pytest.mark.parametrize("method", ["q0s", "q1s", "q2s"])
def test_a_local_model_is_queried_without_training(tiny_dir, tmp_path, method):
    assert infer.main(command(tiny_dir, method, "--limit", 40, "--out", tmp_path / "out")) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "predictions_test.jsonl").read_text().splitlines()
    ]
    metrics = json.loads((tmp_path / "out" / "metrics_test.json").read_text())
    assert metrics["n_annotations"] == len(rows) == 40
    assert {"text_id", "user_id", "prompt", "gold", "predicted", "response", "not_understood"} <= set(rows[0])
    same = {}
    for row in rows:
        assert same.setdefault(row["prompt"], row["response"]) == row["response"]
    assert (len(same) < 40) == (method == "q0s") or method != "q0s"


def test_a_chat_template_changes_the_prompts_of_a_query_only_when_asked(tiny_dir, tmp_path):
    """[choice.P7]"""
    hashes = []
    for k, extra in enumerate(([], ["--chat_template"])):
        out = tmp_path / str(k)
        assert infer.main(command(tiny_dir, "q0s", "--limit", 3, "--out", out, *extra)) == 0
        hashes.append(json.loads((out / "predictions_test.jsonl").read_text().splitlines()[0])["prompt"])
    assert hashes[0] != hashes[1]
    args, _ = infer.parse_args(["--method", "q0s", "--data_dir", f"{tiny_dir}/goemotions", "--limit", "3"])
    task, splits, _ = infer.load_splits(args)
    text, _ = next(splits["test"].fields())
    assert hashes[0] == data.prompt_hash("".join(build_prompt(task, METHODS["q0s"], text)))


@pytest.mark.parametrize(
    "change, message",
    [
        (["--run", "/nonexistent"], "no run.json"),
        (["--model", "/elsewhere"], "a hub id or a directory"),
        (["--lora_r", "7"], "was trained with lora_r 2"),
        (["--text", "x"], "who labels the texts? Give --users"),
        (["--text", "  ", "--users", "4"], "give --text with a text, and --users"),
        (["--users", "4"], "give --text with a text, and --users"),
        (["--input", "x.csv"], "or --input with --output"),
        (["--text", "x", "--output", "x.csv"], "or --input with --output"),
        (["--dataset", "unhealthy"], "was trained with dataset"),
        (["--micro_batch_tokens", "auto"], "give --run a number"),
    ],
)
def test_a_mistake_with_a_run_is_told_in_one_line(finished, capsys, change, message):
    assert infer.main(["--run", str(finished["clsp"]), *change]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]


def test_a_run_is_decoded_with_constraints_beside_its_free_responses(finished, tmp_path, capsys):
    free = (finished["lmp"] / "predictions_test.jsonl").read_bytes()
    arguments = ["--run", str(finished["lmp"]), "--constrain"]
    assert infer.main(arguments) == 2
    assert "give them an --out" in capsys.readouterr().err
    assert infer.main([*arguments, "--out", str(tmp_path / "constrained")]) == 0
    metrics = json.loads((tmp_path / "constrained" / "metrics_test.json").read_text())
    assert metrics["share_not_understood"] == metrics["share_empty_answers"] == 0
    assert (finished["lmp"] / "predictions_test.jsonl").read_bytes() == free
    assert json.loads((tmp_path / "constrained" / "run.json").read_text())["arguments"]["constrain"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "gpt-4", "--dtype", "fp32"],
        ["--model", "phi-2", "--max_cost", "1"],
        ["--model", "phi-2", "--lora_r", "4"],
        ["--run", "DIR", "--dry_run"],
        ["--run", "DIR", "--chat_template"],
        ["--run", "DIR", "--api_base", "http://localhost/v1"],
    ],
)
def test_a_flag_without_a_meaning_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        infer.main(arguments if "--run" in arguments else ["--method", "q0s", *arguments])
    assert stopped.value.code == 2 and "without a meaning here" in capsys.readouterr().err


def test_a_trained_method_is_not_a_query(capsys):
    with pytest.raises(SystemExit) as stopped:
        infer.main(["--method", "clsp", "--model", "gpt-4"])
    assert stopped.value.code == 2


def test_a_label_that_the_tokenizer_joins_to_the_one_before_is_refused():
    class Joining:
        eos_token_id = 0

        def __call__(self, text, **_):
            return {"input_ids": [len(text)]}  # one token for a whole response

    with pytest.raises(ValueError, match="--constrain"):
        infer.LabelSequences(Joining(), neutral_task(["a", "b"]).label_names)


def test_every_tag_stands_once_in_the_code_in_a_test_and_in_the_readme():
    """The method map is held against code and tests both ways, so it cannot rot."""
    code, tests = method_map.tags_in_code(), method_map.tags_in_tests()
    assert {tag: places for tag, places in code.items() if len(places) > 1} == {}
    assert set(code) - set(tests) == set()
    readme = (method_map.ROOT / "results" / "README.md").read_text()
    rows = re.findall(
        r"^\| `([a-z0-9]+\.[\w-]+)` \|.*\| `([\w.]+: [\w.]+)` \| `(\w+)` \|$", readme, re.MULTILINE
    )
    assert {tag: place for tag, place, _ in rows} == {tag: places[0] for tag, places in code.items()}
    assert all(test in tests[tag] for tag, _, test in rows)


def test_a_query_does_not_overwrite_another_one(tiny_dir, tmp_path, capsys):
    arguments = ["--limit", 3, "--out", tmp_path / "out"]
    assert infer.main(command(tiny_dir, "q0s", *arguments)) == 0
    before = (tmp_path / "out" / "predictions_test.jsonl").read_bytes()
    assert infer.main(command(tiny_dir, "q1s", *arguments)) == 2
    assert "method 'q0s' there, 'q1s' here" in capsys.readouterr().err
    written = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert infer.main(command(tiny_dir, "q0s", *arguments)) == 0
    assert "is finished: its result is in metrics_test.json" in capsys.readouterr().out
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == written
    assert (tmp_path / "out" / "predictions_test.jsonl").read_bytes() == before


def test_a_flag_that_is_given_its_default_is_given():
    """`--lora_r 2` contradicts a run of another rank, though 2 is the default."""
    assert infer.parse_args(["--run", "x", "--lora_r", "2"])[1] == {"run": Path("x"), "lora_r": 2}


@pytest.mark.parametrize("what", ["data", "weights"])
def test_a_run_is_not_evaluated_on_other_data_or_weights(finished, tiny_dir, tmp_path, capsys, what):
    """Two label columns with swapped names, or another base under the same path, would be other numbers."""
    inputs, run = shutil.copytree(tiny_dir, tmp_path / "inputs"), tmp_path / "run"
    shutil.copytree(finished["clsp"], run)
    (run / "metrics_test.json").unlink()  # it holds the checksum of run.json
    text = (run / "run.json").read_text().replace(str(tiny_dir), str(inputs))
    (run / "run.json").write_text(text)
    if what == "data":
        path = inputs / "goemotions" / "goemotions_1.csv"
        swapped = path.read_text().replace("joy", "anger_", 1).replace("anger,", "joy,", 1)
        path.write_text(swapped.replace("anger_", "anger"))
    else:
        (path,) = Path(json.loads(text)["arguments"]["model"]).glob("model*.safetensors")
        tensors = load_file(path)
        save_file({name: tensor + 0.05 for name, tensor in tensors.items()}, path, {"format": "pt"})
    assert infer.main(["--run", str(run)]) == 2
    assert f"the {what.replace('data', 'data files')}" in capsys.readouterr().err
    assert infer.main(["--run", str(run), "--text", "x", "--users", "4"]) == (0 if what == "data" else 2)


def test_predictions_that_were_cut_short_are_made_again(finished, tmp_path, capsys):
    """A kill between the predictions and the metrics of a second evaluation must not cost the run."""
    run = shutil.copytree(finished["clsp"], tmp_path / "run")
    (run / "predictions_test.jsonl").write_text("")
    assert infer.main(["--run", str(run)]) == 0
    assert metrics.main(["tables", str(run)]) == 0


def test_baselines_that_were_lost_are_made_again(finished, tmp_path):
    run = shutil.copytree(finished["cls"], tmp_path / "run")
    before = json.loads((run / "baselines_test.json").read_text())
    (run / "baselines_test.json").unlink()
    assert infer.main(["--run", str(run)]) == 0
    after = json.loads((run / "baselines_test.json").read_text())
    assert after["user_bias"]["log_loss"] == pytest.approx(before["user_bias"]["log_loss"], abs=1e-5)
    assert metrics.main(["tables", str(run)]) == 0


def test_nan_logits_are_an_error_and_no_answer(tiny_dir, tmp_path, capsys, monkeypatch):
    build = infer.build

    def broken(*args):
        model, targets = build(*args)
        model.get_output_embeddings().weight.data.fill_(float("nan"))
        return model, targets

    monkeypatch.setattr(infer, "build", broken)
    assert infer.main(command(tiny_dir, "q0s", "--limit", 3, "--out", tmp_path / "out")) == 2
    assert "logits are NaN" in capsys.readouterr().err


def test_nan_scores_are_an_error_and_no_prediction(finished, tmp_path, capsys, monkeypatch):
    load = infer.load_trained

    def broken(*args):
        model = load(*args)
        model.score.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(infer, "load_trained", broken)
    run = shutil.copytree(finished["clsp"], tmp_path / "run")
    assert infer.main(["--run", str(run)]) == 2 and "scores are NaN" in capsys.readouterr().err


def test_annotations_short_of_examples_and_shortened_prompts_are_counted_in_the_metrics(tiny_dir, tmp_path):
    """Of unseen users there is no example in train."""
    out = tmp_path / "out"
    assert infer.main(command(tiny_dir, "q2s", "--limit", 40, "--unseen_users", 0.5, "--out", out)) == 0
    metrics_of = json.loads((out / "metrics_test.json").read_text())
    assert metrics_of["n_too_few_examples"] == metrics_of["unseen"]["n_annotations"]
    assert metrics_of["n_shortened"] == 0


def test_without_git_the_commit_is_not_known(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    args, _ = infer.parse_args(["--method", "q0s"])
    assert infer.describe_run(args, {})["commit"] is None
