"""Index of the downstream tasks: ``config.task.name`` to class."""

TASKS = {
    "text_classification": "sslx.tasks.text_classification:TextClassification",  # a label for a text or a pair
    "text_regression": "sslx.tasks.text_regression:TextRegression",  # a number for a text or a pair
}
