"""Requests per second and memory of the GPT API client, beside what a bare client gets from the same server.

    python tests/bench/api.py [--requests 5000] [--concurrency 32] [--latency_ms 0 20] [--results FILE]

The server is a process of its own on 127.0.0.1 and answers after `latency_ms`; the bare client writes
prepared bytes to one raw socket per thread and reads the answers unparsed. Both share the machine's cores, so
the bare figure is the server's limit here; with a latency the bound is concurrency / latency.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (2, 1)]

from measure import add_results, record  # noqa: E402

BODY = json.dumps({
    "model": "tiny-2026-01-01", "usage": {"prompt_tokens": 184, "completion_tokens": 4},
    "choices": [{"message": {"role": "assistant", "content": "joy"}, "finish_reason": "stop"}]}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def serve(port, latency_s):
    """Answers every POST on a kept-alive connection; sends the port through a pipe."""

    async def answer(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
                await reader.readexactly(int(headers[b"content-length"]))
                if latency_s:
                    await asyncio.sleep(latency_s)
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def prompts(n):
    """n distinct prompts of 750 bytes, the length of the paper's."""
    return {f"hash{i}": f"{i:07d} ".ljust(750, "x") for i in range(n)}


def bare(port, n, concurrency):
    """Seconds that `concurrency` threads take for n requests, with nothing but sockets."""
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 750}],
                       "temperature": 0, "max_tokens": 64}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    def work(count):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(count):
                connection.sendall(request)
                missing = len(ANSWER)
                while missing:
                    missing -= len(connection.recv(missing))

    threads = [threading.Thread(target=work, args=(n // concurrency,)) for _ in range(concurrency)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - started) * n / (n // concurrency * concurrency)


def client(result, port, n, concurrency):
    """Sends (seconds, CPU seconds, MiB before, MiB at the peak, seconds of a second run) through `result`."""
    from test_api import query

    def run():
        started = time.perf_counter()
        usage = query(asked, "tiny", cache, f"http://127.0.0.1:{port}/v1", concurrency=concurrency)[1]
        assert usage["answered"] == n, usage
        return time.perf_counter() - started

    asked = prompts(n)
    sys.stderr = open(os.devnull, "w")  # the progress bar
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "requests.jsonl"
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = run()
        after = resource.getrusage(resource.RUSAGE_SELF)
        again = run()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result.send((seconds, cpu, before.ru_maxrss / 1024, after.ru_maxrss / 1024, again))


def in_process(function, *args):
    """(what `function` sends first, the process)."""
    context = multiprocessing.get_context("spawn")  # a fresh one, so that its memory is its own
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(sender, *args), daemon=True)
    process.start()
    return receiver.recv(), process


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time the GPT API client on 127.0.0.1.", allow_abbrev=False)
    parser.add_argument("--requests", type=int, nargs="+", default=[1000, 5000],
                        help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--latency_ms", type=float, nargs="+", default=[0, 20, 200],
                        help="milliseconds the server takes per answer (default: %(default)s)")
    add_results(parser)
    args = parser.parse_args(argv)
    print("| server's latency | requests | bare sockets, 1/s | client, 1/s | client's CPU per request "
          "| memory before, at the peak | all cached |")
    print("|---|---|---|---|---|---|---|")
    for latency_ms in args.latency_ms:
        port, server = in_process(serve, latency_ms / 1000)
        for n in args.requests:
            limit = n / bare(port, n, args.concurrency)
            (seconds, cpu, before, peak, again), _ = in_process(client, port, n, args.concurrency)
            print(f"| {latency_ms:g} ms | {n} | {limit:.0f} | {n / seconds:.0f} | {cpu / n * 1000:.2f} ms "
                  f"| {before:.0f}, {peak:.0f} MiB | {again:.2f} s |", flush=True)
            row = f"API client, {n} requests, {latency_ms:g} ms"
            record(args, row, "requests/s", [n / seconds], [limit], note="the peer is bare sockets")
            record(args, row, "ms of CPU per request", [cpu / n * 1000])
            record(args, row, "MiB at the peak", [peak], note=f"{before:.0f} MiB before")
            record(args, row, "s, all cached", [again])
        server.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
