"""The words, and who answers them: label lists, templates, one prompt, one response, its parsing, a server.

Source: "Personalized Large Language Models" (arXiv 2402.09269), section VI-C and appendix A.
User text is inserted as it is, never through `str.format`: it may hold braces, `###`, newlines, any Unicode.

    python prompts.py goemotions clsp                         prints one prompt
    python prompts.py mine lmp --labels funny rude            the neutral template, for any label set

Does not tokenize (data.py), and asks no local model (infer.py).
"""

import argparse
import email.utils
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import unicodedata
import urllib.parse
import zlib
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import requests
from tqdm import tqdm

# ---- Methods and tasks: all that differs between settings is a row of these two tables ----


class Method(NamedTuple):
    """One setting of the paper: how it predicts and what its prompt shows of the user."""

    family: str  # "query" (no training), "cls" (classification head) or "lm" (language modelling)
    user_id: bool  # a `### User ID:` section
    shots: int  # K, examples of the user's own annotations
    context: tuple[str, ...] = ()  # C_u: further things that are known of the user, such as an age


METHODS = {
    "q0s": Method("query", False, 0),  # [method.Q]
    "q1s": Method("query", False, 1),  # [method.Q-NS], without a User ID section: [choice.P2]
    "q2s": Method("query", False, 2),
    "cls": Method("cls", False, 0),  # [method.CLS]
    "clsp": Method("cls", True, 0),  # [method.CLS-P]
    "lm": Method("lm", False, 0),  # [method.LM]
    "lmp": Method("lm", True, 0),  # [method.LM-P]
}


class Task(NamedTuple):
    """What a corpus asks for, in the words of the appendix."""

    label_names: tuple[str, ...]  # sorted
    item: str  # what one label is called
    hint: str  # the sentences that follow the request
    few_shot_item: str  # what Q-1S and Q-2S ask a list of
    none: bool = False  # an annotation may have no label


TASKS = {
    "goemotions": Task(
        tuple("admiration amusement anger annoyance approval caring confusion curiosity desire "
              "disappointment disapproval disgust embarrassment excitement fear gratitude grief joy love "
              "nervousness neutral optimism pride realization relief remorse sadness surprise".split()),
        "emotion",
        "Emotions can be subtle or overt, so analyze the text carefully to make an accurate classification.",
        "emotion"),
    "unhealthy": Task(
        tuple("antagonize condescending dismissive generalisation generalisation_unfair healthy hostile "
              "sarcastic".split()),  # the released names, not those of section VI-A: [choice.D6]
        "label",
        "Labels represent different types of communication styles or tones, where each category denotes "
        "a specific attitude or approach that someone might exhibit when communicating with others. "
        "Analyze text carefully to make an accurate categorization.",
        "emotion"),  # the appendix's slip, kept word for word: [choice.P3]
}
NONE = "none"  # the word for an annotation without any label


def neutral_task(label_names, none=False):
    """The task of any other label set: the paper's request, without words that belong to one corpus."""
    return Task(tuple(sorted(label_names)), "label",
                "Analyze the text carefully to make an accurate classification.", "label", none)


# ---- One prompt and one response (appendix A) ----

REQUESTS = (  # by the number of examples
    "Categorize the following text",
    "Knowing that for the given example was provided the response given below categorize the following text",
    "Knowing that for the given examples were provided the responses given below categorize the following "
    "text",
)


def build_prompt(task, method, text, user_id=None, examples=(), context=()):
    """Returns (before, text, after): together they are the prompt, and only `text` may be shortened.

    Shapes: examples, K pairs (text, label names) of the user; context, the values of method.context.
    """
    of_user = [str(user_id)] * method.user_id  # the ID on its own line: [choice.P5]
    of_user += [f"{name}: {value}" for name, value in zip(method.context, context, strict=True)]
    request = REQUESTS[min(method.shots, 2)] + (" for the specified user" if of_user else "")
    request += f" by selecting the most appropriate {task.item} from the provided list. {task.hint}"
    if method.family != "cls":
        item = task.few_shot_item if method.shots else task.item
        request += f" Please compose your response as a list of chosen {item}s, separated by commas"
        request += f", or {NONE} if no {item} applies." if task.none else "."
    before = request + "\n\n"  # no stray space behind the instruction: [choice.P6]
    for k, (example_text, example_labels) in enumerate(examples, start=1):
        number = f" {k}" if method.shots > 1 else ""
        before += f"### Example{number}:\n{example_text}\n\n"
        before += f"### Example{number} Response:\n{build_response(example_labels)}\n\n"
    if of_user:
        before += "\n".join(["### User ID:", *of_user]) + "\n\n"
    before += "### Text:\n"
    labels = "\n".join(f"- {name}" for name in task.label_names)  # "- " before the first one too: [choice.P4]
    after = f"\n\n### {task.item.capitalize()}s:\n{labels}\n\n### Response:"
    return before, text, after


