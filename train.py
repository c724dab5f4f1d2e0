"""Learning: data parallel or one process, mixed precision, the loop, checkpoints, final evaluation.

Source: sections IV-B, IV-C, V-B, V-C and VI-C of the paper; the hyper-parameters are the authors' config's.

    torchrun --nproc_per_node 4 train.py --method clsp --model mistral --dataset goemotions
    python train.py --method lmp --model DIR --dataset annotations.csv        the same on one process

The annotations of an optimizer step depend on the seed alone. The processes share them out and sum their
gradients once per step, and so follow the same path whatever their number. Does not know prompts (prompts.py)
or files of data (data.py).
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import infer
import lora
import metrics
from infer import ALONE, Processes, claim_out, from_all, summed, to_device
from prompts import METHODS

TIMEOUT = datetime.timedelta(minutes=30)  # a process waits for a dead one no longer than this
LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out waiting", "NCCL")  # RuntimeErrors

# ---- Processes ----


def start_processes():
    """Returns the Processes of torchrun, or of one process."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= (n := torch.cuda.device_count()):
            raise ValueError(f"--nproc_per_node is more than this machine's GPUs ({n}): use --nproc_per_node "
                             "gpu, or set CUDA_VISIBLE_DEVICES= for processes on the CPU")
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # batches of all lengths would leave holes
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    elif not rank and (why := lora.idle_gpu()):
        print(why, file=sys.stderr)
    if world_size > 1:
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a lost process is an exception, not an abort
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Processes(rank, world_size, device)


def check_processes_agree(args, encoded, model):
    """Raises ValueError if a process holds other data, arguments, code or weights than the first one."""
    digest = hashlib.sha256(repr(sorted(vars(args).items())).encode())
    for part in encoded.values():
        digest.update(part.ids.tobytes() + part.prompt_index.tobytes() + part.labels.tobytes())
    for tensor in (*model.parameters(), *model.buffers()):  # of what is frozen, the beginning will do
        own = tensor.detach().flatten()[: None if tensor.requires_grad else 64]
        digest.update(own.float().cpu().numpy().tobytes())
    for script in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(script.read_bytes())
    digests = from_all(digest.hexdigest())
    if other := [r for r, found in enumerate(digests) if found != digests[0]]:
        raise ValueError(f"processes {other} hold other data, arguments or code than process 0; start them "
                         "alike")


# ---- The loss of a step, by family ----


def merge_items(encoded, rows):
    """The distinct inputs of a step's annotations: k annotations of one prompt are one input of weight k.

    Binary cross-entropy is linear in its target, so their summed loss is that of the mean target times k.
    Returns (prompts (K,), responses (K,), of 0 for a classifier, weights (K,), mean targets (K, L)).
    """
    prompts, responses = encoded.prompt_index[rows].astype(np.int64), np.zeros(len(rows), np.int64)
    if encoded.response_index is not None:
        responses = encoded.response_index[rows]
    key = prompts * (1 + responses.max(initial=0)) + responses
    _, first, inverse, weights = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    targets = np.zeros((len(first), encoded.labels.shape[1]), np.float32)
    np.add.at(targets, inverse, encoded.labels[rows])
    return prompts[first], responses[first], weights.astype(np.float32), targets / weights[:, None]


def cls_loss(model, encoded, items, prefix, device):
    """Weighted sum of the binary cross-entropies of K prompts and L labels. Source: section IV-B."""
    prompts, _, weights, targets = items
    input_ids, lengths, targets, weights = (to_device(array, device) for array in (
        data.pad([encoded.prompt(m) for m in prompts], 0), encoded.lengths[prompts], targets,
        weights[:, None]))  # all of them before the forward pass, whose end the host does not await
    logits = model(input_ids, lengths, prefix)
    return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")  # [loss.cls]


