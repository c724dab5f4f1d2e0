"""prompts.py: the templates against the appendix, typed out here; the parser against answers of all kinds."""

import random
import re
import string
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompts import (
    METHODS,
    NONE,
    TASKS,
    build_prompt,
    build_response,
    label_key,
    main,
    neutral_task,
    parse_response,
)

ROOT = Path(__file__).resolve().parent.parent

# ---- The appendix ----

GOEMOTIONS_LIST = """### Emotions:
- admiration
- amusement
- anger
- annoyance
- approval
- caring
- confusion
- curiosity
- desire
- disappointment
- disapproval
- disgust
- embarrassment
- excitement
- fear
- gratitude
- grief
- joy
- love
- nervousness
- neutral
- optimism
- pride
- realization
- relief
- remorse
- sadness
- surprise"""
UNHEALTHY_LIST = """### Labels:
- antagonize
- condescending
- dismissive
- generalisation
- generalisation_unfair
- healthy
- hostile
- sarcastic"""
GOEMOTIONS = {
    "q0s": (
        "Categorize the following text by selecting the most appropriate emotion from the provided list. "
        "Emotions can be subtle or overt, so analyze the text carefully to make an accurate classification."
        " Please compose your response as a list of chosen emotions, separated by commas."
    ),
    "cls": (
        "Categorize the following text by selecting the most appropriate emotion from the provided list. "
        "Emotions can be subtle or overt, so analyze the text carefully to make an accurate classification."
    ),
    "q1s": (
        "Knowing that for the given example was provided the response given below categorize the following "
        "text by selecting the most appropriate emotion from the provided list. Emotions can be subtle or "
        "overt, so analyze the text carefully to make an accurate classification. Please compose your "
        "response as a list of chosen emotions, separated by commas."
    ),
    "q2s": (
        "Knowing that for the given examples were provided the responses given below categorize the "
        "following text by selecting the most appropriate emotion from the provided list. Emotions can be "
        "subtle or overt, so analyze the text carefully to make an accurate classification. Please compose "
        "your response as a list of chosen emotions, separated by commas."
    ),
    "clsp": (
        "Categorize the following text for the specified user by selecting the most appropriate emotion "
        "from the provided list. Emotions can be subtle or overt, so analyze the text carefully to make an "
        "accurate classification."
    ),
    "lmp": (
        "Categorize the following text for the specified user by selecting the most appropriate emotion "
        "from the provided list. Emotions can be subtle or overt, so analyze the text carefully to make an "
        "accurate classification. Please compose your response as a list of chosen emotions, separated by "
        "commas."
    ),
}
UNHEALTHY = {
    "q0s": (
        "Categorize the following text by selecting the most appropriate label from the provided list. "
        "Labels represent different types of communication styles or tones, where each category denotes a "
        "specific attitude or approach that someone might exhibit when communicating with others. Analyze "
        "text carefully to make an accurate categorization. Please compose your response as a list of "
        "chosen labels, separated by commas."
    ),
    "cls": (
        "Categorize the following text by selecting the most appropriate label from the provided list. "
        "Labels represent different types of communication styles or tones, where each category denotes a "
        "specific attitude or approach that someone might exhibit when communicating with others. Analyze "
        "text carefully to make an accurate categorization."
    ),
    "q1s": (
        "Knowing that for the given example was provided the response given below categorize the following "
        "text by selecting the most appropriate label from the provided list. Labels represent different "
        "types of communication styles or tones, where each category denotes a specific attitude or "
        "approach that someone might exhibit when communicating with others. Analyze text carefully to make"
        " an accurate categorization. Please compose your response as a list of chosen emotions, separated "
        "by commas."
    ),
    "q2s": (
        "Knowing that for the given examples were provided the responses given below categorize the "
        "following text by selecting the most appropriate label from the provided list. Labels represent "
        "different types of communication styles or tones, where each category denotes a specific attitude "
        "or approach that someone might exhibit when communicating with others. Analyze text carefully to "
        "make an accurate categorization. Please compose your response as a list of chosen emotions, "
        "separated by commas."
    ),
    "clsp": (
        "Categorize the following text for the specified user by selecting the most appropriate label from "
        "the provided list. Labels represent different types of communication styles or tones, where each "
        "category denotes a specific attitude or approach that someone might exhibit when communicating "
        "with others. Analyze text carefully to make an accurate categorization."
    ),
    "lmp": (
        "Categorize the following text for the specified user by selecting the most appropriate label from "
        "the provided list. Labels represent different types of communication styles or tones, where each "
        "category denotes a specific attitude or approach that someone might exhibit when communicating "
        "with others. Analyze text carefully to make an accurate categorization. Please compose your "
        "response as a list of chosen labels, separated by commas."
    ),
}
GOEMOTIONS["lm"], UNHEALTHY["lm"] = GOEMOTIONS["q0s"], UNHEALTHY["q0s"]  # "Prompt for Q-0S and LM scenarios"
SECTIONS = {
    "q0s": "",
    "cls": "",
    "lm": "",
    "clsp": "### User ID:\n37\n\n",
    "lmp": "### User ID:\n37\n\n",
    "q1s": "### Example:\nFirst text.\n\n### Example Response:\nLABELS\n\n",
    "q2s": "### Example 1:\nFirst text.\n\n### Example 1 Response:\nLABELS\n\n"
    "### Example 2:\nSecond text.\n\n### Example 2 Response:\nLABELS\n\n",
}


