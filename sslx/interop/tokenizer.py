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
    """Completes a tokenizer.

    Args:
      tokenizer: The run's; one that puts the right tokens around a text by itself keeps doing it.
      words: Its vocabulary.
      longest: Tokens of the run's rows, where truncation is to cut.
      continued: A text is to be gone on with, as a causal language model does: its end is not marked.
      token_types: The model tells the texts of a pair apart.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    text = tokenizer("a", add_special_tokens=False).input_ids
    itself = tokenizer("a").input_ids == [words.cls_id, *text, *([] if continued else [words.sep_id])]
    if itself and token_types:  # RoBERTa's gives both texts of a pair the same
        types = tokenizer("a", "a", return_token_type_ids=True).token_type_ids
        itself = types == [0] * (len(text) + 2) + [1] * (len(text) + words.pair_separators)
    if not itself:
        begin, end = tokenizer.convert_ids_to_tokens([words.cls_id, words.sep_id])
        first, last = [f"{begin}:0", "$A:0"], [] if continued else [f"{end}:1"]
        backend = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(
            single=[*first, *([] if continued else [f"{end}:0"])],
            pair=[*first, f"{end}:0", *[f"{end}:1"] * (words.pair_separators - 1), "$B:1", *last],
            special_tokens=list({begin: words.cls_id, end: words.sep_id}.items()),
        )
        # Of no model's own class: some of these, as BERT's, make their post-processor anew when they are read.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
            **tokenizer.special_tokens_map,
        )
    tokenizer.model_max_length = longest
    # Given any to a model that has none, transformers adds embeddings all the same (GPT-2) or finds no row (RoBERTa).
    names = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer
