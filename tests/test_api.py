"""The API client of prompts.py against a server on 127.0.0.1 that plays every fault."""

import contextlib
import email.utils
import gzip
import http.server
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import threading
import time
import traceback
import types

import pytest

import prompts as script

KEY = "sk-MARKED-0123456789abcdefghij"


def reply(content="joy", finish_reason="stop", prompt_tokens=100, completion_tokens=10, **message):
    """A chat completion as OpenAI sends it."""
    return {"id": "x", "object": "chat.completion", "model": "tiny-2026-01-01",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens}}


class Server(http.server.ThreadingHTTPServer):
    """Answers with play(prompt, n): n counts this prompt's requests from 1.

    play returns a JSON object (sent with 200), (status, headers, JSON or bytes) or "cut".
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, play, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.play, self.seen, self.headers, self.bodies, self.sockets = play, [], [], [], []
        self.lock = threading.Lock()
        self.base = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def get_request(self):
        request, address = super().get_request()
        self.sockets.append(request)
        return request, address

    def handle_error(self, request, client_address):
        pass  # a client that was killed

    def die(self):
        self.shutdown()
        self.server_close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        prompt = json.loads(raw)["messages"][0]["content"]
        with self.server.lock:
            self.server.seen.append(prompt)
            self.server.bodies.append((self.path, raw))
            self.server.headers.append(dict(self.headers))
            n = self.server.seen.count(prompt)
        play = self.server.play
        played = play(prompt, n, json.loads(raw)) if hasattr(play, "reads_body") else play(prompt, n)
        if played == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, body = played if isinstance(played, tuple) else (200, {}, played)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No key, no proxy, back-off in milliseconds."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(script, "BACKOFF_S", 0.001)


@pytest.fixture
def serve():
    servers = []

    def start(play, port=0):
        servers.append(Server(play, port))
        return servers[-1]

    yield start
    for server in servers:
        with contextlib.suppress(OSError):
            server.die()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "requests.jsonl"


def prompts(n):
    return {f"hash{i}": f"prompt {i}" for i in range(n)}


def lines(path):
    """The file's lines, which any JSON reader must understand."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().splitlines()]


FLAGS = {"max_cost": None, "price_in": None, "price_out": None, "dry_run": False, "concurrency": 8,
         "timeout_s": 60.0, "max_retries": 6, "reasoning_effort": None, "extra": [], "cache_from": []}


def client_of(model, cache, api_base=None, **options):
    return script.Client(types.SimpleNamespace(model=model, api_base=api_base, **FLAGS | options), cache)


def query(asked, model, cache, api_base=None, max_tokens=64, **options):
    return client_of(model, cache, api_base, **options).ask(asked, max_tokens)


def ask(server, cache, n=1, **options):
    return query(prompts(n), "tiny", cache, api_base=server.base, **options)


# ---- What is sent, what is written ----


def test_the_payload_is_exactly_model_message_temperature_and_max_tokens(serve, cache, monkeypatch):
    """[choice.E5] Temperature 0."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server = serve(lambda prompt, n: reply())
    text = 'A {brace}, "quotes", ### Response:\n\tÜñí 😀 \x00'
    query({"h": text}, "gpt-4", cache, api_base=server.base + "/", max_tokens=12)
    (path, raw), headers = server.bodies[0], server.headers[0]
    assert path == "/v1/chat/completions"
    assert json.loads(raw) == {"model": "gpt-4", "messages": [{"role": "user", "content": text}],
        "temperature": 0, "max_tokens": 12}
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Content-Type"] == "application/json"


def test_no_key_sends_no_authorization_to_another_server_not_even_from_netrc(
        serve, cache, monkeypatch, tmp_path):
    """requests replaces an Authorization header by what ~/.netrc has for the host, unless told not to."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server = serve(lambda prompt, n: reply())
    ask(server, cache)
    assert "Authorization" not in server.headers[0]


def test_a_line_of_the_file_holds_request_answer_status_time_and_dated_model(serve, cache):
    server = serve(lambda prompt, n: reply("joy, love"))
    records, usage = ask(server, cache)
    (line,) = lines(cache)
    assert (line["prompt_hash"] == "hash0" and line["status"] == "answered"
        and line["answer"] == reply("joy, love"))
    assert line["request"] == {"model": "tiny", "temperature": 0, "max_tokens": 64,
        "messages": [{"role": "user", "content": "prompt 0"}]}
    assert line["time"].endswith("Z") and line["api_base"] == server.base and len(line["key"]) == 64
    assert records == {
        "hash0": {"status": "answered", "response": "joy, love", "model": "tiny-2026-01-01", "error": "",
        "truncated": False, "useful": True, "tokens": (100, 10)}}
    assert usage["models"] == ["tiny-2026-01-01"] and usage["cost_usd"] is None


@pytest.mark.parametrize("answer, status, response, truncated", [(reply("joy"), "answered", "joy", False),
    (reply("joy, lo", finish_reason="length"), "answered", "joy, lo", True),
    (reply(""), "empty", None, False), (reply(" \n"), "empty", None, False),
    (reply(None), "empty", None, False), (reply([{"type": "image"}]), "empty", None, False),
    ({"choices": []}, "empty", None, False), ({"id": "x"}, "empty", None, False),
    (reply("joy", finish_reason="content_filter"), "refused", None, False),
    (reply(None, refusal="I cannot help with that."), "refused", None, False),
    ((400, {}, {"error": {"code": "content_filter", "message": "filtered"}}), "refused", None, False),
    ((403, {}, {"error": {"message": "Your input was flagged", "code": 403}}), "refused", None, False),
    ((413, {}, b"too much"), "refused", None, False),
    ((422, {}, {"detail": "no"}), "refused", None, False)])
def test_refusals_and_empty_answers_are_recorded_and_never_a_response(
        serve, cache, answer, status, response, truncated):
    server = serve(lambda prompt, n: answer if prompt == "prompt 1" else reply())
    for _ in range(2):  # the second run takes it from the file
        records, usage = ask(server, cache, 2)
        assert (records["hash1"]["status"], records["hash1"]["response"]) == (status, response)
        assert records["hash1"]["truncated"] is truncated and len(server.seen) == 2
        assert usage[status] == 1 + (status == "answered") and usage["truncated"] == truncated
    assert [line["status"] for line in lines(cache)] == ["answered", status]


