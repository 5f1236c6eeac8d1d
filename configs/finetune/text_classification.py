"""Fine-tunes a pretrained text encoder to sort texts into labels.

Command:  python -m sslx.finetune --config=configs/finetune/text_classification.py --config.init=runs/bert_mlm
Baseline: the same with --config.init=scratch:runs/bert_mlm --workdir=runs/scratch
Data:     2,000 labelled docstrings of python_docs (label: the package), or as an argument:
          configs/finetune/text_classification.py:data=csv:reviews.csv with columns text and label
Numbers:  labels that are numbers (a price, a grade) are the argument labels=number:
          configs/finetune/text_classification.py:data=csv:reviews.csv,labels=number
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.errors import choose
from sslx.models.bert import BertConfig
from sslx.tasks.text_classification import TextClassificationConfig
from sslx.tasks.text_regression import TextRegressionConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    given = parse_argument(argument, "data", data="python_docs", labels="classes")
    source = given["data"]
    numbers = choose(given["labels"], ("classes", "number"), "labels") == "number"
    splits = dict(train_split="train[:2000]", test_split="test") if source == "python_docs" else {}
    config = experiment(
        data=TextConfig(source, seq_len=64, label_type="number" if numbers else "class", **splits),
        model=BertConfig(),
        task=TextRegressionConfig() if numbers else TextClassificationConfig(),
    )
    config.steps = 400
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.layer_decay = 0.9
    config.checkpoint.best_metric = "eval/spearman" if numbers else "eval/macro_f1"
    config.checkpoint.best_mode = "max"
    config.eval.every_steps = 100
    config.eval.examples = 0
    return config