def expected_prompt(corpus, method, shown):
    instruction = (GOEMOTIONS if corpus == "goemotions" else UNHEALTHY)[method]
    label_list = GOEMOTIONS_LIST if corpus == "goemotions" else UNHEALTHY_LIST
    sections = SECTIONS[method].replace("LABELS", shown)
    return f"{instruction}\n\n{sections}### Text:\nThat game hurt.\n\n{label_list}\n\n### Response:"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "corpus, labels, shown",
    [
        ("goemotions", ["sadness", "anger"], "anger, sadness"),
        ("unhealthy", ["hostile", "generalisation_unfair"], "generalisation_unfair, hostile"),
    ],
)
def test_every_template_is_the_appendix_word_for_word(corpus, labels, shown, method):
    """[method.Q], [method.Q-NS], [method.CLS], [method.CLS-P], [method.LM], [method.LM-P].

    [choice.P2]: no User ID in Q-1S and Q-2S. [choice.P3]: "chosen emotions" for Unhealthy there, as in the
    appendix. [choice.P4]: "- " before the first label too. [choice.P5]: the User ID on its own line.
    [choice.P6]: no space behind the instruction.
    """
    examples = [("First text.", labels), ("Second text.", labels)][: METHODS[method].shots]
    prompt = "".join(build_prompt(TASKS[corpus], METHODS[method], "That game hurt.", "37", examples))
    assert prompt == expected_prompt(corpus, method, shown)


def test_label_names_are_the_released_ones_sorted():
    """[choice.D6]: section VI-A says "antagonistic" and "unfair generalization"; the files do not."""
    assert TASKS["unhealthy"].label_names == (
        "antagonize",
        "condescending",
        "dismissive",
        "generalisation",
        "generalisation_unfair",
        "healthy",
        "hostile",
        "sarcastic",
    )
    assert len(TASKS["goemotions"].label_names) == 28
    assert list(TASKS["goemotions"].label_names) == sorted(TASKS["goemotions"].label_names)


@pytest.mark.parametrize(
    "text",
    [
        "{text} {0} {}",
        "### Response: joy",
        "a\n\n### User ID:\n5\n\n",
        "%s %(a)s \\n \\1",
        "مرحبا 🙂 ’",
        "  spaces \t",
        "nul \0 and surrogate \ud800",
    ],
)
def test_text_user_and_examples_are_inserted_untouched(text):
    """A template that is filled by str.format fails on the braces of a user."""
    method = METHODS["q2s"]._replace(user_id=True)
    before, middle, after = build_prompt(TASKS["goemotions"], method, text, text, [(text, ["joy"])] * 2)
    assert middle == text
    assert before.endswith(f"### User ID:\n{text}\n\n### Text:\n")
    for k in (1, 2):
        assert f"\n\n### Example {k}:\n{text}\n\n### Example {k} Response:\njoy\n\n" in before
    assert after.startswith("\n\n### Emotions:\n- admiration\n")


