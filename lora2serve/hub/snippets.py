"""How to run what a repository holds, one snippet per engine. The tests run these very lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from lora2serve.adapters.lint import max_lora_rank

PROMPT = "Hello! What can you do?"


def merged(repo_id: str, chat: bool, quant: str | None = None) -> list[tuple[str, str, str]]:
    """``(title, language, code)`` for merged weights; quantized ones are for vLLM, where their parity is measured."""
    vllm = ("vLLM", "shell", f"vllm serve {repo_id}\n{curl(repo_id, chat)}")
    return [vllm] if quant else [vllm, ("transformers", "python", transformers(repo_id, chat))]


def adapter(repo_id: str, base: str, rank: int, chat: bool) -> list[tuple[str, str, str]]:
    """The same for a PEFT adapter, which needs its base."""
    name = repo_id.rpartition("/")[2]
    load = (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
    )
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {max_lora_rank(rank)} --lora-modules {name}={repo_id}"
    return [("vLLM", "shell", f"{serve}\n{curl(name, chat)}"), ("PEFT", "python", load + generate(chat))]


def gguf(repo_id: str, files: Mapping[str, Sequence[str]], chat: bool) -> list[tuple[str, str, str]]:
    """The same for GGUF files; ``files`` maps a type, such as Q4_K_M, to its files: several where it is split.

    Ollama loads no split files (ollama/ollama issue 5245).
    """
    kind = default_type(files)
    tag = f"{repo_id}:{kind}"
    ask = (
        f'answer = model.create_chat_completion([{{"role": "user", "content": {json.dumps(PROMPT)}}}], max_tokens=64)\n'
        'print(answer["choices"][0]["message"]["content"])\n'
        if chat
        else f'print(model({json.dumps(PROMPT)}, max_tokens=64)["choices"][0]["text"])\n'
    )
    first, *more = files[kind]
    others = f", additional_files={json.dumps(more)}" if more else ""
    load = f'model = Llama.from_pretrained("{repo_id}", "{first}"{others}, verbose=False)'
    python = f"from llama_cpp import Llama\n\n{load}\n{ask}"
    return [
        *([] if more else [("Ollama", "shell", f"ollama run hf.co/{tag}")]),
        ("llama.cpp", "shell", f"llama-server -hf {tag}"),
        ("LM Studio", "shell", f"lms get {repo_id}@{kind.lower()}"),
        ("llama-cpp-python", "python", python),
    ]


def gguf_adapter(repo_id: str, file: str) -> list[tuple[str, str, str]]:
    """The same for an adapter as GGUF, beside a GGUF of its base."""
    fetch = f"hf download {repo_id} {file} --local-dir ."
    return [
        ("llama.cpp", "shell", f"{fetch}\nllama-server -m base.gguf --lora {file}"),
        (
            "Ollama",
            "shell",
            f"{fetch}\nprintf 'FROM ./base.gguf\\nADAPTER ./{file}\\n' > Modelfile\nollama create my-model",
        ),
    ]


def transformers(repo_id: str, chat: bool) -> str:
    """Python for merged weights."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
    ) + generate(chat)


def generate(chat: bool) -> str:
    """The second half of a Python snippet, after ``model`` and ``tokenizer``."""
    text = json.dumps(PROMPT)
    inputs = (
        f'messages = [{{"role": "user", "content": {text}}}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)\n"
        if chat
        else f'inputs = tokenizer({text}, return_tensors="pt")\n'
    )
    return (
        f"{inputs}output = model.generate(**inputs, max_new_tokens=64)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n'
    )


def curl(model: str, chat: bool) -> str:
    """A request to an OpenAI-compatible server on this machine."""
    path, question = (
        ("chat/completions", {"messages": [{"role": "user", "content": PROMPT}]})
        if chat
        else ("completions", {"prompt": PROMPT})
    )
    body: dict[str, object] = {"model": model, **question, "max_tokens": 64}
    return (
        f"curl http://localhost:8000/v1/{path} -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body, ensure_ascii=False)}'"
    )


def default_type(kinds: Iterable[str]) -> str:
    """The type that the Hub's own buttons pick: Q4_K_M where it is there."""
    names = list(kinds)
    return "Q4_K_M" if "Q4_K_M" in names else names[0]