def test_a_second_run_sends_nothing_and_returns_the_same(serve, cache):
    server = serve(lambda prompt, n: reply(prompt.upper()))
    first, usage = ask(server, cache, n=30, price_in=2.0, price_out=5.0)
    assert (usage["requests"], usage["cached"], usage["answered"], usage["retries"]) == (30, 0, 30, 0)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3000, 300)
    assert usage["cost_usd"] == pytest.approx(3000 * 2e-6 + 300 * 5e-6)
    second, usage = ask(server, cache, n=30, price_in=2.0, price_out=5.0)
    assert (usage["requests"], usage["cached"], usage["answered"]) == (0, 30, 30)
    assert usage["cost_usd"] == pytest.approx(0.0075) and second == first and len(server.seen) == 30
    assert first["hash7"]["response"] == "PROMPT 7"


@pytest.mark.parametrize("change", [{"model": "other"}, {"max_tokens": 65}])
def test_another_model_or_parameter_is_another_request(serve, cache, change):
    server = serve(lambda prompt, n: reply())
    query({"h": "p"}, "tiny", cache, api_base=server.base)
    query({"h": "p"}, **{"model": "tiny", "cache": cache, "api_base": server.base, **change})
    assert len(server.seen) == 2


# ---- Retries ----


@pytest.mark.parametrize("fault",
    [(500, {}, b"oops"), (503, {}, {"error": {"message": "busy"}}), (408, {}, b""), (409, {}, b""),
    (429, {}, b""),
    (429, {"Retry-After": "0"}, {"error": {"code": "rate_limit_exceeded", "message": "slow down"}}),
    (200, {}, b'{"choices": [{"mess'), (200, {}, b""), (200, {}, b"[1]"), (200, {}, b"\xff\xfe"),
    (200, {}, {"error": {"message": "upstream failed"}}), (200, {"Content-Length": "500"}, reply()), "cut"])
def test_what_may_pass_is_retried_twice_counted_and_then_answered(serve, cache, fault):
    server = serve(lambda prompt, n: fault if n <= 2 else reply())
    records, usage = ask(server, cache, timeout_s=0.5)
    assert records["hash0"]["response"] == "joy" and len(server.seen) == 3
    assert (usage["requests"], usage["retries"], usage["failed"]) == (3, 2, 0)
    written = [(line["attempt"], line["status"]) for line in lines(cache)]
    assert written == [(1, "failed"), (2, "failed"), (3, "answered")]


def test_a_slow_answer_times_out_and_is_asked_again(serve, cache):
    def play(prompt, n):
        time.sleep(0.6 if n == 1 else 0)
        return reply()

    started = time.monotonic()
    records, usage = ask(serve(play), cache, timeout_s=0.2)
    assert records["hash0"]["status"] == "answered" and usage["retries"] == 1
    assert time.monotonic() - started < 60


def test_exhausted_retries_are_failed_with_the_reason_and_asked_again_by_the_next_run(serve, cache):
    broken = [True]
    server = serve(
        lambda prompt, n: (500, {}, b"out of \x1b[31mbeer\n") if broken and prompt == "prompt 1" else reply())
    records, usage = ask(server, cache, n=3, max_retries=2)
    assert (usage["answered"], usage["failed"], usage["retries"], usage["requests"]) == (2, 1, 2, 5)
    assert records["hash1"]["response"] is None
    assert records["hash1"]["error"] == f"127.0.0.1:{server.server_port}: HTTP 500: out of [31mbeer"
    broken.clear()
    records, usage = ask(server, cache, n=3)
    assert (usage["answered"], usage["failed"], usage["cached"], usage["requests"]) == (3, 0, 2, 1)
    outcomes = [line["status"] for line in lines(cache) if line["prompt_hash"] == "hash1"]
    assert outcomes == ["failed"] * 3 + ["answered"]


@pytest.mark.parametrize("headers, expected",
    [({}, [1, 2, 4, 8, 16, 32, 60, 60]), ({"Retry-After": "7"}, [7, 7, 7, 8, 16, 32, 60, 60]),
    ({"Retry-After": "86400"}, [120] * 8)])
def test_delays_double_up_to_the_cap_and_retry_after_is_a_lower_bound(
        serve, cache, monkeypatch, headers, expected):
    monkeypatch.setattr(script, "BACKOFF_S", 1.0)
    monkeypatch.setattr(script.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(script, "threading", types.SimpleNamespace(
        Condition=threading.Condition, Event=Event))
    Event.waited = []
    ask(serve(lambda prompt, n: (429, headers, b"")), cache, max_retries=8)
    assert Event.waited == [0, *expected]


class Event(threading.Event):
    """Waits not at all, and remembers for how long it should have."""

    def wait(self, timeout=None):
        self.waited.append(timeout)
        return self.is_set()


def test_retry_after_may_be_a_date():
    for ahead_s, least, most in ((30, 25, 30), (-30, 0, 0), (86400, 120, 120)):
        date = email.utils.formatdate(time.time() + ahead_s, usegmt=True)
        assert least <= script.retry_after_s(date) <= most


@pytest.mark.parametrize("value, waits", [
    ("7", 7), ("0.5", 0.5), ("86400", 120), ("1" + "0" * 400, 120), ("", 0), ("soon", 0), ("-5", 0),
    ("nan", 0), ("inf", 0), ("1,5", 0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0)])
def test_retry_after_is_read_as_seconds(serve, value, waits):
    server = serve(lambda prompt, n: (429, {"Retry-After": value}, b""))
    client = client_of("tiny", "requests.jsonl", server.base)
    assert client.post({"messages": [{"content": "x"}]})[-1] == waits


# ---- What stops a run ----


@pytest.mark.parametrize("status", [401, 402, 404, 405, 307])
def test_a_request_the_server_will_never_take_stops_at_once_with_its_words(serve, cache, status):
    error = {"error": {"message": "The model `tiny`\ndoes not exist", "code": "model_not_found"}}
    server = serve(lambda prompt, n: (status, {}, error) if prompt == "prompt 2" else reply())
    with pytest.raises(ValueError, match=f"HTTP {status}: The model `tiny` does not exist; ") as stopped:
        ask(server, cache, n=200, concurrency=2)
    assert "\n" not in str(stopped.value) and server.seen.count("prompt 2") == 1
    received = [line for line in lines(cache) if line["status"] == "answered"]
    assert len(received) == len(server.seen) - 1  # everything that was answered is kept
    assert f"{len(received)} of 200 answers are kept in {cache}" in str(stopped.value)


def test_an_account_without_money_is_not_asked_again(serve, cache):
    """OpenAI answers 429 for it too, and no waiting helps."""
    no_money = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    server = serve(lambda prompt, n: (429, {}, no_money))
    with pytest.raises(ValueError, match="HTTP 429: You exceeded your current quota"):
        ask(server, cache)
    assert len(server.seen) == 1


def test_a_redirect_is_not_followed_and_its_target_is_named(serve, cache):
    server = serve(lambda prompt, n: (301, {"Location": "https://elsewhere.example/v1"}, b""))
    with pytest.raises(ValueError, match="HTTP 301: https://elsewhere.example/v1"):
        ask(server, cache)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_unreachable_host_is_named_after_three_attempts_of_the_first_requests(cache, host):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^cannot reach: {host}:{port}: .*"
                       "ConnectionError: .*0 of 5000 answers"):
        query(prompts(5000), "tiny", cache, api_base=f"http://{host}:{port}/v1")
    assert time.monotonic() - started < 60
    assert {(line["status"], line["attempt"] <= 3) for line in lines(cache)} == {("failed", True)}


