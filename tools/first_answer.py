"""`make run`: starts the server on the embedded demo model, asks one question over HTTP, prints the streamed answer.

Then it keeps serving until Ctrl-C, or stops at once with --once.
"""

import argparse
import json
import subprocess
import sys
import time

import httpx

QUESTION = "What is Inhouse?"


def wait_ready(base: str, server: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Polls /ready; raises SystemExit if the server ends or does not become ready in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}; its message stands above")
        try:
            if httpx.get(f"{base}/ready", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"the server was not ready after {seconds:.0f} s")


def ask(base: str, question: str) -> None:
    """Streams one chat completion and prints the text as it comes."""
    body = {
        "model": "demo", "stream": True, "temperature": 0,
        "messages": [{"role": "user", "content": question}],
    }  # fmt: skip
    print(f"\n> {question}\n", flush=True)
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=120, trust_env=False) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"HTTP {answer.status_code}: {answer.read().decode()}")
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                if event.get("error"):
                    raise SystemExit(f"the answer broke off: {event['error']['message']}")
                for choice in event["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
    print("\n", flush=True)


def main() -> int:
    """Returns the exit status of the server, 0 with --once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the first answer")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--question", default=QUESTION)
    args = parser.parse_args()
    base = f"http://127.0.0.1:{args.port}"
    server = subprocess.Popen([sys.executable, "-m", "inhouse", "serve", "demo", "--port", str(args.port)])
    try:
        wait_ready(base, server)
        ask(base, args.question)
        if args.once:
            return 0
        print(f"serving at {base}/v1 (any OpenAI client works; Ctrl-C stops)", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        try:
            server.wait(timeout=15)
        except subprocess.TimeoutExpired:
            server.kill()


if __name__ == "__main__":
    sys.exit(main())