def test_neutral_template_has_no_words_of_one_corpus():
    prompt = "".join(build_prompt(neutral_task(["rude", "funny"]), METHODS["lmp"], "Hi.", "a b"))
    assert prompt == (
        "Categorize the following text for the specified user by selecting the most appropriate label from "
        "the provided list. Analyze the text carefully to make an accurate classification. Please compose "
        "your response as a list of chosen labels, separated by commas.\n\n### User ID:\na b\n\n"
        "### Text:\nHi.\n\n### Labels:\n- funny\n- rude\n\n### Response:"
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_task_with_unlabelled_annotations_says_none_where_the_answer_is_text(name):
    method, names = METHODS[name], ["rude", "funny"]
    examples = [("Hi.", ())] * method.shots
    plain, told = ("".join(build_prompt(neutral_task(names, none), method, "Hi.", "u", examples))
                   for none in (False, True))
    if method.family == "cls":
        assert told == plain
    else:
        assert told == plain.replace("by commas.", "by commas, or none if no label applies.")
        assert told.count("Response:\nnone\n") == method.shots
    assert not any(task.none for task in TASKS.values())


# ---- Parsing ----

EMOTIONS = TASKS["goemotions"].label_names


@pytest.mark.parametrize(
    "response, labels, not_understood",
    [
        ("joy", ["joy"], 0),
        ("\njoy, love", ["joy", "love"], 0),
        ("love, joy, love", ["joy", "love"], 0),
        ("joy.", ["joy"], 0),
        ("Joy, LOVE!", ["joy", "love"], 0),
        ("- joy\n- love\n", ["joy", "love"], 0),
        ("* joy\n• love", ["joy", "love"], 0),
        ("1. joy\n2. love\n10) anger", ["anger", "joy", "love"], 0),
        ("1. joy 2. love (3) anger", ["anger", "joy", "love"], 0),
        ("\"joy\", 'love', `anger`, “fear”", ["anger", "fear", "joy", "love"], 0),
        ("**joy**, __love__", ["joy", "love"], 0),
        ("**Emotions:** joy; love | fear", ["fear", "joy", "love"], 0),
        ("The chosen emotions: joy and love", ["joy", "love"], 0),
        ("anger, joy, and love", ["anger", "joy", "love"], 0),
        ("joy AND love or anger & fear/grief + pride", ["anger", "fear", "grief", "joy", "love", "pride"], 0),
        ("joy\r\nlove\r\n", ["joy", "love"], 0),
        ("joy\tand\tlove", ["joy", "love"], 0),
        ("joy. Love.", ["joy", "love"], 0),
        ("joy, enjoyment", ["joy"], 1),
        ("enjoyment", [], 1),
        ("lovely, joyful, fearless", [], 3),
        ("This is an angry text", [], 1),
        ("no joy", [], 1),
        ("joy love", [], 1),
        ("sandjoy", [], 1),
        ("", [], 0),
        ("   \n ,,, ;; ... 🙂", [], 0),
        ("### Response: joy", ["joy"], 0),
        ("joy, love ### Explanation: foo, anger", ["joy", "love"], 0),  # T5 writes no line ends
        ("joy\n\n### Text:\nlove\n\n### Response: fear", ["joy"], 0),
        ("joy\nCategorize the following text by selecting love, fear", ["joy"], 0),
    ],
)
def test_answers_are_understood_by_whole_labels_only(response, labels, not_understood):
    """[choice.E2]: never a substring inside another word."""
    found, rest = parse_response(response, EMOTIONS)
    assert (found, len(rest)) == (labels, not_understood)


@pytest.mark.parametrize("response, answer", [
    ("The most fitting labels are: joy", (["joy"], [])),
    ("The most appropriate label is: Joy.", (["joy"], [])),
    ("**The most suitable emotions are:** joy, anger", (["anger", "joy"], [])),
    ("The most fitting labels are:\n- joy\n- anger", (["anger", "joy"], [])),
    ("most appropriate emotions are : joy and anger", (["anger", "joy"], [])),
    ("The chosen labels are: none", ([], [])), ("The emotion is: joy", (["joy"], [])),
    ("The most fitting labels are joy", ([], ["The most fitting labels are joy"])),  # prose
    ("The most fitting label is not: joy", ([], ["The most fitting label is not: joy"]))])
def test_the_lead_in_of_a_chatty_answer_is_understood_and_prose_is_not(response, answer):
    assert parse_response(response, EMOTIONS) == answer


@pytest.mark.parametrize("response, answer", [
    ("none", ([], [])), ("\nNone.", ([], [])), ("- **NONE**", ([], [])), ("Labels: none", ([], [])),
    ("none, joy", (["joy"], [])), ("none of these", ([], ["none of these"])),
    ("nonesuch", ([], ["nonesuch"]))])
def test_none_is_the_answer_without_any_label(response, answer):
    assert parse_response(response, EMOTIONS) == answer
    assert build_response([]) == build_response(()) == NONE == "none"
    assert parse_response(response, (*EMOTIONS, NONE))[0] == answer[0] + [NONE] * (not answer[1])


LETTERS = {  # names that differ in a vowel sign or tone mark only
    "Devanagari": ("कि", "की", "कु", "क"), "Bengali": ("ভালো", "ভাল", "ভালা"), "Tamil": ("பல", "பலி", "பலு"),
    "Thai": ("ไม่", "ไม้", "ไม"),
    "Arabic": ("كَ", "كُ", "ك"), "Hebrew": ("שָׁ", "שׂ", "ש"), "Burmese": ("က", "ကာ", "ကိ")}


@pytest.mark.parametrize("script", LETTERS)
def test_labels_that_differ_in_a_combining_sign_are_two_labels(script):
    names = sorted(LETTERS[script])
    assert len({*map(label_key, names)}) == len(names)
    for subset in ([name] for name in names):
        assert parse_response(f"- {build_response(subset)}.", names) == (subset, [])
    assert parse_response(build_response(names), names) == (names, [])


@pytest.mark.parametrize("name", ["fröhlich", "Ängstlich", "niño", "vui vẻ", "각"])
def test_composed_and_decomposed_spellings_are_one_label(name):
    composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    assert composed != decomposed
    for own, other in ((composed, decomposed), (decomposed, composed)):
        assert parse_response(f"{other.upper()}, x", (own, "x")) == (sorted([own, "x"]), [])


def test_emoji_with_a_variation_selector_behind_a_label_are_no_part_of_it():
    assert parse_response("joy \u2764\ufe0f, \U0001f44d\U0001f3fd love", EMOTIONS) == (["joy", "love"], [])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("corpus", TASKS)
def test_an_answer_that_repeats_the_prompt_or_goes_on_with_another_one_counts_once(corpus, method):
    names = TASKS[corpus].label_names
    examples = [("A text, joy, hostile", names[3:5])] * METHODS[method].shots
    prompt = "".join(build_prompt(TASKS[corpus], METHODS[method], "Oh, love, healthy, fear.", "5", examples))
    answer = " " + build_response(names[:2])
    assert parse_response(prompt + answer, names) == (sorted(names[:2]), [])
    assert parse_response(answer + "\n\n" + prompt + names[2], names) == (sorted(names[:2]), [])
    assert parse_response(prompt + answer + "\n" + prompt + names[2], names) == (sorted(names[:2]), [])
    assert parse_response(prompt, names) == ([], [])


def test_names_with_underscore_hyphen_or_space_are_found_however_they_are_written():
    names = TASKS["unhealthy"].label_names
    for written in ("generalisation_unfair", "Generalisation Unfair", "generalisation-unfair"):
        assert parse_response(written, names)[0] == ["generalisation_unfair"]
    assert parse_response("generalisation, generalisation_unfair", names)[0] == [
        "generalisation",
        "generalisation_unfair",
    ]
    assert parse_response("generalisation", names)[0] == ["generalisation"]
    assert parse_response("unfair", names) == ([], ["unfair"])
    assert parse_response("no hope, no-hope, NO_HOPE", ["no-hope"]) == (["no-hope"], [])


def test_released_parser_removes_no_punctuation():
    """[choice.E2]: the released parser looks for 29 punctuation characters in a row: "joy." is nothing."""
    assert parse_response("joy.", EMOTIONS, released=True) == ([], ["joy."])
    assert parse_response("\nlove, joy, Fear, love,", EMOTIONS, released=True) == (["joy", "love"], ["Fear"])


ODD_NAMES = [
    "black and white",
    "and",
    "or else",
    "yes/no",
    "R&B",
    "c++ code",
    "level 1.5",
    "2.0",
    "no. 7",
    "1) first",
    "Straße",
    "too-much",
    "under_score",
    "response: none",
    "what?! really",
    "naïve",
    "日本",
    "heading ## x",
]


@pytest.mark.parametrize("names", [EMOTIONS, TASKS["unhealthy"].label_names, ODD_NAMES])
def test_parsing_is_the_inverse_of_building_for_random_subsets(names):
    chance = random.Random(0)
    subsets = [
        [],
        list(names),
        *([name] for name in names),
        *(chance.sample(names, chance.randint(1, min(6, len(names)))) for _ in range(500)),
    ]
    for subset in subsets:
        for end in ("", ".", "\n"):
            assert parse_response(build_response(subset) + end, names) == (sorted(subset), [])


WORD = st.text(string.ascii_lowercase + "àß9", min_size=1, max_size=5)
NAME = st.builds(
    lambda words, joint: joint.join(words),
    st.lists(WORD, min_size=1, max_size=3),
    st.sampled_from([" ", "_", "-", "/", " and ", " or ", "&", ".", "+"]),
).filter(lambda name: name != NONE)


@settings(max_examples=300, deadline=None)
@given(st.lists(NAME, min_size=1, max_size=8, unique_by=label_key), st.data())
def test_parsing_is_the_inverse_of_building_for_any_names(names, data):
    subset = data.draw(st.lists(st.sampled_from(names), unique=True))
    assert parse_response(build_response(subset), names) == (sorted(subset), [])


PIECES = st.sampled_from(
    [
        "joy",
        "love",
        "joyful",
        ", ",
        "\n",
        "- ",
        "1. ",
        " and ",
        "### ",
        "### Response:",
        "**",
        "/",
        "Categorize the following text ",
        "Emotions: ",
        " ",
        "\0",
        "\ud800",
        "🙂",
        "(",
        "]",
        "\\",
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join)), st.booleans())
def test_any_response_gives_sorted_label_names_and_the_rest(response, released):
    found, rest = parse_response(response, EMOTIONS, released)
    assert found == sorted(set(found)) and set(found) <= set(EMOTIONS)
    assert all(isinstance(piece, str) and piece.strip() for piece in rest)
    if not released:  # by an independent rule: a found label stands somewhere as a whole word
        assert all(
            re.search(rf"(?<![a-z]){name}(?![a-z])", response.casefold().replace("_", " ")) for name in found
        )


