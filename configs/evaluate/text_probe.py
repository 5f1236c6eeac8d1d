"""Probes a text encoder with its parameters frozen: linear probe and nearest neighbours on labelled texts.

Command:  python -m sslx.evaluate --run=runs/bert_mlm --config=configs/evaluate/text_probe.py
Data:     2,000 labelled docstrings of python_docs (label: the package), its validation and test rows; or an argument:
          configs/evaluate/text_probe.py:data=csv:reviews.csv with columns text and label
Beside:   the same architecture with random parameters, and logistic regression on TF-IDF
"""

import ml_collections

from sslx.config import parse_argument, to_config_dict
from sslx.data.text import TextConfig
from sslx.probing.text import TextProbeConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    source = parse_argument(argument, "data", data="python_docs")["data"]
    splits = dict(train_split="train[:2000]", eval_split="validation", test_split="test")
    if source != "python_docs":
        splits = dict(train_split="train[:80%]", eval_split="train[80%:90%]", test_split="train[90%:]")
    return to_config_dict(TextProbeConfig(data=TextConfig(source, seq_len=64, **splits)))