def test_a_server_that_dies_halfway_stops_the_run_and_its_return_continues_it(serve, cache, monkeypatch):
    monkeypatch.setattr(script, "STOP_AFTER_FAILURES", 4)
    dying = []

    def play(prompt, n):
        if len(server.seen) >= 20 and not dying:
            dying.append(threading.Thread(target=server.die))
            dying[0].start()
        return "cut" if dying else reply(prompt)

    server = serve(play)
    with pytest.raises(ValueError, match="4 requests in a row failed: 127.0.0.1.*same command goes on"):
        ask(server, cache, n=60, max_retries=1, concurrency=4)
    dying[0].join()
    kept = {line["prompt_hash"] for line in lines(cache) if line["status"] == "answered"}
    assert 10 <= len(kept) < 25
    again = serve(lambda prompt, n: reply(prompt), port=server.server_port)
    records, usage = ask(again, cache, n=60)
    assert usage["answered"] == 60 and usage["requests"] == 60 - len(kept) == len(again.seen)
    assert not {prompt.replace("prompt ", "hash") for prompt in again.seen} & kept


@pytest.mark.parametrize("options, words", [({"price_in": 1}, "give --price_in and --price_out"),
    ({"max_cost": 1}, "give --price_in and --price_out"),
    ({"api_base": "localhost:8000"}, "--api_base"), ({"api_base": "ftp://h/v1"}, "--api_base"),
    ({"api_base": "http://"}, "--api_base"), ({"api_base": "http://me:secret@h/v1"}, "--api_base"),
    ({"api_base": "http://h/v1?key=secret"}, "--api_base"),
    ({"api_base": "https://api.openai.com/v1"}, "OPENAI_API_KEY is not set")])
def test_a_users_mistake_is_one_line_that_says_what_to_give(cache, options, words):
    with pytest.raises(ValueError) as mistake:
        query({"h": "p"}, "tiny", cache, **{"api_base": "http://127.0.0.1:9/v1", **options})
    assert (
        words in str(mistake.value) and "secret" not in str(mistake.value) and "\n" not in str(mistake.value))


