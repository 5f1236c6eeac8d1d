"""Index of the downstream tasks: ``config.task.name`` to class."""

TASKS = {
    "text_classification": "sslx.tasks.text_classification:TextClassification",  # a label for a text or a pair
    "text_regression": "sslx.tasks.text_regression:TextRegression",  # a number for a text or a pair
    "token_tagging": "sslx.tasks.token_tagging:TokenTagging",  # a label for each word: entities, parts of speech
    "question_answering": "sslx.tasks.question_answering:QuestionAnswering",  # where in a context the answer is
    "sentence_embedding": "sslx.tasks.sentence_embedding:SentenceEmbedding",  # near where the meaning is (SimCSE)
    "image_classification": "sslx.tasks.image_classification:ImageClassification",  # a label for a picture
    "mean_teacher": "sslx.tasks.mean_teacher:MeanTeacher",  # the same from few labels and many pictures without
    "object_detection": "sslx.tasks.object_detection:ObjectDetection",  # boxes around what is on a picture
    "segmentation": "sslx.tasks.segmentation:Segmentation",  # a label for each pixel of a picture
}
