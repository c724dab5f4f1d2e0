"""A prediction: of a trained adapter, a queried model or the GPT API; or one text seen by several users.

Source: sections IV and V of the paper. Queries (Q-0S, Q-1S, Q-2S) use no training at all.

    python infer.py --run DIR [--split test|val]             evaluate a trained adapter
    python infer.py --run DIR --text "..." --users 4 37      how these users would label this text
    python infer.py --run DIR --input new.csv --output scores.csv     a file in, a file out
    python infer.py --method q2s --model M --dataset D       query a local model
    python infer.py --method q2s --model gpt-4 --dataset D   query the API; OPENAI_API_KEY holds the key

Identical prompts are predicted once, whatever the number of annotations. Does not train (train.py).
"""

import argparse
import csv
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import data
import lora
import metrics
import prompts
from prompts import METHODS, NONE, TASKS, Task, build_prompt, build_response, neutral_task, parse_response

# ---- Arguments, data and configuration of a run ----

FOLLOW = {  # row of the audit -> whom it can follow, the default first
    "P1": ("paper", "released"), "T1": ("released", "paper"), "T2": ("paper", "released"),
    "T4": ("paper", "released"), "E2": ("paper", "released"),
}
PLACES = ("model", "dataset", "data_dir")  # what may lie elsewhere when a run is used: fingerprints decide
MEANT_FOR = {  # what alone a flag has a meaning for; one that is not here has a meaning everywhere
    "texts": {"text", "input", "output", "force", "users", "threshold"},
    "adapter": {"lora_r", "lora_alpha", "lora_dropout", "target_modules"},
    "weights": {"constrain", "dtype", "micro_batch_tokens", "quantize", "revision"},
    "chat": {"chat_template"},
    "server": {"api_base", "dry_run", "max_cost", "price_in", "price_out", "max_tokens", "reasoning_effort",
               "extra", "cache_from", "concurrency", "timeout_s", "max_retries"},
}
HAS = {"run": ("texts", "adapter", "weights"), "local query": ("weights", "chat"), "query": ("server",)}


def positive(text):
    """argparse type of a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def above_zero(text):
    """argparse type of a finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def tokens_or_auto(text):
    """argparse type of --micro_batch_tokens."""
    return text if text == "auto" else positive(text)


def follow_row(text):
    """argparse type of one ROW=paper|released."""
    row, _, source = text.partition("=")
    if source not in FOLLOW.get(row, ()):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW=paper|released, ROW of {', '.join(FOLLOW)}")
    return row, source


def follows(args):
    """{row of the audit: whom this run follows}."""
    return {row: dict(args.follow).get(row, sources[0]) for row, sources in FOLLOW.items()}


def add_arguments(parser, methods):
    """The flags that every run has."""
    add = parser.add_argument
    add("--method", choices=methods, help="the setting of the paper")
    add("--model", default="mistral",
        help=f"{', '.join(lora.MODELS)}, a hub id or a directory; for queries also a GPT (default: mistral)")
    add("--dataset", default="goemotions",
        help="goemotions, unhealthy or the path of a long CSV (default: %(default)s)")
    add("--out", type=Path, help="(default: runs/DATASET/MODEL/METHOD)")
    add("--limit", type=positive, nargs="+", metavar="N",
        help="at most N annotations of each split, or a number for each of train, val, test (default: all)")
    add("--max_length", type=positive, default=512,
        help="tokens of a prompt; a longer one loses the end of its text (default: %(default)s)")
    add("--micro_batch_tokens", type=tokens_or_auto,
        help="tokens, padding included, that a device trains on at once, a quarter of those that it decodes; "
        "auto: as many as fit into its free memory (default: auto for training on a GPU, else 4096)")
    add("--follow", type=follow_row, nargs="+", default=[], metavar="ROW=SOURCE",
        help=f"do as the paper or the released code does in a row of the audit: {', '.join(FOLLOW)}")
    add("--unseen_users", type=data.share, default=0.0, metavar="SHARE",
        help="hold this share of the users out of train and val, report them apart (default: %(default)s)")
    add("--no_user_id", action="store_true", default=None, help="show only the --context of a user")
    add("--constrain", action="store_true", help="decode only distinct labels in sorted order")
    add("--seed", type=int, default=42,
        help="of weights, order and dropout (default: %(default)s, the authors' config)")
    add("--note", help="kept in run.json and shown in the tables")
    data.add_arguments(parser)
    lora.add_arguments(parser)


def complete(args):
    """Fills in what has no fixed default."""
    args.dtype = args.dtype or lora.default_dtype(args.model)
    args.out = args.out or Path("runs", Path(args.dataset).stem, Path(args.model).name, args.method)
    query = method_of(args).family == "query"
    args.micro_batch_tokens = args.micro_batch_tokens or (
        "auto" if torch.cuda.is_available() and not query else 4096)
    if args.micro_batch_tokens == "auto" and query:
        raise ValueError("--micro_batch_tokens auto is measured on training steps; give a query a number")


def load_splits(args):
    """Returns (task, {split: Annotations}, report): cleaned, users held out, limited."""
    task, splits, report = data.load(args)
    splits, held_out = data.hold_out_users(splits, args.unseen_users, args.split_seed)
    if args.limit:
        splits = {name: data.limit(part, args.limit[min(k, len(args.limit) - 1)], args.split_seed)
                  for k, (name, part) in enumerate(splits.items())}
    report["unseen_users"] = sorted({*held_out, *data.unseen_users(splits)})
    report["counts"] = {name: len(part) for name, part in splits.items()}
    if empty := [name for name, n in report["counts"].items() if not n]:
        raise ValueError(f"no annotation is left in {empty}; give more data, or lower --min_share")
    return task, splits, report


def method_of(args):
    """The Method of a run: its row of the table, with what its flags show of the user."""
    method, context = METHODS[args.method], tuple(args.context or ())
    if (context or args.no_user_id) and not method.user_id:
        raise ValueError(f"--context and --no_user_id are for clsp and lmp, not for {args.method}: leave out")
    if args.no_user_id and not context:
        raise ValueError("--no_user_id leaves nothing of the user: add --context, or use cls or lm")
    return method._replace(context=context, user_id=method.user_id and not args.no_user_id)


def example_chooser(args, splits):
    """What chooses the examples of Q-1S and Q-2S for (text, user_id); None for the other methods."""
    pool = splits["train" if follows(args)["P1"] == "paper" else "test"]  # [choice.P1]
    return functools.partial(data.choose_examples, data.example_pool(pool), shots=method_of(args).shots,
                             seed=args.split_seed) if method_of(args).shots else None


