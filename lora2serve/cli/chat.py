"""``lora2serve chat``."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import Command, complete_exports, progress
from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.parity_check.chat_session import Answer, ChatSession


@click.command(
    cls=Command,
    short_help="Ask a model, in the engine that will serve it.",
    examples=[
        ("lora2serve chat", "runs/latest, with the template as it is served"),
        ("lora2serve chat --against base", "and what the model without the adapter says"),
        ("lora2serve chat runs/demo/exports/ollama-Q4_K_M --against runs/demo", "an export beside its run"),
        ("lora2serve chat http://localhost:8000 --url-model demo", "a server that runs"),
        ('lora2serve chat --ask "Who governs Wexley?" --json', "one question, for scripts"),
    ],
)
@click.argument("model", metavar="[RUN | EXPORT | ADAPTER | URL]", required=False, shell_complete=complete_exports)
@click.option(
    "--against", metavar="MODEL", shell_complete=complete_exports,
    help="Ask a second one the same: base, or any other RUN, EXPORT, ADAPTER or URL.",
)  # fmt: skip
@click.option("--ask", metavar="TEXT", help="One question; so is what is piped in.")
@click.option("--system", metavar="TEXT", default="", help="The system message.")
@click.option("--max-tokens", type=int, metavar="N", help="Tokens of an answer (default: the model's own, or 1024).")
@click.option(
    "--temperature", type=float, metavar="X",
    help="0 takes the likeliest token (default: the model's own, or 0; a server's is its own).",
)  # fmt: skip
@click.option("--base", metavar="MODEL", help="Adapters: the base to load (default: the one trained on).")
@click.option("--url-model", metavar="NAME", help="The model's name at the URL (default: the first it lists).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object an answer, one a line; for one question.")
@click.pass_context
def chat(
    ctx: click.Context, model: str | None, against: str | None, ask: str | None, system: str, max_tokens: int | None,
    temperature: float | None, base: str | None, url_model: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Hold a conversation with a run, an export, an adapter, a model or a server (default: runs/latest).

    Runs and adapters are asked in transformers and PEFT, vllm exports in vLLM's own server, gguf, ollama and lmstudio
    exports in llama.cpp, with the chat template as it is served. /help shows what can be typed beside questions;
    Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    from lora2serve.api import chat_with_model
    from lora2serve.cli.chat_terminal import TypedChat, clean, show_answers

    question = _question(ask)
    if as_json and question is None:
        raise UsageError("--json: for one question", "--ask TEXT, or pipe it in")
    session = chat_with_model.chat(
        model, against=against, base=base, system=clean(system), max_tokens=max_tokens, temperature=temperature,
        url_model=url_model, progress=progress(ctx),
    )  # fmt: skip
    with session:
        if question is None:
            TypedChat(session, progress(ctx)).hold()
        elif as_json:
            _show_json(session, question)
        else:
            _end_if_interrupted(show_answers(session, question, progress(ctx)))


def _question(ask: str | None) -> str | None:
    """What is asked without a terminal; None where a person will type."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # ``clean`` shows a byte that is no text
    if ask is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    from lora2serve.cli.chat_terminal import clean

    text = clean(ask if ask is not None else sys.stdin.read() if sys.stdin is not None else "").strip()
    if not text:
        raise UsageError("--ask: empty" if ask is not None else "no question: nothing was piped in", "--ask TEXT")
    return text


def _show_json(session: ChatSession, question: str) -> None:
    from dataclasses import asdict

    from lora2serve import console

    answers = session.ask(question)
    for answer in answers:
        console.result_line({"question": question, **asdict(answer), "engine": session.engines[answer.model]})
    _end_if_interrupted(answers)


def _end_if_interrupted(answers: list[Answer]) -> None:
    if any(answer.end == "interrupted" for answer in answers):
        raise KeyboardInterrupt
