"""The words that answers are: each must be one token in its place, and all must be different.

A candidate is scored by the logits of the label words at the answer slot. That is only the probability of the answer
when each word is one token there, however it is spelt elsewhere: " Yes" and "Yes" are different tokens, and a word of
two tokens is scored by its first half.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recjax.core.errors import ConfigError
from recjax.prompts.chat import Chat


def label_tokens(chat: Chat, words: Sequence[str]) -> np.ndarray:
    """int32 [C]: the token of each label word at the answer slot.

    Raises `ConfigError` when a word is not one token there, spelt alone or together with what stands before it, or when
    two words are one token.
    """
    if len(words) < 2:
        raise ConfigError(f"label words {list(words)}", expected="at least two")
    tokenizer, lead, before = chat.spell.tokenizer, chat.leads["assistant"], chat.before_answer
    context = tokenizer.encode(before)
    found: dict[int, str] = {}
    for word in words:
        alone, placed = tokenizer.encode(lead + word), tokenizer.encode(before + lead + word)
        is_one = len(alone) == 1 and np.array_equal(placed, np.concatenate([context, alone]))
        if not is_one:
            pieces = [tokenizer.pieces[t] for t in placed[min(len(context), len(placed) - 1) :]]
            raise ConfigError(
                f"the label word {word!r} is not one token where answers stand, but {pieces}",
                where=f"chat format {chat.format.name!r}, after {before + lead!r}",
                expected="a word of one token, the same alone and after what stands before it",
                mend="take another word, or name it in TokenizerConfig.words where the tokenizer is trained here",
            )
        if int(alone[0]) in found:
            raise ConfigError(
                f"the label words {found[int(alone[0])]!r} and {word!r} are the same token",
                where=f"chat format {chat.format.name!r}",
                expected="different first tokens",
            )
        found[int(alone[0])] = word
    return np.array(list(found), np.int32)
