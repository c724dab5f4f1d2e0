"""Hostile inputs for all that reads a file or an answer: taken as it is, or refused by a documented error.

    python tests/fuzz.py [--inputs 100000] [--seed 0] [--results FILE]

A target gets a random.Random and a directory, makes one input, calls the project's function and returns
whether it was accepted. A failure is any other exception, a broken invariant, or LIMIT_S without an end.
"""

import argparse
import contextlib
import csv
import io
import json
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import types
import unittest.mock
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

import torch  # noqa: E402
from measure import append  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_api import KEY, any_json, client_of, reply  # noqa: E402
from test_metrics import write_run  # noqa: E402

import data  # noqa: E402
import infer  # noqa: E402
import lora  # noqa: E402
import metrics  # noqa: E402
import prompts  # noqa: E402
import train  # noqa: E402
from prompts import TASKS, build_response, parse_response  # noqa: E402

LIMIT_S = 60  # by the clock of a machine that may be busy: a hang, not a speed
COLUMNS = "text_id", "user_id", "text"
PIECES = [
    "joy", "love", "joyful", "generalisation_unfair", "### Response:", "### User ID:", "Labels: ",
    "the label: ", "Categorize the following text", "split", "response", " and ", " or ", "1. ", "(2) ",
    ", ", ". ", "- ", "## ", "日本", "🙂", "{0}", "%s", '""', "\r\n",
    *'10 \t,;|\n\r\0"\'{\\/&._-éß\u0130\x85\ufeff\u202e\u200f\u2013\u2028']
BYTES = [
    b"\xff", b"\xed\xa0\x80", b"\xc3", b"\0", b"\xef\xbb\xbf", b"\r\n", b"1e999", b"NaN", b"null", b"\\ud800",
    b"text", b"[" * 9999, *(bytes([byte]) for byte in b'"\r\n,\t{[]}:-9')]
ENTRIES = (  # of the header of a safetensors file
    "F64", "I8", "F8_E4M3", "X", [], [0], [-1], [2, 6], [12], [0, 2**62], [2**40] * 3, None, {}, 1)


class Hang(BaseException):
    """No script catches it."""


# ---- Makers of inputs ----


def words(rng, most=8):
    return "".join(rng.choices(PIECES, k=rng.randint(0, most)))


def mutate(rng, raw):
    """The bytes with 1 to 3 of: a bit flipped, a piece inserted, removed or doubled; rarely cut in half."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(raw) or 1), rng.randrange(4)
        piece = raw[at: at + rng.choice((1, 1, 8, 50))]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:1]) + piece[1:]
        raw[at: at + len(piece)] = (flipped, rng.choice(BYTES) + piece, b"", piece * 2)[kind]
    return bytes(raw if rng.random() < 0.95 else raw[: len(raw) // 2])


def spoil(rng, value, leaf=any_json):
    """A JSON value with one node, at any depth, removed or replaced."""
    spots, nodes = [], [value]
    for node in nodes:
        places = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        spots += [(node, place) for place in places]
        nodes += [node[place] for place in places]
    node, place = rng.choice(spots)
    node[place] = leaf(rng)
    if rng.random() < 0.3:
        del node[place]
    return value if rng.random() < 0.98 else leaf(rng)


def spoiled(rng, text):
    if rng.random() < 0.4:
        return mutate(rng, text.encode())
    return json.dumps(spoil(rng, json.loads(text))).encode()


def spoil_tensors(rng, path):
    """Damages a safetensors file: its bytes, the length of its header, or an entry of the header."""
    raw, kind = path.read_bytes(), rng.randrange(3)
    size = int.from_bytes(raw[:8], "little")
    header, rest = raw[8: 8 + size], raw[8 + size:]
    if kind == 1:
        header = json.dumps(spoil(rng, json.loads(header), lambda rng: rng.choice(ENTRIES))).encode()
    size = rng.choice((0, 8, size - 1, size + 1, 10**8 + 1, 2**63, 2**64 - 1)) if kind == 2 else len(header)
    path.write_bytes(size.to_bytes(8, "little") + header + rest if kind else mutate(rng, raw))


def write_table(rng, path, header, delimiter):
    """Writes texts of any kind, rarely of a megabyte, or damages the file; returns whether it is sound."""
    rows = []
    for _ in range(rng.randint(1, 4)):
        labels = rng.choices(("0", "1", "0.0", "1.0"), k=len(header) - 3)
        rows.append([*(rng.choice("abcdefg ") + words(rng, 3) for _ in COLUMNS), *labels])
    rows[0][2] += 'a "b", {c}\n' * (90_000 if rng.random() < 0.001 else 0)
    file, quoting = io.StringIO(newline=""), rng.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL))
    ends = "\r\n" if quoting == csv.QUOTE_MINIMAL else rng.choice(("\n", "\r\n"))  # else csv leaves a \r bare
    writable = [[cell.replace("\0", "\ue000") for cell in row] for row in rows]  # Python 3.10 writes no NUL
    csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=ends).writerows([header, *writable])
    content = file.getvalue().replace("\ue000", "\0").encode()
    raw, whole = rng.choice((b"", b"\xef\xbb\xbf")) + content, rng.random() < 0.5
    path.write_bytes(raw if whole else mutate(rng, raw))
    return whole and b"\0" not in raw and all(cell.strip() for row in rows for cell in row)


def plain_rows(path, delimiter):
    """What Python's csv makes of a whole file: the oracle. A \\r before no line end is a part of its cell."""
    text = re.sub(r"\r(?!\r*(?:\n|$))", "\ue001", path.read_bytes().decode("utf-8-sig"))
    rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    return [[cell.replace("\ue001", "\r") for cell in row] for row in rows if row]