def load_tokenizer(args):
    """The tokenizer of a run's model, whose config is judged, too; args.commit is what --revision stands for.

    A run that goes on keeps the commit that it was started with.
    """
    def work():
        path, commit = metrics.run_record(args.out), getattr(args, "commit", None)
        old = read_record(args.out) if path.exists() else {"arguments": {}}
        if all(old["arguments"].get(name) == getattr(args, name) for name in ("model", "revision")):
            commit = commit or old.get("model_commit")
        commit = commit or lora.commit_of(args.model, args.revision)
        tokenizer = lora.load_tokenizer(args.model, commit or args.revision)
        config = lora.load_config(args.model, commit or args.revision, lora.DTYPES[args.dtype])
        tokenizer.n_embeddings = getattr(config, "vocab_size", math.inf)
        return commit, tokenizer

    args.commit, tokenizer = lora.by_turns(work)
    return tokenizer


def encode_split(args, tokenizer, task, splits, split, say=print):
    """Returns the Encoded of one split; says what was shortened and who has too few examples."""
    method = method_of(args)
    encoded = data.encode(tokenizer, task, method, splits[split], args.max_length,
                          example_chooser(args, splits), getattr(args, "chat_template", False))
    if method.family == "lm":
        data.add_responses(encoded, tokenizer, train_eos=follows(args)["T2"] == "paper")
    unknown, highest = (encoded.ids == tokenizer.unk_token_id).mean(), encoded.ids.max(initial=0)
    if not encoded.lengths.all() or unknown > 0.25:
        raise ValueError(f"the tokenizer of --model {args.model} turns {unknown:.0%} of the prompts into "
                         f"{tokenizer.unk_token!r}, or some into nothing: restore its files")
    if highest >= getattr(tokenizer, "n_embeddings", math.inf):
        raise ValueError(f"--model {args.model} has embeddings of {tokenizer.n_embeddings} tokens, but its "
                         f"tokenizer writes token {highest}: they are not of one model")
    if encoded.n_shortened:
        say(f"{split}: {encoded.n_shortened} prompts are shortened to {args.max_length} tokens")
    if encoded.n_too_few:
        say(f"{split}: {encoded.n_too_few} annotations are of users with fewer than {method.shots} examples")
    return encoded


def arguments_of(args):
    """Every argument by name, as JSON has it."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
             if name != "commit"}
    return plain | {"follow": follows(args)}


def build(args, n_labels, device):
    """Returns (a run's model, with LoRA layers unless it is a query's, the names of the targets)."""
    torch.manual_seed(args.seed)  # before any weight is drawn, the same on all processes
    family = method_of(args).family
    model = lora.build_model(args.model, family, n_labels, args.quantize, lora.DTYPES[args.dtype], device,
                             getattr(args, "commit", None) or args.revision)
    if family == "query":
        return model, []
    model.last_layer_trains = family == "cls" or follows(args)["T4"] == "released"  # [choice.T4]
    return model, lora.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.target_modules,
                                args.model)


def load_trained(args, n_labels, device):
    """A finished run's model with its adapter. Raises: ValueError if the base is not that of the run."""
    model, _ = build(args, n_labels, device)
    check_inputs(args.adapter, read_record(args.adapter), model=model)
    lora.load_adapter(model, args.adapter)
    return model.eval()


def describe_run(args, report, model=None, task=None, train=None):
    """What run.json holds: all that a prediction needs beside the base model, and how the run came about."""
    commit = "" if shutil.which("git") is None else subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
        cwd=Path(__file__).parent, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "arguments": arguments_of(args), "note": args.note, "commit": commit or None,
        "places": {name: os.path.abspath(place) for name in PLACES if (place := getattr(args, name))
                   and place not in (*lora.MODELS, *data.CORPORA) and os.path.exists(place)},
        "task": task and task._asdict(),
        "users": {user: train.profiles.get(user, ()) for user in sorted(data.present_users(train))} if train
        else {},
        "model_commit": getattr(args, "commit", None),
        "model_fingerprint": getattr(model, "fingerprint", None),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "numpy": np.__version__},
        "device": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores", "data": report,
    }


def from_before(arguments):
    """The arguments of an older run's config.json, as they would be given today."""
    shares = {name: None for name, own in (("min_share", 0.01), ("max_share", 0.6)) if arguments[name] == own}
    clean = None if arguments["dataset"] in data.CORPORA else "paper"
    today = {"columns": None, "labels": None, "context": None, "no_user_id": None, "clean": clean}
    return today | arguments | shares


def to_task(words):
    """The Task of its JSON."""
    return Task(**words | {"label_names": tuple(words["label_names"])})


def read_record(directory):
    """The run.json of a run. Raises: ValueError if it is none, is damaged, or lacks an argument."""
    shared, path = argparse.ArgumentParser(), metrics.run_record(directory)
    add_arguments(shared, METHODS)
    try:
        record = json.loads(path.read_bytes())
        if path.name == "config.json":
            record["arguments"] = from_before(record["arguments"])
        lack = vars(shared.parse_args([])).keys() - record["arguments"].keys()
        record["task"] = record.get("task") and to_task(record["task"])
        if lack or not isinstance(record["arguments"]["follow"], dict) or not record["data"]["files"]:
            raise ValueError(f"no {sorted(lack) or 'files or follow'}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the {path.name} of a run ({error!r}): use another --out") from None
    return record


def check_inputs(out, record, report=None, model=None):
    """Raises ValueError if the data files or the base's weights are not those that a run was started with."""
    if report is not None:
        theirs, ours = (sorted(str(file.get("blob_id")) for file in files.values())
                        for files in (record["data"]["files"], report["files"]))
        if theirs != ours:
            raise ValueError(f"the data files are not those that {out} was started with: give their place by "
                             "--dataset or --data_dir, or use another --out")
    if model is not None and record.get("model_fingerprint", model.fingerprint) != model.fingerprint:
        raise ValueError(f"the weights of {record['arguments'].get('model')} are not those that {out} was "
                         f"started with (commit {record.get('model_commit')}): give their place by --model")


def amend_record(out, **fields):
    """Adds what is known at the end to run.json, of which metrics_test.json then holds the checksum."""
    path = metrics.run_record(out)
    if path.exists() and not Path(out, "metrics_test.json").exists():
        write_json(path, json.loads(path.read_bytes()) | fields)