@pytest.mark.parametrize("key", ["", "  \n"])
def test_openai_wants_a_key_unless_every_answer_is_in_the_file(cache, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set, or empty"):
        query({"h": "p"}, "gpt-4", cache)
    cache.touch()
    assert query({}, "gpt-4", cache)[1]["requests"] == 0


def test_names_of_gpt_models_and_any_model_of_a_server_are_asked_over_http():
    assert script.is_api_model("gpt-3.5-turbo", None) and script.is_api_model("mistral", "http://localhost/v1")
    assert not script.is_api_model("mistral", None) and not script.is_api_model("gpt2", None)
    assert not script.is_api_model("EleutherAI/gpt-neo-125m", None)


# ---- Money ----


def test_a_dry_run_sends_nothing_writes_nothing_and_prints_what_it_would_cost(serve, cache, capsys):
    server = serve(lambda prompt, n: reply())
    asked = {f"h{i}": "x" * 392 for i in range(1)} | {"i": "é" * 100, "j": "abc"}
    records, usage = query(asked, "tiny", cache, api_base=server.base, max_tokens=10, dry_run=True,
        price_in=10_000, price_out=100_000)
    assert records == {} and usage["requests"] == 0 and server.seen == [] and not cache.exists()
    # 392 / 4 + 8 = 106, 200 bytes / 4 + 8 = 58, ceil(3 / 4) + 8 = 9: 173 tokens, 1.73 USD; 3 x 10 for 3 USD
    assert capsys.readouterr().out == (
        "dry run: 3 distinct requests to tiny, 0 cached, 3 to send; estimated: 173 prompt "
        "tokens (4 bytes each), at most 30 completion tokens, 4.73 USD\n"
        "thoughts come on top and cost as much as an answer's tokens: --reasoning_effort none\n")
    query({"j": "abc"}, "tiny", cache, api_base=server.base, max_tokens=10)
    query(asked, "tiny", cache, api_base=server.base, max_tokens=10, dry_run=True, reasoning_effort=None)
    assert (
        "3 distinct requests to tiny, 1 cached, 2 to send; estimated: 164 prompt tokens (4 bytes each), at "
        "most 20 completion tokens, cost unknown without --price_in") in capsys.readouterr().out


def test_the_price_table_is_openais_and_for_exact_names_only(cache, capsys):
    query({"h": "x" * 3_999_968}, "gpt-6-luna", cache, max_tokens=1_000_000, dry_run=True)  # no key needed
    assert "0.60 USD" in capsys.readouterr().out  # 1,000,000 tokens in for 0.10, as many out for 0.50
    query({"h": "x"}, "gpt-6-luna-2", cache, dry_run=True, reasoning_effort="none")
    assert "unknown without --price_in" in (said := capsys.readouterr().out) and "thoughts" not in said
    with pytest.raises(ValueError, match="the price of gpt-6-luna is not known: give"):
        query({"h": "x"}, "gpt-6-luna", cache, api_base="http://127.0.0.1:9", max_cost=1)
    assert not {"gpt-3.5-turbo", "gpt-4"} & script.PRICES.keys()  # shut down


@pytest.mark.parametrize("concurrency", [1, 8])
def test_max_cost_stops_before_it_is_exceeded_and_counts_what_earlier_runs_spent(serve, cache, concurrency):
    """A prompt of 8 bytes is at worst 8 + 8 tokens, its answer 4: 20 USD before, and 7 USD after."""
    server = serve(lambda prompt, n: reply(prompt_tokens=5, completion_tokens=2))
    money = {"price_in": 1e6, "price_out": 1e6, "max_tokens": 4, "concurrency": concurrency}
    asked = {f"h{i}": f"prompt{i}{i}" for i in range(10)}
    with pytest.raises(
            ValueError, match=r"--max_cost 40: 21.0000 USD spent.*up to 20.0000.* 3 of 10 answers"):
        query(asked, "tiny", cache, api_base=server.base, max_cost=40, **money)
    assert len(server.seen) == len(lines(cache)) == 3  # 0 + 20, 7 + 20, 14 + 20, but not 21 + 20
    with pytest.raises(ValueError, match="--max_cost 40: 21.0000 USD spent"):
        query(asked, "tiny", cache, api_base=server.base, max_cost=40, **money)
    usage = query(asked, "tiny", cache, api_base=server.base, max_cost=83, **money)[1]
    assert usage["cost_usd"] == pytest.approx(70) and len(server.seen) == 10


@pytest.mark.parametrize("first, n_asked", [("cut", 1), ((200, {}, b"{"), 1), ((500, {}, b""), 2),
    ({**reply(), "usage": {"prompt_tokens": True, "completion_tokens": -1}}, 1)])
def test_an_answer_that_was_lost_or_has_no_usage_counts_as_its_upper_bound(serve, cache, first, n_asked):
    """As above, 20 USD at worst: another attempt is another 20, unless the first one surely cost nothing."""
    money = {"price_in": 1e6, "price_out": 1e6, "max_tokens": 4, "concurrency": 1}
    server = serve(lambda prompt, n: first if len(server.seen) == 1 else reply())
    with pytest.raises(ValueError, match=r"--max_cost 39: (20|110).0000 USD spent.*up to 20.0000"):
        query(
            {"h0": "prompt00", "h1": "prompt11"}, "tiny", cache, server.base, max_cost=39, **money)
    assert len(server.seen) == n_asked
    with pytest.raises(ValueError, match="--max_cost 39"):  # a restart has no budget of its own
        query(
            {"h0": "prompt00", "h1": "prompt11"}, "tiny", cache, server.base, max_cost=39, **money)
    assert len(server.seen) == n_asked
    records, usage = query({"h0": "prompt00"}, "tiny", cache, server.base, **money)
    assert usage["answered"] == 1 and usage["cost_usd"] == (None if isinstance(first, dict) else 110)


def test_the_progress_bar_shows_done_cached_failed_and_cost(serve, cache, capfd):
    server = serve(lambda prompt, n: (500, {}, b"") if prompt == "prompt 3" else reply())
    ask(server, cache, n=2, price_in=1000, price_out=0)
    ask(server, cache, n=5, price_in=1000, price_out=0, max_retries=0)
    assert (
        "5/5" in (shown := capfd.readouterr().err.split("\r")[-1]) and "USD=0.4, cached=2, failed=1" in shown)


# ---- The key ----


@pytest.mark.parametrize("fault", ["200", "401", "500", "301", "cut", "bytes"])
def test_the_key_is_in_no_file_output_or_exception_even_if_the_server_echoes_it(
        serve, cache, capfd, monkeypatch, fault):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = "x" * 290 + f"Bearer {KEY}"
    error = {"error": {"message": f"Incorrect API key provided: {KEY}. {echo}", "code": "invalid_api_key"}}
    server = serve(lambda prompt, n: {"200": {**reply(f"joy {KEY}"), "model": KEY, KEY: [KEY, {KEY: KEY}]},
        "401": (401, {}, error), "500": (500, {"Retry-After": KEY}, error),
        "301": (301, {"Location": f"/{KEY}"}, b""), "cut": "cut", "bytes": (502, {}, echo.encode())}[fault])
    shown = ""
    try:
        records, usage = ask(server, cache, n=3, max_retries=1)
        shown += repr((records, usage))
        assert fault != "200" or records["hash0"]["response"] == "joy [key]"
    except ValueError as error:
        shown += "".join(traceback.format_exception(error)) + repr((error.args, error.__context__))
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    captured = capfd.readouterr()
    for text in (shown, captured.out, captured.err, *(path.read_text() for path in cache.parent.iterdir())):
        assert KEY not in text and KEY[:12] not in text
    assert fault != "200" or "[key]" in cache.read_text()


@pytest.mark.parametrize("key", ["sk-ab\ncd-MARKED", "sk-ü-MARKED", "sk ab-MARKED", "sk-\x7f-MARKED"])
def test_a_key_that_is_no_header_value_is_refused_without_being_shown(cache, monkeypatch, key):
    """requests puts an invalid header value into its exception: apache/devlake#7132 and others met it."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds a space, a line break") as mistake:
        query({"h": "p"}, "tiny", cache, api_base="http://127.0.0.1:9/v1")
    assert "MARKED" not in "".join(traceback.format_exception(mistake.value))


# ---- Faults of this side: kills, torn lines, two processes ----


def in_child(function, *args):
    """Starts function(*args) in a forked process, which has the modules already: that takes milliseconds."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, daemon=True)
    process.start()
    return process


def slowly(prompt, n):
    time.sleep(0.01)
    return reply(prompt.upper())


def test_killed_at_random_moments_a_run_ends_like_an_undisturbed_one_and_repeats_no_kept_answer(
        serve, cache, tmp_path):
    server = serve(slowly)
    expected, _ = ask(server, tmp_path / "undisturbed.jsonl", n=150)
    generator, kills, kept = random.Random(0), 0, set()
    while len(kept) < 150:
        server.seen.clear()
        child = in_child(ask, server, cache, 150)
        child.join(generator.uniform(0.01, 0.09 + 0.02 * kills))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        time.sleep(0.03)  # the server still works on what the dead client sent
        assert not kept & set(server.seen)  # what was in the file before this round was not sent in it
        for line in cache.read_bytes().split(b"\n")[:-1] if cache.exists() else []:
            with contextlib.suppress(ValueError):  # a torn line
                kept.add(json.loads(line)["request"]["messages"][0]["content"])
    records, usage = ask(server, cache, n=150)
    assert records == expected and usage["requests"] == 0 and kills >= 2


def test_ctrl_c_stops_soon_and_everything_received_is_kept(serve, cache, tmp_path):
    server, said = serve(slowly), tmp_path / "said"

    def run():
        try:
            ask(server, cache, 5000)
        except KeyboardInterrupt as stop:
            said.write_text(str(stop))

    child = in_child(run)
    while len(server.seen) < 40:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGINT)
    started = time.monotonic()
    child.join(60)
    assert child.exitcode == 0 and time.monotonic() - started < 60
    assert len(lines(cache)) == len(server.seen) < 5000  # requests under way were waited for
    assert said.read_text().startswith(f"interrupted; {len(server.seen)} of 5000 answers are kept in {cache}")


