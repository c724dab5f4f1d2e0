"""The words: label lists, the paper's prompt templates, one prompt, one response, the parsing of a response.

Source: "Personalized Large Language Models" (arXiv 2402.09269), section VI-C and appendix A.
A prompt is an instruction followed by sections, each a `### Heading:` line, its content and an empty line.
User text is inserted as it is, never through `str.format`: it may hold braces, `###`, newlines, any Unicode.

    python prompts.py goemotions clsp                         prints one prompt
    python prompts.py mine lmp --labels funny rude            the neutral template, for any label set

Does not tokenize (data.py) and does not ask a model (infer.py).
"""

import argparse
import re
import sys
import unicodedata
from typing import NamedTuple

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
LEAD_IN = re.compile(r"^\W*(?:the )?(?:chosen )?(?:emotion|label|response|answer)s?\s*:", re.IGNORECASE)
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
