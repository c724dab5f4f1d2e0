"""The tour: the method in stops, in the order of the data, on one page that needs no network.

    python tests/tour.py [--runs runs/tiny] [--out runs/tour.html]     `make tour` trains its three runs first

At each stop: what the paper says, in other words; the lines that do it, cut out of the scripts; one text and
two of its annotators, computed by them; the tests and the audit rows of these lines. The words are in
tests/tour.md, the looks in tests/tour.css.
"""

import argparse
import ast
import csv
import functools
import html
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import method_map  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from pygments import highlight  # noqa: E402
from pygments.formatters import HtmlFormatter  # noqa: E402
from pygments.lexers import PythonLexer  # noqa: E402

import data  # noqa: E402
import infer  # noqa: E402
import lora  # noqa: E402
import metrics  # noqa: E402
import prompts  # noqa: E402
import train  # noqa: E402

# ---- Lines cut out of the scripts ----


class Cut(NamedTuple):
    """Lines of a script, and the function, class or constant that they are of."""

    script: str
    name: str
    first: int
    last: int


@functools.cache
def parsed(script):
    """A script as (lines, the same lines as HTML, syntax tree)."""
    text = (ROOT / script).read_text()
    colored = highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    return text.splitlines(), colored.split("\n"), ast.parse(text)


def names_of(node):
    """The names that a definition or an assignment gives."""
    return {getattr(node, "name", None), *(getattr(one, "id", None) for one in getattr(node, "targets", ()))}


def cut(place):
    """The Cut of "script: name", or of the first statement in it that begins with x: "script: name / x".

    Raises: ValueError if it is no longer there.
    """
    script, _, rest = place.partition(": ")
    name, _, beginning = rest.partition(" / ")
    lines, _, node = parsed(script)
    for part in name.split("."):
        node = next((child for child in ast.iter_child_nodes(node) if part in names_of(child)), ast.Pass())
    if beginning:
        node = next((child for child in ast.walk(node) if isinstance(child, ast.stmt)
                     and lines[getattr(child, "lineno", 1) - 1].strip().startswith(beginning)), ast.Pass())
    if not hasattr(node, "lineno"):
        raise ValueError(f"tests/tour.md shows {place!r}, which the scripts no longer have: name another")
    first = min(one.lineno for one in (node, *getattr(node, "decorator_list", ())))
    return Cut(script, name, first, node.end_lineno)


def figure(own):
    """The lines of a Cut with their numbers, which are no part of the text."""
    colored = parsed(own.script)[1]
    lines = "".join(f'<span class="line" data-n="{n}">{colored[n - 1]}\n</span>'
                    for n in range(own.first, own.last + 1))
    return (f'<figure data-script="{own.script}" data-first="{own.first}"><figcaption>{own.script}:'
            f'{own.first} <b>{own.name}</b></figcaption><pre tabindex="0" role="region" aria-label="'
            f'{own.name} in {own.script}, from line {own.first}">{lines}</pre></figure>')


# ---- Words and formulas ----


def mathml(tex, display="inline"):
    r"""A formula as MathML: letters, numbers, signs, _ ^ { }, \frac \hat \prime \quad and \op{word}."""
    left = re.findall(r"\\op{\w+}|\\[a-z]+|[0-9.]+|\S", tex)

    def row(end=None):
        items = []
        while left and left[0] != end:
            items.append(item())
        del left[:1]
        return f"<mrow>{''.join(items)}</mrow>"

    def atom():
        sign = left.pop(0)
        if sign == "{":
            return row("}")
        if sign == r"\frac":
            return f"<mfrac>{atom()}{atom()}</mfrac>"
        if sign == r"\hat":
            return f'<mover accent="true">{atom()}<mo>^</mo></mover>'
        if sign.startswith(r"\op"):
            return f'<mi mathvariant="normal">{sign[4:-1]}</mi>'
        sign = {r"\prime": "′", r"\quad": "\u2003", "-": "−"}.get(sign, sign)
        tag = "mi" if sign.isalpha() else "mn" if sign[0].isdigit() else "mo"
        return f"<{tag}>{html.escape(sign)}</{tag}>"

    def item():
        base, scripts = atom(), {}
        while left and left[0] in "_^":
            sign = left.pop(0)
            scripts[sign] = atom()
        kind = "m" + "sub" * ("_" in scripts) + "sup" * ("^" in scripts)
        return f"<{kind}>{base}{scripts.get('_', '')}{scripts.get('^', '')}</{kind}>" if scripts else base

    return f'<math display="{display}">{row()}</math>'