def test_a_second_ctrl_c_ends_at_once(serve, cache):
    """The first one awaits the answers under way, here for 60 seconds."""
    server = serve(lambda prompt, n: prompt != "prompt 0" and time.sleep(60) or reply())
    child = in_child(ask, server, cache, 6)
    while len(server.seen) < 6:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGINT)
    child.join(1)
    assert child.exitcode is None
    os.kill(child.pid, signal.SIGINT)
    child.join(20)
    assert child.exitcode == -signal.SIGINT


def test_a_second_process_waits_for_the_first_and_pays_for_nothing_again(serve, cache):
    server = serve(slowly)
    children = [in_child(ask, server, cache, 300) for _ in range(2)]
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert len(server.seen) == 300 and {line["status"] for line in lines(cache)} == {"answered"}
    records, usage = ask(server, cache, n=300)
    assert usage["cached"] == usage["answered"] == 300
    assert all(record["response"] == f"PROMPT {prompt_hash[4:]}" for prompt_hash, record in records.items())


def test_a_last_line_torn_at_any_byte_is_asked_again_and_never_glued_to_the_next(serve, cache):
    server = serve(lambda prompt, n: reply("ü"))
    expected, _ = ask(server, cache, n=2)
    whole = cache.read_bytes()
    start = whole.index(b"\n") + 1
    for end in (*range(start, start + 5), *range(start + 5, len(whole), 29), len(whole) - 2, len(whole) - 1):
        cache.write_bytes(whole[:end])
        records, usage = ask(server, cache, n=2)
        assert records == expected
        assert usage["requests"] == (end < len(whole) - 1)  # without its newline only, a line is whole
        records, usage = ask(server, cache, n=2)
        assert records == expected and usage["requests"] == 0
        assert cache.read_bytes().startswith(whole[:end] + b"\n" * (end > start))


def test_a_flipped_bit_anywhere_is_detected_said_and_never_an_answer(serve, cache, capsys):
    server = serve(lambda prompt, n: reply("joy"))
    expected, _ = ask(server, cache, n=3)
    whole, generator = cache.read_bytes(), random.Random(1)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        cache.write_bytes(damaged)
        records, _ = ask(server, cache, n=3, dry_run=True)
        assert records.items() <= expected.items() and len(records) >= 1
        assert len(records) == 3 or "damaged lines ignored" in capsys.readouterr().out
    cache.write_bytes(whole.replace(b"joy", b"joX", 1))
    records, usage = ask(server, cache, n=3)
    assert records == expected and usage["cached"] == 2
    assert f"{cache}: 1 damaged lines ignored, what they answered is asked again\n" == capsys.readouterr().out


def test_a_run_ends_on_the_disk(serve, cache, monkeypatch):
    synced = []
    monkeypatch.setattr(script.os, "fsync", synced.append)
    ask(serve(lambda prompt, n: reply()), cache)
    assert len(synced) == 1


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_was_written(serve, cache):
    server = serve(lambda prompt, n: reply())

    def run(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OSError, match=str(cache)):
            ask(server, cache, 50, concurrency=2)

    child = in_child(run, 5000)
    child.join(20)
    assert child.exitcode == 0
    records, usage = ask(server, cache, n=50)
    assert usage["answered"] == 50 and 5 <= usage["cached"] < 12


# ---- Anything at all as an answer ----


def any_json(generator, depth=0):
    """A random JSON value, made of the words of a chat completion more often than not."""
    names = (
        "choices message content finish_reason usage prompt_tokens completion_tokens error model refusal "
        "code type detail index").split() + [""]
    leaves = [None, True, False, 0, -1, 10**30, 1.5, -0.0, 1e308, "", " ", "joy", "\ud800", "\x00", "length"]
    leaves += ["content_filter", "insufficient", "😀", "x" * 5000]
    kind = generator.randrange(5) if depth < 5 else 0
    if kind == 0:
        return generator.choice(leaves)
    if kind == 1:
        return [any_json(generator, depth + 1) for _ in range(generator.randrange(4))]
    return {generator.choice(names): any_json(generator, depth + 1) for _ in range(generator.randrange(5))}


def test_an_answer_that_is_huge_is_cut_and_asked_again(serve, cache):
    """400 KB on the wire were 400 MB of answer once: memory is bounded, and so is the file."""
    body = gzip.compress(json.dumps(reply("x" * 30_000_000)).encode())
    server = serve(lambda prompt, n: (200, {"Content-Encoding": "gzip"}, body))
    records, _ = ask(server, cache, n=1, max_retries=1)
    assert records["hash0"]["status"] == "failed" and "after 1048576 bytes" in records["hash0"]["error"]
    assert len(server.seen) == 2 and cache.stat().st_size < 10_000


