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

HF = """```python
from transformers import AutoTokenizer, {name}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {name}.from_pretrained("FOLDER")
```"""
# One dictionary, with all inputs that the table names and no others.
STABLEHLO = """```python
import numpy as np
from jax import export
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER/tokenizer")
{function} = export.deserialize(open("FOLDER/{function}.stablehlo", "rb").read()).call
given = tokenizer({texts}, padding="max_length", truncation={cut}, max_length={length}, return_tensors="np"{types})
real = given["attention_mask"]  # 1, and 0 for padding
rows = {{"tokens": given["input_ids"], "segment_ids": real, "positions": real * np.arange({length}){token_types}}}
found = {function}({{name: array.astype(np.int32) for name, array in rows.items()}})  # {result}
```"""
HF_OF_PICTURES = """```python
from PIL import Image
from transformers import AutoImageProcessor, {name}

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = {name}.from_pretrained("FOLDER")
model(**processor(Image.open("a.png"){mode}, return_tensors="pt"))
```"""
STABLEHLO_OF_PICTURES = """```python
import numpy as np
from jax import export
from PIL import Image, ImageOps

features = export.deserialize(open("FOLDER/features.stablehlo", "rb").read()).call
picture = ImageOps.fit(Image.open("a.png").convert("{mode}"), ({size}, {size}), bleed={bleed:g})
features({{"image": np.asarray(picture, np.uint8).reshape(1, {size}, {size}, {channels})}})
```"""


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
    use = _use(form, class_name, config, notes)
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


def _use(form: str, class_name: str, config: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """How the exported model is used, as Python."""
    data = config["data"]
    if "image_size" not in data:
        return HF.format(name=class_name) if form == "hf" else _stablehlo_use(config, notes)
    grey = data["channels"] == 1
    if form == "hf":
        return HF_OF_PICTURES.format(name=class_name, mode='.convert("L")' if grey else "")
    bleed = (1 - held_out_share(data.get("crop", "step"))) / 2  # from each side
    size = {"size": data["image_size"], "channels": data["channels"]}
    return STABLEHLO_OF_PICTURES.format(mode="L" if grey else "RGB", bleed=bleed, **size)


def _stablehlo_use(config: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """How a function of a text model is called: of the head, where a task has one, else of the features."""
    data, task = config["data"], config.get("task", {}).get("name")
    function = "logits" if task and "logits.stablehlo" in notes else "features"
    inputs, _, result = notes[f"{function}.stablehlo"].partition(" -> ")
    texts, cut = '["a text"]', "True"
    if data.get("pair_field"):
        texts = '["a text"], ["its pair"]'
    elif task == "question_answering":
        texts, cut = '["a question"], ["its context"]', '"only_second"'
    typed = "token_types" in inputs
    return STABLEHLO.format(
        function=function,
        texts=texts,
        cut=cut,
        length=data.get("seq_len", ""),
        types=", return_token_type_ids=True" if typed else "",
        token_types=', "token_types": given["token_type_ids"]' if typed else "",
        result=result,
    )