def prose(text):
    """Text with `code` and $formulas$ as HTML; a formula keeps the sign behind it on its line."""
    def marked(part):
        if part[0] == "`":
            return f"<code>{html.escape(part[1:-1])}</code>"
        formula, sign = part[1:].split("$")
        return f'<span class="together">{mathml(formula)}{sign}</span>' if sign else mathml(formula)

    parts = re.split(r"(`[^`]+`|\$[^$]+\$[.,:;)]?)", " ".join(text.split()))
    return "".join(marked(part) if k % 2 else html.escape(part, quote=False) for k, part in enumerate(parts))


def words(text):
    return f"<p>{prose(text)}</p>"


def readable(value):
    """A number with commas or three digits behind the point; all else as it is."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.1e}" if value else "0"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(header, rows, bold=lambda row: False):
    """A table in a box that scrolls by itself; numbers stand on the right."""
    lines = ["<tr>" + "".join(f"<th>{prose(cell)}</th>" for cell in header) + "</tr>"]
    for row in rows:
        cells = (f'<td{"" if isinstance(cell, str) else " class=number"}>{html.escape(readable(cell))}</td>'
                 for cell in (cell.item() if hasattr(cell, "item") else cell for cell in row))
        lines.append(f"<tr{' class=bold' if bold(row) else ''}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def chips(tokens):
    """Tokens in a box each, with visible spaces and line ends."""
    shown = (html.escape(visible(token)) for token in tokens)
    return f'<p class="tokens">{" ".join(f"<span>{token}</span>" for token in shown)}</p>'


def visible(text):
    return text.replace("\n", "⏎").replace(" ", "·")


# ---- The running example ----

METHODS = {"cls": "CLS", "clsp": "CLS-P", "lmp": "LM-P"}  # whose runs are read
CPU = torch.device("cpu")


class Example:
    """One text of the test split, two of its annotators, and three finished runs with their models.

    The two share the fewest labels; of such texts it is the first with the fewest annotations.
    """

    def __init__(self, runs):
        self.runs = {name: Path(runs, "unhealthy", "mistral", name, "1") for name in METHODS}
        self.args = {name: infer.load_run(path, {}) for name, path in self.runs.items()}
        self.task, self.splits, self.report = infer.load_splits(self.args["clsp"])
        self.tokenizer = lora.load_tokenizer(self.args["clsp"].model)
        self.labels, test, of_text = list(self.task.label_names), self.splits["test"], {}
        for row, item in enumerate(test.text_index.tolist()):
            of_text.setdefault(item, []).append(row)
        pairs = [(int((test.labels[a] & test.labels[b]).sum()), len(rows), a, b)
                 for rows in of_text.values() for a in rows for b in rows if a < b]
        self.pair = test.select(np.array(min(pairs)[2:]))
        (self.text, one), (_, two) = self.pair.fields()
        self.users = one, two
        parts = {"train": self.splits["train"], "pair": self.pair}
        self.encoded = {name: {part: infer.encode_split(args, self.tokenizer, self.task, parts, part)
                               for part in parts} for name, args in self.args.items()}
        n, of_run = len(self.labels), self.args.items()
        self.models = {"untrained": {name: infer.build(args, n, CPU)[0].eval() for name, args in of_run},
                       "trained": {name: infer.load_trained(args, n, CPU) for name, args in of_run}}
        self.rows = {name: metrics.read_predictions(path / "predictions_test.jsonl")
                     for name, path in self.runs.items()}
        self.log = metrics.read_predictions(self.runs["clsp"] / "log.jsonl")
        self.results = {name: json.loads((path / "metrics_test.json").read_text())
                        for name, path in self.runs.items()}

    def predictions(self, name):
        """The two rows of a run's predictions that are of the example."""
        of_user = {row["user_id"]: row for row in self.rows[name]
                   if row["text_id"] == self.pair.text_ids[self.pair.text_index[0]]}
        return [of_user[user] for user in self.users]

    def array(self, name, key):
        """The labels (N, L) of a run's predictions file, key "gold" or "predicted"."""
        return np.array([[label in row[key] for label in self.labels] for row in self.rows[name]])

    def prefix(self, name):
        return infer.shared_prefix(self.models["untrained"][name], self.encoded[name]["train"])

    def objective(self, name, state, processes=infer.ALONE):
        return train.Objective(self.models[state][name], prompts.METHODS[name].family, 10**9, processes)

    def pieces(self, ids):
        return [self.tokenizer.decode([one]) for one in ids]

    def first_layer(self, kind, state="untrained"):
        """The first layer of a kind in CLS-P, and its name."""
        return next((name, layer) for name, layer in self.models[state]["clsp"].named_modules()
                    if isinstance(layer, kind))

    @functools.cache  # noqa: B019
    def answers(self, state):
        """The tokens (K,) of both answers, the log-probability of each, and the logits (K, V), by lm_loss."""
        caught, pair, real = [], self.encoded["lmp"]["pair"], lora.response_logits

        def catch(*args):
            caught.append(real(*args))
            return caught[-1]

        with mock.patch.object(lora, "response_logits", catch):
            self.objective("lmp", state).mean_loss(pair, self.prefix("lmp"))
        lengths = pair.lengths + np.diff(pair.response_offsets)[pair.response_index]
        tokens = [pair.response(pair.response_index[m]) for m in np.argsort(lengths, kind="stable")]
        tokens, logits = np.concatenate(tokens).tolist(), torch.cat(caught)
        return tokens, logits.log_softmax(-1)[range(len(tokens)), tokens], logits


