"""Small tokenizers of the kinds in use, trained in a moment."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = [
    "The quick brown fox jumps over the lazy dog. It's 3.14 or 2,718!\n\nNaïve café, 東京 and 🙂 emoji.",
    "def add(a, b):\n    return a + b\n",
    "one two three  four   five\tsix",
] * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def gpt2_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds nothing to a text, with an EOS token alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


@cache
def llama_like(*, add_eos: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's space marks with byte fallback, and a BOS token before every text."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if add_eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@cache
def words() -> PreTrainedTokenizerFast:
    """One token per letter a ... h, between spaces; ids 2 ... 9, and </s> is 1."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {letter: index for index, letter in enumerate("abcdefgh", 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@cache
def with_chat() -> PreTrainedTokenizerFast:
    """The GPT-2-like one with a chat template that marks roles and ends messages."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_like().backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