def is_finished(args, old, split="test"):
    """Whether --out holds the result of the same command; says so."""
    if done := old is not None and (args.out / f"metrics_{split}.json").exists():
        print(f"{args.out} is finished: its result is in metrics_{split}.json")
    return done


def write_json(path, value):
    lora.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def lock_out(out):
    """Takes a directory for this process alone; returns the lock. Raises: ValueError if it is taken."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # held until the process ends, however it ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out} is in use by another run: wait, or use another --out") from None
    for left in (*out.glob("*.[0-9]*.tmp"), *out.glob("checkpoint/*.[0-9]*.tmp")):
        left.unlink()  # of a write that was killed
    return lock


def claim_out(args):
    """Takes --out for this process alone; returns (the lock, run.json of the same command or None).

    Raises: ValueError if another process is at work there, or if it holds a run with other arguments.
    """
    lock = lock_out(args.out)
    if not metrics.run_record(args.out).exists():
        return lock, None
    record = read_record(args.out)
    old, new = record["arguments"], arguments_of(args)
    if different := sorted(name for name in new.keys() - metrics.HOW
                           if json.dumps(old.get(name)) != json.dumps(new[name])):
        was = ", ".join(f"{name} {old.get(name)!r} there, {new[name]!r} here" for name in different)
        raise ValueError(f"--out {args.out} holds a run with other arguments ({was}); use another --out")
    return lock, record


# ---- Processes ----


class Processes(NamedTuple):
    """This process among those of a run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


ALONE = Processes()


def from_all(value):
    """The values of all processes, in the order of their ranks."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def summed(array, device):
    """The sum of an array over all processes."""
    tensor = torch.from_numpy(array).to(device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def to_device(array, device):
    """The array as a tensor; the way to a GPU is from pinned memory, for which the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def in_parts(compute, batch):
    """[(batch, compute(batch))], or the same of its halves, in order, where memory is too small for it."""
    try:
        return [(batch, compute(batch))]
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # outside of the except: the error holds what was computed
    half = len(batch) // 2
    return in_parts(compute, batch[:half]) + in_parts(compute, batch[half:])


def shared_prefix(model, encoded, limit=0):
    """The tokens that the model can read once for all prompts: none of an encoder's.

    Before a response of up to `limit` tokens none either, if a window is shorter: it would count the padding
    that decoding leaves behind the prefix.
    """
    fits = not limit or encoded.lengths.max() + limit <= model.window
    return data.shared_prefix(encoded) if model.shares_prefix and fits else 0


# ---- Scores of a classifier ----


@torch.inference_mode()
def predict_scores(model, encoded, tokens_per_batch, processes=ALONE, progress="", logits=False):
    """Returns the probabilities, or logits, of the N annotations, float32 (N, L): each prompt is run once.

    Every process computes its share of the prompts, so each annotation counts once for any number of them.
    Raises: ValueError, on all processes, for a probability that is NaN.
    """
    model.eval()
    lengths, prefix = encoded.lengths, shared_prefix(model, encoded)
    mine = np.argsort(lengths, kind="stable")[processes.rank:: processes.world_size]
    scores = np.zeros((len(lengths), encoded.labels.shape[1]), np.float32)

    def compute(batch):
        input_ids = to_device(data.pad([encoded.prompt(m) for m in batch], 0), processes.device)
        own = model(input_ids, to_device(lengths[batch], processes.device), prefix)
        return (own if logits else torch.sigmoid(own)).cpu().numpy()

    batches = data.micro_batches(lengths, mine, tokens_per_batch, prefix)
    for batch in tqdm(batches, desc=progress, disable=not progress or processes.rank > 0):
        for part, found in in_parts(compute, batch):
            scores[part] = found
    scores = summed(scores, processes.device)
    if not logits and np.isnan(scores).any():
        raise ValueError("the model's scores are NaN; use --dtype bf16 or fp32")
    return scores[encoded.prompt_index]


# ---- Generated responses ----


class LabelSequences:
    """The token sequences of all responses with distinct labels in sorted order: an automaton over token ids.

    A state is a set of (label before or -1, label, tokens of it that are written): a label may begin as
    another one does. Raises: ValueError if the tokenizer writes a label in different ways behind others.
    """

    def __init__(self, tokenizer, label_names, none=False, ends=()):
        def ids(*names):
            return tokenizer("\n" + ", ".join(names), add_special_tokens=False)["input_ids"]

        self.end, self.ends, self.moves = tokenizer.eos_token_id, {tokenizer.eos_token_id, *ends}, {}
        self.first, self.following = [ids(name) for name in label_names], [None] * len(label_names)
        for j, name in enumerate(label_names):
            for before, written in zip(label_names[:j], self.first, strict=False):
                tokens = ids(before, name)
                own = tokens[len(written):]
                if tokens[: len(written)] != written or self.following[j] not in (None, own):
                    raise ValueError(f"--constrain: this tokenizer joins {name!r} with the label before it")
                self.following[j] = own
        self.first += [ids(NONE)] * none  # alone: the last one, which follows no other
        self.start = frozenset((-1, j, 0) for j in range(len(self.first)))

    def allowed(self, state):
        """{token: next state}, never empty."""
        if state not in self.moves:
            moves = {}
            for before, j, n in state:
                tokens = self.first[j] if before < 0 else self.following[j]
                if n < len(tokens):
                    moves.setdefault(tokens[n], set()).add((before, j, n + 1))
                else:
                    moves |= {end: set() for end in self.ends}
                    for k in range(j + 1, len(self.following)):
                        moves.setdefault(self.following[k][0], set()).add((j, k, 1))
            if not moves:
                raise ValueError("--constrain: no token is allowed here")
            self.moves[state] = {token: frozenset(after) for token, after in moves.items()}
        return self.moves[state]


def longest_response(tokenizer, label_names):
    """The number of tokens of the response that names every label, or none."""
    answers = ["\n" + build_response(names) for names in (label_names, ())]
    return max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))