def small_model():
    model = torch.nn.Linear(4, 3)
    model.lora_A = torch.nn.Parameter(torch.randn(2, 4))
    return model, list(model.parameters())


# ---- Targets ----


def read_annotations(rng, work):
    sound = write_table(rng, path := work / "a.csv", [*COLUMNS, "joy", "love"], ",")
    try:
        read, _ = data.read_annotations([path], dict(zip(data.ROLES, data.ROLES)), None, None, (), COLUMNS)
    except ValueError as error:
        assert str(error).startswith(str(path)) and not sound, f"a sound file: {error}"
        return False
    header, *rows = plain_rows(path, ",")
    place = {name.strip(): k for k, name in enumerate(header)}
    names = sorted(place.keys() - {*COLUMNS, "split", ""})
    found = [([read.text_ids[item], user, text], read.label_set(n))
             for n, (item, (text, user)) in enumerate(zip(read.text_index, read.fields()))]
    assert found == [([row[place[name]] for name in COLUMNS], [
        name for name in names if row[place[name]].strip() in ("1", "1.0")]) for row in rows]
    return True


def read_split_texts(rng, work):
    path, delimiter = rng.choice(((work / "s.tsv", "\t"), (work / "s.csv", ",")))
    sound = write_table(rng, path, ["text", "b", "c"], delimiter)
    try:
        found = data.read_split_texts(path, "text")
    except ValueError as error:
        assert str(error).startswith(str(path)) and not sound, f"a sound file: {error}"
        return False
    rows = plain_rows(path, delimiter)
    column, skip = (0, 0) if delimiter == "\t" else (rows[0].index("text"), 1)
    assert found == {row[column] for row in rows[skip:]}
    return True


def parse_responses(rng, work):
    names = TASKS[rng.choice(("goemotions", "unhealthy"))].label_names
    if rng.random() < 0.5:  # or any names that data.py lets pass
        drawn = {rng.choice(("a", "b 1", "c")) + words(rng, 2) for _ in range(rng.randint(1, 6))}
        names = tuple(sorted(name for name in drawn if parse_response(name, sorted(drawn))[0] == [name]))
        try:
            data.check_labels("a.csv", names)
        except ValueError:
            return False
    subset = rng.sample(names, rng.randint(0, min(5, len(names))))
    assert parse_response(build_response(subset), names) == (sorted(subset), []), f"{subset} of {names}"
    response = "".join(
        words(rng, rng.choice((0, 0, 3))) + rng.choice(names or [""]) + rng.choice((", ", "\n", " and ", " "))
        for _ in range(rng.randint(1, 6)))
    found, rest = parse_response(response * (30_000 if rng.random() < 0.0003 else 1), names)
    assert found == sorted({*found} & {*names}) and all(piece.strip() for piece in rest)
    for name in found:  # by an independent rule: it stands there as whole words
        key, plain = (re.sub(r"[\s_\-\u2010-\u2015]+", " ", own).casefold() for own in (name, response * 2))
        key = re.search(r"\w(?:.*\w)?", key, re.DOTALL)[0]
        assert re.search(rf"(?<!\w){re.escape(key)}(?!\w)", plain), f"{name!r} is no word of {response!r}"
    assert set(parse_response(response, names, released=True)[0]) <= {*names}
    return bool(found)


