"""The README.md of an exported model: what it is, what it learned from, how well, and how to use it.

In: the run's config and its log. Out: Markdown with the front matter that the Hugging Face hub reads; the licence is
left to whoever publishes. Of a path on this machine's disks only the last part is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sslx
from sslx.data.images import held_out_share
from sslx.train.run_folder import read_splits

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
USES_OF_PICTURES = {
    "hf": """```python
from PIL import Image
from transformers import AutoImageProcessor, {name}

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = {name}.from_pretrained("FOLDER")
model(**processor(Image.open("a.png"){mode}, return_tensors="pt"))
```""",
    "stablehlo": """```python
import numpy as np
from jax import export
from PIL import Image, ImageOps

features = export.deserialize(open("FOLDER/features.stablehlo", "rb").read()).call
picture = ImageOps.fit(Image.open("a.png").convert("{mode}"), ({size}, {size}), bleed={bleed})
features({"image": np.asarray(picture, np.uint8).reshape(1, {size}, {size}, {channels})})
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


_LOCAL = re.compile(r"((?:\w+:)*)(?:~\w*)?/.*?([^/]*)/*")  # perhaps with a scheme: jsonl:/a/b.jsonl, scratch:/runs/a
_REMOTE = re.compile(r"(?:\w+:)*\w+://.*")


def without_folders(value: Any) -> Any:
    """A config, or a part of it, in which absolute local paths are their last part."""
    if isinstance(value, Mapping):
        return {name: without_folders(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if isinstance(value, str) and not _REMOTE.fullmatch(value) and (found := _LOCAL.fullmatch(value)):
        return "".join(found.groups())
    return value


def _use(form: str, class_name: str, data: Mapping[str, Any]) -> str:
    """How the exported model is used, as Python."""
    if "image_size" not in data:
        return USES[form].replace("{name}", class_name).replace("{length}", str(data.get("seq_len", "")))
    grey = data["channels"] == 1
    mode = {"hf": '.convert("L")' if grey else "", "stablehlo": "L" if grey else "RGB"}[form]
    bleed = (1 - held_out_share(data.get("crop", "step"))) / 2  # from each side
    values = {"name": class_name, "mode": mode, "size": data["image_size"], "channels": data["channels"]}
    values["bleed"] = f"{bleed:g}"
    use = USES_OF_PICTURES[form]
    for name, value in values.items():
        use = use.replace(f"{{{name}}}", str(value))
    return use


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
    # The optimizer's patterns of names may look like paths; it has none.
    name, config = run.absolute().name, without_folders(config) | {"optimizer": config["optimizer"]}
    data, metrics, splits = config["data"], last_metrics(run, step), read_splits(run)
    train_split, eval_split = (splits.get(role, data[f"{role}_split"]) for role in ("train", "eval"))
    rows = {
        "model": f"{config['model']['name']}{f', {class_name}' if class_name else ''}",
        "objective": config[part]["name"],
        "data": f"{data['source']}, split {train_split}",
        "started from": config["init"] or "random parameters",
        "steps": f"{step:,} of {config['batch_size']:,} rows",
        **{f"held-out {name.removeprefix('eval/')}": f"{v:.4f}" for name, v in metrics.items() if name != "step"},
        "held-out rows": f"split {eval_split}, at step {metrics['step']:,}" if metrics else "not evaluated",
        **notes,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    library = "transformers" if form == "hf" else "jax"
    use = _use(form, class_name, data)
    return f"""---
license: # to be filled in by whoever publishes the model
library_name: {library}
tags: [sslx]
---

# {name}

Trained with sslx {sslx.__version__}.

| | |
|---|---|
{table}

{use}

Trained by `python -m sslx.{entry}` with this config, and exported by
`python -m sslx.export --run={name} --format={form} --step={step} --out=FOLDER`:

```json
{json.dumps(config, indent=2)}
```
"""