def show_row(e):
    path = Path(e.args["clsp"].data_dir, "unhealthy_full.csv")
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    own = [next(k for k, row in enumerate(rows) if e.text in row and user in row) for user in e.users]
    header = f"`{path.name}`", *(f"line {k + 1:,}" for k in own)
    return (table(header, zip(rows[0], *(rows[k] for k in own)))
            + words(f"{len(rows) - 1:,} such rows become arrays over {len(e.pair.texts):,} texts and "
                    f"{len(e.pair.users)} users; the labels are {len(e.labels)} columns of true and false."))


def show_cleaning(e):
    rows = [(stage["stage"], " / ".join(f"{n:,}" for n in stage["rows"]), stage["users"])
            for stage in e.report["stages"]]
    return (words("The synthetic corpus, stage by stage:") + table(("", "train / val / test", "users"), rows)
            + words("Our text is in test, with all its annotations that are left."))


def show_prompt(e):
    method = prompts.METHODS["clsp"]
    one, two = ("".join(prompts.build_prompt(e.task, method, e.text, user)) for user in e.users)
    n = sum(a != b for a, b in zip(one.split("\n"), two.split("\n"), strict=True))
    shown = html.escape(one, quote=False)
    for part in (e.users[0], html.escape(e.text, quote=False)):
        shown = f"<mark>{part}</mark>".join(shown.rsplit(part, 1))
    return (words(f"CLS-P asks about user {e.users[0]}. The prompt of user {e.users[1]} differs in {n} line.")
            + f"<pre>{shown}</pre>")


def show_tokens(e):
    text, lmp = e.tokenizer(e.text, add_special_tokens=False)["input_ids"], e.encoded["lmp"]["pair"]
    rows = [(METHODS[name], len(own["train"].prompt_index), len(own["train"].lengths))
            for name, own in e.encoded.items() if name != "lmp"]
    return (words(f"Our text is {len(text)} tokens:") + chips(e.pieces(text))
            + words(f"With template and ID a CLS-P prompt has {e.encoded['clsp']['pair'].lengths.max()}. The "
                    f"answer that LM-P is to give for user {e.users[0]}:")
            + chips(e.pieces(lmp.response(lmp.response_index[0])))
            + table(("train", "annotations", "distinct prompts"), rows))