def load_adapter(rng, work):
    (model, parameters), path = small_model(), work / "adapter_model.safetensors"
    before = [parameter.detach().clone() for parameter in parameters]
    save_file({name: tensor + 1 for name, tensor in lora.adapter_state(model).items()}, path)
    spoil_tensors(rng, path)
    try:
        lora.load_adapter(model, work)
    except ValueError:
        assert all(map(torch.equal, parameters, before)), "refused, and changed"
        return False
    return True


def load_checkpoint(rng, work):
    """Of two checkpoints the newer is damaged: one of the two is restored, exactly as it was written."""
    (_, parameters), directory, written = small_model(), work / "checkpoint", {}
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for step in (1, 2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = {"step": step, "best_val_loss": 1 / step, "best_step": step, "scale": [1.0, 0, 0]}
        train.save_checkpoint(directory, optimizer, state)
        written[step] = state | {"world_size": 1}, [parameter.detach().clone() for parameter in parameters]
    older, newest = sorted(directory.iterdir())
    spoil_tensors(rng, newest)
    if alone := rng.random() < 0.3:
        older.unlink()
    try:
        state = train.load_checkpoint(directory, optimizer, infer.ALONE)
    except ValueError:
        assert alone, "the whole checkpoint before it was not used"
        return False
    expected, values = written.get(state.get("step"), (None, ()))
    assert state == expected and all(map(torch.equal, parameters, values)), f"{state} was never written"
    return state["step"] == 2


def some_reply(rng):
    """An answer of a server, and whether it is a refusal."""
    refused, answers = rng.random() < 0.4, ({}, {"finish_reason": "length"})
    refusals = {"finish_reason": "content_filter"}, {"refusal": "No, joy."}
    more = rng.choice(refusals if refused else answers)
    return reply(rng.choice(("joy", "joy, love", "", None)), **more), refused


def keyed_client(cache):
    with unittest.mock.patch.dict("os.environ", OPENAI_API_KEY=KEY):
        return client_of("tiny", cache, "http://127.0.0.1:9/v1")


def post(rng, work):
    answer, refused = some_reply(rng)
    whole, status = json.dumps(answer).encode(), rng.choice((200, 200, 200, 400, 401, 429, 500, 0))
    raw = whole if rng.random() < 0.2 else spoiled(rng, whole.decode())
    client = keyed_client("answers.jsonl")
    headers = {"Retry-After": words(rng), "Location": rng.choice((None, KEY))}
    answered = types.SimpleNamespace(status_code=status, iter_content=lambda _: [raw], headers=headers)
    client.adapter.send = lambda *_, **__: contextlib.nullcontext(answered)
    try:
        code, answer, returned, wait_s = client.post({})
    except ValueError as error:
        assert str(error).isprintable() and KEY not in str(error) and 0 < status < 500
        return False
    record, text = prompts.read_answer(answer, code), json.dumps(answer, allow_nan=False)
    assert code == status and 0 <= wait_s <= prompts.RETRY_AFTER_CAP_S and KEY not in text
    assert returned == record
    assert (record["status"] == "answered") == bool((record["response"] or "").strip())
    assert record["status"] != "answered" or status == 200 and not (refused and raw == whole)
    return record["status"] != "failed"


def read_cache(rng, work):
    todo, expected, raw, path = {}, {}, b"", work / "answers.jsonl"
    for n in range(3):
        record = prompts.read_answer(answer := some_reply(rng)[0])
        line = {"key": f"k{n}", "request": words(rng), "answer": answer, "status": record["status"],
                "http_status": 200, "dialect": {}, "api_base": "http://127.0.0.1:9/v1"}
        raw += json.dumps(line | {"crc32": zlib.crc32(json.dumps(line).encode())}).encode() + b"\n"
        request = {"messages": [{"content": "x"}], "max_tokens": 9}
        todo[f"k{n}"], expected[f"h{n}"] = {"prompt_hash": f"h{n}", "request": request}, record
    path.write_bytes(mutate(rng, raw))
    client, whole = keyed_client(path), path.read_bytes()
    with path.open("ab") as client.file:
        client.read_cache(path, todo)
    assert path.read_bytes() == whole + b"\n" * (whole[-1:] not in (b"", b"\n"))
    assert client.records.items() <= expected.items(), "an answer that nobody gave"
    return bool(client.records)


def tables(rng, work):
    """`metrics.py tables` of a run with a damaged file ends with 0, or with 2 and one line."""
    metrics.resample.__defaults__ = 2, 0  # 1,000 resamples are nothing that an input can break
    if not (work / "whole").exists():
        baselines = {"user_bias": {"f1_micro": 0.5, "scores": [[0.5, 0.25, 0.75]] * 9}}
        write_run(work / "whole", "cls", "mistral", 0.3, n_texts=3, baselines=baselines)
        (work / "runs" / "one").mkdir(parents=True)
    files = ("run.json", "metrics_test.json", "predictions_test.jsonl", "baselines_test.json")
    victim = rng.choice(files)
    for name in files:
        lines = (work / "whole" / name).read_text().splitlines()
        at = rng.randrange(len(lines)) if name == victim else -1
        (work / "runs" / "one" / name).write_bytes(b"\n".join(
            spoiled(rng, line) if k == at else line.encode() for k, line in enumerate(lines)))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = metrics.main(["tables", str(work / "runs")])
    errors = [line for line in said.getvalue().splitlines() if line[:2] != "  " and "Warning" not in line]
    assert len(errors) == (code != 0) and all(line.startswith("error: ") for line in errors), errors
    return code == 0


def load_run(rng, work):
    """A run.json gives every argument of a run, or is refused."""
    args = train.parse_args(["--method", rng.choice(("cls", "clsp", "lm", "lmp"))])
    (work / "run.json").write_bytes(spoiled(rng, json.dumps(
        {"arguments": infer.arguments_of(args), "data": {"files": {"a.csv": {}}}})))
    infer.add_arguments(shared := argparse.ArgumentParser(), ["cls"])
    try:
        found = vars(infer.load_run(work, {}))
    except ValueError:
        return False
    assert not (lack := vars(shared.parse_args([])).keys() - found.keys()), f"without {lack}"
    return True


# ---- Running ----

TARGETS = {  # with their shares of the inputs
    read_annotations: 0.26, read_split_texts: 0.1, parse_responses: 0.38, load_adapter: 0.05,
    load_checkpoint: 0.02, post: 0.09, read_cache: 0.06, tables: 0.02, load_run: 0.02}


def run(target, inputs, seed=0):
    """Returns how many inputs were [accepted, refused, failed], and a failure of each place in the code."""
    def stop(*_):
        raise Hang(f"more than {LIMIT_S} s")

    counts, shown, before = [0, 0, 0], {}, signal.signal(signal.SIGALRM, stop)
    with tempfile.TemporaryDirectory() as work:
        for number in range(inputs):
            rng = random.Random(f"{target.__name__} {seed} {number}")
            signal.alarm(LIMIT_S)
            try:
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    counts[0 if target(rng, Path(work)) else 1] += 1
            except (Exception, Hang) as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                counts[2] += 1
                shown.setdefault(f"{Path(at.filename).name}:{at.lineno}",
                                 f"{target.__name__} {number}: {type(error).__name__}: {error}"[:400])
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return counts, [f"{place}: {wrong}" for place, wrong in shown.items()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, help="a file that gets a JSON line per target")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines, failures = ["| target | inputs | accepted | refused | failures | seconds |", "|" + "---|" * 6], []
    for target, share in TARGETS.items():
        started = time.perf_counter()
        counts, wrong = run(target, round(args.inputs * share), args.seed)
        figures = (sum(counts), *counts, round(time.perf_counter() - started))
        lines.append(f"| `{target.__name__}` | {' | '.join(f'{n:,}' for n in figures)} |")
        failures += wrong
        if args.results:
            append(args.results, {"what": f"hostile inputs: {target.__name__}", "injected": sum(counts),
                                  "lost": counts[2], "note": f"{counts[1]:,} refused",
                                  "command": f"python tests/fuzz.py --inputs {args.inputs}"})
    print("\n".join([*lines, "", *failures]))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
