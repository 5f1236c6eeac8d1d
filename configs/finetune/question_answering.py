"""Fine-tunes a pretrained BERT to find answers in texts (SQuAD v1.1 and v2.0).

Command:  python -m sslx.finetune --config=configs/finetune/question_answering.py:data=squad:FOLDER --config.init=RUN
Baseline: the same with --config.init=scratch:RUN --workdir=runs/scratch
Data:     a folder with train-v2.0.json and dev-v2.0.json, which become the splits train and validation; other names
          are one split, of which 2 % are held out. Or data=tfds:squad/v2.0.
Settings: BERT's for SQuAD: rows of 384, windows 128 apart, batches of 32, two to three epochs (88,000 rows each)
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.questions import QuestionsConfig
from sslx.models.bert import BertConfig
from sslx.tasks.question_answering import QuestionAnsweringConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    source = parse_argument(argument, "data", data="")["data"]
    config = experiment(
        data=QuestionsConfig(source),
        model=BertConfig(),
        task=QuestionAnsweringConfig(),
    )
    config.steps = 6000
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 600
    config.optimizer.layer_decay = 0.9
    config.checkpoint.best_metric = "eval/f1"
    config.checkpoint.best_mode = "max"
    config.eval.every_steps = 1000
    config.eval.examples = 4
    return config