def test_an_answer_that_drips_ends_with_the_time_out():
    """A byte now and then is no broken connection, and would hold its worker for ever."""
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(390):
                connection.sendall(b" " * 256)
                time.sleep(0.02)

    threading.Thread(target=drip, daemon=True).start()
    client = client_of("tiny", "requests.jsonl", f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    client.timeouts = 0.1, 0.4
    status, answer, *_ = client.post({})
    assert status == 200 and "or 0.5 s no end" in answer["error"]


def mutated_reply(generator):
    answer = reply()
    spot = generator.choice([answer, answer["choices"][0], answer["choices"][0]["message"], answer["usage"]])
    spot[generator.choice(list(spot))] = any_json(generator)
    return answer


def any_bodies(n):
    generator = random.Random(2)
    odd = [b"[" * 200_000, b'{"a":' * 50_000, b'{"choices": NaN}', b'{"choices": 1e999}', b"1" * 6000,
        b"null"]
    odd += [b"\x00", b'{"model": "\xff"}', '{"choices": []}'.encode("utf-16"), b"<html>", b'{"choices":[]}x']
    made = [json.dumps(any_json(generator) if i % 2 else mutated_reply(generator)).encode() for i in range(n)]
    return odd + made


def test_any_json_as_an_answer_is_recorded_and_nothing_else_happens(serve, cache, monkeypatch):
    monkeypatch.setattr(script, "STOP_AFTER_FAILURES", 10**6)
    bodies = any_bodies(400)
    server = serve(lambda prompt, n: (200, {}, bodies[int(prompt.split()[1])]))
    records, usage = ask(server, cache, n=len(bodies), max_retries=0, price_in=1, price_out=1)
    assert len(records) == len(bodies) == len(lines(cache)) == usage["requests"]
    assert all((record["status"] == "answered") == bool(record["response"]) for record in records.values())
    assert all(usage[status] > 5 for status in ("answered", "empty", "failed"))
    assert usage["cost_usd"] is None  # not every answer says what it was
    again, usage = ask(server, cache, n=len(bodies), dry_run=True)
    assert again == {h: record for h, record in records.items() if record["status"] != "failed"}


@pytest.mark.parametrize("status", [400, 404, 429])
def test_any_json_as_an_error_is_one_printable_line(serve, tmp_path, status):
    bodies = any_bodies(30)
    server = serve(lambda prompt, n: (status, {}, bodies[int(prompt.split()[1])]))
    for i in range(len(bodies)):
        try:
            records, _ = query(
                {"h": f"prompt {i}"}, "tiny", tmp_path / f"{i}.jsonl", api_base=server.base, max_retries=0)
            text = records["h"]["error"]
            assert status == 429 or records["h"]["status"] == "refused"
        except ValueError as stopped:
            text = str(stopped)
        assert text.isprintable() and len(text) < 600


# ---- Servers of today ----


def openai(prompt, n, body):
    """gpt-6-luna, by OpenAI's documentation of 2026-11: errors, thoughts and usage of chat completions."""
    effort, error = body.get("reasoning_effort", "medium"), {"type": "invalid_request_error"}
    if "max_tokens" in body:
        return 400, {}, {"error": error | {
            "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.", "param": "max_tokens", "code": "unsupported_parameter"}}
    if body.get("temperature", 1) != 1 and effort != "none":
        return 400, {}, {"error": error | {
            "message": "Unsupported value: 'temperature' does not support 0 with this model. Only the "
            "default (1) value is supported.", "param": "temperature", "code": "unsupported_value"}}
    if "BAD" in prompt:
        return 400, {}, {"error": error | {
            "message": "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
            "param": None, "code": "invalid_prompt"}}
    limit, thoughts = body["max_completion_tokens"], {"none": 0, "low": 64}.get(effort, 256)
    answer = reply("joy", completion_tokens=thoughts + 4)
    if thoughts + 4 > limit:
        answer = reply("", "length", completion_tokens=limit)
    answer["usage"]["completion_tokens_details"] = {"reasoning_tokens": min(thoughts, limit)}
    return answer


openai.reads_body = True
KNOWN = {"model", "messages"}


def names_sent(server):
    return [sorted(json.loads(raw).keys() - KNOWN) for _, raw in server.bodies]


def test_refused_parameters_are_found_by_the_first_request_said_and_kept_for_the_resumption(
        serve, cache, capsys):
    server = serve(openai)
    records, usage = ask(server, cache, n=20, max_tokens=2000)
    said = capsys.readouterr().out
    assert "so max_tokens is sent as max_completion_tokens\n" in said and "temperature is left out\n" in said
    assert names_sent(server) == [["max_tokens", "temperature"], ["max_completion_tokens", "temperature"],
                                  *[["max_completion_tokens"]] * 20]
    assert json.loads(server.bodies[-1][1])["max_completion_tokens"] == 2000  # as given
    assert (usage["answered"], usage["retries"]) == (20, 0)
    assert usage["completion_tokens"] == 20 * 260
    assert lines(cache)[-1]["dialect"] == {"max_tokens": "max_completion_tokens", "temperature": None}
    assert [line["status"] for line in lines(cache)] == ["failed"] * 2 + ["answered"] * 20
    server.bodies.clear()
    assert ask(server, cache, n=40, max_tokens=2000)[1]["cached"] == 20
    assert names_sent(server) == [["max_completion_tokens"]] * 20


def test_temperature_is_0_wherever_it_is_allowed(serve, cache):
    server = serve(openai)
    ask(server, cache, reasoning_effort="none", extra=[("seed", 1), ("provider", {"only": ["a"]})])
    assert json.loads(server.bodies[-1][1]) == {
        "model": "tiny", "messages": [{"role": "user", "content": "prompt 0"}], "temperature": 0,
        "max_completion_tokens": 64, "reasoning_effort": "none", "seed": 1, "provider": {"only": ["a"]}}


@pytest.mark.parametrize("status, answer", [
    (400, {"error": {"message": "temperature must be 1", "param": "temperature"}}),
    (400, {"object": "error", "message": "Unrecognized request argument: temperature", "code": 400}),
    (422, {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]}),
    (400, b"unknown field `temperature`")])
