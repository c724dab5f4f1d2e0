"""The words, and who answers them: label lists, templates, one prompt, one response, its parsing, a server.

Source: "Personalized Large Language Models" (arXiv 2402.09269), section VI-C and appendix A.
A prompt is an instruction followed by sections, each a `### Heading:` line, its content and an empty line.
User text is inserted as it is, never through `str.format`: it may hold braces, `###`, newlines, any Unicode.

    python prompts.py goemotions clsp                         prints one prompt
    python prompts.py mine lmp --labels funny rude            the neutral template, for any label set

Client asks a model of a server; local models are asked by infer.py. Does not tokenize (data.py).
"""

import argparse
import email.utils
import fcntl
import hashlib
import json
import logging
import math
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
        item="emotion",
        hint="Emotions can be subtle or overt, so analyze the text carefully to make an accurate "
        "classification.",
        few_shot_item="emotion",
    ),
    "unhealthy": Task(
        tuple("antagonize condescending dismissive generalisation generalisation_unfair healthy hostile "
              "sarcastic".split()),  # the released names, not those of section VI-A: [choice.D6]
        item="label",
        hint="Labels represent different types of communication styles or tones, where each category denotes "
        "a specific attitude or approach that someone might exhibit when communicating with others. "
        "Analyze text carefully to make an accurate categorization.",
        few_shot_item="emotion",  # the appendix's slip, kept word for word: [choice.P3]
    ),
}


NONE = "none"  # the word for an annotation without any label


def neutral_task(label_names, none=False):
    """The task of any other label set: the paper's request, without words that belong to one corpus."""
    hint = "Analyze the text carefully to make an accurate classification."
    return Task(tuple(sorted(label_names)), item="label", hint=hint, few_shot_item="label", none=none)


# ---- One prompt and one response (appendix A) ----

REQUESTS = (  # by the number of examples
    "Categorize the following text",
    "Knowing that for the given example was provided the response given below categorize the following text",
    "Knowing that for the given examples were provided the responses given below categorize the following "
    "text",
)


def build_prompt(task, method, text, user_id=None, examples=(), context=()):
    """Returns (before, text, after): their concatenation is the prompt, and only `text` may be shortened.

    Source: appendix A.
    Shapes: examples, the method's K pairs (text, label names) of the user's own annotations; context, the
    user's values of method.context.
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


def is_word(character):
    """Whether it is of a letter or digit: vowel signs are, a variation selector behind an emoji is not."""
    is_sign = unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"
    return character.isalnum() or is_sign


def label_key(piece):
    """A label's name or a piece of a response, as they are compared.

    From the first letter or digit to the last one, case-folded, with `_`, `-` and spaces as one space.
    """
    folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", piece).casefold())
    plain = re.sub(r"[\s_\-\u2010-\u2015]+", " ", folded)
    return plain.strip("".join(character for character in {*plain} if not is_word(character)))


def parse_response(response, label_names, released=False):
    """Returns (label names in sorted order, the pieces that were not understood).

    A piece counts only if all of it is a label's name [choice.E2], or "none"; `released` matches as the
    released parser does, which splits at commas and removes no punctuation.
    """
    if released:
        pieces = [piece for piece in map(str.strip, response.split(",")) if piece]
        return sorted({*pieces} & {*label_names}), [piece for piece in pieces if piece not in label_names]
    names, found = {NONE: NONE} | {label_key(name): name for name in label_names}, set()

    def name_of(piece):
        return names.get(label_key(piece)) or names.get(label_key(LEAD_IN.sub("", piece)))

    pieces = [_answer(response)]
    for separators in (SEPARATORS, NUMBERING):
        parts = [part for piece in pieces for part in separators.split(piece) if label_key(part)]
        found.update(filter(None, map(name_of, parts)))
        pieces = [part for part in parts if not name_of(part)]
    not_understood = []
    for piece in (LEAD_IN.sub("", piece).strip() for piece in pieces):
        parts = [name_of(part) for part in WEAK_SEPARATORS.split(piece) if label_key(part)]
        if parts and None not in parts:  # a sentence that has a label between "and" and a full stop is none
            found.update(parts)
        elif label_key(piece):
            not_understood.append(piece)
    return sorted(found & {*label_names}), not_understood


def _answer(response):
    """The part of a response that answers: a model may repeat the prompt first, or go on with another one."""
    end = PROMPT_LINE.search(response)
    if end and not response[: end.start()].strip():
        repeated = RESPONSE_HEADING.search(response)
        response = response[repeated.end():] if repeated else ""
        end = PROMPT_LINE.search(response)
    return response[: end.start()] if end else response


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
STOP_AFTER_FAILURES = 20  # requests in a row that failed in spite of their retries
STOP_AFTER_USELESS = 5  # first prompts that are all refused, or whose answers are all empty or cut
ANSWER_BYTES = 2**20  # a longer answer is none
REFUSED = (400, 403, 413, 422)  # one prompt: for what it says, or for its length
TOKENS = ("prompt_tokens", "completion_tokens")
PAGE, STREAM = re.compile(r"\s*<(?:!doctype|html)", re.I), re.compile(r"\s*(?:data|event|id|retry)?:")
TOO_LONG = re.compile(r"context.?length|too (?:large|long|many)", re.I)  # so it is not about a parameter
MARKS = re.compile(  # of thoughts, and of the channels of gpt-oss (harmony)
    r"(<\|(?:channel|message|start|end|return|call|constrain)\|>"
    r"|</?(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning)>|\[/?THINK\]|◁/?think▷)", re.I)


class ServerError(ValueError):
    """What no retry mends: the run stops, and what was received is kept."""


def is_api_model(model, api_base=None):
    """True if `model` is asked over HTTP: a GPT name, or any name when --api_base is given."""
    return api_base is not None or model.startswith("gpt-") and not Path(model).is_dir()


def _dict(value):
    return value if isinstance(value, dict) else {}


def _count(where, name):
    value = _dict(where).get(name)
    return value if type(value) is int and 0 <= value < 10**9 else None


def one_line(text):
    """Text as at most 300 printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:300]