def lm_loss(model, encoded, items, prefix, device, all_positions=False):
    """Weighted sum of the cross-entropies of the response tokens, or of all tokens. Source: section IV-C."""
    prompts, responses, weights, _ = items
    prompt_ids, response_ids = [encoded.prompt(m) for m in prompts], [encoded.response(k) for k in responses]
    if model.config.is_encoder_decoder:
        inputs, targets, starts = prompt_ids, response_ids, [0] * len(prompt_ids)
    else:
        inputs = targets = [np.concatenate(pair) for pair in zip(prompt_ids, response_ids, strict=True)]
        starts = [1 if all_positions else len(ids) for ids in prompt_ids]  # [choice.T1]
        prefix = min(prefix, min(starts) - 1)
    places = [np.arange(start, len(ids)) for ids, start in zip(targets, starts, strict=True)]
    rows, columns = np.repeat(np.arange(len(places)), [*map(len, places)]), np.concatenate(places)
    tokens = np.concatenate([ids[own] for ids, own in zip(targets, places, strict=True)]).astype(np.int64)
    rows, columns, tokens, lengths, weights, inputs, responses = (to_device(array, device) for array in (
        rows, columns, tokens, np.array([*map(len, inputs)]), weights[rows], data.pad(inputs, 0),
        data.pad(response_ids, 0)))
    logits = lora.response_logits(model, inputs, lengths, rows, columns, responses, prefix)
    return (F.cross_entropy(logits, tokens, reduction="none") * weights).sum()  # [loss.lm]


class Objective:
    """The summed loss of annotations, in micro-batches, shared out over the processes."""

    def __init__(self, model, family, tokens_per_batch, processes=ALONE, all_positions=False):
        self.model, self.family, self.tokens_per_batch = model, family, tokens_per_batch
        self.processes, self.all_positions = processes, all_positions
        self.decoder = family == "cls" or not model.config.is_encoder_decoder

    def losses(self, encoded, rows, prefix):
        """Yields the loss of each micro-batch of this process, a sum over terms."""
        prompts, responses, *_ = items = merge_items(encoded, rows)
        lengths, prefix = encoded.lengths[prompts], 0 if self.all_positions else prefix
        if self.family == "lm" and self.decoder:
            lengths = lengths + np.diff(encoded.response_offsets)[responses]
        mine = np.argsort(lengths, kind="stable")[self.processes.rank:: self.processes.world_size]
        for batch in data.micro_batches(lengths, mine, self.tokens_per_batch, prefix):
            own = self.model, encoded, [each[batch] for each in items], prefix, self.processes.device
            yield cls_loss(*own) if self.family == "cls" else lm_loss(*own, self.all_positions)

    def terms(self, encoded, rows):
        """The number of terms in the summed loss of these annotations: its normalizer, for all processes."""
        if self.family == "cls":
            return len(rows) * encoded.labels.shape[1]
        terms = np.diff(encoded.response_offsets)[encoded.response_index[rows]].sum()
        if self.decoder and self.all_positions:
            terms += (encoded.lengths[encoded.prompt_index[rows]] - 1).sum()
        return int(terms)

    @torch.inference_mode()
    def mean_loss(self, encoded, prefix):
        """The loss over a whole split, the same on every process."""
        self.model.eval()
        rows = np.arange(len(encoded.prompt_index))

        def own():
            losses = (loss.double() for loss in self.losses(encoded, rows, prefix))
            return np.array([float(sum(losses, torch.zeros((), device=self.processes.device)))])

        total = summed(self.fitting(own, encoded, rows), self.processes.device)
        return float(total[0] / self.terms(encoded, rows))

    def validate(self, encoded, prefix):
        """{figure: value} of a split by one pass, the same on every process: its loss, a classifier's F1."""
        if self.family != "cls":
            return {"val_loss": self.mean_loss(encoded, prefix)}
        logits = infer.predict_scores(self.model, encoded, self.tokens_per_batch, self.processes, "", True)
        gold, scores = encoded.labels > 0, 0.5 + 0.5 * np.tanh(0.5 * logits)
        tuned, own = scores >= metrics.tune_thresholds(gold, scores), encoded.annotations
        auc = metrics.disagreement_auc(gold, scores, own.text_number, own.user_index)
        pair = (torch.from_numpy(array).double() for array in (logits, encoded.labels))
        return {"val_loss": F.binary_cross_entropy_with_logits(*pair).item(),
                "val_f1_macro": metrics.f1_macro(gold, scores >= 0.5),
                "val_f1_macro_tuned": metrics.f1_macro(gold, tuned),
                "val_disagreement_auc": None if math.isnan(auc) else auc}

    def fitting(self, work, encoded, rows):
        """work(), where memory runs out again from its start, in micro-batches of half the size.

        No process waits for another within, so each does this alone. Raises: torch.OutOfMemoryError, if a
        micro-batch cannot get smaller.
        """
        random = rng_of(self.processes.device)
        state, lengths = random.get_rng_state(), encoded.lengths[encoded.prompt_index[rows]]
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                self.tokens_per_batch = min(self.tokens_per_batch, int(lengths.sum())) // 2
                if self.tokens_per_batch < lengths.max():
                    raise
            torch.cuda.empty_cache()  # not in the except: the error holds what was computed
            random.set_rng_state(state)
            print(f"out of memory on process {self.processes.rank}: --micro_batch_tokens "
                  f"{self.tokens_per_batch} from here on", file=sys.stderr)