@torch.inference_mode()
def generate(model, tokenizer, encoded, label_names, tokens_per_batch, processes=ALONE, constrain=False):
    """Returns the greedy responses of the M distinct prompts, and the number of decoding steps.

    Decoders read the prompts' shared prefix once, are padded on the left, in batches of like length, and stop
    at the end token or the longest possible answer. A batch has four times the tokens of a training one: no
    activations are kept, and a step takes hardly longer for more rows. `constrain` allows sequences of labels
    only, whose forced tokens cost a decoder no step.
    """
    model.eval()
    ends = {tokenizer.eos_token_id} | model.end_tokens
    sequences = LabelSequences(tokenizer, label_names, encoded.none, ends) if constrain else None
    limit, lengths = longest_response(tokenizer, label_names), encoded.lengths
    prefix = shared_prefix(model, encoded, limit)
    mine = np.argsort(lengths, kind="stable")[processes.rank:: processes.world_size]
    batches, responses, steps = data.micro_batches(lengths + limit, mine, 4 * tokens_per_batch), {}, 0

    def compute(batch):
        prompts = [encoded.prompt(m) for m in batch]
        return decode(model, prompts, prefix, processes.device, limit, ends, sequences)

    for batch in tqdm(batches, desc="responses", leave=False, disable=processes.rank > 0 or len(batches) < 2):
        for part, (written, batch_steps) in in_parts(compute, batch):
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            responses.update(zip(part.tolist(), texts, strict=True))
            steps += batch_steps
    responses = {m: text for part in from_all(responses) for m, text in part.items()}
    return [responses[m] for m in range(len(lengths))], sum(from_all(steps))


def first_inputs(model, prompts, prefix, device):
    """(token ids that each row has yet to read, further inputs of the model, its cache, who reads them)."""
    if model.config.is_encoder_decoder:
        input_ids = to_device(data.pad(prompts, 0), device)
        real = lora.real_tokens(input_ids, to_device(np.array([len(ids) for ids in prompts]), device))
        encoder_outputs = model.encoder(input_ids=input_ids, attention_mask=real)
        inputs = {"attention_mask": real, "encoder_outputs": encoder_outputs}
        return [[model.config.decoder_start_token_id] for _ in prompts], inputs, None, model
    cache = None
    if prefix:
        shared = to_device(prompts[0][None, :prefix].astype(np.int64), device)
        cache = model.base_model(input_ids=shared, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(prompts))
    return [ids[prefix:].tolist() for ids in prompts], {}, cache, model.base_model