def show_prefix(e):
    P, encoded, pair = e.prefix("clsp"), e.encoded["clsp"]["train"], e.encoded["clsp"]["pair"]
    ids, lengths = torch.tensor(data.pad([pair.prompt(m) for m in (0, 1)], 0)), torch.tensor(pair.lengths)
    with torch.inference_mode():
        shared, alone = (e.models["untrained"]["clsp"](ids, lengths, prefix) for prefix in (P, 0))
    B, mean = e.args["clsp"].batch_size, float(encoded.lengths.mean())
    return (words(f"All {len(encoded.lengths):,} CLS-P prompts begin alike, and stop to do so here:")
            + chips([*e.pieces(pair.prompt(0)[P - 2: P]), "…"]) + table(("", ""), [
                ("tokens of the shared beginning", P), ("tokens of a prompt, on average", f"{mean:.0f}"),
                (f"tokens of a step of {B} prompts", round(B * mean)),
                ("the same, the shared ones once", round(P + B * (mean - P))),
                ("largest difference of our users' logits", (shared - alone).abs().max())]))


def show_nf4(e):
    name, layer = e.first_layer(lora.NF4Linear)
    key = name.removesuffix(".base") + ".weight"
    stored = dict(lora.stored_tensors(Path(e.args["clsp"].model, "model.safetensors")))[key]
    restored, scale = layer.dequantize().float(), stored.flatten()[:64].abs().max()
    rows = [(stored[0, k], stored[0, k] / scale, restored[0, k] / scale, restored[0, k]) for k in range(6)]
    error = ((restored - stored).norm() / stored.norm()).item()
    quantized = lora.count_parameters(e.models["untrained"]["clsp"])[1]
    return (words(f"The first weights of `{key.removesuffix('.weight')}`, in whose first block of 64 the "
                  f"largest magnitude is {scale:.3f}:")
            + table(("$W$", "$W / s$", "$q[c]$", r"$\hat{W}$"), rows)
            + words(f"{stored.numel():,} weights take {layer.packed.numel():,} bytes, and their scales. The "
                    f"error is {error:.1%} of the matrix, by norm. {quantized:,} weights of the model are "
                    "stored so."))


def show_lora(e):
    (name, before), (_, after) = (e.first_layer(lora.LoRALinear, state) for state in e.models)
    x = e.models["untrained"]["clsp"].get_submodule(e.first_layer(torch.nn.Embedding)[0])(
        torch.tensor(e.encoded["clsp"]["pair"].prompt(0)).long())
    with torch.inference_mode():
        adds = [((own(x) - own.base(x)).norm() / own.base(x).norm()) for own in (before, after)]
    base, _, trains = lora.count_parameters(e.models["untrained"]["clsp"])
    (r, D_in), D_out = before.lora_A.shape, before.base.out_features
    return (words(f"`{name}`, fed with our prompt:") + table(("", ""), [
        ("W₀", f"{D_out} × {D_in}"), ("A", f"{r} × {D_in}"), ("B", f"{D_out} × {r}"),
        ("α / r", f"{before.scaling:g}"), ("update, as a share of the base's output", adds[0]),
        ("the same after training", adds[1]), ("parameters of the base, frozen", base),
        ("parameters that train, with the head", trains)]))


def show_cls(e):
    pair, D = e.encoded["clsp"]["pair"], e.models["untrained"]["clsp"].config.hidden_size
    scores = infer.predict_scores(e.models["untrained"]["clsp"], pair, 10**6)
    before, after = (e.objective("clsp", state).mean_loss(pair, 0) for state in e.models)
    rows = [(label, *(f(k, j) for k in (0, 1) for f in (lambda k, j: int(pair.labels[k, j]),
                                                         lambda k, j: scores[k, j])))
            for j, label in enumerate(e.labels)]
    return (words(f"States (2, {pair.lengths.max()}, {D}), of which one a prompt is read, give logits "
                  f"{scores.shape}. Before training, for our two users:")
            + table(("", "$y$", "$p$", "$y$", "$p$"), rows)
            + words(f"The mean of the {scores.size} terms of the loss is {before:.3f}; after training, which "
                    f"did not see this text, {after:.3f}."))