def answer_of(content):
    """What of a message's content, text or a list of parts, answers: no thoughts, and the final channel."""
    parts = [part.get("text") if isinstance(part, dict) else part
             for part in (content if isinstance(content, list) else [content])
             if str(_dict(part).get("type", "text")).endswith("text")]
    text = "".join(part for part in parts if isinstance(part, str))
    if text.startswith("analysis") and "assistantfinal" in text:  # channels without their special tokens
        return text.rpartition("assistantfinal")[2]
    answer, *marked = MARKS.split(text)
    channel, thinks = "", False
    for mark, behind in zip(marked[::2], marked[1::2], strict=True):
        if mark == "<|channel|>":
            channel = behind.strip()
        elif mark == "<|message|>":
            answer = behind if channel.startswith("final") else answer
        elif "/" in mark:  # thoughts that nothing began were begun by the chat template
            answer, thinks = (answer if thinks else "") + behind, False
        else:
            thinks = not mark.startswith("<|")
    return answer


def read_answer(answer, http_status=200):
    """Returns the record of a JSON object that may hold anything; it has a response if answered."""
    choices, usage, model = answer.get("choices"), answer.get("usage"), answer.get("model")
    choice = _dict(choices[0]) if isinstance(choices, list) and choices else {}
    message, finish = _dict(choice.get("message")), choice.get("finish_reason")
    error = choice.get("error") or answer.get("error") or finish == "error" and "an error in the answer"
    if http_status != 200:
        error = error or answer.get("detail") or answer  # as FastAPI and vLLM say it
    filtered = "content_filter" in (finish, _dict(error).get("code"))
    refusal = message.get("refusal") or ("content_filter" if filtered else None)
    words, response = _dict(error).get("message") or error or refusal, answer_of(message.get("content"))
    status = ("refused" if refusal or http_status in REFUSED else "failed" if error
              else "answered" if response.strip() else "empty")
    tokens = {name: _count(usage, name) for name in TOKENS}
    if None in tokens.values():
        tokens = dict.fromkeys(TOKENS)
    elif total := _count(usage, "total_tokens"):  # some servers count thoughts only there
        tokens["completion_tokens"] = max(tokens["completion_tokens"], total - tokens["prompt_tokens"])
    thoughts = message.get("reasoning_content") or message.get("reasoning") or (
        message.get("content") if response != message.get("content") else None)
    return {"status": status, "response": response if status == "answered" else None, "thoughts": thoughts,
            "truncated": finish == "length", "error": one_line(words) if words else None,
            "model": model if isinstance(model, str) else None, **tokens,
            "reasoning_tokens": _count(_dict(usage).get("completion_tokens_details"), "reasoning_tokens")}