def build_response(label_names):
    """The text of one annotation: its labels in sorted order, separated by commas. Source: section IV-C."""
    return ", ".join(sorted(label_names)) or NONE


# ---- Parsing a response ----

SEPARATORS = re.compile(r"[,;|\n\r\u2022\u2028\u2029]")
NUMBERING = re.compile(r"(?<!\S)\(?\d{1,3}[.)](?=\s)")  # this and the next, only inside what is no label
WEAK_SEPARATORS = re.compile(r"(?<!\S)(?:and|or)(?!\S)|[&/+]|[.!?](?=\s)", re.IGNORECASE)
LEAD_IN = re.compile(
    r"^\W*(?:the )?(?:chosen |(?:most )?(?:fitting|appropriate|suitable) )?"
    r"(?:emotion|label|response|answer)s?(?: (?:is|are))?\s*:", re.IGNORECASE)
PROMPT_LINE = re.compile(  # `###` within a line, too: T5 writes no line ends
    r"^[ \t]*(?:##|categorize the following|knowing that for the given)|(?<=\s)###", re.I | re.M)
RESPONSE_HEADING = re.compile(r"### ?(?:response|answer):?", re.IGNORECASE)


def label_key(piece):
    """A label's name or a piece of a response as they are compared: folded, from a letter to a letter."""
    folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", piece).casefold())
    plain = re.sub(r"[\s_\-\u2010-\u2015\ufe00-\ufe0f]+", " ", folded)  # the last: selectors behind an emoji
    return plain.strip("".join(character for character in {*plain} if not character.isalnum()
                               and unicodedata.category(character) not in ("Mn", "Mc")))


def parse_response(response, label_names, released=False):
    """Returns (label names in sorted order, the pieces that were not understood).

    A piece counts only if all of it is a label's name [choice.E2], or "none". released: split at commas only.
    """
    if released:
        pieces = [piece for piece in map(str.strip, response.split(",")) if piece]
        return sorted({*pieces} & {*label_names}), [piece for piece in pieces if piece not in label_names]
    names, found = {NONE: NONE} | {label_key(name): name for name in label_names}, set()

    def name_of(piece):
        return names.get(label_key(piece)) or names.get(label_key(LEAD_IN.sub("", piece)))

    if PROMPT_LINE.match(response.lstrip()):  # a model may repeat the prompt first, or go on with another one
        response = (RESPONSE_HEADING.split(response, maxsplit=1) + [""])[1]
    not_understood = []
    for piece in SEPARATORS.split(PROMPT_LINE.split(response, maxsplit=1)[0]):
        for part in [piece] if name_of(piece) else NUMBERING.split(piece):
            rest = LEAD_IN.sub("", part).strip()
            words = [part] if name_of(part) else WEAK_SEPARATORS.split(rest)
            named = [name_of(word) for word in words if label_key(word)]
            if named and None not in named:  # a label between "and" and a full stop of a sentence is none
                found.update(named)
            elif label_key(rest):
                not_understood.append(rest)
    return sorted(found & {*label_names}), not_understood


# ---- Asking a server: any OpenAI-compatible POST {api_base}/chat/completions ----

OPENAI_BASE = "https://api.openai.com/v1"
# US dollars per million tokens (prompt, completion with its thoughts) for prompts up to 272,000 tokens;
# source: developers.openai.com/api/docs/models, 2026-11. The last two are shut down on 2027-01-14.
PRICES = {"gpt-6-luna": (0.1, 0.5), "gpt-5.6-luna": (0.2, 1.2), "gpt-6-sol": (2, 10),
          "gpt-5.6-terra": (2, 12), "gpt-4o-mini": (0.15, 0.6), "gpt-4o": (2.5, 10)}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # source: the same