# ---- One optimizer step ----


class LossScale:
    """The factor on the loss that keeps fp16 gradients above underflow; 1 for the other dtypes.

    Source: Micikevicius et al. 2018, section 3.2; the constants of torch.amp.GradScaler.
    """

    def __init__(self, enabled):
        self.enabled, self.value, self.good_steps, self.skipped = enabled, 2.0**16 if enabled else 1.0, 0, 0

    def state(self):
        return [self.value, self.good_steps, self.skipped]

    def update(self, finite):
        """Halves after an overflow; doubles after 2,000 good steps in a row."""
        self.good_steps = self.good_steps + 1 if finite else 0
        self.skipped += not finite
        if not finite:
            self.value /= 2
        elif self.enabled and self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0


def rng_of(device):
    """Where get_rng_state and set_rng_state of a device are."""
    return torch.cuda if device.type == "cuda" else torch.random


class Learner:
    """What learns: an objective's model by an optimizer.

    All gradients lie in one buffer, with two numbers behind them: one all-reduce for a step.
    """

    def __init__(self, objective, optimizer, fp16=False):
        self.objective, self.optimizer, self.scale, start = objective, optimizer, LossScale(fp16), 0
        parameters = optimizer.param_groups[0]["params"]
        self.buffer = torch.zeros(sum(p.numel() for p in parameters) + 2, device=parameters[0].device)
        for parameter in parameters:
            parameter.grad = self.buffer[start: start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


def learning_rate_at(step, total_steps, peak, warmup_ratio=0.05):
    """Linear warm-up, then a half cosine down to 0; step counts from 0. Source: the authors' config."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return peak * step / max(1, warmup)
    share = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share))  # [step.schedule]


def train_step(learner, encoded, rows, prefix, max_grad_norm=1.0, stop=False):
    """One optimizer step on the annotations `rows`; returns (mean loss, gradient norm, stop of any process).

    Sum of gradients over all micro-batches and processes, unscale, clip, step; a step whose fp16 gradients
    overflow is skipped. Raises: FloatingPointError, on all processes, if the loss is not finite, or gradients
    are not at a scale of 1.
    """
    objective, buffer, scale = learner.objective, learner.buffer, learner.scale
    objective.model.train()
    terms = objective.terms(encoded, rows)

    def sum_gradients():
        buffer.zero_()
        for loss in objective.losses(encoded, rows, prefix):
            (loss * (scale.value / terms)).backward()
            buffer[-2] += loss.detach() / terms

    objective.fitting(sum_gradients, encoded, rows)
    own, buffer[-1] = buffer[:-1].sum(), float(stop)  # not finite if its loss or a gradient is not
    if dist.is_initialized():
        dist.all_reduce(buffer)
    gradients = buffer[:-2].div_(scale.value)  # unscale first (fsdp_qlora clipped before) [step.unscale]
    norm = gradients.norm()
    mean_loss, norm_value, stop = torch.stack([buffer[-2], norm, buffer[-1]]).tolist()
    finite = math.isfinite(norm_value)
    if not math.isfinite(mean_loss) or not (finite or scale.value > 1):
        where = [rank for rank, one in enumerate(from_all(own.item())) if not math.isfinite(one)]
        raise FloatingPointError(f"loss {mean_loss}, gradient norm {norm_value}, process {where or '?'}")
    scale.update(finite)
    if finite:
        gradients.mul_(min(1.0, max_grad_norm / (norm_value + 1e-6)))  # [step.clip]
        learner.optimizer.step()
    return mean_loss, norm_value, stop > 0


# ---- Memory ----


def peak_memory_gb():
    """Peak memory of the device in GB: allocated on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def growth_gb(work, device):
    """What the memory grows by, at its peak, while work() runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9

    def resident(key):
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e9

    lora.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def free_memory_gb(device):
    """What is left on a GPU, or on a CPU machine for each of its processes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) / 1e9
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fit_micro_batch(objective, encoded, batch_size):
    """Returns (the tokens of a micro-batch that takes 80% of the free memory, the GB that are free).

    Micro-batches of one and of five of the longest prompts are run, or of fewer if five do not fit: memory is
    linear in their number. Raises: torch.OutOfMemoryError if one does not fit.
    """
    world_size, device = objective.processes.world_size, objective.processes.device
    prefix = infer.shared_prefix(objective.model, encoded)
    _, first_rows = np.unique(encoded.prompt_index, return_index=True)
    longest = first_rows[np.argsort(encoded.lengths, kind="stable")[::-1]]
    objective.model.train()

    def growth(n):
        def work():
            for loss in objective.losses(encoded, longest[: n * world_size], prefix):
                loss.backward()
        try:
            grown = growth_gb(work, device)
        except torch.OutOfMemoryError:
            grown = math.inf
        torch.cuda.empty_cache()
        return max(from_all(grown))

    growth(1)  # warms up
    one, many, length = growth(1), 5, int(encoded.lengths.max())
    if objective.family == "lm" and objective.decoder:
        length += int(np.diff(encoded.response_offsets).max())
    while (most := growth(many)) == math.inf and many > 2:
        many -= 1
    free = min(from_all(free_memory_gb(device)))
    if one == math.inf:
        raise torch.OutOfMemoryError(f"a prompt of {length} tokens does not fit into {free:.1f} GB.")
    n = 1 + int((0.8 * free - one) / max((most - one) / (many - 1), 1e-6))  # evaluation takes less
    return prefix + (length - prefix) * min(max(n, 1), batch_size), free


