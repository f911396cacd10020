"""Shapes of credentials, searched for in everything before it is sent.

Each shape has a fixed prefix and a fixed minimal length, so that ordinary text and vocabularies do not match.
"""

from __future__ import annotations

import re

# kind -> its prefixes, and what must follow one of them
SHAPES = {
    "a Hugging Face token": ((b"hf_", b"api_org_"), rb"[A-Za-z0-9]{30,}"),
    "a GitHub token": ((b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"), rb"[A-Za-z0-9_]{36,}"),
    "a GitLab token": ((b"glpat-",), rb"[A-Za-z0-9_-]{20,}"),
    "an API key": ((b"sk-ant-", b"sk-proj-", b"sk-or-"), rb"[A-Za-z0-9_-]{20,}"),
    "an AWS key": ((b"AKIA", b"ASIA"), rb"[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "a Google key": ((b"AIza",), rb"[A-Za-z0-9_-]{35}"),
    "a Slack token": ((b"xoxb-", b"xoxp-", b"xoxa-", b"xoxs-"), rb"[0-9]{8,}-[A-Za-z0-9-]{20,}"),
    "a private key": ((b"-----BEGIN ",), rb"(?:[A-Z]+ )?PRIVATE KEY-----"),
}
LONGEST_SECRET = 256  # bytes that a search over pieces must let overlap
_AFTER = {kind: re.compile(after) for kind, (_, after) in SHAPES.items()}
_TEXT = re.compile(
    "|".join(f"(?:{'|'.join(map(re.escape, map(bytes.decode, p)))}){a.decode()}" for p, a in SHAPES.values())
)


def find_secret(data: bytes) -> str:
    """The kind of the first credential-shaped text in ``data``, or an empty string."""
    for kind, (prefixes, _) in SHAPES.items():
        for prefix in prefixes:  # a plain search for the prefix is hundreds of times faster than one pattern
            at = data.find(prefix)
            while at >= 0:
                inside_a_word = at > 0 and data[at - 1 : at].isalnum()
                if not inside_a_word and _AFTER[kind].match(data, at + len(prefix)):
                    return kind
                at = data.find(prefix, at + 1)
    return ""


def masked(text: str) -> str:
    """``text`` with every credential-shaped part replaced."""
    return _TEXT.sub("***", text)