OURS = ("model", "messages", "temperature", "max_tokens", "max_completion_tokens", "reasoning_effort", "n",
        "stream")  # parameters that have a flag of their own, or none
RENAMED = {"max_tokens": "max_completion_tokens"}  # a parameter that is refused by its name -> another name
BYTES_PER_TOKEN = 4  # of an estimate: 4.2 to 5.0 by GPT-4's tokenizer (cl100k) on the paper's prompts
CHAT_TOKENS = 8  # what the chat format adds to one message: 7 at OpenAI
BACKOFF_S, BACKOFF_CAP_S, RETRY_AFTER_CAP_S = 1.0, 60.0, 120.0
STOP_AFTER_FAILURES = 20  # prompts in a row that failed in spite of their retries, or that met one 403
STOP_AFTER_USELESS = 5  # first prompts that are all refused, or whose answers are all empty or cut
STREAM = re.compile(r"\s*(?:data|event|id|retry)?:")
TOO_LONG = re.compile(r"context.?length|too (?:large|long|many)", re.I)  # so it is not about a parameter
ANSWER_BYTES = 2**20  # a longer answer is none
REFUSED = (400, 403, 413, 422)  # one prompt: for what it says, or for its length
FINAL = re.compile(  # the begin of the last channel of gpt-oss (harmony), with and without special tokens
    r"<\|channel\|>\s*final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>|\Aanalysis.*assistantfinal", re.S)
CHANNEL = re.compile(r"<\|(?:channel|message|start|end|return|call)\|>")
BEGIN, END = (rf"<{slash}(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning)>|\[{slash}THINK\]|◁{slash}think▷"
              for slash in ("", "/"))
THOUGHT, THOUGHT_END = re.compile(f"(?:{BEGIN}).*?(?:{END}|\\Z)", re.I | re.S), re.compile(END, re.I)


def is_api_model(model, api_base=None):
    """True if `model` is asked over HTTP: a GPT name, or any name when --api_base is given."""
    return api_base is not None or model.startswith("gpt-") and not Path(model).is_dir()


def at(value, *path):
    """What a JSON value has at a path of names and indices, or None."""
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value


def one_line(text):
    """Text as at most 300 printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:300]


def answer_of(content):
    """What of a message's content, text or a list of parts, answers: no thoughts, and the final channel."""
    parts = [part if isinstance(part, str) else at(part, "text")
             for part in (content if isinstance(content, list) else [content])
             if str(at(part, "type") or "text").endswith("text")]
    text = FINAL.split("".join(part for part in parts if isinstance(part, str)))[-1]
    text = THOUGHT.sub("", CHANNEL.split(text)[0])
    return THOUGHT_END.split(text)[-1]  # thoughts that nothing began were begun by the chat template


def read_answer(answer, http_status=200):
    """Returns the record of a JSON object that may hold anything; it has a response if answered."""
    choice, usage = at(answer, "choices", 0), at(answer, "usage")
    finish, refusal = at(choice, "finish_reason"), at(choice, "message", "refusal")
    error = at(choice, "error") or at(answer, "error") or finish == "error" and "an error in the answer"
    if http_status != 200:
        error = error or at(answer, "detail") or answer  # as FastAPI and vLLM say it
    if "content_filter" in (finish, at(error, "code")):
        refusal = refusal or "content_filter"
    response = answer_of(at(choice, "message", "content"))
    status = ("refused" if refusal or http_status in REFUSED else "failed" if error
              else "answered" if response.strip() else "empty")
    n_in, n_out, total = (at(usage, f"{name}_tokens") for name in ("prompt", "completion", "total"))
    known = all(type(n) is int and 0 <= n < 10**9 for n in (n_in, n_out))
    if known and type(total) is int and total < 10**9:  # some servers count thoughts only there
        n_out = max(n_out, total - n_in)
    answered, words = status == "answered", at(error, "message") or error or refusal or ""
    return {"status": status, "response": response if answered else None, "error": one_line(words),
            "truncated": finish == "length", "useful": answered and finish != "length",
            "model": one_line(at(answer, "model") or ""), "tokens": (n_in, n_out) if known else None}