@pytest.mark.parametrize(
    "unit",
    [
        "!",
        " ",
        "a",
        "and ",
        "- ",
        "\n",
        "\n ",
        "#",
        "\n## ",
        "1. ",
        ".",
        "joy, ",
        "_",
        "x!",
        "emotion ",
        "### Response:",
        "the most fitting labels are ",
    ],
)
def test_a_response_of_a_megabyte_is_parsed_in_linear_time(unit):
    """`\\W+$` tried at each place of "a!!!...!b" takes hours: a million times half a million steps."""
    response = "a" + unit * (1_000_000 // len(unit)) + "b"
    started = time.perf_counter()
    parse_response(response, EMOTIONS)
    assert time.perf_counter() - started < 120


# ---- Command line and tags ----


@pytest.mark.parametrize(
    "arguments, beginning, ending",
    [
        (
            ["goemotions", "clsp"],
            GOEMOTIONS["clsp"] + "\n\n### User ID:\n37\n\n",
            "- surprise\n\n### Response:\n",
        ),
        (
            ["unhealthy", "q2s", "--text", "{}"],
            UNHEALTHY["q2s"] + "\n\n### Example 1:\n",
            "\n\n### Response:\n",
        ),
        (
            ["mine", "lmp", "--labels", "rude", "funny"],
            "Categorize",
            "### Labels:\n- funny\n- rude\n\n### Response:\n",
        ),
    ],
)
def test_command_line_prints_one_prompt(capsys, arguments, beginning, ending):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(beginning) and printed.endswith(ending)


@pytest.mark.parametrize(
    "arguments", [["mine", "lmp"], ["goemotions", "clsq"], ["goemotions", "cls", "--lab", "a"]]
)
def test_command_line_refuses_what_it_does_not_know(arguments):
    run = subprocess.run(
        [sys.executable, ROOT / "prompts.py", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and "error:" in run.stderr and "Traceback" not in run.stderr and not run.stdout


def test_every_tag_stands_once_in_the_code_and_is_named_in_a_test():
    tags = re.findall(r"\[(?:method|choice)\.[A-Z0-9-]+\]", (ROOT / "prompts.py").read_text())
    assert sorted(tags) == sorted({*tags}) and len(tags) == 14
    named = Path(__file__).read_text() + Path(__file__).with_name("test_api.py").read_text()
    assert {*tags} <= {*re.findall(r"\[[a-z]+\.[A-Z0-9-]+\]", named)}


def test_a_label_inside_a_sentence_is_not_an_answer():
    """Answers of a real 135M model: a label stood alone between "and" and a full stop, and counted."""
    names = ("ambiguous", "explicit", "implicit")
    for sentence in ("The text is ambiguous and explicit. The text is not implicit.",
                     "It is unclear whether it is ambiguous or explicit"):
        assert parse_response(sentence, names) == ([], [sentence.removesuffix("\n")])
    assert parse_response("ambiguous and explicit", names) == (["ambiguous", "explicit"], [])
