"""A run's tokenizer for its export: of a text it makes the row that the model was trained on.

In: the tokenizer of a run, which training calls without special tokens and puts them around texts itself. Out: the same
with these in its post-processor, as `verb.whole_document` and `verb.pair_of_texts` have them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sslx.data.tokenizer import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def complete(
    tokenizer: PreTrainedTokenizerFast, words: Vocabulary, *, longest: int, continued: bool, token_types: bool
) -> PreTrainedTokenizerFast:
    """Completes a tokenizer in place, and returns it.

    Args:
      tokenizer: The run's; one that puts the right tokens around a text by itself stays as it is.
      words: Its vocabulary.
      longest: Tokens of the run's rows, where truncation is to cut.
      continued: A text is to be gone on with, as a causal language model does: its end is not marked.
      token_types: The model tells the texts of a pair apart.
    """
    from tokenizers.processors import TemplateProcessing

    text = tokenizer("a", add_special_tokens=False).input_ids
    around = ([words.cls_id], [] if continued else [words.sep_id])
    if tokenizer("a").input_ids != [*around[0], *text, *around[1]]:
        begin, end = tokenizer.convert_ids_to_tokens([words.cls_id, words.sep_id])
        last = [] if continued else [f"{end}:1"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[f"{begin}:0", "$A:0", *([] if continued else [f"{end}:0"])],
            pair=[f"{begin}:0", "$A:0", f"{end}:0", *[f"{end}:1"] * (words.pair_separators - 1), "$B:1", *last],
            special_tokens=list({begin: words.cls_id, end: words.sep_id}.items()),
        )
    tokenizer.model_max_length = longest
    if not token_types:
        # Of one that has none, transformers would add embeddings all the same (GPT-2) or find no such row (RoBERTa).
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    return tokenizer