def join_stream(text):
    """The chat completion that an event stream brings in pieces."""
    answer, choice, message = {}, {}, {}
    for chunk in map(json.loads, re.findall(r"^data:[ \t]*(\{.*)", text, re.MULTILINE)):
        answer |= {name: value for name, value in chunk.items() if value}
        choice |= {name: value for name, value in (at(chunk, "choices", 0) or {}).items() if value}
        for name, piece in choice.pop("delta", {}).items():
            message |= {name: message.get(name, "") + piece} if isinstance(piece, str) else {}
    if not choice.get("finish_reason"):
        answer = {"error": "an event stream that ends before the answer"} | answer
    return answer | {"choices": [choice | {"message": message}]}


def retry_after_s(value):
    """Seconds of a Retry-After header, a number or an HTTP date: 0 if it is neither, and with a cap."""
    try:
        seconds = (float(value) if value[:1].isdigit()
                   else email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_CAP_S)


def estimate(line, bytes_per_token=1):
    """Tokens (in, out) of a line's request: an upper bound, since a byte-level token is at least a byte."""
    size = len(line["request"]["messages"][0]["content"].encode("utf-8", "surrogatepass"))
    return -(-size // bytes_per_token) + CHAT_TOKENS, line["request"]["max_tokens"]


class Client:
    """One model of a server, the file of its answers and what they cost. args: the flags of a query."""

    def __init__(self, args, cache):
        self.args, self.cache, key = args, Path(cache), os.environ.get("OPENAI_API_KEY", "").strip()
        self.api_base = (args.api_base or OPENAI_BASE).rstrip("/")
        parts = urllib.parse.urlsplit(self.api_base)
        if parts.scheme not in ("http", "https") or not parts.hostname or set("@?#") & set(self.api_base):
            raise ValueError("--api_base: give http(s)://HOST/PATH, no user, password, query or fragment")
        self.host, is_openai = parts.netloc, f".{parts.hostname}".endswith(".openai.com")
        own = [price for price in (args.price_in, args.price_out) if price is not None]
        self.prices = own or (is_openai and PRICES.get(args.model)) or []
        if len(self.prices) == 1 or not self.prices and args.max_cost is not None:
            raise ValueError(f"the price of {args.model} is not known: give --price_in and --price_out")
        if re.search(r'[^!-~]|["\\]', key):
            raise ValueError("OPENAI_API_KEY holds a space, a line break or a character that no key has")
        if is_openai and not key and not args.dry_run and not self.cache.exists():
            raise ValueError(f"OPENAI_API_KEY is not set, or empty: {self.api_base} wants a key in it")
        self.others = [Path(directory, "answers.jsonl") for directory in args.cache_from or ()]
        if lost := [str(path) for path in self.others if not path.is_file()]:
            raise FileNotFoundError(f"--cache_from: no {', '.join(lost)}; give the --out of another query")
        self.usage, self.records = {"requests": 0, "retries": 0, "failed": 0}, {}
        self.dialect = {}  # parameter -> its name here, None if it is left out
        self.reached = self.settled = self.proof = None  # by a reply, an answer; a line of use
        self.spent, self.under_way, self.useless, self.in_a_row, self.common = 0.0, 0, 0, 0, None
        self.stop, self.changed = threading.Event(), threading.Condition()
        self.headers, self.timeouts = {"Authorization": f"Bearer {key}"} if key else {}, (10, args.timeout_s)
        self.adapter = requests.adapters.HTTPAdapter(pool_maxsize=args.concurrency)
        self.settings = requests.Session().merge_environment_settings(self.api_base, {}, True, None, None)
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it prints the headers that it cannot read
        secret = "".join(rf"(?:{re.escape(c)}|\\+u00{ord(c):02x})" for c in key)  # or in JSON in JSON
        self.secret = re.compile(secret if len(key) >= 8 else "(?!)", re.I)  # a short "EMPTY" is no secret

    def post(self, body):
        """Returns (HTTP status or 0, answer, record, seconds to wait). Raises: ValueError: no retry helps."""
        status, headers, content, ends = 0, {}, b"", time.monotonic() + sum(self.timeouts)
        try:  # no session: it would read the environment for each request, and take a key from ~/.netrc
            sent = requests.Request("POST", f"{self.api_base}/chat/completions", self.headers, json=body)
            with self.adapter.send(sent.prepare(), timeout=self.timeouts, **self.settings) as reply:
                status, headers = reply.status_code, reply.headers
                for part in reply.iter_content(256):  # small: a slow server fills each part before we see it
                    content += part
                    if len(content) > ANSWER_BYTES or time.monotonic() > ends:
                        raise requests.Timeout(f"after {ANSWER_BYTES} bytes or {sum(self.timeouts)} s no end")
            text = content.decode(errors="replace")
        except requests.RequestException as broken:
            text = f"{type(broken).__name__}: {broken}"
        try:  # through JSON and back, so that no escape hides a key
            answer = join_stream(text) if STREAM.match(text) else json.loads(text)
            answer = {} | json.loads(self.secret.sub("[key]", json.dumps(answer, allow_nan=False)))
        except (ValueError, TypeError, AttributeError, RecursionError):  # no JSON object
            answer = {"error": self.secret.sub("[key]", text) or "nothing"}
        record = read_answer(answer, status)
        page = not self.reached and status < 500 and re.match(r"\s*<(?:!doctype|html)", text, re.I)
        self.reached = self.reached or status > 0
        if status == 200 and record["status"] != "failed" or status in REFUSED and not page:
            return status, answer, record, 0.0
        words = one_line(self.secret.sub("[key]", headers.get("Location") or record["error"]))
        words = f"{self.host}: HTTP {status or '(no answer)'}: {words}"
        spent = status == 429 and "insufficient_quota" in text  # OpenAI: an account without money, not haste
        if page or spent or status < 500 and status not in (0, 200, 408, 409, 429):
            raise ValueError(words + bool(page) * "; a web page: does --api_base lack a /v1 at its end?")
        answer = {"error": words}
        return status, answer, read_answer(answer, status), retry_after_s(headers.get("Retry-After", ""))

    def read_cache(self, path, todo):
        """Takes the answers to todo {key: line} from a file; what they cost counts if it is this run's."""
        raw, damaged, lost, bases = b"\n", 0, set(), set()
        with path.open("rb") as lines:
            for raw in lines:
                try:
                    line = json.loads(raw)
                    if line.pop("crc32") != zlib.crc32(json.dumps(line).encode()):
                        raise ValueError("checksum")
                    if line["key"] in todo:
                        asked, status = todo[line["key"]], line["http_status"]
                        record, prompt_hash = read_answer(line["answer"], status), asked["prompt_hash"]
                        self.spent += self.cost(status, record, asked) * (path == self.cache)
                        if status == 403 and at(self.records, prompt_hash, "status") == "answered":
                            lost.add(record["error"])  # it was the key: see judge
                        elif line["status"] != "failed":
                            self.records[prompt_hash] = record
                            bases.add(line["api_base"])
                            self.dialect = line["dialect"] if line["api_base"] == self.api_base else {}
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    damaged += 1  # or torn by a kill: it answers nothing
        if path == self.cache and not raw.endswith(b"\n"):
            self.file.write(b"\n")
        if damaged:
            print(f"{path}: {damaged} damaged lines ignored, what they answered is asked again")
        if bases - {self.api_base}:
            print(f"{path}: the same model's answers at {', '.join(sorted(bases))} are used")
        alone = {record["status"] for record in self.records.values()} == {"refused"}
        self.records = {prompt_hash: record for prompt_hash, record in self.records.items()
                        if record["status"] != "refused" or not alone and record["error"] not in lost}

    def usd(self, tokens):
        return sum(price * n / 1e6 for price, n in zip(self.prices, tokens))

    def cost(self, status, record, line):
        """US dollars of an attempt: the most that it can have been, where the server does not say."""
        return self.usd(record["tokens"] or (estimate(line) if status in (0, 200) else ()))

    def adapt(self, status, answer, words, sent):
        """Whether the server refuses a parameter by name: it is renamed or left out from now on, and said."""
        names = [word for word in re.findall(r"\w+", f"{at(answer, 'error', 'param')} {words}")
                 if word in sent and word not in ("model", "messages")]
        if self.settled or status not in (400, 422) or not names or TOO_LONG.search(words):
            return False
        name = next((ours for ours, other in self.dialect.items() if other == names[0]), names[0])
        if self.dialect.get(name, name) == names[0]:  # else another request under way has found it
            if name != names[0] and self.args.max_cost is not None:
                raise ValueError(f"{self.host}: {words}; so --max_cost cannot hold: leave it out")
            self.dialect[name] = other = RENAMED.get(names[0])
            print(f"{self.host}: {words}; so {names[0]} is {f'sent as {other}' if other else 'left out'}")
        return True

    def work(self, line):
        """Asks until a prompt is answered, refused or given up; returns (line, HTTP status, record)."""
        number, wait_s, worst, limit = 1, 0.0, self.usd(estimate(line)), self.args.max_cost
        retries = self.args.max_retries
        while not self.stop.wait(wait_s):
            with self.changed:
                while limit is not None and self.spent + worst > limit:
                    if not self.under_way or self.stop.is_set():
                        raise ValueError(f"--max_cost {limit}: {self.spent:.4f} USD spent; up to {worst:.4f}")
                    self.changed.wait(0.1)  # what is under way may cost less
                self.spent, self.under_way = self.spent + worst, self.under_way + 1
            sent = {self.dialect.get(name, name): value for name, value in line["request"].items()}
            sent.pop(None, None)  # what is left out
            status, answer, record, wait_s = self.post(sent)
            with self.changed:
                self.changed.notify_all()
                self.under_way -= 1
                self.spent += self.cost(status, record, line) - worst
                adapted = self.adapt(status, answer, record["error"], sent)
                record["status"] = "failed" if adapted else record["status"]
                written = line | {"request": sent, "dialect": self.dialect, "attempt": number,
                                  "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                                  "status": record["status"], "http_status": status, "answer": answer}
                written["crc32"] = zlib.crc32(json.dumps(written).encode())
                raw = json.dumps(written).encode() + b"\n"
                if self.file.write(raw) < len(raw):
                    raise OSError("no space left for a whole line")
                self.records[line["prompt_hash"]] = record
                self.usage["requests"] += 1
                self.usage["retries"] += number > 1
                self.settled = self.settled or status == 200 and record["status"] != "failed"
            if not adapted:
                if record["status"] != "failed" or number > (retries if self.reached else min(2, retries)):
                    return line, status, record
                jitter_s = random.uniform(0.0, min(BACKOFF_CAP_S, BACKOFF_S * 2 ** (number - 1)))
                number, wait_s = number + 1, max(wait_s, jitter_s)

    def judge(self, line, status, record):
        """Raises: ValueError if after this prompt there is no point in asking for another one."""
        failed, words = record["status"] == "failed", record["error"]
        common = failed or status == 403 and words  # to it and the ones before
        self.in_a_row = self.in_a_row * (common == self.common) + bool(common)
        self.common, self.usage["failed"] = common, self.usage["failed"] + failed
        self.proof = line if record["useful"] else self.proof
        self.useless += not (failed or self.proof)
        if failed and (not self.reached or self.in_a_row == STOP_AFTER_FAILURES):
            problem = f"{self.in_a_row} requests in a row failed" if self.reached else "cannot reach"
            raise ValueError(f"{problem}: {words}")
        if self.in_a_row == STOP_AFTER_FAILURES and self.proof and self.work(self.proof)[1] == 403:
            raise ValueError(f"{self.host} refuses what it answered before: HTTP 403: {words}")
        if not self.proof and self.useless >= min(STOP_AFTER_USELESS, self.usage["prompts"]):
            raise ValueError(f"{self.host}: of the first {self.useless} prompts " + (
                f"all are refused: {words}" if record["status"] == "refused" else
                "every answer is empty or cut: give --reasoning_effort none or a larger --max_tokens"))

    def send(self, known, left):
        """Asks for the lines left: one at a time until an answer is of use, then `concurrency`."""
        usage, bar = self.usage, tqdm(total=len(known + left), initial=len(known), desc=self.host)
        with futures.ThreadPoolExecutor(self.args.concurrency) as pool, bar:
            try:
                for line in sorted(known, key=lambda line: not self.records[line["prompt_hash"]]["useful"]):
                    self.judge(line, 200, self.records[line["prompt_hash"]])
                while left:
                    n = len(left) if self.proof or usage["failed"] else 1
                    for one in futures.as_completed([pool.submit(self.work, line) for line in left[:n]]):
                        self.judge(*one.result())
                        usd = self.spent if self.prices else "?"
                        bar.set_postfix(cached=len(known), failed=usage["failed"], USD=usd, refresh=False)
                        bar.update()
                    left = left[n:]
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is under way is awaited; a second ends
                raise
            finally:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        os.fsync(self.file.fileno())

    def ask(self, prompts, max_tokens):
        """Returns (records {prompt hash: record}, usage), after asking what the caches do not answer yet.

        Shapes: prompts {prompt hash: distinct prompt}. Raises: ValueError, OSError; what came is kept.
        """
        args, todo = self.args, {}
        more = {"reasoning_effort": args.reasoning_effort} if args.reasoning_effort else {}
        for prompt_hash, prompt in prompts.items():
            body = {"model": args.model, "messages": [{"role": "user", "content": prompt}],
                    "temperature": 0, "max_tokens": max_tokens} | more | dict(args.extra or ())  # [choice.E5]
            key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            todo[key] = {"prompt_hash": prompt_hash, "key": key, "api_base": self.api_base, "request": body}
        with open(os.devnull if args.dry_run else self.cache, "ab", buffering=0) as self.file:
            if not args.dry_run:
                fcntl.flock(self.file, fcntl.LOCK_EX)  # a second process waits here for the end of the first
            for path in filter(Path.exists, [*self.others, self.cache]):
                self.read_cache(path, todo)
            known = [line for line in todo.values() if line["prompt_hash"] in self.records]
            left = [line for line in todo.values() if line["prompt_hash"] not in self.records]
            self.usage |= {"prompts": len(prompts), "cached": len(self.records)}
            try:
                self.print_estimate(left) if args.dry_run else self.send(known, left)
            except (ValueError, OSError, KeyboardInterrupt) as stop:
                n_kept = sum(record["status"] != "failed" for record in self.records.values())
                raise type(stop)(f"{str(stop) or 'interrupted'}; {n_kept} of {len(prompts)} answers are kept "
                                 f"in {self.cache}, the same command goes on from there") from None
        records = self.records.values()
        n_in, n_out = (sum(one["tokens"][k] for one in records if one["tokens"]) for k in (0, 1))
        known = self.prices and all(one["tokens"] or one["status"] == "refused" for one in records)
        states = {state: sum(one["status"] == state for one in records)
                  for state in ("answered", "refused", "empty", "failed")}
        return self.records, self.usage | states | {
            "truncated": sum(one["truncated"] for one in records), "prompt_tokens": n_in,
            "completion_tokens": n_out, "cost_usd": self.usd((n_in, n_out)) if known else None,
            "models": sorted({one["model"] for one in records} - {""})}

    def print_estimate(self, left):
        """Says what the lines would cost."""
        tokens = [sum(estimate(line, BYTES_PER_TOKEN)[k] for line in left) for k in (0, 1)]
        cost = f"{self.usd(tokens):.2f} USD" if self.prices else "cost unknown without --price_in"
        thoughts = "\nthoughts come on top and cost as much as an answer's tokens: --reasoning_effort none"
        print(f"dry run: {self.usage['prompts']} distinct requests to {self.args.model}, {len(self.records)} "
              f"cached, {len(left)} to send; estimated: {tokens[0]} prompt tokens ({BYTES_PER_TOKEN} bytes "
              f"each), at most {tokens[1]} completion tokens, {cost}"
              + thoughts * (self.args.reasoning_effort != "none"))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print one prompt.", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)  # so that a mistake is answered by one line
    parser.add_argument("task", help="goemotions, unhealthy, or any name together with --labels")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--labels", nargs="+", help="label names of the neutral template")
    parser.add_argument("--text", default="That game hurt.", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.labels and args.task not in TASKS:
        parser.error(f"no task {args.task!r}: use one of {sorted(TASKS)}, or give --labels")
    task, method = neutral_task(args.labels) if args.labels else TASKS[args.task], METHODS[args.method]
    examples = [(f"(text {k} of this user)", task.label_names[:k]) for k in range(1, method.shots + 1)]
    print("".join(build_prompt(task, method, args.text, "37", examples)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
