"""The random base's tokenizer: its tokens are the bytes."""

from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TURN: Final = 2
STOP_IDS: Final = (0, END_OF_TURN)


def tokenizer(vocab: int) -> Tokenizer:
    """The special tokens, then the 256 bytes, then reserved tokens that no text gives."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    reserved = [f"<|reserved_{i}|>" for i in range(vocab - len(SPECIAL) - len(alphabet))]
    ids = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *reserved])}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *reserved)])
    return made
