"""Data: sources -> prepared once -> random-access rows -> device batches. The index of this folder."""

INDEX = {
    "cache": "Names prepared folders by their content and has each written once, whole or not at all.",
    "sources": "Opens a TFDS dataset or files as one random-access list of records, sliced into disjoint splits.",
    "files": "Reads .txt, .jsonl, .parquet and .csv files as one list of records.",
    "python_docs": "The text that comes with Python itself, as a small TFDS dataset made on this machine.",
    "near_duplicates": "Finds documents that nearly repeat each other, so that evaluation text is not training text.",
    "tokenizer": "Trains or loads a tokenizer and describes its vocabulary.",
    "tokens": "Tokenises a source into one flat array on disk, with document and sentence offsets.",
    "packing": "Plans which pieces of the tokens make each row: packed, or a document a row.",
    "pairs": "Plans sentence pairs for next-sentence and sentence-order prediction.",
    "rows": "Reads any rows of a plan as NumPy batches, and gives the shuffled order of an endless run.",
    "text": "From a text config to prepared rows: all of the above.",
    "batches": "Puts the rows of a step on the devices that its sharding assigns them to.",
}
