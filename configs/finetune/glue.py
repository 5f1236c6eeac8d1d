"""Fine-tunes a pretrained text encoder on one task of GLUE, by BERT's recipe. For all of them: python -m sslx.glue.

Command:   python -m sslx.finetune --config=configs/finetune/glue.py:rte --config.init=runs/base --workdir=runs/rte
Argument:  cola (the default) sst2 mrpc stsb qqp mnli qnli rte wnli
Data:      tfds:glue/TASK, prepared with: tfds build glue/TASK --file_format=array_record
Causal:    a run of configs/gpt_clm.py needs --config.task.pool=last
Recipe:    3 epochs of the published training set, batches of 32 rows of 128 tokens, AdamW at 2e-5 with a tenth of the
           steps as warm-up, then linear decay (arXiv 1810.04805, section 4.1, and its run_classifier.py); evaluated
           once, after the last step, so that nothing is selected on the validation set. The table of the tasks is
           sslx/tasks/glue.py.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.errors import choose
from sslx.models.bert import BertConfig
from sslx.tasks.glue import GLUE
from sslx.tasks.text_classification import TextClassificationConfig
from sslx.tasks.text_regression import TextRegressionConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one task."""
    name = choose(parse_argument(argument, "task", task="cola")["task"], GLUE, "task of GLUE")
    task = GLUE[name]
    config = experiment(
        data=TextConfig(
            f"tfds:glue/{name}",
            text_field=task.text,
            pair_field=task.pair,
            label_type="number" if task.numbers else "class",
            eval_split=task.eval_split,
            test_split=task.test_split,
            seq_len=128,
        ),
        model=BertConfig(),
        task=TextRegressionConfig(pool="first") if task.numbers else TextClassificationConfig(pool="first"),
    )
    config.steps = task.steps
    config.batch_size = task.batch_size
    config.optimizer.learning_rate = task.learning_rate
    config.optimizer.warmup_steps = task.steps // 10
    config.optimizer.eps = 1e-6
    config.eval.every_steps = task.steps
    config.eval.examples = 0
    config.checkpoint.keep = 1
    config.checkpoint.best_metric = f"eval/{task.scores[-1].metric}"
    config.checkpoint.best_mode = "max"
    return config