# ---- Checkpoints ----


def save_checkpoint(directory, optimizer, state):
    """Writes checkpoint/step-N.safetensors, one file with its own sha256, and keeps the one before it."""
    tensors, parameters = {}, optimizer.param_groups[0]["params"]
    for k, parameter in enumerate(parameters):
        tensors[f"parameter.{k}"] = parameter.detach()
        for name, value in optimizer.state[parameter].items():
            tensors[f"{name}.{k}"] = value
    states = from_all(rng_of(parameters[0].device).get_rng_state())
    if dist.is_initialized() and dist.get_rank():
        return
    tensors |= {f"rng.{rank}": one for rank, one in enumerate(states)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    directory.mkdir(exist_ok=True)
    text = json.dumps(state | {"world_size": len(states)})
    metadata = {"state": text, "sha256": lora.digest_of(tensors, text)}
    path = directory / f"step-{state['step']:08d}.safetensors"
    lora.write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    for old in sorted(directory.glob("step-*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(directory, optimizer, processes):
    """Restores the newest whole checkpoint; returns its state, or None if there is none.

    Raises: ValueError if files are there and none is whole, or if they belong to another number of processes.
    """
    files = sorted(directory.glob("step-*.safetensors"), reverse=True)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata()
            if lora.digest_of(tensors, metadata["state"]) != metadata["sha256"]:
                raise SafetensorError("its content is not what was written")
        except (SafetensorError, KeyError, TypeError) as error:  # of damaged metadata, too
            print(f"{path} is broken ({error}); the checkpoint before it is used", file=sys.stderr)
            continue
        state = json.loads(metadata["state"])
        if state["world_size"] != processes.world_size:
            raise ValueError(f"{path} is of {state['world_size']} processes, not {processes.world_size}: "
                             f"use --nproc_per_node {state['world_size']}, or another --out")
        for k, parameter in enumerate(optimizer.param_groups[0]["params"]):
            parameter.data.copy_(tensors[f"parameter.{k}"])
            optimizer.state[parameter] = {  # none, if every step so far was skipped
                name: tensors[f"{name}.{k}"].to(parameter.device)
                for name in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{k}" in tensors}
        rng_of(processes.device).set_rng_state(tensors[f"rng.{processes.rank}"])
        return state
    if files:
        raise ValueError(f"no checkpoint in {directory} is whole; remove the directory to start again")
    return None


# ---- The run ----


class Stopped(Exception):
    """Training ended early, on a signal: (what to say, the exit status)."""


def remaining_steps(encoded, args, step, total):
    """Yields (step, annotations) from the one behind `step` to the last, over as many epochs as they take."""
    while step < total:
        epoch, done = divmod(step, math.ceil(len(encoded.prompt_index) / args.batch_size))
        steps = data.training_steps(encoded, args.batch_size, args.seed, epoch, args.merge_duplicates)
        for rows in steps[done:]:
            if step < total:
                step += 1
                yield step, rows


def train(args, encoded, learner, save_best):
    """Trains until the last step; returns the state of the best validation.

    encoded {"train", "val"}. After every validation: the adapter if it is the best so far, and a
    checkpoint. Raises: Stopped, with a checkpoint, on a signal; ValueError, keeping the last one, on a NaN.
    """
    objective, optimizer, scale = learner.objective, learner.optimizer, learner.scale
    own, directory, first = encoded["train"], args.out / "checkpoint", not objective.processes.rank
    total = min(args.epochs * math.ceil(len(own.prompt_index) / args.batch_size), args.max_steps or math.inf)
    every = max(1, math.ceil(total / args.validations))
    prefix = {name: infer.shared_prefix(objective.model, encoded[name]) for name in ("train", "val")}
    state = {"step": 0, "best_val_loss": math.inf, "best_step": 0, "scale": scale.state(), "waited": 0}
    state |= load_checkpoint(directory, optimizer, objective.processes) or {}
    scale.value, scale.good_steps, scale.skipped = state["scale"]
    if first and state["step"]:
        print(f"resumed at step {state['step']} of {total}")
    log = Log(args.out / "log.jsonl", state["step"], own, enabled=first)
    bar = tqdm(total=total, initial=state["step"], desc="train", disable=not first)
    with StopSignal() as stop, bar:
        for step, rows in remaining_steps(own, args, state["step"], total):
            if args.patience and state["waited"] >= args.patience:  # on all processes, and if resumed
                bar.write(f"training ends at step {state['step']} of {total}: no better validation loss in "
                          f"{state['waited']} validations", end="\n" if first else "")
                break
            rate = optimizer.param_groups[0]["lr"] = learning_rate_at(step - 1, total, args.learning_rate)
            validate = step % every == 0 or step == total
            try:
                loss, norm, stopped = train_step(learner, own, rows, prefix["train"], args.max_grad_norm,
                                                 stop.received)
                log.add(rows, loss)
                bar.update()
                if validate or step % max(1, total // 1000) == 0:
                    log.write(step, learning_rate=rate, grad_norm=norm, skipped_steps=scale.skipped)
                    bar.set_postfix(loss=f"{loss:.4f}")
                if validate:
                    figures = objective.validate(encoded["val"], prefix["val"])
                    note_validation(log, step, figures, state, save_best)
                    stopped = any(from_all(stop.received > 0))  # in the validation, too
            except FloatingPointError as error:
                kept = f"the checkpoint of step {saved} is kept in {directory}" if (
                    saved := state["step"]) else "there is no checkpoint yet"
                raise ValueError(f"step {step}: {error}; {kept}; lower --learning_rate or use --dtype "
                                 "bf16") from None
            if validate or stopped:
                state |= {"step": step, "scale": scale.state()}
                save_checkpoint(directory, optimizer, state)
            if stopped:
                raise Stopped(f"stopped at step {step} of {total}, which is saved: the same command goes on",
                              128 + (stop.received or signal.SIGTERM))
    return state


def note_validation(log, step, figures, state, save_best):
    """Logs the figures of a validation; the state and the adapter are of the best one."""
    log.write(step, **figures)
    if not math.isfinite(val_loss := figures["val_loss"]):
        raise FloatingPointError(f"validation loss {val_loss}")
    state["waited"] += 1
    if val_loss < state["best_val_loss"]:  # [choice.T7]
        state |= {"best_val_loss": val_loss, "best_step": step, "waited": 0}
        save_best()


class StopSignal:
    """Inside, SIGINT and SIGTERM ask for a checkpoint after the step; a second one ends at once."""

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.received = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)


class Log:
    """log.jsonl: training loss, speed and memory since the last line, and validation losses."""

    def __init__(self, path, step, encoded, enabled):
        self.path, self.encoded, self.enabled = path, encoded, enabled
        self.start()
        if enabled and path.exists():  # what was logged behind the checkpoint is run again
            def is_kept(line):
                try:
                    return line.endswith("\n") and json.loads(line)["step"] <= step
                except (ValueError, KeyError, TypeError):  # damaged
                    return False

            kept = "".join(filter(is_kept, path.read_text(errors="replace").splitlines(keepends=True)))
            lora.write_atomically(path, lambda temporary: temporary.write_text(kept))

    def start(self):
        self.since, self.steps, self.samples, self.tokens, self.loss = time.perf_counter(), 0, 0, 0, 0.0

    def add(self, rows, loss):
        self.steps, self.samples, self.loss = self.steps + 1, self.samples + len(rows), self.loss + loss
        self.tokens += int(self.encoded.lengths[self.encoded.prompt_index[rows]].sum())

    def write(self, step, **figures):
        """Appends a line; the clock starts anew, so that a validation counts for nothing."""
        if self.steps:
            seconds = time.perf_counter() - self.since
            figures = {"loss": self.loss / self.steps, "samples_per_s": self.samples / seconds,
                       "tokens_per_s": self.tokens / seconds, "peak_memory_gb": peak_memory_gb()} | figures
        if self.enabled:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": step} | figures) + "\n")
            except OSError as error:
                raise OSError(f"cannot write {self.path}: {error}") from None
        self.start()


def go_on_from(args, task, model, targets):
    """Fills the model with the adapter of a finished run; returns (what run.json says of that, its users).

    Raises: ValueError if it has other labels, another base or another adapter.
    """
    run, ours = args.init_adapter, vars(args)
    theirs, (of_run, users, _) = vars(infer.load_run(run, {})), infer.knowledge(run, 0.5)
    adapter = json.loads((run / "adapter_config.json").read_bytes())
    pairs = {name: (theirs[name], ours[name]) for name in ("lora_r", "lora_alpha")} | {
        "family": tuple(METHODS[one["method"]].family for one in (theirs, ours)),
        "labels": (of_run.label_names, task.label_names),
        "trained last layer": (bool(adapter["modules_to_save"]), model.last_layer_trains),
        "base": (infer.read_record(run)["model_fingerprint"], model.fingerprint),
        "target_modules": (sorted(adapter["target_modules"]), targets)}
    if different := [f"{name} {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]:
        raise ValueError(f"--init_adapter {run} does not fit: {'; '.join(different)}")
    return {"run": str(run), "sha256": lora.load_adapter(model, run)}, users


def choose_micro_batch(args, old, objective, encoded):
    """Gives the objective its micro-batches, on auto those that fit; a run that goes on keeps its own."""
    if args.micro_batch_tokens == "auto" and old:
        args.micro_batch_tokens = old["arguments"]["micro_batch_tokens"]
    elif args.micro_batch_tokens == "auto":
        args.micro_batch_tokens, free = fit_micro_batch(objective, encoded, args.batch_size)
        if not objective.processes.rank:
            print(f"--micro_batch_tokens {args.micro_batch_tokens} fits into the {free:.1f} GB that are free")
    objective.tokens_per_batch = args.micro_batch_tokens


def print_arithmetic(args, encoded, counts, objective):
    """Says once what a step is made of."""
    mean_length, processes = encoded.lengths[encoded.prompt_index].mean(), objective.processes
    prefix = infer.shared_prefix(objective.model, encoded)
    share = math.ceil(args.batch_size / processes.world_size)
    batches = math.ceil(share / max(1, (args.micro_batch_tokens - prefix) // (mean_length - prefix)))
    print("{:,} parameters in the base, {:,} of them in NF4; {:,} train".format(*counts))
    print(f"about {math.ceil(share / batches)} x {batches} accumulation x {processes.world_size} processes = "
          f"{args.batch_size} annotations per step; {len(encoded.prompt_index):,} annotations of "
          f"{mean_length:.0f} tokens an epoch; {args.dtype} on {processes.device}")


def run(args, processes):
    """The whole of a run, from the arguments to metrics_test.json."""
    first, method = processes.rank == 0, infer.method_of(args)
    say = print if first else lambda *_: None
    infer.complete(args)
    lora.check_by_name(args.model, processes.device)
    tokenizer = infer.load_tokenizer(args)  # a wrong name is told before any work
    lock, old = claim_out(args) if first else (None, None)
    if from_all(infer.is_finished(args, old))[0]:
        return
    task, splits, report = infer.load_splits(args)
    say(data.format_report(report))
    encoded = {name: infer.encode_split(args, tokenizer, task, splits, name, say) for name in splits}
    model, targets = infer.build(args, len(task.label_names), processes.device)
    if args.gradient_checkpointing:
        lora.recompute_layers(model)
    origin, known = go_on_from(args, task, model, targets) if args.init_adapter else (None, {})
    check_processes_agree(args, encoded, model)
    if old:
        infer.check_inputs(args.out, old, report, model)
        if origin != old.get("init_adapter"):
            raise ValueError(f"--init_adapter {args.init_adapter} is not the run that {args.out} began with")
    objective = Objective(model, method.family, 10**9, processes, infer.follows(args)["T1"] == "paper")
    choose_micro_batch(args, old, objective, encoded["train"])
    if first:
        counts = lora.count_parameters(model)
        print_arithmetic(args, encoded["train"], counts, objective)
        if not old:
            record = infer.describe_run(args, report, model, task, splits["train"])
            infer.write_json(args.out / "run.json", record | {
                "users": known | record["users"], "world_size": processes.world_size, "init_adapter": origin,
                "parameters": dict(zip(("base", "quantized", "trainable"), counts, strict=True))})

    def save_best():
        if first:
            lora.save_adapter(model, args.out, args.model, method.family, args.commit or args.revision)

    torch.manual_seed(args.seed + 1 + processes.rank)  # dropout differs between processes
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    state = train(args, encoded, Learner(objective, optimizer, args.dtype == "fp16"), save_best)
    say(f"best validation loss {state['best_val_loss']:.4f} at step {state['best_step']}")
    if first:
        infer.amend_record(args.out, steps=state["step"], best_step=state["best_step"])
    from_all(None)  # the adapter is on disk
    lora.load_adapter(model, args.out)
    result = infer.evaluate(args, model, tokenizer, splits, encoded, processes=processes)
    if first:
        say(infer.format_metrics(result))
        shutil.rmtree(args.out / "checkpoint")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Fine-tune a model to label texts as one annotator would.",
                                     allow_abbrev=False, usage=argparse.SUPPRESS)
    trained = [name for name, method in METHODS.items() if method.family != "query"]
    infer.add_arguments(parser, trained)
    add, source = parser.add_argument, "(default: %(default)s, the authors' config)"  # [choice.T6]
    add("--epochs", type=infer.positive, default=10, help=source)
    add("--max_steps", type=infer.positive, help="end after so many optimizer steps (default: all epochs)")
    add("--batch_size", type=infer.positive, default=128,
        help=f"annotations per optimizer step over all processes, 8 x 4 x 4 {source}")
    add("--learning_rate", type=infer.above_zero, default=1e-4, help=f"peak {source}")
    add("--max_grad_norm", type=infer.above_zero, default=1.0, help=source)
    add("--patience", type=infer.positive, metavar="N",
        help="end after N validations without a lower loss than the best (default: all steps)")
    add("--init_adapter", type=Path, metavar="RUN",
        help="go on from the weights of a finished run, with new data or users and a new optimizer")
    add("--validations", type=infer.positive, default=20, help=f"per run, that is every 5%% {source}")
    add("--merge_duplicates", action="store_true",
        help="keep the annotations of one prompt in one step, where they cost one pass (for cls and lm)")
    add("--gradient_checkpointing", action="store_true",
        help="less memory, more time (default: off; the authors' code has it on)")
    args = parser.parse_args(argv)
    if args.method is None:
        parser.error(f"--method is needed: {', '.join(trained)}")
    return args


def main(argv=None):
    args, processes, together, code = parse_args(argv), ALONE, False, 1
    try:
        processes = start_processes()
        run(args, processes)
        together, code = True, 0
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        words, code = str(error), 2
        if isinstance(error, torch.OutOfMemoryError):
            words = f"{words.splitlines()[0]} Lower --micro_batch_tokens or use --gradient_checkpointing"
        print(f"error{f' on process {processes.rank}' if processes.rank else ''}: {words}", file=sys.stderr)
    except SystemExit:
        code = 2  # another process has said why
    except (KeyboardInterrupt, Stopped) as stop:
        together = isinstance(stop, Stopped)
        words, code = stop.args if together else (
            "interrupted: the same command goes on from the last checkpoint", 130)
        if not processes.rank:
            print(words, file=sys.stderr)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(words in str(error) for words in LOST):
            raise
        print(f"error on process {processes.rank}: another process of this run ended or cannot be reached "
              f"({str(error).splitlines()[0]}): the same command goes on from the last checkpoint",
              file=sys.stderr)
    finally:
        if dist.is_initialized() and not together:  # to destroy the group would be to wait for the others
            if sys.exc_info()[0]:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside the loop it ends as Ctrl-C does
    sys.exit(main())
