"""Fine-tunes a pretrained BERT to find answers in texts (SQuAD v1.1 and v2.0).

Command:  python -m sslx.finetune --config=configs/finetune/question_answering.py --config.init=runs/bert_mlm
Baseline: the same with --config.init=scratch:runs/bert_mlm --workdir=runs/scratch
Data:     python_questions, what is what in functions of Python's standard library ("Which class is used first?"), of
          which some have no answer; or data=squad:FOLDER with train-v2.0.json and dev-v2.0.json, which become the
          splits train and validation; other names are one split, of which 2 % are held out; or data=tfds:squad/v2.0
Chance:   exact match 50.4 on python_questions, of where the answer to such a question mostly is, and 15.5 of a random
          name; a run of bert_mlm.py comes to 67
Settings: a few minutes on two CPU cores for python_questions. Otherwise BERT's for SQuAD: rows of 384, windows 128
          apart, batches of 32, two to three epochs (88,000 rows each)
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.questions import QuestionsConfig
from sslx.models.bert import BertConfig
from sslx.tasks.question_answering import QuestionAnsweringConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    source = parse_argument(argument, "data", data="python_questions")["data"]
    embedded = source == "python_questions"
    small = dict(test_split="test", seq_len=96, doc_stride=32, max_question_length=16) if embedded else {}
    config = experiment(
        data=QuestionsConfig(source, **small),
        model=BertConfig(),
        task=QuestionAnsweringConfig(),
    )
    config.steps = 300 if embedded else 6000
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3 if embedded else 1e-4
    config.optimizer.warmup_steps = config.steps // 10
    config.optimizer.layer_decay = 0.9
    config.checkpoint.best_metric = "eval/f1"
    config.checkpoint.best_mode = "max"
    config.eval.every_steps = 100 if embedded else 1000
    config.eval.examples = 4
    return config
