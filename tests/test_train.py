"""Training: losses, data parallelism, mixed precision, checkpoints, and what wrong arguments get."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chaos
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import data
import infer
import lora
import train
from prompts import METHODS

ROOT = Path(train.__file__).parent
STEPS = [
    "--batch_size",
    "16",
    "--max_steps",
    "8",
    "--validations",
    "4",
    "--learning_rate",
    "1e-3",
    "--lora_r",
    "4",
]


def command(tiny_dir, out, *more, method="clsp", model="mistral"):
    """The arguments of a short run on the embedded default, in fp32."""
    return [
        "--method",
        method,
        "--model",
        f"{tiny_dir}/models/{model}",
        "--dataset",
        "goemotions",
        "--data_dir",
        f"{tiny_dir}/goemotions",
        "--dtype",
        "fp32",
        "--out",
        str(out),
        *STEPS,
        *map(str, more),
    ]


def start(arguments, processes=1, script="train.py", **options):
    """train.py in processes of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    )
    return subprocess.Popen(
        [*launcher, str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def prepared(tiny_dir):
    """{(model, method): (args, model with LoRA whose B is not 0, encoded train annotations)}, dropout off."""
    made = {}

    def prepare(model="mistral", method="clsp"):
        if (model, method) not in made:
            args = train.parse_args(
                command(
                    tiny_dir,
                    "unused",
                    "--lora_dropout",
                    "0",
                    "--quantize",
                    "none",
                    method=method,
                    model=model,
                )
            )
            task, splits, _ = infer.load_splits(args)
            encoded = infer.encode_split(args, lora.load_tokenizer(args.model), task, splits, "train")
            network, _ = infer.build(args, len(task.label_names), "cpu")
            with torch.no_grad():
                for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            made[model, method] = args, network, encoded
        return made[model, method]

    return prepare


def gradients_of(network, losses):
    network.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, torch.cat(
        [
            p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            for p in network.parameters()
            if p.requires_grad
        ]
    )


# ---- The loss ----


@pytest.mark.parametrize("model", ["mistral", "t5"])
def test_merged_duplicates_give_the_loss_and_gradient_of_one_row_per_annotation(prepared, model):
    """[loss.cls] Binary cross-entropy is linear in its target, so k annotations of a prompt are one row."""
    args, network, encoded = prepared(model, "cls")
    rows = np.arange(40)
    assert len(np.unique(encoded.prompt_index[rows])) < len(rows)
    merged = train.Objective(network, "cls", 4096)
    prefix = data.shared_prefix(encoded) if network.shares_prefix else 0

    def one_by_one():
        for row in rows:
            ids = torch.from_numpy(encoded.prompt(encoded.prompt_index[row]).astype(np.int64))[None]
            logits = network(ids, torch.tensor([ids.shape[1]]))
            yield F.binary_cross_entropy_with_logits(
                logits, torch.from_numpy(encoded.labels[row])[None], reduction="sum"
            )

    expected, expected_gradient = gradients_of(network, one_by_one())
    found, gradient = gradients_of(network, merged.losses(encoded, rows, prefix))
    assert found == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("model", ["mistral", "phi", "neox", "t5"])
def test_the_lm_loss_is_that_of_transformers_over_the_response_tokens(prepared, model):
    """[loss.lm] [choice.T1] transformers' own loss with labels of -100 on the prompt; tolerance 1e-5."""
    args, network, encoded = prepared(model, "lmp")
    rows = np.array([0, 1, 2, 3, 4, 5, 3, 3])  # the doubled ones are one input of weight 3
    objective = train.Objective(network, "lm", 4096)
    prefix = data.shared_prefix(encoded) if network.shares_prefix else 0
    found, gradient = gradients_of(network, objective.losses(encoded, rows, prefix))
    found, gradient = found / objective.terms(encoded, rows), gradient / objective.terms(encoded, rows)
    prompts = [encoded.prompt(encoded.prompt_index[row]) for row in rows]
    responses = [encoded.response(encoded.response_index[row]) for row in rows]
    if network.config.is_encoder_decoder:
        inputs, labels = prompts, responses
    else:
        inputs = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
        labels = [np.concatenate([np.full(len(a), -100), b]) for a, b in zip(prompts, responses, strict=True)]
    mask = torch.from_numpy(data.pad([np.ones(len(ids)) for ids in inputs], 0))
    expected, expected_gradient = gradients_of(
        network,
        [
            network(
                input_ids=torch.from_numpy(data.pad(inputs, 0)),
                attention_mask=mask,
                labels=torch.from_numpy(data.pad(labels, -100)),
            ).loss
        ],
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * max(1, expected_gradient.norm())


def test_the_loss_over_all_positions_counts_every_token_but_the_first(prepared):
    """[choice.T1] T1=paper sums over all positions in the sequence."""
    args, network, encoded = prepared("mistral", "lm")
    rows = np.array([3])
    objective = train.Objective(network, "lm", 4096, all_positions=True)
    ids = np.concatenate(
        [encoded.prompt(encoded.prompt_index[3]), encoded.response(encoded.response_index[3])]
    )
    ids = torch.from_numpy(ids.astype(np.int64))[None]
    expected = network(input_ids=ids, labels=ids).loss.item()
    assert objective.terms(encoded, rows) == ids.shape[1] - 1
    found = sum(loss.item() for loss in objective.losses(encoded, rows, 20))
    assert found / (ids.shape[1] - 1) == pytest.approx(expected, abs=1e-5)


def test_a_response_ends_with_the_end_token_unless_told_otherwise(prepared, tiny_dir):
    """[choice.T2] The released code never teaches the model to stop."""
    args, network, encoded = prepared("mistral", "lm")
    tokenizer = lora.load_tokenizer(args.model)
    assert all(encoded.response(k)[-1] == tokenizer.eos_token_id for k in range(3))
    args = train.parse_args(command(tiny_dir, "unused", "--follow", "T2=released", method="lm"))
    task, splits, _ = infer.load_splits(args)
    released = infer.encode_split(args, tokenizer, task, splits, "train")
    assert all(released.response(k)[-1] != tokenizer.eos_token_id for k in range(3))


def test_the_lm_head_trains_only_if_the_released_code_is_followed(tiny_dir):
    """[choice.T4]"""
    for follow, trains in (("paper", False), ("released", True)):
        args = train.parse_args(command(tiny_dir, "unused", "--follow", f"T4={follow}", method="lm"))
        network, _ = infer.build(args, 28, "cpu")
        assert network.get_output_embeddings().weight.requires_grad == trains


# ---- Data parallelism ----


@pytest.mark.parametrize("method, family", [("clsp", "cls"), ("lmp", "lm")])
@pytest.mark.parametrize("world_size, tokens", [(1, 1), (1, 300), (2, 4096), (4, 500), (8, 4096)])
def test_any_number_of_processes_and_micro_batches_gives_the_gradient_of_one_batch(
    prepared, method, family, world_size, tokens
):
    """8 x 1 = 4 x 2 = 2 x 4 to 1e-5 (transformers#34191: accumulation was unequal)."""
    _, network, encoded = prepared("mistral", method)
    rows, prefix = np.arange(5, 21), data.shared_prefix(encoded)
    one = train.Objective(network, family, 10**6)
    expected, expected_gradient = gradients_of(network, one.losses(encoded, rows, prefix))
    total, summed = 0.0, 0
    for rank in range(world_size):
        part = train.Objective(network, family, tokens, infer.Processes(rank, world_size))
        loss, gradient = gradients_of(network, part.losses(encoded, rows, prefix))
        total, summed = total + loss, summed + gradient
    assert total == pytest.approx(expected, rel=1e-5)
    assert (summed - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_a_process_without_annotations_of_its_own_takes_part_in_the_step(prepared):
    """The last step of an epoch may hold fewer annotations than there are processes."""
    _, network, encoded = prepared("mistral", "clsp")
    assert (
        list(train.Objective(network, "cls", 4096, infer.Processes(3, 4)).losses(encoded, np.arange(2), 0))
        == []
    )


def test_two_processes_train_the_weights_of_one(tiny_dir, tmp_path):
    """Adam divides by the root of tiny squares, which blows up rounding: tolerance 1% of the largest."""
    alone, both = tmp_path / "one", tmp_path / "two"
    processes = (
        start(command(tiny_dir, alone, "--lora_dropout", 0)),
        start(command(tiny_dir, both, "--lora_dropout", 0), 2),
    )
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    one, two = (load_file(out / "adapter_model.safetensors") for out in (alone, both))
    largest = max(tensor.abs().max() for tensor in one.values())
    assert max((one[name] - two[name]).abs().max() for name in one) < 0.01 * largest
    ours, theirs = (json.loads((out / "metrics_test.json").read_text()) for out in (alone, both))
    assert ours["n_annotations"] == theirs["n_annotations"]  # pytorch#25162: a sampler that repeats rows
    assert ours["log_loss"] == pytest.approx(theirs["log_loss"], abs=1e-4)


# ---- The step ----


def test_the_learning_rate_is_the_cosine_with_warm_up_of_transformers():
    """[step.schedule] [choice.T6] The defaults are those of the authors' config (README, audit row T6)."""
    args = vars(train.parse_args(["--method", "clsp"]))
    recipe = {"learning_rate": 1e-4, "epochs": 10, "batch_size": 128, "max_grad_norm": 1.0, "validations": 20}
    recipe |= {"lora_r": 2, "lora_alpha": 32, "lora_dropout": 0.05, "seed": 42}
    assert {name: args[name] for name in recipe} == recipe
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(0.05 * 130), 130)
    for step in range(130):
        assert train.learning_rate_at(step, 130, 1.0) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12
        )
        optimizer.step()
        schedule.step()


def one_step(network, encoded, scale_value, max_grad_norm=1e-3):
    """The trainable parameters after one step with this loss scale, starting from the same weights."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    learner = train.Learner(train.Objective(network, "cls", 4096), torch.optim.SGD(parameters, lr=1.0), True)
    learner.scale.value = scale_value
    result = train.train_step(learner, encoded, np.arange(8), 0, max_grad_norm)
    after = torch.cat([(p.detach() - old).flatten() for p, old in zip(parameters, before, strict=True)])
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
            parameter.grad = None
    return after, result, learner.scale


def test_clipping_does_not_depend_on_the_loss_scale(prepared):
    """[step.unscale] [step.clip] fsdp_qlora clipped before it unscaled; tolerance 1e-5."""
    _, network, encoded = prepared("mistral", "clsp")
    plain, (_, norm, _), _ = one_step(network, encoded, 1.0)
    scaled, (_, norm_scaled, _), _ = one_step(network, encoded, 2.0**12)
    assert norm > 1e-3  # it clips
    assert norm_scaled == pytest.approx(norm, rel=1e-5)
    assert plain.norm() == pytest.approx(1e-3, rel=1e-2)
    assert (plain - scaled).norm() < 1e-5 * plain.norm()


def test_a_step_whose_scaled_gradients_overflow_is_skipped_and_the_scale_halved(prepared):
    _, network, encoded = prepared("mistral", "clsp")
    change, _, scale = one_step(network, encoded, 3e38)
    assert change.abs().max() == 0
    assert (scale.value, scale.skipped) == (1.5e38, 1)


def test_gradients_that_are_nan_at_every_scale_stop_the_run(prepared):
    """1,300 steps were skipped without a word once, at a scale of 0."""
    _, network, encoded = prepared()
    parameters = [p for p in network.parameters() if p.requires_grad]
    hook = parameters[0].register_hook(lambda gradient: gradient * float("nan"))
    learner = train.Learner(train.Objective(network, "cls", 4096), torch.optim.AdamW(parameters), True)
    with pytest.raises(FloatingPointError, match=r"gradient norm nan, process \[0\]"):
        for _ in range(30):
            train.train_step(learner, encoded, np.arange(4), 0)
    assert learner.scale.skipped == 16 and learner.scale.value == 1
    hook.remove()


def test_the_loss_scale_moves_like_the_scaler_of_torch():
    ours, theirs = train.LossScale(True), torch.amp.GradScaler("cpu", growth_interval=2000)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(4100):
        finite = step not in (3, 4, 2500)
        weight.grad = torch.ones(1) if finite else torch.full((1,), math.inf)
        theirs.scale(torch.ones(1))
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.value == theirs.get_scale()


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_keeps_the_checkpoint(
    tiny_dir, tmp_path, capsys
):
    arguments = command(tiny_dir, tmp_path / "out", "--max_grad_norm", 1e30)
    arguments[arguments.index("--learning_rate") + 1] = "1e30"
    assert train.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("error: step ") and "lower --learning_rate" in line for line in lines), lines
    assert not (tmp_path / "out" / "metrics_test.json").exists()


@pytest.mark.parametrize("free, prompts", [(10.0, 15), (3.0, 3), (0.1, 1), (1000.0, 16)])
def test_auto_micro_batches_fill_80_percent_of_the_free_memory(prepared, monkeypatch, free, prompts):
    """A prompt takes 0.5 GB on top of 0.5 for all: (0.8 free - 0.5) / 0.5 of them fit, at most a batch."""
    _, network, encoded = prepared("mistral", "clsp")
    objective = train.Objective(network, "cls", 10**9)
    pad, prompts_of = data.pad, []

    def counting(rows, *more):
        prompts_of[-1] += len(rows)
        return pad(rows, *more)

    def growth_gb(work, device):
        prompts_of.append(0)
        work()
        return 0.5 + 0.5 * prompts_of[-1]

    monkeypatch.setattr(data, "pad", counting)
    monkeypatch.setattr(train, "growth_gb", growth_gb)
    monkeypatch.setattr(train, "free_memory_gb", lambda device: free)
    tokens, found = train.fit_micro_batch(objective, encoded, 16)
    assert prompts_of == [1, 1, 5] and found == free
    prefix = data.shared_prefix(encoded)  # is computed once
    assert 0 < prefix and tokens == prefix + prompts * (encoded.lengths.max() - prefix)


def out_of_memory_above(network, monkeypatch, most_rows):
    """The model runs out of memory in the middle of a forward pass of more rows; returns the rows of each."""
    forward, rows_of = network.forward, []

    def limited(input_ids, *more):
        rows_of.append(len(input_ids))
        logits = forward(input_ids, *more)
        if len(input_ids) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits

    monkeypatch.setattr(network, "forward", limited)
    return rows_of


@pytest.mark.parametrize("most, expected", [(4, 4), (2, 3), (1, 1)])
def test_the_probe_of_auto_micro_batches_survives_an_out_of_memory(prepared, monkeypatch, most, expected):
    """0.5 GB a prompt and 1.75 GB of room for them: as many as five prompts would have told, or one."""
    _, network, encoded = prepared("mistral", "clsp")
    rows_of = out_of_memory_above(network, monkeypatch, most)
    monkeypatch.setattr(train, "growth_gb", lambda work, device: (work(), 0.5 * rows_of[-1])[1])
    monkeypatch.setattr(train, "free_memory_gb", lambda device: {4: 2.5, 2: 2.0, 1: 9.0}[most])
    tokens, _ = train.fit_micro_batch(train.Objective(network, "cls", 10**9), encoded, 16)
    prefix = data.shared_prefix(encoded)
    assert tokens == prefix + expected * (encoded.lengths.max() - prefix)
    assert max(rows_of) == 5 and rows_of.count(1) >= 2
    out_of_memory_above(network, monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="does not fit into"):
        train.fit_micro_batch(train.Objective(network, "cls", 10**9), encoded, 16)


def test_a_step_that_runs_out_of_memory_is_repeated_exactly_in_smaller_micro_batches(
        prepared, monkeypatch, capsys):
    """Gradients and random numbers are those of a step that began with the smaller size. Dropout is on."""
    _, network, encoded = prepared("mistral", "clsp")
    parameters = [p for p in network.parameters() if p.requires_grad]
    for module in network.modules():
        if isinstance(module, lora.SharedDropout):
            monkeypatch.setattr(module, "p", 0.3)

    def step(tokens):
        torch.manual_seed(5)
        learner = train.Learner(train.Objective(network, "cls", tokens), torch.optim.SGD(parameters, lr=0.0))
        train.train_step(learner, encoded, np.arange(8, 24), 0, 1e30)
        return learner.objective.tokens_per_batch, learner.buffer, torch.get_rng_state()

    with monkeypatch.context() as patch:
        rows_of = out_of_memory_above(network, patch, 5)
        halved, buffer, rng = step(10**9)
    assert max(rows_of) > 5 >= rows_of[-1] and halved < 10**9
    assert f"on process 0: --micro_batch_tokens {halved} from here on" in capsys.readouterr().err
    again, expected, expected_rng = step(halved)
    assert again == halved and torch.equal(buffer, expected) and torch.equal(rng, expected_rng)
    out_of_memory_above(network, monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        step(10**9)


def test_a_validation_that_runs_out_of_memory_gives_the_same_loss(prepared, monkeypatch):
    _, network, encoded = prepared("mistral", "clsp")
    expected = train.Objective(network, "cls", 2000).mean_loss(encoded, 0)
    out_of_memory_above(network, monkeypatch, 7)
    assert train.Objective(network, "cls", 2000).mean_loss(encoded, 0) == pytest.approx(expected, rel=1e-6)


def test_measured_growth_is_that_of_the_work(tmp_path):
    """300 MB that are freed again count; what was there before does not. Tolerance 10%."""
    held = np.ones(50_000_000)
    growth = train.growth_gb(lambda: np.ones(37_500_000).sum(), torch.device("cpu"))
    assert growth == pytest.approx(0.3, rel=0.1) and len(held)


def test_a_run_with_auto_micro_batches_says_and_records_what_fits(tiny_dir, tmp_path, capsys):
    arguments = command(tiny_dir, tmp_path / "out", "--micro_batch_tokens", "auto")
    assert train.main(arguments) == 0
    tokens = json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]["micro_batch_tokens"]
    assert tokens > 0 and f"--micro_batch_tokens {tokens} fits into the " in capsys.readouterr().out


# ---- Checkpoints ----


def test_a_checkpoint_before_the_first_step_that_counts_is_resumed(tmp_path):
    """In fp16 every step so far may have overflowed: there is no optimizer state yet (KeyError once)."""
    weights = [torch.nn.Parameter(torch.ones(3))]
    train.save_checkpoint(tmp_path, torch.optim.AdamW(weights), {"step": 4})
    other = [torch.nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.AdamW(other, lr=0.5, weight_decay=0.0)
    assert train.load_checkpoint(tmp_path, optimizer, infer.ALONE)["step"] == 4
    other[0].grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(other[0], torch.full((3,), 0.5))  # Adam's first step is the learning rate


def files_of(out):
    return {
        name: (out / name).read_bytes() for name in ("adapter_model.safetensors", "predictions_test.jsonl")
    }


@pytest.fixture(scope="module")
def undisturbed(tiny_dir, tmp_path_factory):
    """The results of the run that the faults below disturb."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert train.main(command(tiny_dir, out)) == 0
    return files_of(out)


def test_a_finished_run_is_not_run_again_and_other_arguments_are_refused(tiny_dir, tmp_path, capsys):
    arguments = command(tiny_dir, tmp_path / "out")
    assert train.main(arguments) == 0
    before = files_of(tmp_path / "out")
    assert train.main(arguments) == 0
    assert "is finished" in capsys.readouterr().out
    assert train.main([*arguments, "--lora_alpha", "8"]) == 2
    assert "lora_alpha 32 there, 8.0 here" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_killed_ends_bit_identical_when_started_again(tiny_dir, tmp_path, undisturbed, kill):
    """peft#859, nanoGPT#467: a resume that lost the optimizer, the random state or the position."""
    out = tmp_path / "out"
    process = start(command(tiny_dir, out))
    while not list(out.glob("checkpoint/*.safetensors")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(kill)
    output, _ = process.communicate()
    assert not (out / "metrics_test.json").exists()
    if kill != signal.SIGKILL:
        assert process.returncode == 128 + kill and "the same command goes on" in output
    assert train.main(command(tiny_dir, out)) == 0
    assert files_of(out) == undisturbed


@pytest.mark.parametrize("victim", ["train.save_file", "lora.save_file"])
def test_a_kill_in_the_middle_of_a_write_loses_nothing(tiny_dir, tmp_path, undisturbed, victim):
    """The second checkpoint, or the second adapter, is cut in half and the process killed."""
    script = tmp_path / "die.py"
    script.write_text(f"""
import os, sys, lora, train
calls, save = [], {victim}
def save_half(tensors, path, *more):
    save(tensors, path, *more)
    calls.append(1)
    if len(calls) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), 9)
{victim} = save_half
train.main(sys.argv[1:])
""")
    out = tmp_path / "out"
    process = start(command(tiny_dir, out), script=script)
    process.communicate()
    assert process.returncode == -9
    assert train.main(command(tiny_dir, out)) == 0
    assert files_of(out) == undisturbed


def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(tiny_dir, tmp_path, undisturbed, capsys):
    out = tmp_path / "out"
    process = start(command(tiny_dir, out))
    while len(list(out.glob("checkpoint/*.safetensors"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    older, newest = sorted(out.glob("checkpoint/*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    assert train.main(command(tiny_dir, out)) == 0
    captured = capsys.readouterr()
    assert f"{newest} is broken" in captured.err and "resumed at step" in captured.out
    assert files_of(out) == undisturbed
    (out / "metrics_test.json").unlink()
    older.parent.mkdir()
    older.write_bytes(content[:1000])
    assert train.main(command(tiny_dir, out)) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_two_processes_are_killed_and_end_bit_identical(tiny_dir, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    first, process = (
        start(command(tiny_dir, whole), 2),
        start(command(tiny_dir, out), 2, start_new_session=True),
    )
    while not list(out.glob("checkpoint/*.safetensors")):
        time.sleep(0.01)
        assert process.poll() is None
    chaos.kill_all(process)
    for each in (first, process):
        each.communicate()
    assert not (out / "metrics_test.json").exists()
    second = start(command(tiny_dir, out), 2)
    output, _ = second.communicate()
    assert second.returncode == 0, output
    assert files_of(out) == files_of(whole)


def test_a_second_run_in_the_same_directory_is_refused(tiny_dir, tmp_path, capsys):
    args = train.parse_args(command(tiny_dir, tmp_path / "out"))
    lock, _ = train.claim_out(args)
    assert train.main(command(tiny_dir, tmp_path / "out")) == 2
    assert "is in use by another run" in capsys.readouterr().err
    lock.close()


# ---- Wrong arguments ----


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "no/such-model"], "--model no/such-model"),
        (["--model", "mistral"], "has no GPU"),
        (["--model", "flan-t5", "--dtype", "fp16"], "GPU"),
        (["--dataset", "nothing.csv"], "no data set"),
        (["--data_dir", "/nonexistent"], "goemotions"),
        (["--target_modules", "q_porj"], "match no linear layer"),
        (["--max_length", "20"], "--max_length 20 is less than"),
        (["--min_share", "2"], "no user is left"),
    ],
)
def test_a_mistake_ends_in_one_line_with_exit_status_2(
    tiny_dir, tmp_path, capsys, monkeypatch, change, message
):
    monkeypatch.setattr(
        data.requests, "get", lambda *_, **__: (_ for _ in ()).throw(data.requests.ConnectionError())
    )
    monkeypatch.setattr(data.time, "sleep", lambda _: None)
    assert train.main(command(tiny_dir, tmp_path / "out", *change)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--methd", "clsp"],
        ["--epoch", "3"],
        ["--method", "q0s"],
        ["--batch_size", "0"],
        ["--follow", "X9=paper"],
        ["--quantize", "int8"],
        [],
    ],
)
def test_unknown_abbreviated_and_mistyped_flags_are_refused(arguments, capsys):
    """qlora swallowed unknown flags."""
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip()


def test_a_truncated_adapter_is_refused(tiny_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(command(tiny_dir, out)) == 0
    os.truncate(out / "adapter_model.safetensors", 5000)
    assert infer.main(["--run", str(out)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_methods_of_the_query_family_are_not_trained():
    assert all(METHODS[name].family == "query" for name in ("q0s", "q1s", "q2s"))