def show_lm(e):
    pair, (tokens, _, logits) = e.encoded["lmp"]["pair"], e.answers("trained")
    (K, V), T = logits.shape, int((pair.lengths + np.diff(pair.response_offsets)[pair.response_index]).max())
    rows = [(visible(own), visible(best)) for own, best in zip(e.pieces(tokens), e.pieces(logits.argmax(-1)))]
    return (words(f"Both prompts with their answers are 2 × {T} tokens, of which {K} are of the answers. "
                  f"The head gives {K} × {V:,} logits instead of {2 * T} × {V:,}. After training:")
            + table(("token of the answer", "most probable"), rows))


def show_loss(e):
    (tokens, before, _), (_, after, _) = map(e.answers, e.models)
    rows = [(visible(own), -a, -b) for own, a, b in zip(e.pieces(tokens), before, after)]
    means = [e.objective("lmp", state).mean_loss(e.encoded["lmp"]["pair"], 0) for state in e.models]
    return (words("The terms of our two answers, in nats, before and after training:")
            + table(("token", "before", "after"), [*rows, ("mean, by the code", *means)],
                    lambda row: row[0].startswith("mean")))


def show_step(e):
    steps, limit = [row for row in e.log if "grad_norm" in row], e.args["clsp"].max_grad_norm
    chosen = sorted({0, 1, len(steps) // 20, len(steps) // 4, len(steps) // 2, len(steps) - 1})
    rows = [(row["step"], row["loss"], row["grad_norm"], min(1.0, limit / (row["grad_norm"] + 1e-6)),
             row["learning_rate"]) for row in steps if steps.index(row) in chosen]
    return (words(f"Some of the {steps[-1]['step']} steps of the CLS-P run, of {e.args['clsp'].batch_size} "
                  "annotations each:") + table(("$t$", "loss", "$‖g‖$", "factor", "$η_t$"), rows)
            + words("The factor is what clipping multiplies the gradient by."))


def show_processes(e):
    encoded, args = e.encoded["clsp"]["train"], e.args["clsp"]
    rows = data.training_steps(encoded, args.batch_size, args.seed, 0)[0]
    trainable = [p for p in e.models["untrained"]["clsp"].parameters() if p.requires_grad]

    def gradient(rank, world_size):
        objective = e.objective("clsp", "untrained", infer.Processes(rank, world_size, CPU))
        loss = sum(objective.losses(encoded, rows, e.prefix("clsp"))) / objective.terms(encoded, rows)
        return loss.detach(), torch.cat([own.flatten() for own in torch.autograd.grad(loss, trainable)])

    (alone, whole), (a, one), (b, two) = gradient(0, 1), gradient(0, 2), gradient(1, 2)
    return (words(f"The first step of the CLS-P run, {len(rows)} annotations of {len(e.labels)} labels: "
                  f"{len(rows) * len(e.labels)} terms.") + table(("", "loss", "$‖g‖$"), [
                      ("process 0 of 2", a, one.norm()), ("process 1 of 2", b, two.norm()),
                      ("their sum", a + b, (one + two).norm()), ("one process alone", alone, whole.norm())])
            + words(f"The sum differs from the gradient of one process by a share of "
                    f"{(one + two - whole).norm() / whole.norm():.0e}."))


def show_validation(e):
    keys = ("step", "val_loss", "val_f1_macro", "val_f1_macro_tuned")
    rows = [tuple(row[key] for key in keys) for row in e.log if "val_loss" in row]
    return (words(f"The CLS-P run was told to validate {len(rows)} times. The one with the lowest loss is "
                  "its result:") + table(("step", "loss", "F1 at 0.5", "F1 tuned"), rows,
                                     lambda row: row[1] == min(own[1] for own in rows)))


def show_generation(e):
    parts, n = [], len({row["prompt"] for row in e.rows["lmp"]})
    for k, (user, row) in enumerate(zip(e.users, e.predictions("lmp"))):
        ids = e.tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        said = ", ".join(e.pair.label_set(k))
        parts += [words(f"User {user} said {said}. LM-P writes"), chips(e.pieces(ids))]
    return "".join(parts) + words(
        f"All {n} prompts of test took {e.results['lmp']['decoding_steps']} decoding steps, since a batch "
        "steps together. The longest possible answer has "
        f"{infer.longest_response(e.tokenizer, e.labels)} tokens.")


def show_parsing(e):
    response = e.predictions("lmp")[0]["response"]
    names = prompts.parse_response(response, e.labels)[0] or e.labels[:2]
    parts = []
    for text in (response.strip(), "\n".join(f"- {name.replace('_', ' ').title()}." for name in names),
                 f"This is rather {names[0]}."):
        found, rest = prompts.parse_response(text, e.labels)
        released = prompts.parse_response(text, e.labels, released=True)[0]
        parts.append(f"<pre>{html.escape(text)}</pre>" + table(("", ""), [
            ("read as", ", ".join(found) or "nothing"), ("not understood", ", ".join(rest) or "nothing"),
            ("by the released parser", ", ".join(released) or "nothing")]))
    return words(f"The answer for user {e.users[0]}, its labels as another model may write them, and a "
                 "sentence:") + "".join(parts)


def show_f1(e):
    gold, predicted = e.array("clsp", "gold"), e.array("clsp", "predicted")
    rows = [(label, *(int(n) for n in counts), f1) for label, counts, f1 in zip(
        e.labels, metrics.count(gold, predicted)[0].T, metrics.f1_per_label(gold, predicted))]
    absent = [row[0] for row in rows if not any(row[1:4])]
    return (words(f"CLS-P on the {len(gold):,} annotations of test:") + table(
        ("", "TP", "FP", "FN", "$F_k$"), [*rows, ("F1-macro", "", "", "", metrics.f1_macro(gold, predicted))],
        lambda row: row[1] == "")
            + (words(f"Neither given nor predicted, and so 0: {', '.join(absent)}.") if absent else ""))


def show_threshold(e):
    shares, highest = e.array("cls", "gold").mean(0), np.max([row["scores"] for row in e.rows["cls"]], axis=0)
    rows = zip(e.labels, (f"{share:.0%}" for share in shares), highest, e.results["cls"]["thresholds"])
    f1 = [(METHODS[name], *(e.results[name][key] for key in ("f1_macro", "f1_macro_tuned")))
          for name in ("cls", "clsp")]
    return (words("CLS, which does not know the person, on test: how often a label is chosen, its highest "
                  "probability, its tuned threshold.") + table(("", "chosen", "highest", "$t_k$"), rows)
            + table(("F1-macro", "at 0.5", "tuned"), f1))


def show_person(e):
    said = [["•" if chosen else "" for chosen in own] for own in e.pair.labels]
    scores = [row["scores"] for row in (*e.predictions("clsp"), e.predictions("cls")[0])]
    bias = json.loads((e.runs["cls"] / "baselines_test.json").read_text())["user_bias"]
    systems = {METHODS[name]: result for name, result in e.results.items()} | {"CLS + bias": bias}
    shown = [(name, own["f1_macro"], own.get("f1_macro_tuned", "–"), own["disagreement_auc"])
             for name, own in systems.items()]
    cls, clsp = systems["CLS"]["f1_macro"], systems["CLS-P"]["f1_macro"]
    change = f"{metrics.gain(clsp, cls):+.0f}%" if cls else "not defined, as CLS has 0"
    columns = zip(e.labels, said[0], scores[0], said[1], scores[1], scores[2])
    return (words(f"What {e.users[0]} and {e.users[1]} said (•) and what CLS-P gives for each; CLS gives "
                  "one answer for both:") + table(("", "", "CLS-P", "", "CLS-P", "CLS"), columns)
            + words("On all of test:") + table(("", "F1 at 0.5", "tuned", "pairs in order"), shown)
            + words(f"The gain of CLS-P over CLS at 0.5 is {change}. In this corpus nothing but the ID "
                    "explains who says what; on real texts that has to be measured. The last column is "
                    "`disagreement_auc`: of two users who differ on a label, how often the scores tell which "
                    "one chose it. Chance is 0.5."))


# ---- The stops, and what checks them ----

SHOWN = (show_row, show_cleaning, show_prompt, show_tokens, show_prefix, show_nf4, show_lora, show_cls,
         show_lm, show_loss, show_step, show_processes, show_validation, show_generation, show_parsing,
         show_f1, show_threshold, show_person)


class Stop(NamedTuple):
    """A stop of tests/tour.md."""

    anchor: str
    title: str
    what: str  # HTML, as the next two
    section: str  # of the paper
    paper: str
    code: list  # of Cut
    tests: list  # names, those of the code's tags first
    rows: list  # of the audit, those of the code's tags first


@functools.cache
def read_words():
    """Returns ({name: HTML} of the words for the page, the stops in order) of tests/tour.md."""
    first, *parts = re.split(r"^## (\w+): (.+)\n", (ROOT / "tests" / "tour.md").read_text(), flags=re.M)
    return ({key: prose(text) for key, text in re.findall(r"^(\w+): (.+?)\n\n", first, re.M | re.S)},
            [read_stop(*three) for three in zip(parts[::3], parts[1::3], parts[2::3])])


def read_stop(anchor, title, body):
    """The Stop of a section of tests/tour.md."""
    fields, of_tag = {}, method_map.tags_in_tests()
    field = re.compile(r"^(paper|code|test|audit): (.*)$", re.M)
    for key, value in field.findall(body):
        fields.setdefault(key, []).append(value)
    blocks = [mathml(block[3:], "block") if block.startswith("$$") else words(block)
              for block in re.split(r"\n{2,}", field.sub("", body).strip())]
    code = [cut(place) for place in fields["code"]]
    lines = [line for own in code for line in parsed(own.script)[0][own.first - 1: own.last]]
    tags = [tag for line in lines for tag in method_map.TAG.findall(line.partition("#")[2])]
    tests = [of_tag[tag][0] for tag in tags if tag in of_tag] + fields.get("test", [])
    rows = [tag.removeprefix("choice.") for tag in tags if tag.startswith("choice.")]
    rows += " ".join(fields.get("audit", [])).split()
    return Stop(anchor, title, blocks[0], fields["paper"][0], "".join(blocks[1:]), code,
                list(dict.fromkeys(tests)), list(dict.fromkeys(rows)))


def test_places():
    """{name of a test: "tests/file:line"}."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return {node.name: f"tests/{path.name}:{node.lineno}" for path in files
            for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def audit_rows():
    """{row: its line of the audit's table in results/README.md as HTML}; a line may be of several rows."""
    text, found = (ROOT / "results" / "README.md").read_text().partition("\n## Audit\n")[2], {}
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    for name, *cells in rows:
        columns = [f"<i>{column}:</i> {prose(cell)}" for column, cell in zip(header[1:], cells, strict=True)
                   if cell not in ("", "-")]
        for row in re.findall(r"[A-Z]\d+", name):
            found[row] = f"<b>{prose(name)}</b> {'; '.join(columns)}"
    return found


def checks(stop):
    """The tests that pin a stop's lines, and the rows of the audit that touch it, each row once."""
    places, audit = test_places(), audit_rows()
    tests = (f'<code>{name.replace("_", "_<wbr>")}</code> <span class="quiet">{places[name]}</span>'
             for name in stop.tests)
    rows = dict.fromkeys(audit[row] for row in stop.rows if row in audit)
    none = "<li>No row of the audit touches this stop.</li>"
    return (f"<h3>Tests</h3><ul>{''.join(f'<li>{own}</li>' for own in tests)}</ul>"
            f"<h3>Audit</h3><ul>{''.join(f'<li>{own}</li>' for own in rows) or none}</ul>")


# ---- The page ----

SCRIPT = """
const stops = [...document.querySelectorAll(".stop")], bar = document.querySelector(".bar");
let at = -2;
function here() {
  const k = stops.findLastIndex(stop => stop.getBoundingClientRect().top < innerHeight / 3);
  if (k === at) return;
  at = k;
  for (const a of bar.children) a.removeAttribute("aria-current");
  bar.children[k + 1].setAttribute("aria-current", "true");
  bar.scrollLeft = bar.children[k + 1].offsetLeft - bar.clientWidth / 2;
}
addEventListener("scroll", here, {passive: true});
addEventListener("keydown", event => {
  here();
  const next = stops[at + ({j: 1, k: -1}[event.key] ?? NaN)];
  if (next && !event.ctrlKey && !event.metaKey && !event.altKey) location.hash = next.id;
});
here();
"""


def style():
    """The colours of the code, for light, dark and paper, and tests/tour.css."""
    def colors(name):
        lines = HtmlFormatter(style=name).get_style_defs("pre").splitlines()
        return "\n".join(line for line in lines if re.match(r"pre \.\w+ {(?!.*background)", line))

    media = {"screen": "default", "screen and (prefers-color-scheme: dark)": "github-dark", "print": "bw"}
    return "".join(f"@media {medium} {{ {colors(name)} }}\n" for medium, name in media.items()) + (
        ROOT / "tests" / "tour.css").read_text()


def link(stop, text):
    return f'<a href="#{stop.anchor}" title="{stop.title}">{text}</a>'


def section(stop, number, shown):
    """A stop as HTML; long code has the checks beside it, short code below it."""
    _, stops = read_words()
    long = " long" * (sum(own.last - own.first + 1 for own in stop.code) > 50)
    before = link(stops[number - 2], f"← {stops[number - 2].title}") if number > 1 else "<span></span>"
    behind = link(stops[number], f"{stops[number].title} →") if number < len(stops) else ""
    return f"""<section class="stop" id="{stop.anchor}"><p class="small quiet">{number} of {len(stops)}</p>
<h2>{link(stop, stop.title)}</h2><div class="what">{stop.what}</div><div class="sides{long}">
<div class="paper"><h3>{stop.section}</h3>{stop.paper}</div>
<div class="source"><h3>The code</h3>{"".join(map(figure, stop.code))}</div>
<div class="example"><h3>The example</h3>{shown}</div>
<div class="checks small">{checks(stop)}</div></div><p class="next small">{before}{behind}</p></section>"""


def page(e):
    """The whole page, for an Example."""
    text, stops = read_words()
    n_lines = sum(own.last - own.first + 1 for stop in stops for own in stop.code)
    n = sum(p.numel() for p in e.models["untrained"]["lmp"].parameters() if not p.requires_grad)
    said = "<br>".join(f"User {user} says <b>{', '.join(e.pair.label_set(k))}</b>."
                       for k, user in enumerate(e.users))
    bar = "".join(link(stop, k) for k, stop in enumerate(stops, start=1))
    contents = "".join(f"<li>{link(stop, stop.title)}</li>" for stop in stops)
    body = "".join(section(stop, k, show(e)) for k, stop, show in zip(range(1, 99), stops, SHOWN))
    text["title"] = text["title"].format(stops=len(stops))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text["title"]}</title><style>{style()}</style></head><body>
<a class="skip" href="#{stops[0].anchor}">To the first stop</a>
<nav class="bar" aria-label="stops"><a href="#top" title="top">↑</a>{bar}</nav>
<header id="top"><h1>{text["title"]}</h1><div class="sides"><div class="what">
<p>{text["intro"]}</p><p>{text["parts"].format(lines=n_lines)}</p></div>
<div class="example"><h3>The example</h3><p class="what">“{html.escape(e.text)}”</p><p>{said}</p>
<p class="small">{text["example"].format(parameters=f"{n:,}")}</p></div></div>
<nav aria-label="contents"><ol class="contents">{contents}</ol></nav></header>
<main>{body}</main><footer class="small"><p>{text["notation"]}</p></footer>
<script>{SCRIPT}</script></body></html>
"""


def stop_list():
    """The lines of the list in README.md: each stop with file and line of its code."""
    for number, stop in enumerate(read_words()[1], start=1):
        places = ", ".join(f"`{own.script}:{own.first}` {own.name}" for own in stop.code)
        yield f"{number}. {stop.title}: {places}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/tour.html"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        text = page(Example(args.runs))
        lora.write_atomically(args.out, lambda path: path.write_text(text, encoding="utf-8"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(SHOWN)} stops; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