def decode(model, prompts, prefix, device, limit, ends, sequences=None):
    """Greedy decoding of one batch; returns (token ids of each response without its end, decoding steps).

    What a row has yet to read, its prompt at first, is `pending`; rows are aligned at their last token, and
    the mask hides the padding that this leaves between them. Without a prefix there is padding at the left
    alone, as forced tokens are read one by one: what counts tokens by their place stays right.
    """
    n, decoder, steps = len(prompts), not model.config.is_encoder_decoder, 0
    pending, inputs, cache, read = first_inputs(model, prompts, prefix, device)
    written, running = [[] for _ in prompts], [True] * n
    states = [sequences.start] * n if sequences else None
    mask = torch.ones(n, prefix, dtype=torch.long, device=device)

    def write(row, token):
        pending[row].append(token)
        running[row] = token not in ends and len(written[row]) < limit
        if running[row]:
            written[row].append(token)
            if sequences:
                states[row] = sequences.allowed(states[row])[token]

    while True:
        for row in range(n) if sequences and prefix else ():
            while running[row] and len(choices := sequences.allowed(states[row])) == 1:
                write(row, *choices)  # forced
        if not any(running):
            return written, steps
        ids = to_device(data.pad(pending, 0, left=True), device)
        if decoder:
            real = data.pad([np.ones(len(new), np.int64) for new in pending], 0, left=True)
            mask = torch.cat([mask, to_device(real, device)], dim=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
            inputs |= {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        else:
            inputs["decoder_input_ids"] = ids
        answer = read(**inputs, past_key_values=cache, use_cache=True)
        cache, steps = answer.past_key_values, steps + 1
        if decoder:  # the head on (n, D): for (n, 1, D) a CPU may copy its weight n times
            logits = model.get_output_embeddings()(answer.last_hidden_state[:, -1]).float()
        else:
            logits = answer.logits[:, -1].float()
        logits = logits.cpu() if sequences else logits  # else n numbers are all that a step moves
        best = torch.where(logits.isnan().any(-1), -1, logits.argmax(-1)).tolist()
        if -1 in best:
            raise ValueError("the model's logits are NaN; use --dtype bf16 or fp32")
        for row in range(n):
            pending[row] = [] if running[row] else [*ends][:1]  # what a finished row reads does not matter
            if running[row]:
                choices = sequences.allowed(states[row]) if sequences else ()
                write(row, max(choices, key=logits[row].__getitem__) if sequences else best[row])


# ---- Evaluation: predictions and metrics on disk ----


def rows_of_gold(annotations, encoded):
    """What a row of predictions_SPLIT.jsonl says of an annotation, in the order of the data set."""
    for n, (item, user) in enumerate(zip(annotations.text_index, annotations.user_index)):
        text_hash = data.prompt_hash(annotations.texts[item])  # text_id may be the number of a row
        yield {"text_id": annotations.text_ids[item], "text_hash": text_hash,
               "user_id": annotations.users[user],
               "prompt": encoded.hashes[encoded.prompt_index[n]], "gold": annotations.label_set(n)}


def rows_of_scores(annotations, encoded, scores):
    """The rows of a classifier; the labels whose probability reaches 0.5, as in the paper, are predicted."""
    names = annotations.label_names
    for row, own in zip(rows_of_gold(annotations, encoded), scores, strict=True):
        predicted = [names[k] for k in np.flatnonzero(own >= 0.5)]
        yield row | {"predicted": predicted, "scores": [round(float(score), 6) for score in own]}


def rows_of_responses(annotations, encoded, responses, released_parser=False):
    """The rows of generated text: responses, one per distinct prompt, None where there is no answer."""
    parsed = [parse_response(response or "", (*annotations.label_names, NONE), released_parser)
              for response in responses]
    for row, m in zip(rows_of_gold(annotations, encoded), encoded.prompt_index, strict=True):
        found, lost = parsed[m]
        yield row | {"predicted": [name for name in found if name != NONE], "response": responses[m],
                     "not_understood": lost, "none": NONE in found}


def write_results(out, split, rows, label_names, thresholds=None, unseen_users=(), **further):
    """Writes predictions_SPLIT.jsonl and metrics_SPLIT.json; returns the metrics."""
    rows = list(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    lora.write_atomically(Path(out, f"predictions_{split}.jsonl"), lambda path: path.write_text(text))
    result = metrics.evaluate(rows, label_names, thresholds, unseen_users) | further
    write_json(Path(out, f"metrics_{split}.json"),
               result | {"sha256": metrics.checksums(out, split, result)})
    return result


def evaluate(args, model, tokenizer, splits, encoded, split="test", processes=ALONE):
    """Predicts a split and writes its predictions and metrics; the first process returns the metrics.

    For a classifier, thresholds are tuned on val; for CLS the baselines are computed beside it.
    """
    started, result, label_names = time.perf_counter(), None, splits[split].label_names
    unseen_users = data.unseen_users(splits)
    if METHODS[args.method].family != "cls":
        responses, steps = generate(model, tokenizer, encoded[split], label_names, args.micro_batch_tokens,
                                    processes, args.constrain)
        rows = rows_of_responses(splits[split], encoded[split], responses, follows(args)["E2"] == "released")
        if not processes.rank:
            result = write_results(args.out, split, rows, label_names, None, unseen_users,
                                   decoding_steps=steps, seconds=time.perf_counter() - started,
                                   n_shortened=encoded[split].n_shortened,
                                   n_too_few_examples=encoded[split].n_too_few)
        return result
    names = ("val", "test") if split == "test" else ("val",)
    scores = {name: predict_scores(model, encoded[name], args.micro_batch_tokens, processes, name)
              for name in names}
    if processes.rank:
        return None
    if args.method == "cls" and split == "test":
        write_json(args.out / "baselines_test.json",
                   evaluate_baselines(splits, scores, encoded["test"]))
    tuned = metrics.tune_thresholds(splits["val"].labels, scores["val"])
    if split == "test":
        amend_record(args.out, thresholds=tuned.tolist())
    for name in names:  # the metrics of test come last: they say that the run is finished
        rows = rows_of_scores(splits[name], encoded[name], scores[name])
        result = write_results(args.out, name, rows, label_names, tuned if name == "test" else None,
                               unseen_users, seconds=time.perf_counter() - started)
    return result


def evaluate_baselines(splits, scores, encoded, folds=5):
    """{name: metrics and scores on test} of what a User ID in the prompt must beat; scores {split: (N, L)}.

    All labels, always; each user's label frequencies in train; CLS plus a bias per user and label, fitted on
    val, on which the model was not trained. Of several strengths the one with the least log-loss on val is
    taken, where a bias is that of the other folds of texts, as for the thresholds.
    """
    train, val, test, n_users = splits["train"], splits["val"], splits["test"], len(splits["train"].users)
    clipped = {name: np.clip(own, 1e-6, 1 - 1e-6) for name, own in scores.items()}
    logits = {name: np.log(own / (1 - own)) for name, own in clipped.items()}

    def biased(l2, name, fold=None):
        """Scores of a split by the bias that is fitted on all folds but one."""
        kept = val.text_index % folds != fold
        bias = metrics.fit_user_bias(logits["val"][kept], val.labels[kept], val.user_index[kept], n_users, l2)
        return 1 / (1 + np.exp(-logits[name] - bias[splits[name].user_index]))

    strengths = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    systems = {  # name -> (strength, scores on val, scores on test)
        "always_all": [(None, *(metrics.always_all(*part.labels.shape) for part in (val, test)))],
        "user_frequencies": [(smoothing, *(metrics.user_frequencies(
            train.labels, train.user_index, part.user_index, n_users, smoothing) for part in (val, test)))
            for smoothing in strengths],
        "user_bias": [(l2, np.choose((val.text_index % folds)[:, None], [
            biased(l2, "val", fold) for fold in range(folds)]), biased(l2, "test")) for l2 in strengths],
    }
    result = {}
    for name, ways in systems.items():
        strength, on_val, on_test = min(ways, key=lambda way: metrics.log_loss(val.labels, way[1]))
        rows = list(rows_of_scores(test, encoded, on_test))
        thresholds = metrics.tune_thresholds(val.labels, on_val)
        result[name] = metrics.evaluate(rows, train.label_names, thresholds, data.unseen_users(splits))
        result[name] |= {"strength": strength, "scores": [row["scores"] for row in rows]}
    return result


def format_metrics(result):
    """The main figures of a metrics file as a small table: of all and, if some are unseen, of both parts."""
    names = ("f1_macro", "f1_macro_tuned", "f1_micro", "mean_average_precision", "log_loss",
             "disagreement_auc", "share_not_understood", "share_empty_answers", "share_truncated",
             "share_refused")
    parts = {"all": result} | {name: result[name] for name in ("seen", "unseen") if name in result}
    lines = [f"{result['n_annotations']:,} annotations of {result['n_texts']:,} texts by "
             f"{result['n_users']} users, {result['seconds']:.0f} s"]
    if len(parts) > 1:
        lines.append(f"{'users':>22} " + "".join(f"{part:<8}" for part in parts).rstrip())
    for name in (name for name in names if result.get(name) is not None):
        figures = ("-" if own.get(name) is None else f"{own[name]:.4f}" for own in parts.values())
        lines.append(f"{name:>22} " + "".join(f"{figure:<8}" for figure in figures).rstrip())
    return "\n".join(lines)


# ---- A trained run: evaluate it again, or predict texts ----

PART = 4096  # rows that are predicted, and kept, at a time


def load_run(directory, given):
    """Returns the arguments of a training run, from its run.json.

    Raises: FileNotFoundError; ValueError if `given`, from the command line, contradicts the run.
    """
    path = metrics.run_record(directory)
    if not path.is_file():
        raise FileNotFoundError(f"--run {directory}: no run.json there; give the --out of a training run")
    if path.with_name("metrics_test.json").exists():
        metrics.read_checked(path.parent, path.name)
    elif path.with_name("checkpoint").exists():
        raise ValueError(f"--run {directory} is not finished: start its train.py command again")
    record = read_record(directory)
    args = argparse.Namespace(**record["arguments"] | record.get("places", {}))
    args.commit = None if "model" in given else record.get("model_commit")
    args.out, args.adapter, args.follow = Path(directory), str(directory), list(args.follow.items())
    kept = not given.keys() & {"out", *MEANT_FOR["texts"]}  # what is predicted replaces the run's own
    if given.get("constrain", args.constrain) != args.constrain and kept:
        raise ValueError(f"--constrain gives other responses than those in {directory}: give them an --out")
    for name, value in given.items():
        named = name == "dataset" and {value, args.dataset} & data.CORPORA.keys()
        if name in ("micro_batch_tokens", "constrain", "out") or name in PLACES and not named:
            setattr(args, name, value)
        elif name == "follow" and {*value} <= {*args.follow} or name in ("run", "split", *MEANT_FOR["texts"]):
            continue  # changes no run
        elif name in ("columns", "labels") and "input" in given:
            continue  # of the input
        elif getattr(args, name) != value:
            raise ValueError(f"--run {directory} was trained with {name} {getattr(args, name)}, not {value}: "
                             f"leave --{name} out")
    if args.micro_batch_tokens == "auto":
        raise ValueError("--micro_batch_tokens auto is measured on training steps; give --run a number")
    return args


def knowledge(directory, threshold=None):
    """Returns a run's (Task, {user of train: context}, threshold of each label): what a prediction needs.

    Of an older run from the files beside its config.json. Raises: ValueError for a classifier without any.
    """
    record = read_record(directory)
    task, users, thresholds = record["task"], record.get("users"), record.get("thresholds")
    if task is None:
        result, corpus = metrics.read_checked(Path(directory)), record["arguments"]["dataset"]
        task, thresholds = TASKS.get(corpus) or neutral_task(result["labels"]), result.get("thresholds")
        rows = metrics.read_predictions(Path(directory, "predictions_test.jsonl"))
        users = dict.fromkeys({row["user_id"] for row in rows} - {*record["data"]["unseen_users"]}, ())
    if threshold is not None or METHODS[record["arguments"]["method"]].family != "cls":
        thresholds = [0.5 if threshold is None else threshold] * len(task.label_names)
    if thresholds is None:
        raise ValueError(f"--run {directory} has no tuned thresholds: evaluate it first, or give --threshold")
    return task, {user: tuple(own) for user, own in users.items()}, np.array(thresholds)


def evaluate_run(args, run, device):
    """Evaluates a split of a finished run once more; returns its metrics."""
    if run.dataset not in data.CORPORA and not Path(run.dataset).is_file():
        raise FileNotFoundError(f"--run {args.run}: no {run.dataset} is there; give --dataset with "
                                "where it lies now, or --text or --input, which need no data")
    task, splits, report = load_splits(run)
    check_inputs(args.run, read_record(args.run), report)
    tokenizer = load_tokenizer(run)
    encoded = {name: encode_split(run, tokenizer, task, splits, name) for name in ("val", "test")}
    model = load_trained(run, len(task.label_names), device)
    beside = run.out != args.run  # the run's own predictions
    with claim_out(run)[0] if beside else lock_out(run.out):
        if beside:
            write_json(run.out / "run.json", describe_run(run, report, model, task, splits["train"]))
        return evaluate(run, model, tokenizer, splits, encoded, args.split, Processes(device=device))


# ---- Texts in, predictions out ----


def read_asked(args, run, task):
    """Returns (the Annotations of --text or --input, whether they have labels); a user may be None.

    Columns are found by --columns, else by the names of the run's own file, else by those of a role.
    """
    if args.input is None:
        zero, labels = np.zeros(1, np.int32), np.zeros((1, len(task.label_names)), bool)
        return data.Annotations(["1"], [args.text], [None], zero, zero, labels, task.label_names), False
    path, own = args.input, read_record(args.run)["data"].get("columns", {})
    header = {name.strip() for name in next(data.read_rows(path, None, {*own.values(), "text"}), (0, ()))[1]}
    given = data.own_columns(args.columns)
    own = {role: name for role, name in own.items() if name in header} | given
    columns = {role: own.get(role, role) for role in ("text_id", "user_id", "text")}
    context = run.context if {columns["user_id"], *(run.context or ())} <= header else None
    asked, table = data.read_annotations([path], columns, args.labels or run.labels, task.label_names,
                                         context or (), ("text", *given))
    if not table.label_places and (there := {*task.label_names} & {*table.header}):
        print(f"no metrics: {path} has no column {', '.join(sorted({*task.label_names} - there))}, so its "
              f"{', '.join(sorted(there))} are not read")
    return asked, bool(table.label_places) and args.users is None


def parts_of(asked, users=None):
    """Yields Annotations of about PART rows each: those of `asked`, or each of its texts by all of users."""
    n = len(users or "1")
    step, total = max(1, PART // n), len(asked.texts) if users else len(asked)
    for rows in (np.arange(start, min(start + step, total)) for start in range(0, total, step)):
        yield asked.select(rows) if users is None else dataclasses.replace(
            asked, users=users, text_index=np.repeat(rows, n), user_index=np.tile(np.arange(n), len(rows)),
            labels=np.zeros((len(rows) * n, len(asked.label_names)), bool))


def predict_rows(run, task, model, tokenizer, part, device):
    """The rows of predictions_SPLIT.jsonl for any annotations."""
    method, tokens, processes = method_of(run), run.micro_batch_tokens, Processes(device=device)
    encoded = data.encode(tokenizer, task, method, part, run.max_length)
    if method.family == "cls":
        return list(rows_of_scores(part, encoded, predict_scores(model, encoded, tokens, processes)))
    responses, _ = generate(model, tokenizer, encoded, task.label_names, tokens, processes, run.constrain)
    return list(rows_of_responses(part, encoded, responses, follows(run)["E2"] == "released"))


def use_part(path, key, predict):
    """The rows that predict() returns, or that a command of this key left at `path` when it was killed."""
    def digest(rows):
        return hashlib.sha256((key + json.dumps(rows)).encode()).hexdigest()

    try:
        rows, written = json.loads(path.read_bytes())
        if written == digest(rows):
            return rows
    except (OSError, ValueError, TypeError):
        pass  # none, or not whole
    rows = predict()
    write_json(path, [rows, digest(rows)])
    return rows


def output_rows(part, rows, thresholds, together=0):
    """Yields a row {column: value} of the output for each row; `together` users of a text have one more.

    A label has its decision and, of a classifier, its probability; generated text has the response. Of all
    users: the means, and the standard deviation (of the decisions, if there are no probabilities).
    """
    names, values = part.label_names, []
    for n, (row, (text, user_id)) in enumerate(zip(rows, part.fields(), strict=True), start=1):
        shown = {} if row["text_id"] == row["text_hash"] else {"text_id": row["text_id"]}
        shown |= {"user_id": user_id, "text": text}
        values.append(row.get("scores") or [float(name in row["predicted"]) for name in names])
        shown |= {name: int(v >= t) for name, v, t in zip(names, values[-1], thresholds)}
        own = {f"{name}_probability": v for name, v in zip(names, row.get("scores", ()))}
        yield shown | (own or {"response": row["response"].strip()})
        if together and n % together == 0:
            group = np.array(values[-together:])
            figures = [group >= thresholds, *[group] * bool(own)]
            figures = np.concatenate([*(each.mean(axis=0) for each in figures), group.std(axis=0)])
            keys = (*names, *own, *(f"{name}_spread" for name in names))
            yield shown | {"user_id": "all"} | dict(zip(keys, figures.round(6).tolist()))


def print_table(rows, names):
    """Prints a table labels x users of one text: probabilities, or 1 for a generated label."""
    users = [row["user_id"] or "" for row in rows]
    width, column = max(map(len, names)) + 2, max(8, *(len(user) + 2 for user in users))
    print(f"\n{rows[0]['text']}\n{'user':<{width}}" + "".join(f"{user:>{column}}" for user in users))
    for name in names:
        cells = (row.get(f"{name}_probability", row[name]) for row in rows)
        print(f"{name:<{width}}" + "".join(f"{cell:>{column}.2f}" for cell in cells))


def write_rows(path, rows, as_json, last_columns=()):
    """Writes rows {column: value} as lines of JSON, or as a CSV file whose cells of text are quoted."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        if as_json:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            return
        first = next(rows)
        columns, quoting = [*first, *last_columns], csv.QUOTE_NONNUMERIC
        writer = csv.DictWriter(file, columns, quoting=quoting, lineterminator="\n")
        writer.writeheader()
        writer.writerows(itertools.chain([first], rows))


def choose_users(given, method, asked, known):
    """Returns (the users of each text, None for those of the file; who of them did not train, which is said).

    Raises: ValueError if nobody labels a text, or nothing is known of somebody.
    """
    if given == ["all"] and "all" in known:
        raise ValueError("--users all: a user of train has this ID; name the users, or give a file of them")
    users, asks_who = sorted(known) if given == ["all"] else given, method.user_id or method.context
    if users is None and None in asked.users and asks_who:
        raise ValueError("who labels the texts? Give --users ID ... or all, or a file with a column of users")
    strangers = sorted({*(users or asked.users)} - {*known, None})
    if method.context and (lack := [user for user in strangers if user not in asked.profiles]):
        raise ValueError(f"user {lack[0]} did not train: give an --input with their columns "
                         f"{', '.join(method.context)}")
    if strangers and asks_who:
        words = ", ".join(strangers[:3])
        print("unseen in training, so only a guess: "
              + (f"users {words}" if len(strangers) < 4 else f"{len(strangers)} users, such as {words}"))
    return users, strangers


def predict_texts(args, run, device):
    """`--text` or `--input`: how users would label texts. Returns metrics if the input has labels, too."""
    method, (task, known, thresholds) = method_of(run), knowledge(args.run, args.threshold)
    if args.output and args.output.exists() and not args.force:
        raise ValueError(f"--output {args.output} exists: give another name, or --force to replace it")
    asked, has_gold = read_asked(args, run, task)
    asked.profiles |= known
    users, strangers = choose_users(args.users, method, asked, known)
    together = len(known) if args.users == ["all"] else 0
    tokenizer, model = load_tokenizer(run), load_trained(run, len(thresholds), device)
    files = metrics.run_record(args.run), Path(args.run, "adapter_model.safetensors")
    key, gold, started = str([*map(data.git_blob_id, files), run.constrain]), [], time.perf_counter()
    total, work = len(asked.texts) * len(users) if users else len(asked), Path(f"{args.output}.parts")

    def shown():
        with tqdm(total=total, desc=work.stem, unit="row", disable=args.output is None) as bar:
            for k, part in enumerate(parts_of(asked, users)):
                predict = functools.partial(predict_rows, run, task, model, tokenizer, part, device)
                own = key + json.dumps([(*row, asked.profiles.get(row[1])) for row in part.fields()])
                rows = use_part(work / f"{k:06d}.json", own, predict) if args.output else predict()
                gold.extend(rows if has_gold else ())
                yield from output_rows(part, rows, thresholds, together)
                bar.update(len(rows))

    if args.output is None:
        print_table([*shown()], task.label_names)
        return None
    spreads = [f"{name}_spread" for name in task.label_names if together]
    with lock_out(work):
        lora.write_atomically(work / args.output.name, lambda path: write_rows(
            path, shown(), args.output.suffix == ".jsonl", spreads))
        os.replace(work / args.output.name, args.output)
        shutil.rmtree(work)
    return metrics.evaluate(gold, task.label_names, thresholds if method.family == "cls" else None,
                            strangers) | {"seconds": time.perf_counter() - started} if gold else None


def use_run(args, given, device):
    """`--run DIR`: predicts texts, or evaluates a split and returns its metrics."""
    run = load_run(args.run, given)
    if not given.keys() & MEANT_FOR["texts"]:
        return evaluate_run(args, run, device)
    no_text = args.text is None or not args.text.strip()
    if no_text == (args.input is None) or (args.input is None) != (args.output is None):
        raise ValueError("give --text with a text, and --users, the IDs of who labels it; or --input with "
                         "--output")
    return predict_texts(args, run, device)


# ---- Queries ----


def query_model(args, device):
    """Asks an untrained local model; returns the metrics of what it answers."""
    lora.check_by_name(args.model, device)
    tokenizer = load_tokenizer(args)  # a wrong name is told before any work
    lock, old = claim_out(args)
    if is_finished(args, old, args.split):
        return None
    task, splits, report = load_splits(args)
    print(data.format_report(report))
    encoded = {args.split: encode_split(args, tokenizer, task, splits, args.split)}
    model, _ = build(args, 0, device)
    if old:
        check_inputs(args.out, old, report, model)
    else:
        write_json(args.out / "run.json", describe_run(args, report, model, task, splits["train"]))
    return evaluate(args, model, tokenizer, splits, encoded, args.split, Processes(device=device))


def fit(before, text, after, max_length):
    """A prompt of about max_length tokens of 4 bytes at most: text may lose its end. Raises: ValueError."""
    room = (max_length - prompts.CHAT_TOKENS) * prompts.BYTES_PER_TOKEN - len((before + after).encode())
    if room < 0:
        raise ValueError(f"--max_length {max_length}: the prompt without its text is longer; raise it")
    return before, text.encode()[:room].decode(errors="ignore"), after


def query_server(args):
    """Asks a model over HTTP; returns the metrics of what it answers, None after a dry run."""
    client = prompts.Client(args, args.out / "answers.jsonl")  # a mistake is told before --out is taken
    lock, old = (None, None) if args.dry_run else claim_out(args)
    if is_finished(args, old, args.split):
        return None
    task, splits, report = load_splits(args)
    print(data.format_report(report))
    if old:
        check_inputs(args.out, old, report)
    elif not args.dry_run:
        write_json(args.out / "run.json", describe_run(args, report, None, task, splits["train"]))
    started, annotations, method = time.perf_counter(), splits[args.split], method_of(args)
    inputs, prompt_index, too_few = data.prompt_inputs(method, annotations, example_chooser(args, splits))
    if too_few:
        print(f"{args.split}: {too_few} annotations are of users with fewer than {method.shots} examples")
    parts = [build_prompt(task, method, *one) for one in inputs]
    texts = ["".join(fit(*one, args.max_length) if args.max_length else one) for one in parts]
    n_shortened = sum(len(text) < sum(map(len, one)) for text, one in zip(texts, parts, strict=True))
    if n_shortened:
        print(f"{args.split}: {n_shortened} prompts are shortened to about {args.max_length} tokens")
    hashes = [data.prompt_hash(text) for text in texts]
    asked = dict(zip(hashes, texts, strict=True))
    enough = len(build_response(task.label_names).encode()) + 64  # a token is at least a byte; some words
    try:
        records, usage = client.ask(asked, args.max_tokens or enough)
    finally:
        if not args.dry_run:
            amend_record(args.out, dialect=client.dialect)
    if args.dry_run:
        return None
    if usage["failed"]:
        raise ValueError(f"{usage['failed']} of {len(records)} requests failed: the same command asks again")
    answers = [records[one] for one in hashes]
    encoded = data.Encoded(None, None, prompt_index, None, hashes)
    rows = rows_of_responses(annotations, encoded, [one["response"] for one in answers],
                             follows(args)["E2"] == "released")
    rows = [row | {"truncated": one["truncated"], "refused": one["status"] == "refused" and one["error"]}
            for row, one in zip(rows, (answers[m] for m in prompt_index), strict=True)]
    return write_results(args.out, args.split, rows, task.label_names, None, report["unseen_users"],
                         usage=usage, n_shortened=n_shortened, n_too_few_examples=too_few,
                         seconds=time.perf_counter() - started)


def not_negative(text):
    """argparse type of a finite number of at least 0."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return float(text)


def extra_parameter(text):
    """argparse type of one KEY=VALUE of --extra: (key, value), the value as JSON if it is some."""
    key, equals, value = text.partition("=")
    if not key or not equals or key in prompts.OURS:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, or KEY is one of {prompts.OURS}")
    try:
        return key, json.loads(json.dumps(json.loads(value), allow_nan=False))
    except (ValueError, RecursionError):
        return key, value


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Predict how annotators label texts.", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    add_arguments(parser, list(METHODS))
    parser.set_defaults(model=None)
    add = parser.add_argument
    add("--run", type=Path, help="directory of a training run")
    add("--split", choices=("test", "val"), default="test", help="(default: %(default)s)")
    add("--text", help="a text to show to --users")
    add("--input", type=Path, help="a file of texts, as --dataset takes it; users and labels may be missing")
    add("--output", type=Path, help="what is predicted for it, a row for each text and user: .csv or .jsonl")
    add("--force", action="store_true", help="replace --output")
    add("--users", nargs="+", metavar="ID",
        help="who sees each text; all: each user of train, and how they split (default: the file's users)")
    add("--threshold", type=data.share, help="of a decision (default: tuned on val; the paper's: 0.5)")
    add("--chat_template", action="store_true",
        help="wrap a query in the model's own chat template (default: the plain prompt)")  # [choice.P7]
    add("--api_base", help=f"ask an OpenAI-compatible server (default for GPT names: {prompts.OPENAI_BASE})")
    add("--dry_run", action="store_true", help="print what the API would cost and send nothing")
    add("--max_cost", type=not_negative, metavar="USD", help="stop the API before this is exceeded")
    add("--price_in", type=not_negative, help="US dollars per million prompt tokens (default: a dated table)")
    add("--price_out", type=not_negative, help="the same of completion tokens")
    add("--max_tokens", type=positive,
        help="of an answer and its thoughts, sent as given (default: enough for all labels and some words)")
    add("--reasoning_effort", choices=prompts.EFFORTS, help="how long a model thinks (default: the server's)")
    add("--extra", type=extra_parameter, nargs="+", metavar="KEY=VALUE",
        help="what else to tell the server, such as seed=1")
    add("--cache_from", nargs="+", metavar="DIR",
        help="--out of other queries: their answers to the same request count, whatever their server")
    add("--concurrency", type=positive, default=8, help="requests at a time (default: %(default)s)")
    add("--timeout_s", type=positive, default=60, help="of a request, in seconds (default: %(default)s)")
    add("--max_retries", type=positive, default=6, help="of a request (default: %(default)s)")
    args = parser.parse_args(argv)
    unset = object()  # what stands on the command line is given, even if it is the default
    all_given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    given = {name: value for name, value in all_given.items() if value is not unset}
    kind = "run"
    if len(dict(args.extra or ())) < len(args.extra or ()):
        parser.error("--extra: a parameter is given twice; leave one out")
    if args.run is None:
        if args.method is None or METHODS[args.method].family != "query":
            parser.error("give --run DIR of a training run, or --method q0s, q1s or q2s to query a model")
        args.model = args.model or "mistral"
        kind = "query" if prompts.is_api_model(args.model, args.api_base) else "local query"
    if kind == "query":
        args.max_length = given.get("max_length")
    idle = set().union(*(flags for what, flags in MEANT_FOR.items() if what not in HAS[kind]))
    if idle := sorted(idle & given.keys()):
        parser.error(f"--{', --'.join(idle)}: without a meaning here; leave out")
    return args, given


def main(argv=None):
    args, given = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.run is not None:
            result = use_run(args, given, device)
        else:
            complete(args)
            asked_over_http = prompts.is_api_model(args.model, args.api_base)
            result = query_server(args) if asked_over_http else query_model(args, device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]} Lower --micro_batch_tokens", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(stop or "interrupted", file=sys.stderr)
        return 130
    if result:
        print(format_metrics(result))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    sys.exit(main())
