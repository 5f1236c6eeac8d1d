"""Index of the downstream tasks: ``config.task.name`` to class."""

TASKS = {
    "text_classification": "sslx.tasks.text_classification:TextClassification",  # one label for one text
}