def test_a_parameter_is_known_by_its_name_in_the_words_of_any_server(serve, cache, status, answer):
    def play(prompt, n, body):
        return (status, {}, answer) if "temperature" in body else reply()

    play.reads_body = True
    server = serve(play)
    assert ask(server, cache, n=9)[1]["answered"] == 9 and len(server.seen) == 10


def test_a_server_without_any_limit_is_asked_without_one_unless_that_could_exceed_max_cost(serve, cache):
    def play(prompt, n, body):
        refused = [name for name in body if "tokens" in name]
        return (400, {}, {"error": {"message": f"unknown {refused[0]}"}}) if refused else reply()

    play.reads_body = True
    server = serve(play)
    with pytest.raises(ValueError, match="unknown max_completion_tokens; so --max_cost cannot hold"):
        ask(server, cache, n=3, max_cost=1e6, price_in=1, price_out=1)
    assert ask(server, cache, n=3)[1]["answered"] == 3 and names_sent(server)[-1] == ["temperature"]


def test_a_model_that_thinks_to_the_limit_stops_after_five_answers_with_the_mend(serve, cache):
    server = serve(openai)
    for _ in range(2):  # the same command does not pay for more
        with pytest.raises(ValueError, match="of the first 5 prompts every answer is empty or cut: give "
                           "--reasoning_effort none or a larger --max_tokens") as stopped:
            ask(server, cache, n=1000, concurrency=32)
        assert "5 of 1000 answers are kept" in str(stopped.value) and len(server.seen) == 7
    assert ask(server, cache, n=9, max_tokens=500)[1]["answered"] == 9


def test_answers_that_are_all_cut_stop_the_run_and_one_that_is_whole_lets_it_go_on(serve, cache):
    server = serve(lambda prompt, n: reply("The most fitting labels are: jo", "length"))
    with pytest.raises(ValueError, match="of the first 3 prompts every answer is empty or cut"):
        ask(server, cache, n=3)
    server.play = lambda prompt, n: reply("joy", "stop" if prompt == "prompt 4" else "length")
    usage = ask(server, cache, n=50)[1]
    assert (usage["answered"], usage["truncated"]) == (50, 49)


THOUGHTS = "I could say love, or anger."


@pytest.mark.parametrize("content", [
    f"<think>{THOUGHTS}</think>joy", f"<think>\n{THOUGHTS}\n</think>\n\njoy", f"{THOUGHTS}</think>\njoy",
    f"joy <think>{THOUGHTS}", f"<thinking>{THOUGHTS}</thinking>joy", f"[THINK]{THOUGHTS}[/THINK]joy",
    f"<think>a<think>{THOUGHTS}</think>b</think>joy", f"<Think>{THOUGHTS}</Think>joy",
    f"<seed:think>{THOUGHTS}</seed:think>joy", f"<reasoning>{THOUGHTS}</reasoning>joy",
    f"<|channel|>analysis<|message|>{THOUGHTS}<|end|><|start|>assistant<|channel|>final<|message|>joy<|end|>",
    f"<|channel|>commentary<|message|>{THOUGHTS}<|end|><|channel|>final <|constrain|>text<|message|>joy",
    f"analysis{THOUGHTS}assistantfinaljoy",
    [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHTS}]}, {"type": "text", "text": "joy"}],
    [{"type": "reasoning", "text": THOUGHTS}, {"type": "output_text", "text": "joy"}]])
def test_thoughts_and_channels_are_no_answer(content):
    record = script.read_answer(reply(content))
    assert record["response"].strip() == "joy" and record["status"] == "answered"


@pytest.mark.parametrize("content", [
    f"<think>{THOUGHTS}", f"<|channel|>analysis<|message|>{THOUGHTS}", f"{THOUGHTS}</think>", None])
def test_thoughts_without_an_answer_are_an_empty_answer(content):
    record = script.read_answer(reply(content, "length", reasoning_content="hm"))
    assert (record["status"], record["response"], record["truncated"]) == ("empty", None, True)


