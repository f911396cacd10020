"""Are exports byte-identical to those of an older commit? Every target and type, of one run, by both trees.

    python scripts/compare_exports.py                           # trains the demo by both, compares that as well
    python scripts/compare_exports.py runs/demo                 # against the commit that the layout was released with
    python scripts/compare_exports.py runs/demo --commit HEAD~5

Manifests (lora2serve.json) are left out: they hold versions and hashes of themselves. So are evaluations: since ad5255d
their loss is the mean over tokens, not over batches; and as they no longer draw a random number from the training's
own, which moved the masks of dropout after each, the demo is trained without dropout. Prints what differs; exit code 1
if anything does, or if the control, one flipped bit, is not seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELEASED = "8b9b6f0"
MANIFEST = "lora2serve.json"
# Of Ollama: system messages that a template refuses, turns in any order (3449ef9, e41eab4), on purpose.
CHANGED = re.compile(r"(targets|adapter)/ollama[^/]*/(template|Modelfile): differs")
COMPRESSED = ("fp8", "fp8-block", "int8", "w8a16", "w4a16", "nvfp4", "mxfp4")


def commands(run: Path, imatrix: Path) -> Iterator[tuple[str, list[str]]]:
    """``(folder, arguments of export)``: together every target and every type that needs no environment of its own."""
    from converters.gguf.presets import PRESETS

    yield "targets", [str(run), "-t", "vllm", "-t", "ollama", "-t", "lmstudio", "-t", "adapter", "-t", "gguf-adapter"]
    yield "compressed", [str(run), "-t", "vllm", *(f"--quant={quant}" for quant in COMPRESSED)]
    yield "original", [str(run), "-t", "vllm", "-t", "gguf", "-q", "F16", "--merge-base", "original"]
    yield "trained", [str(run), "-t", "vllm", "-t", "gguf", "-q", "Q8_0", "--merge-base", "trained"]
    yield "float32", [str(run), "-t", "vllm", "--dtype", "fp32", "--shard-size", "2MB"]
    yield "split", [str(run), "-t", "gguf", "-q", "F32", "--split-size", "2MB", "--match-reference"]
    yield "adapter", [str(run), "-t", "ollama", "--as", "adapter", "--from", "demo-base"]
    types = [f"--quant={quant}" for quant in PRESETS]
    yield "gguf", [str(run), "-t", "gguf", *types, "--imatrix", str(imatrix)]


def lora2serve(tree: Path, arguments: list[str], folder: Path) -> None:
    """The command line by the code of one tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "lora2serve", "--quiet", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"{tree}: lora2serve {' '.join(arguments)}: exit code {done.returncode}")


def export(tree: Path, arguments: list[str]) -> None:
    """``lora2serve export``, in an empty folder."""
    with tempfile.TemporaryDirectory() as empty:
        lora2serve(tree, ["export", *arguments], Path(empty))


def train(tree: Path, folder: Path) -> Path:
    """The run of ``lora2serve train demo`` in that folder, without dropout."""
    folder.mkdir(parents=True)
    lora2serve(tree, ["train", "demo", "--set", "train.lora.dropout=0"], folder)
    return folder / "runs" / "demo"


def losses(run: Path) -> list[dict[str, float]]:
    """Every figure of every step, those apart that measure time; no evaluations."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [row for row in rows if "loss" in row]
    return [{key: row[key] for key in sorted(row) if "second" not in key and "time" not in key} for row in steps]


def training_differences(before: Path, after: Path) -> list[str]:
    """In what two runs differ: losses, and the weights of the adapter."""
    old, new = losses(before), losses(after)
    first = next((number for number, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), None)
    lines = [f"losses: step {first + 1} differs"] if first is not None else []
    lines += [f"losses: {len(new)} steps, expected {len(old)}"] if len(new) != len(old) or not old else []
    weights = [run / "adapter" / "adapter_model.safetensors" for run in (before, after)]
    return lines + (["adapter: differs"] if weights[0].read_bytes() != weights[1].read_bytes() else [])


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below, manifests apart."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(before: Path, after: Path) -> list[str]:
    """Files that are missing, new or different, one line each."""
    old, new = digests(before), digests(after)
    lines = [f"{name}: missing" for name in sorted(old.keys() - new.keys())]
    lines += [f"{name}: new" for name in sorted(new.keys() - old.keys())]
    return lines + [f"{name}: differs" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]


def sees_a_flipped_bit(before: Path, after: Path) -> bool:
    """The control: one bit of the last file, flipped and put back."""
    path = after / list(digests(after))[-1]
    content = path.read_bytes()
    known = len(differences(before, after))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    seen = len(differences(before, after)) == known + 1
    path.write_bytes(content)
    return seen


def main() -> None:
    """Export by both trees, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a finished run, such as runs/demo (default: train the demo)")
    parser.add_argument("--commit", default=RELEASED, help="the commit to compare with (default: %(default)s)")
    parser.add_argument("--before", type=Path, help="keep that commit's exports here, and take them if they are there")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        tree, after = Path(temporary, "tree"), Path(temporary, "after")
        before = options.before.resolve() if options.before else Path(temporary, "before")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, options.commit], cwd=ROOT, check=True)
        try:
            count, lines, changed = 0, [], []
            if options.run:
                run = options.run.resolve()
            else:
                run = train(tree, Path(temporary, "old"))  # each later release reads it, the older one not the newer's
                lines += training_differences(run, train(ROOT, Path(temporary, "new")))
                print(f"training: {len(losses(run))} rows of losses and the adapter compared", file=sys.stderr)
            imatrix = before / "matrix" / "imatrix.gguf"
            if not imatrix.is_file():
                export(tree, [str(run), "-t", "gguf", "-q", "Q8_0", "--calibrate", "train", "-o", str(imatrix.parent)])
            for name, arguments in commands(run, imatrix):
                if not (before / name).is_dir():
                    export(tree, [*arguments, "-o", str(before / name)])
                export(ROOT, [*arguments, "-o", str(after / name)])
                found = [f"{name}/{line}" for line in differences(before / name, after / name)]
                on_purpose = [line for line in found if CHANGED.fullmatch(line)]
                lines += [line for line in found if line not in on_purpose]
                changed += on_purpose
                count += len(digests(after / name))
                print(f"{name}: {len(digests(after / name))} files compared", file=sys.stderr)
            same = not lines and sees_a_flipped_bit(before / "targets", after / "targets")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    print(*(f"{line}, on purpose" for line in changed), sep="\n", end="\n" if changed else "")
    print("\n".join(lines) if lines else f"{count - len(changed)} files: byte-identical to those of {options.commit}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
