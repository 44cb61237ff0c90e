"""Text -> token ids: tokenizer, SmolVLM's chat template, image strings, loss mask.

Ids and mask come from the same pass over the turns, so they always agree. For example,
`<|im_start|>User:<image>What is this?<end_of_utterance>\nAssistant:` is not supervised,
` a cat<end_of_utterance>` is.
Not here: pixels (images.py), samples from files (sources/).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from config_tools import InputError
from configs import VLMConfig
from data.types import Turn

START, END_OF_TURN = "<|im_start|>", "<end_of_utterance>"
PAD = "<|im_end|>"  # as in SmolVLM; its turns end with END_OF_TURN instead
TURN_SEPARATOR = "\n"  # between an answer and the next turn
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
ROWS_COLS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]  # as in Idefics3
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = Path(__file__).with_name("world") / "merges.txt"  # a test retrains and compares
WORLD_SPECIAL = [PAD, START, END_OF_TURN, IMAGE, FAKE, GLOBAL, *ROWS_COLS]
# GPT-2's regex, but with single digits, and with role names first so that each can be one token.
PRETOKENIZER_REGEX = (
    r"\n?(?:User|Assistant):|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
# Common words in questions about images that the built-in dataset does not contain.
EXTRA_CORPUS = """what is the image what color is it
does the image contain a black dog or a gray cat
is there not a brown car in the photo
how many are in an image of people
which object on that picture is pink or teal
where does the man with one shape and this woman show two other rectangle
who what which when a the no yes"""

# SmolVLM's template. Content may be a string or a list of {"type": "text" | "image"} parts.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}"
    "{% if message['content'].startswith('<image>') %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{{ message['content'] }}"
    "{% else %}{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}"
    "{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with single digits; special tokens have the first ids."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=WORLD_SPECIAL,
                                  show_progress=False, initial_alphabet=ALPHABET)  # fmt: skip
    # Repeated eight times, so that the words are frequent enough to be merged.
    tokenizer.train_from_iterator(chain(corpus, EXTRA_CORPUS.splitlines() * 8), trainer)
    return tokenizer


def world_tokenizer(vocab_size: int) -> Tokenizer:
    """The tokenizer of the built-in dataset, from stored merges; training it would take seconds."""
    n_merges = max(0, vocab_size - len(WORLD_SPECIAL) - len(ALPHABET))
    lines = MERGES.read_text(encoding="utf-8").splitlines()[:n_merges]
    merges = [(a, b) for a, b in map(str.split, lines)]
    tokens = [*WORLD_SPECIAL, *ALPHABET, *map("".join, merges)]
    tokenizer = _byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(WORLD_SPECIAL)
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    words = pre_tokenizers.Split(Regex(PRETOKENIZER_REGEX), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer.json of a directory or Hub id unchanged; raises `InputError`.

    AutoTokenizer of transformers 5 would rebuild GPT2Tokenizer's pre-tokenizer without the
    splitting of digits.
    """
    path = Path(source) / "tokenizer.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(str(source), "tokenizer.json"))
        except (OSError, ValueError) as error:
            neither = "neither a directory nor a tokenizer that can be downloaded from the Hub"
            raise InputError(f"{source}: {neither} ({type(error).__name__}).") from None
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizers file ({error}).") from None


def add_special_tokens(tokenizer: Tokenizer, cfg: VLMConfig) -> Tokenizer:
    """Add Idefics3's special tokens; raises `InputError` if an id differs from the config's.

    Reserved tokens fill the vocabulary up to END_OF_TURN, so that its id is `vlm_eos_token_id`.
    SmolLM2's tokenizer then has the same ids as SmolVLM's.
    """
    names = START, PAD, GLOBAL, *ROWS_COLS, FAKE, IMAGE
    missing = [token for token in names if tokenizer.token_to_id(token) is None]
    if tokenizer.token_to_id(END_OF_TURN) is None:
        gap = cfg.vlm_eos_token_id - tokenizer.get_vocab_size() - len(missing)
        missing += [f"<|reserved_special_token_{i}|>" for i in range(gap)] + [END_OF_TURN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in missing])
    for kind, token in (("image", IMAGE), ("eos", END_OF_TURN), ("bos", START)):
        name, i = f"vlm_{kind}_token_id", tokenizer.token_to_id(token)
        if i != (given := getattr(cfg, name)):
            raise InputError(f"{name} = {given}: the tokenizer's id of {token} is {i}; use {i}.")
    if (size := tokenizer.get_vocab_size()) > (given := cfg.lm_vocab_size):
        has = f"the tokenizer has {size} tokens; set lm_vocab_size to at least {size}."
        raise InputError(f"lm_vocab_size = {given}: {has}")
    return tokenizer