def join_stream(text):
    """The chat completion that an event stream brings in pieces."""
    answer, message, finish = {}, {}, None
    for line in text.split("\n"):
        name, _, value = line.partition(":")
        if name.strip() != "data" or value.strip() in ("", "[DONE]"):
            continue
        chunk = json.loads(value)
        for choice in [chunk, *(chunk.get("choices") or ())[:1]]:
            answer |= {key: choice[key] for key in ("model", "usage", "error") if choice.get(key)}
            finish = choice.get("finish_reason") or finish
            for key, piece in (choice.get("delta") or {}).items():
                message |= {key: message.get(key, "") + piece} if isinstance(piece, str) else {}
    error = {} if finish or "error" in answer else {"error": "an event stream that ends before the answer"}
    return answer | error | {"choices": [{"message": message, "finish_reason": finish}]}


def retry_after_s(value):
    """Seconds of a Retry-After header, a number or an HTTP date: 0 if there is none, and with a cap."""
    try:
        seconds = (float(value) if value[:1].isdigit()
                   else email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_CAP_S)


def estimate(bodies, bytes_per_token):
    """Tokens of requests; 1 byte per token gives an upper bound: a byte-level token is at least a byte."""
    sizes = [len(body["messages"][0]["content"].encode("utf-8", "surrogatepass")) for body in bodies]
    return {"prompt_tokens": sum(math.ceil(size / bytes_per_token) + CHAT_TOKENS for size in sizes),
            "completion_tokens": sum(body["max_tokens"] for body in bodies)}


