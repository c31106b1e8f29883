"""Chat templates are programs that come with a model: each is tried in a process of its own before it is used.

jinja2's sandbox keeps a template from files and from Python, but not from looping, nor from making gigabytes. The
process renders with transformers' own function under limits of time, memory and length. Only then is the template
rendered here, with the same words. It starts with the first prompt, is kept, and ends with this one.
"""

from __future__ import annotations

import atexit
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from vtwcli.errors import NotFoundError
from vtwcli.io import console
from vtwcli.models.jsonfiles import PROCESSOR, TEMPLATES, TOKENIZER, read_json

SECONDS = 5.0
"""For one prompt; a template of a real model takes a thousandth of one."""
MEMORY = 256 << 20
"""Bytes beyond what the process takes by itself."""
LENGTH = 1 << 22
"""Characters of a prompt."""

_START = 120.0  # seconds until the process is there, on a machine that is busy
_FINE, _READY = "", "ready"


def template_of(processor: Any) -> str | None:
    """The chat template that a processor uses; None where there is none."""
    for owner in (processor, processor.tokenizer):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return str(template)
    return None


def check(
    processor: Any,
    template: str,
    path: Path | None,
    conversation: Sequence[Mapping[str, Any]],
    generation_prompt: bool,
) -> None:
    """Refuse a chat template that does not end, or takes or makes too much, for this conversation.

    A template that fails in another way is let through: rendering it says how.

    Args:
        processor: its tokenizer's special tokens are known to the template.
        template: the text of the template.
        path: the directory that the template comes from.
        conversation: the turns, as ``apply_chat_template`` takes them.
        generation_prompt: whether the beginning of an answer is asked for.

    Raises:
        NotFoundError: names the file of the template and the limit.
    """
    request = {
        "template": template,
        "conversation": conversation,
        "generation_prompt": generation_prompt,
        "tokens": processor.tokenizer.special_tokens_map,
    }
    # a picture stands there by the name of its type, as transformers shows it to a template
    text = json.dumps(request, default=lambda value: f"<{type(value).__name__}>")
    if reason := _refused.get(template) or _trial.run(text):
        _refused[template] = reason
        raise NotFoundError(
            f"the chat template in {template_file(path)} {reason}",
            "copy the template of the base model beside the weights",
        )


def template_file(path: Path | None) -> str:
    """The file that holds a directory's chat template, for messages."""
    if path is None:
        return "the processor"
    for name in TEMPLATES:
        if (path / name).is_file():
            return str(path / name)
    for name in (*PROCESSOR, *TOKENIZER[1:]):
        with suppress(NotFoundError, FileNotFoundError):
            if "chat_template" in read_json(path / name):
                return str(path / name)
    return str(path)


class _Trial:
    """The process that templates are tried in."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.replies: queue.Queue[str | None] = queue.Queue()
        self.possible = True

    def run(self, request: str) -> str:
        """Why a template is refused; empty where it is not, or where no process can be started."""
        with self.lock:
            if self.process is None and self.possible:
                self._start()
            if self.process is None:
                return _FINE
            try:
                assert self.process.stdin is not None
                self.process.stdin.write(request + "\n")
                self.process.stdin.flush()
                reply = self.replies.get(timeout=SECONDS)
            except queue.Empty:
                reply = f"does not end within {SECONDS:.0f} seconds"
            except OSError:
                reply = None
            except BaseException:
                self.stop()  # its answer would be taken for that to the next prompt
                raise
            if reply is None:
                reply = "ends the process that renders it: it takes too much memory or time"
            if reply != _FINE:
                self.stop()
            return reply

    def _start(self) -> None:
        atexit.register(self.stop)
        # Isolated, so that no file of the working directory is taken for a module; then with this one's own path.
        code = f"import sys; sys.path[:] = {sys.path!r}; from vtwcli.models.templates import _serve; _serve()"
        try:
            self.process = subprocess.Popen(
                [sys.executable or "", "-I", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            assert self.process.stdout is not None
            self.replies = queue.Queue()
            threading.Thread(
                target=_listen, args=(self.process.stdout, self.replies), daemon=True, name="chat-template"
            ).start()
            started = self.replies.get(timeout=_START) == _READY
        except (OSError, queue.Empty):
            started = False
        if not started:
            self.stop()
            self.possible = False
            console.warn(
                "no process can be started to try the chat template in; it is rendered without limits"
            )

    def stop(self) -> None:
        """End the process, whatever it does."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):
                    if stream is not None:
                        stream.close()


_trial = _Trial()
_refused: dict[str, str] = {}  # template -> why, so that another try does not take as long again


def _listen(stream: IO[str], replies: queue.Queue[str | None]) -> None:
    """Hand on what the process says, and None when it has ended."""
    with suppress(ValueError, OSError):  # closed meanwhile
        for line in stream:
            replies.put(json.loads(line))
    replies.put(None)


def _serve() -> None:
    """The process: renders what it is given, a line at a time, and says whether it was within the limits."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _say(_READY)
    for line in sys.stdin:
        request = json.loads(line)
        _limit_time()
        try:
            rendered: Any = render_jinja_template(
                conversations=[request["conversation"]],
                chat_template=request["template"],
                add_generation_prompt=request["generation_prompt"],
                **request["tokens"],
            )
            reply = _FINE
            if len(rendered[0][0]) > LENGTH:
                reply = f"makes a prompt of more than {LENGTH:,} characters"
        except MemoryError:
            reply = f"takes more than {MEMORY >> 20} MiB of memory"
        except RecursionError:
            reply = "calls itself without end"
        except Exception:
            reply = _FINE  # the rendering that counts says it better
        _say(reply)


def _say(word: str) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


def _limit_memory() -> None:
    """No more than ``MEMORY`` beyond what is in use now, where the system can tell and keep it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _limit_time() -> None:
    """Should the process that asks be gone, this one ends by itself."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + 2 * SECONDS + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
