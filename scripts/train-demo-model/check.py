"""Checks the exported file with stock llama.cpp: the same tokens for the same text, and stories that read well.

The tokenizer is asked through llama-server, on a socket file; the text comes from llama-completion at temperature 0.
"""

import argparse
import http.client
import json
import pathlib
import socket
import subprocess
import tempfile
import time

import stories
import tokenizer

ODD_TEXTS = ["", " ", "  two  spaces ", "Once upon a time", "\n", "\n\n\"Hello!\" said Pip.", "tab\there", "Ümläut, naïve, 北京, 🙂",
             "UPPER lower 12345 +-*/", "a" * 40, "Why?\" asked Tom.\n\nThen", "trailing space ", "<s> </s> <unk> <0x41>"]


class SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


def ask(path, target, question):
    connection = SocketConnection(path)
    connection.request("POST", target, json.dumps(question), {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())


def check_tokens(gguf, sp, programs):
    """Every text must come out as the very pieces that the model was trained with."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/server.sock"
        server = subprocess.Popen([programs / "llama-server", "-m", gguf, "--host", path, "-c", "256", "-t", "1", "-np", "1"],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.time() + 60
            while True:
                try:
                    if ask(path, "/tokenize", {"content": "a"}).get("tokens"):
                        break
                except (OSError, ValueError):
                    pass
                if time.time() > deadline or server.poll() is not None:
                    raise SystemExit("check: llama-server does not start")
                time.sleep(0.2)
            texts = stories.corpus(999, 300) + ODD_TEXTS
            for text in texts:
                theirs = ask(path, "/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
                ours = sp.encode(text)
                if theirs != ours:
                    raise SystemExit(f"check: tokens differ for {text!r}:\n  llama.cpp {theirs}\n  training  {ours}")
            print(f"check: {len(texts)} texts, the same tokens in llama.cpp")
        finally:
            server.terminate()
            server.wait()


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=pathlib.Path)
    arguments.add_argument("gguf", type=pathlib.Path)
    arguments.add_argument("programs", type=pathlib.Path)
    a = arguments.parse_args()
    size = a.gguf.stat().st_size
    if size > 8_000_000:
        raise SystemExit(f"check: {size} bytes, more than 8 MB")
    check_tokens(a.gguf, tokenizer.load(a.folder / "tokenizer.model"), a.programs)
    for prompt in ("Once upon a time", "One day, a fox met", "Lily had a red ball"):
        done = subprocess.run([a.programs / "llama-completion", "-m", a.gguf, "-no-cnv", "--temp", "0", "-n", "120", "-t", "2",
                               "--no-display-prompt", "-p", prompt], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        print(f"--- {prompt}{done.stdout}\n")


if __name__ == "__main__":
    main()