class Client:
    """One model of a server, the file of its answers and what they cost; only one header shows the key.

    args: the flags of a query (infer.py). Raises: ValueError, FileNotFoundError for what cannot be asked.
    """

    def __init__(self, args, cache):
        self.args, self.cache, self.key = args, Path(cache), os.environ.get("OPENAI_API_KEY", "").strip()
        self.api_base = (args.api_base or OPENAI_BASE).rstrip("/")
        parts = urllib.parse.urlsplit(self.api_base)
        if parts.scheme not in ("http", "https") or not parts.hostname or set("@?#") & set(self.api_base):
            raise ValueError("--api_base: give http(s)://HOST/PATH, no user, password, query or fragment")
        self.host, is_openai = parts.netloc, f".{parts.hostname}".endswith(".openai.com")
        own, listed = (args.price_in, args.price_out), PRICES.get(args.model) if is_openai else None
        self.prices = listed if own == (None, None) else own
        if self.prices and None in self.prices or not self.prices and args.max_cost is not None:
            raise ValueError(f"the price of {args.model} at {self.api_base} is not known: "
                             "give --price_in and --price_out")
        if not all("!" <= character <= "~" and character not in '"\\' for character in self.key):
            raise ValueError("OPENAI_API_KEY holds a space, a line break or a character that no key has")
        self.caches = [Path(one, "answers.jsonl") for one in args.cache_from or ()] + [self.cache]
        if lost := [str(path) for path in self.caches[:-1] if not path.is_file()]:
            raise FileNotFoundError(f"--cache_from: no {', '.join(lost)}; give the --out of another query")
        if is_openai and not self.key and not args.dry_run and not self.cache.exists():
            raise ValueError(f"OPENAI_API_KEY is not set, or empty: {self.api_base} wants a key in it")
        self.dialect, self.records, self.usage = {}, {}, {}  # parameter -> its name here, None if left out
        self.spent = self.reserved = 0.0
        self.reached = self.settled = self.useful = False  # by any reply, an answer, one of use
        self.failures = self.in_a_row = 0
        self.changed, self.stop = threading.Condition(), threading.Event()
        self.timeouts, self.session = (10, args.timeout_s), requests.Session()
        self.session.mount(self.api_base, requests.adapters.HTTPAdapter(pool_maxsize=args.concurrency))
        self.session.auth = lambda request: request  # without it, ~/.netrc would replace the key
        self.session.headers.update({"Authorization": f"Bearer {self.key}"} if self.key else {})
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it prints the headers that it cannot read
        self.secret = re.compile(  # as it is, or in the escapes of JSON in JSON
            "".join(rf"(?:{re.escape(c)}|\\+u00{ord(c):02x})" for c in self.key), re.IGNORECASE)

    def redact(self, text):
        """Text without the key, escaped or not; a local server's placeholder ("EMPTY") is no secret."""
        return self.secret.sub("[key]", text) if len(self.key) >= 8 else text

    def post(self, body):
        """Returns (HTTP status or 0, answer, Retry-After in seconds). Raises: ServerError: no retry helps."""
        content, ends = b"", time.monotonic() + sum(self.timeouts)
        try:
            with self.session.post(f"{self.api_base}/chat/completions", json=body, timeout=self.timeouts,
                                   allow_redirects=False, stream=True) as reply:
                for part in reply.iter_content(256):  # small: a slow server fills each part before we see it
                    content += part
                    if len(content) > ANSWER_BYTES or time.monotonic() > ends:
                        content = (f"an answer of more than {ANSWER_BYTES} bytes, or one that took more than "
                                   f"{sum(self.timeouts)} s").encode()
                        break
            status, headers, text = reply.status_code, reply.headers, content.decode(errors="replace")
        except requests.RequestException as broken:
            status, headers, text = 0, {}, f"{type(broken).__name__}: {broken}"
        try:  # through JSON and back, so that no escape hides a key
            answer = join_stream(text) if STREAM.match(text) else json.loads(text)
            answer = json.loads(self.redact(json.dumps(answer, allow_nan=False)))
            record = read_answer(answer, status)
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):  # no JSON object
            record = read_answer(answer := {"error": self.redact(text) or "nothing"}, status)
        words = self.redact(one_line(headers.get("Location") or record["error"]))
        error = f"{self.host}: HTTP {status or '(no answer)'}: {words}"
        page = bool(PAGE.match(text)) and status < 500 and not self.reached
        spent = status == 429 and "insufficient_quota" in text  # OpenAI: an account without money, not haste
        self.reached = self.reached or status > 0
        if status == 200 and record["status"] != "failed" or status in REFUSED and not page:
            return status, answer, 0.0
        if page or spent or status < 500 and status not in (0, 200, 408, 409, 429):
            raise ServerError(error + page * "; a web page: does --api_base lack a /v1 at its end?")
        return status, {"error": error}, retry_after_s(headers.get("Retry-After"))

    def read_cache(self, path, todo):
        """Takes the answers to todo {key: line} from a cache; returns whether its last line is whole.

        What they cost counts if the file is this run's. Refusals alone are no answers.
        """
        raw, damaged, refused, bases = b"\n", 0, set(), set()
        with open(path, "rb") as lines:
            for raw in lines:
                try:
                    line = json.loads(raw)
                    if line.pop("crc32") != zlib.crc32(json.dumps(line).encode()):
                        raise ValueError("checksum")
                    if line["key"] in todo:
                        asked, status = todo[line["key"]], line["http_status"]
                        record, prompt_hash = read_answer(line["answer"], status), asked["prompt_hash"]
                        self.spent += self.cost(status, record, asked["request"]) * (path == self.cache)
                        if line["status"] != "failed":
                            self.records[prompt_hash] = record
                            bases.add(line["api_base"])
                            self.dialect = line["dialect"] if line["api_base"] == self.api_base else {}
                            refused |= {prompt_hash} if status != 200 else set()
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    damaged += 1  # or torn by a kill: it answers nothing
        if damaged:
            print(f"{path}: {damaged} damaged lines ignored, what they answered is asked again")
        if bases - {self.api_base}:
            print(f"{path}: the same model's answers at {', '.join(sorted(bases))} are used")
        if refused == self.records.keys():
            self.records.clear()
        return raw.endswith(b"\n")

    def usd(self, tokens):
        prices = self.prices or (0.0, 0.0)
        return sum(price * (tokens[name] or 0) / 1e6 for price, name in zip(prices, TOKENS, strict=True))

    def cost(self, status, record, body):
        """US dollars of an attempt: the most that it can have been, where the server does not say."""
        perhaps_charged = record["prompt_tokens"] is None and status in (0, 200)
        return self.usd(estimate([body], bytes_per_token=1) if perhaps_charged else record)

    def reserve(self, body):
        """Sets aside what an attempt may cost at most, and returns it; waits for those that may cost less."""
        worst, limit = self.usd(estimate([body], bytes_per_token=1)), self.args.max_cost
        with self.changed:
            while limit is not None and self.spent + self.reserved + worst > limit:
                if not self.reserved or self.stop.is_set():
                    raise ServerError(f"--max_cost {limit}: {self.spent:.4f} USD spent; up to {worst:.4f}")
                self.changed.wait(0.1)
            self.reserved += worst
        return worst

    def adapt(self, status, record, answer, sent):
        """Whether the server refuses a parameter by name: it is renamed or left out from now on, and said."""
        words, names = record["error"] or "", sent.keys() - {"model", "messages"}
        if self.settled or status not in (400, 422) or not names or TOO_LONG.search(words):
            return False
        named = re.search(rf"\b({'|'.join(map(re.escape, names))})\b", words)
        param = _dict(answer.get("error")).get("param")
        name = next((one for one in names if one == param), named and named[1])
        if name and name not in self.dialect:  # else another request under way has found it
            if name in RENAMED.values() and self.args.max_cost is not None:
                raise ServerError(f"{self.host}: {words}; so --max_cost cannot hold: leave it out")
            self.dialect[name] = other = RENAMED.get(name)
            print(f"{self.host}: {words}; so {name} is {f'sent as {other}' if other else 'left out'}")
        return name is not None

    def stop_if_useless(self):
        """Raises: ServerError if the first prompts are all refused, or their answers all empty or cut."""
        known = [] if self.useful else [one for one in self.records.values() if one["status"] != "failed"]
        self.useful |= any(one["status"] == "answered" and not one["truncated"] for one in known)
        if known and not self.useful and len(known) >= min(STOP_AFTER_USELESS, self.usage["prompts"]):
            refused = known[-1]["status"] == "refused"
            raise ServerError(f"{self.host}: of the first {len(known)} prompts " + (
                f"all are refused: {known[-1]['error']}" if refused else "every answer is empty or cut: give "
                "--reasoning_effort none or a larger --max_tokens, and another --out"))

    def work(self, line):
        """Asks for a prompt until it is answered, refused or given up; each attempt is a line of the file."""
        number, wait_s, retries = 1, 0.0, self.args.max_retries
        while not self.stop.wait(wait_s):
            worst, sent, dialect = self.reserve(line["request"]), dict(line["request"]), dict(self.dialect)
            for name, other in dialect.items():
                value = sent.pop(name)
                sent |= {other: value} if other else {}
            status, answer, wait_s = self.post(sent)
            record, now = read_answer(answer, status), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            with self.changed:
                self.changed.notify_all()
                self.reserved -= worst
                self.spent += self.cost(status, record, line["request"])
                adapted = self.adapt(status, record, answer, sent)
                failed = adapted or record["status"] == "failed"
                record["status"] = "failed" if failed else record["status"]
                written = line | {"request": sent, "dialect": dialect, "attempt": number, "time": now,
                                  "status": record["status"], "http_status": status, "answer": answer}
                written["crc32"] = zlib.crc32(json.dumps(written).encode())
                raw = json.dumps(written).encode() + b"\n"
                if self.file.write(raw) < len(raw):
                    raise OSError("no space left for a whole line")
                self.records[line["prompt_hash"]] = record
                self.usage["requests"] += 1
                self.usage["retries"] += number > 1
                self.settled = self.settled or status == 200 and not failed
                if adapted:
                    continue
                if not failed or number > (retries if self.reached else min(2, retries)):
                    return self.judge(record, failed)
                jitter_s = random.uniform(0.0, min(BACKOFF_CAP_S, BACKOFF_S * 2 ** (number - 1)))
                number, wait_s = number + 1, max(wait_s, jitter_s)

    def judge(self, record, failed):
        """Raises: ServerError if after this prompt there is no point in asking for another one."""
        self.failures, self.in_a_row = self.failures + failed, self.in_a_row + 1 if failed else 0
        if failed and (not self.reached or self.in_a_row == STOP_AFTER_FAILURES):
            problem = f"{self.in_a_row} requests in a row failed" if self.reached else "cannot reach"
            raise ServerError(f"{problem}: {record['error']}")
        self.stop_if_useless()

    def send(self, todo):
        """Asks for the lines of todo: one at a time until an answer is of use, then `concurrency`."""
        done = self.usage["cached"]
        bar = tqdm(total=self.usage["prompts"], initial=done, desc=self.host, unit="prompt")
        with futures.ThreadPoolExecutor(self.args.concurrency) as pool, bar:
            try:
                self.stop_if_useless()
                while todo:
                    n = len(todo) if self.useful or self.failures else 1
                    for one in futures.as_completed([pool.submit(self.work, line) for line in todo[:n]]):
                        one.result()
                        usd = self.spent if self.prices else "?"
                        bar.set_postfix(cached=done, failed=self.failures, USD=usd)
                        bar.update()
                    todo = todo[n:]
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is under way is awaited; a second ends
                raise
            finally:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        os.fsync(self.file.fileno())

    def ask(self, prompts, max_tokens):
        """Returns (records {prompt hash: record}, usage), after asking what the caches do not answer yet.

        Shapes: prompts {prompt hash: distinct prompt}; record: see read_answer. Raises: ValueError (the
        user's or server's no), OSError (the file); what was received is kept either way.
        """
        args, records, todo = self.args, self.records, {}
        more = {"reasoning_effort": args.reasoning_effort} if args.reasoning_effort else {}
        for prompt_hash, prompt in prompts.items():
            body = {"model": args.model, "messages": [{"role": "user", "content": prompt}],
                    "temperature": 0, "max_tokens": max_tokens} | more | dict(args.extra or ())  # [choice.E5]
            key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            todo[key] = {"prompt_hash": prompt_hash, "key": key, "api_base": self.api_base, "request": body}
        with open(os.devnull if args.dry_run else self.cache, "ab", buffering=0) as self.file:
            if not args.dry_run:
                fcntl.flock(self.file, fcntl.LOCK_EX)  # a second process waits here for the end of the first
            for path in self.caches:
                if path.exists() and not self.read_cache(path, todo) and path == self.cache:
                    self.file.write(b"\n")  # behind a line that a kill has torn
            left = [line for line in todo.values() if line["prompt_hash"] not in records]
            self.usage |= {"prompts": len(prompts), "cached": len(records), "requests": 0, "retries": 0}
            try:
                self.print_estimate(left) if args.dry_run else self.send(left)
            except (ServerError, OSError, KeyboardInterrupt) as stop:
                n_kept = sum(record["status"] != "failed" for record in records.values())
                raise type(stop)(f"{str(stop) or 'interrupted'}; {n_kept} of {len(prompts)} answers are kept "
                                 f"in {self.cache}, the same command goes on from there") from None
        counts = {name: sum(one[name] or 0 for one in records.values())
                  for name in (*TOKENS, "reasoning_tokens", "truncated")}
        states = [record["status"] for record in records.values()]
        counts |= {state: states.count(state) for state in ("answered", "refused", "empty", "failed")}
        known = self.prices and all(record["status"] == "refused" or record["prompt_tokens"] is not None
                                    for record in records.values())
        models = sorted({record["model"] for record in records.values() if record["model"]})
        return records, self.usage | counts | {
            "cost_usd": self.usd(counts) if known else None, "models": models}

    def print_estimate(self, left):
        """Says what the lines would cost."""
        tokens = estimate([line["request"] for line in left], BYTES_PER_TOKEN)
        cost = f"{self.usd(tokens):.2f} USD" if self.prices else "cost unknown without --price_in"
        print(f"dry run: {self.usage['prompts']} distinct requests to {self.args.model}, {len(self.records)} "
              f"cached, {len(left)} to send; estimated: {tokens['prompt_tokens']} prompt tokens "
              f"({BYTES_PER_TOKEN} bytes each), at most {tokens['completion_tokens']} completion tokens, "
              + cost)
        if self.args.reasoning_effort != "none":
            print("thoughts come on top and cost as much as an answer's tokens: --reasoning_effort none")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print one prompt.", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)  # so that a mistake is answered by one line
    parser.add_argument("task", help="goemotions, unhealthy, or any name together with --labels")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--labels", nargs="+", help="label names of the neutral template")
    parser.add_argument("--user_id", default="37", help="(default: %(default)s)")
    parser.add_argument("--text", default="That game hurt.", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.labels and args.task not in TASKS:
        parser.error(f"no task {args.task!r}: use one of {sorted(TASKS)}, or give --labels")
    task, method = neutral_task(args.labels) if args.labels else TASKS[args.task], METHODS[args.method]
    examples = [(f"(text {k} of this user)", task.label_names[:k]) for k in range(1, method.shots + 1)]
    print("".join(build_prompt(task, method, args.text, args.user_id, examples)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