def test_marks_of_thoughts_are_read_in_linear_time():
    for mark in ("<think>", "</think>", "<|channel|>final", "<|message|>"):
        started = time.monotonic()
        script.answer_of(mark * (2**20 // len(mark)))
        assert time.monotonic() - started < 10


def test_content_as_parts_is_its_text():
    parts = [{"type": "text", "text": "joy,"}, {"type": "text", "text": " love"}]
    assert script.read_answer(reply(parts))["response"] == "joy, love"
    assert script.read_answer(reply(["joy", {"text": ", love"}]))["response"] == "joy, love"


@pytest.mark.parametrize("choice", [
    {"error": {"code": 502, "message": "upstream died"}, "finish_reason": "error", "message": {}},
    {"error": {"message": "upstream died"}, "message": {"role": "assistant", "content": "jo"}},
    {"finish_reason": "error", "message": {"content": "jo"}}])
def test_an_error_in_a_choice_is_retried_and_never_cached_for_good(serve, cache, choice):
    server = serve(lambda prompt, n: {"choices": [choice]} if n <= 2 else reply())
    usage = ask(server, cache, n=2, max_retries=1)[1]
    assert (usage["failed"], usage["answered"], usage["retries"]) == (2, 0, 2)
    assert ask(server, cache, n=2)[1]["answered"] == 2


def stream(*chunks, end="data: [DONE]\n\n", line_end="\n"):
    pieces = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
    body = ": keep alive\n\n" + "".join(pieces) + end
    return 200, {"Content-Type": "text/event-stream"}, body.replace("\n", line_end).encode()


def delta(finish=None, **of):
    return {"model": "tiny-1", "choices": [{"index": 0, "delta": of, "finish_reason": finish}]}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_an_event_stream_is_read(serve, cache, line_end):
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
    server = serve(lambda prompt, n: stream(
        delta(role="assistant", content=None), delta(reasoning_content="h\u2028m"), delta(content="jo"),
        delta(content="y"), delta("stop"), usage, line_end=line_end))
    records, usage = ask(server, cache, n=4)
    assert records["hash3"]["response"] == "joy"
    assert lines(cache)[-1]["answer"]["choices"][0]["message"]["reasoning_content"] == "h\u2028m"
    assert usage["answered"] == 4 and usage["prompt_tokens"] == 20 and usage["models"] == ["tiny-1"]


@pytest.mark.parametrize("bad", [stream(delta(content="jo"), end=""), stream({"error": {"message": "no"}}),
                                 stream("x"), stream({"choices": {}}), stream({"choices": [3]})])
def test_a_broken_event_stream_is_a_failure_with_its_reason(serve, cache, bad):
    server = serve(lambda prompt, n: bad)
    records, usage = ask(server, cache, n=2, max_retries=1)
    assert usage["failed"] == 2 and len(records["hash0"]["error"]) > 20


def test_a_key_that_a_stream_sends_in_pieces_is_redacted(serve, cache, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda prompt, n: stream(delta(content=f"joy {KEY[:9]}"), delta("stop", content=KEY[9:])))
    assert ask(server, cache)[0]["hash0"]["response"] == "joy [key]" and KEY[9:] not in cache.read_text()


@pytest.mark.parametrize("status", [200, 404])
def test_a_web_page_in_the_place_of_an_api_stops_at_once(serve, cache, status):
    server = serve(lambda prompt, n: (status, {"Content-Type": "text/html"}, b"<!DOCTYPE html><p>Hello"))
    with pytest.raises(ValueError, match=f"HTTP {status}: <!DOCTYPE html>.*a web page: does --api_base"):
        ask(server, cache, n=9)
    assert len(server.seen) == 1


def test_of_1000_prompts_30_are_moderated_and_the_run_ends_with_30_refused(serve, cache):
    asked = {f"h{i}": f"{i} {'BAD' * (i % 33 == 0 and i < 990)}" for i in range(1000)}  # the first one, too
    server = serve(openai)
    records, usage = query(asked, "tiny", cache, server.base, reasoning_effort="none", concurrency=32)
    assert (usage["answered"], usage["refused"], usage["failed"]) == (970, 30, 0)
    assert records["h33"]["error"].startswith("Invalid prompt: your prompt was flagged")
    assert records["h33"]["response"] is None and len(server.seen) == 1001
    assert query(asked, "tiny", cache, server.base, reasoning_effort="none")[1]["cached"] == 1000


def test_a_server_that_refuses_all_first_prompts_stops_and_they_are_asked_again(serve, cache):
    server = serve(lambda prompt, n: (403, {}, {"error": {"message": "Your organization is not verified"}}))
    with pytest.raises(ValueError, match="of the first 5 prompts all are refused: Your organization is not"):
        ask(server, cache, n=100)
    assert len(server.seen) == 5
    server.play = lambda prompt, n: reply()
    assert ask(server, cache, n=100)[1]["answered"] == 100


FORBIDDEN = 403, {}, {"error": {"message": "You have no permission", "code": "invalid_api_key"}}


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_key_that_is_revoked_in_the_middle_stops_the_run_and_what_it_was_refused_is_asked_again(
        serve, cache, concurrency):
    server = serve(lambda prompt, n: reply() if len(server.seen) <= 50 else FORBIDDEN)
    with pytest.raises(ValueError, match="refuses what it answered before: HTTP 403: You have no permission"):
        ask(server, cache, n=1000, concurrency=concurrency)
    with pytest.raises(ValueError, match="refuses what it answered before"):  # still revoked
        ask(server, cache, n=1000, concurrency=concurrency)
    assert len(server.seen) < 50 + 2 * 60
    server.play = lambda prompt, n: reply()
    usage = ask(server, cache, n=1000, concurrency=concurrency)[1]
    assert (usage["answered"], usage["refused"], usage["cached"]) == (1000, 0, 50)


def test_moderation_of_many_prompts_in_a_row_in_the_same_words_goes_on(serve, cache):
    server = serve(lambda prompt, n: FORBIDDEN if 10 <= int(prompt.split()[1]) < 60 else reply())
    for cached in (0, 90):
        usage = ask(server, cache, n=90)[1]
        assert (usage["answered"], usage["refused"], usage["cached"]) == (40, 50, cached)


def test_a_context_that_is_too_long_is_no_refused_parameter(serve, cache):
    words = "'max_tokens' is too large: 64. This model's maximum context length is 32 tokens"
    server = serve(lambda prompt, n: (400, {}, {"error": {"message": words, "param": "max_tokens"}})
                   if prompt in ("prompt 0", "prompt 7") else reply())
    records, usage = ask(server, cache, n=9)
    assert (usage["refused"], usage["answered"], records["hash7"]["error"]) == (2, 7, words)
    assert names_sent(server) == [["max_tokens", "temperature"]] * 9


@pytest.mark.parametrize("usage, completion", [
    ({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 113}, 104),  # thoughts only in the total
    ({"prompt_tokens": 9, "completion_tokens": 104, "total_tokens": 113}, 104),
    ({"prompt_tokens": 9, "completion_tokens": 104, "total_tokens": None}, 104)])
def test_thoughts_are_counted_as_output(usage, completion):
    assert script.read_answer(reply() | {"usage": usage})["tokens"] == (9, completion)


def test_the_cache_belongs_to_model_prompt_and_parameters_and_not_to_a_port(serve, cache, tmp_path, capsys):
    first, second = serve(lambda prompt, n: reply("joy")), serve(lambda prompt, n: reply("love"))
    ask(first, cache, n=5)
    records, usage = ask(second, cache, n=9)
    assert usage["cached"] == 5 and usage["requests"] == len(second.seen) == 4
    assert f"the same model's answers at {first.base} are used" in capsys.readouterr().out
    (tmp_path / "old").mkdir()
    cache.rename(tmp_path / "old" / "answers.jsonl")
    usage = ask(second, cache, n=12, cache_from=[tmp_path / "old"], price_in=1, price_out=1)[1]
    assert usage["cached"] == 9 and len(lines(cache)) == 3
    for other in ({"max_tokens": 65}, {"extra": [("seed", 2)]}, {"reasoning_effort": "low"}):
        assert ask(second, tmp_path / "x", cache_from=[tmp_path / "old"], dry_run=True, **other)[1][
            "cached"] == 0
    with pytest.raises(FileNotFoundError, match="--cache_from: no .*nowhere"):
        ask(second, cache, cache_from=[tmp_path / "nowhere"])
