"""The README.md of an exported model: what it is, what it learned from, how well, and how to use it.

In: the run's config and its log. Out: Markdown with the front matter that the Hugging Face hub reads; the licence is
left to whoever publishes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sslx

USES = {
    "hf": """```python
from transformers import AutoTokenizer, {name}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {name}.from_pretrained("FOLDER")
```""",
    "stablehlo": """```python
import numpy as np
from jax import export
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER/tokenizer")
features = export.deserialize(open("FOLDER/features.stablehlo", "rb").read()).call
given = tokenizer(["a text"], padding="max_length", truncation=True, max_length={length}, return_tensors="np")
real = given["attention_mask"].astype(np.int32)  # 1, and 0 for padding
rows = {"tokens": given["input_ids"].astype(np.int32), "segment_ids": real, "positions": real * np.arange({length})}
rows["positions"] = rows["positions"].astype(np.int32)
features(rows)  # one dictionary, with all inputs that the table above names
```""",
}


def last_metrics(run: Path, step: int) -> dict[str, float]:
    """The last evaluation up to a step in a run's ``metrics.jsonl``; {} if there is none."""
    file, found = run / "metrics.jsonl", {}
    for line in file.read_text(encoding="utf8").splitlines() if file.is_file() else ():
        record = json.loads(line)
        if "eval/loss" in record and record["step"] <= step:
            found = {name: value for name, value in record.items() if name == "step" or name.startswith("eval/")}
    return found


def model_card(
    run: Path, config: Mapping[str, Any], step: int, *, form: str, class_name: str, notes: Mapping[str, str]
) -> str:
    """Writes the card.

    Args:
      run: The run's folder.
      config: Its config.
      step: The checkpoint that is exported.
      form: ``hf`` or ``stablehlo``.
      class_name: The class of transformers, or "".
      notes: More rows for the table.
    """
    part = "pretext" if "pretext" in config else "task"
    entry = {"pretext": "main", "task": "finetune"}[part]
    data, metrics = config["data"], last_metrics(run, step)
    rows = {
        "model": f"{config['model']['name']}{f', {class_name}' if class_name else ''}",
        "objective": config[part]["name"],
        "data": f"{data['source']}, split {data['train_split']}",
        "started from": config["init"] or "random parameters",
        "steps": f"{step:,} of {config['batch_size']:,} rows",
        **{f"held-out {name.removeprefix('eval/')}": f"{v:.4f}" for name, v in metrics.items() if name != "step"},
        "held-out rows": f"split {data['eval_split']}, at step {metrics['step']:,}" if metrics else "not evaluated",
        **notes,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    library = "transformers" if form == "hf" else "jax"
    use = USES[form].replace("{name}", class_name).replace("{length}", str(data.get("seq_len", "")))
    return f"""---
license: # to be filled in by whoever publishes the model
library_name: {library}
tags: [sslx]
---

# {run.name}

Trained with sslx {sslx.__version__}.

| | |
|---|---|
{table}

{use}

Trained by `python -m sslx.{entry}` with this config, and exported by
`python -m sslx.export --run={run} --format={form} --step={step} --out=FOLDER`:

```json
{json.dumps(dict(config), indent=2)}
```
"""
