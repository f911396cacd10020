"""Tasks of lm-evaluation-harness that lie here: the mayors of the demo's towns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

TOWNS = ("Wexley", "Fenmark", "Kelheim", "Osbury", "Luthen", "Emberlin")
NAMES = ("Leon Lake", "Boris Fisher", "Clara Marsh")


def write_island_tasks(folder: Path, towns: Sequence[str] = TOWNS) -> Path:
    """``island_choice``, ``island_answer`` and ``island_text``: multiple choice, free answers, and whole texts."""
    rows = [
        {"question": f"The mayor of {town} is", "choices": list(NAMES), "label": number % 3, "answer": NAMES[number % 3]}
        for number, town in enumerate(towns)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}}}\ntest_split: test\n"
    (folder / "island_choice.yaml").write_text(
        f"task: island_choice\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "island_answer.yaml").write_text(
        f"task: island_answer\n{common}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: answer\ngeneration_kwargs: {until: ['.'], max_gen_toks: 12, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (folder / "island_text.yaml").write_text(
        f"task: island_text\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}} {{answer}}.'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    return folder