def image_string(rows: int, cols: int, tokens_per_tile: int) -> str:
    """The text that replaces `<image>`: a grid of tiles, then the whole image as one tile.

    rows = cols = 0: only the whole image.
    """
    tokens = IMAGE * tokens_per_tile
    grid = ""
    for r in range(1, rows + 1):
        grid += "".join(f"{FAKE}<row_{r}_col_{c}>{tokens}" for c in range(1, cols + 1)) + "\n"
    return grid + "\n" * (rows > 0) + f"{FAKE}{GLOBAL}{tokens}{FAKE}"


def format_turns(
    turns: Iterable[Turn], image_strings: Iterable[str], opening: str = START
) -> Iterator[tuple[str, bool]]:
    """Format a conversation as (text, supervised) spans; an answer includes its end of turn.

    The text starts with `opening`: TURN_SEPARATOR if the turns continue after an answer.

    Spans are tokenised separately: "<|im_start|>User: Hi<end_of_utterance>\nAssistant:",
    " Hello<end_of_utterance>" and "\n", for example. The ids equal those of the whole text
    (tested): spans end at special tokens, or between ":" and " ", where the pre-tokenizer splits.
    """
    replacements = iter(image_strings)
    prompt = opening
    for role, text in turns:
        text = text.strip()
        space = "" if text.startswith(IMAGE) else " "
        text = re.sub(IMAGE, lambda _: next(replacements), text)
        if role == "assistant":
            yield prompt + "Assistant:", False
            yield space + text + END_OF_TURN, True
            prompt = TURN_SEPARATOR
        else:
            prompt += f"{role.capitalize()}:{space}{text}{END_OF_TURN}\n"
    if prompt:
        yield prompt, False


def encode_spans(
    tokenizer: Tokenizer, spans: Iterable[tuple[str, bool]]
) -> tuple[np.ndarray, np.ndarray]:
    """Spans -> ids [T] int32 and supervised [T] bool."""
    texts, supervised = zip(*spans)
    ids = [_ids(tokenizer, text) for text in texts]
    return np.concatenate(ids), np.repeat(supervised, list(map(len, ids)))  # [T], [T]


@lru_cache(maxsize=4096)  # questions and short answers repeat
def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def check_turns(turns: Iterable[Turn], n_images: int, tokenizer: Tokenizer, where: str) -> None:
    """Raise `InputError` for an unknown role, a special token in text or a wrong image count."""
    n_placeholders = 0
    for turn in turns:
        if turn.role not in ("system", "user", "assistant"):
            raise InputError(f"{where}: role is {turn.role!r}; expected system, user or assistant.")
        if turn.role == "assistant" and IMAGE in turn.text:
            raise InputError(f"{where}: an answer contains {IMAGE}; move images to user turns.")
        if re.search("[\ud800-\udfff]", turn.text):  # valid in JSON, not in UTF-8
            raise InputError(f"{where}: the text contains a lone surrogate; expected UTF-8.")
        n_placeholders += turn.text.count(IMAGE)
        if "<" in turn.text.replace(IMAGE, ""):
            for t in tokenizer.get_added_tokens_decoder().values():
                if t.content in turn.text and t.content != IMAGE:
                    problem = f"the text contains the special token {t.content}; remove it."
                    raise InputError(f"{where}: {problem}")
    if n_placeholders != n_images:
        raise InputError(f"{where}: {n_placeholders} {IMAGE} placeholders for {n_images} images.")
