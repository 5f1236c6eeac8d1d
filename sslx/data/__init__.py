"""Data: sources -> prepared once -> random-access rows -> device batches.

- ``cache``: names prepared folders by their content and has each written once, whole or not at all
- ``sources``: opens a TFDS dataset or files as one random-access list of records, sliced into disjoint splits
- ``files``: which files a glob means, what splits they are, and text and JSON from their bytes
- ``file_records``: reads .txt, .jsonl, .parquet and .csv files as one list of records
- ``python_docs``: the text that comes with Python itself, as a small TFDS dataset made on this machine
- ``python_names``: Python's own functions, each name tagged with what it is
- ``python_questions``: questions about these functions and their answers
- ``near_duplicates``: finds documents that nearly repeat each other, so that evaluation text is not training text
- ``tokenizer``: trains or loads a tokenizer and describes its vocabulary
- ``tokens``: tokenises a source into one flat array on disk, with document and sentence offsets
- ``token_shards``: tokenises a source in several processes or with Apache Beam, to the same bytes
- ``packing``: plans which pieces of the tokens make each row: packed, or a document a row
- ``pairs``: plans sentence pairs for next-sentence and sentence-order prediction
- ``rows``: reads any rows of a plan as NumPy batches, and gives the shuffled order of an endless run
- ``stored_rows``: writes rows as a folder of large blocks, on a disk or on ``gs://``, and reads them from there
- ``block_cache``: reads blocks ahead with threads, each once however many ask, and keeps those used last
- ``block_order``: the shuffled order for far storage: blocks, then rows inside a window of blocks
- ``text``: from a text config to prepared rows: all of the above
- ``fitted``: pictures brought to a square whole, as detection and segmentation need them
- ``pasted``: an embedded set for both: characters on photographs, with exact boxes and masks
- ``coco``: opens COCO's JSON files as one list of records
- ``boxes``: from a config to prepared rows of pictures with boxes
- ``masks``: from a config to prepared rows of pictures with a class for each pixel
- ``batches``: puts the rows of a step on the devices that its sharding assigns them to
"""
