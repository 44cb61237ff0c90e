"""Text -> token ids: tokenizer, SmolVLM's chat template, image strings, loss mask.

Ids and mask are made in one pass, turn by turn, so no second tokenisation has to find the answers.
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

START, END_OF_TURN, PAD = "<|im_start|>", "<end_of_utterance>", "<|im_end|>"
TURN_SEPARATOR = "\n"  # between an answer and the next turn
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
ROWS_COLS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = Path(__file__).with_name("world") / "merges.txt"  # a test trains them again
WORLD_SPECIAL = [PAD, START, END_OF_TURN, IMAGE, FAKE, GLOBAL, *ROWS_COLS]
# GPT-2's pre-tokenizer with single digits, and the role names first: each becomes one token.
WORDS = (
    r"\n?(?:User|Assistant):|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
# Common words of questions about images: the world's corpus is too small to fill the vocabulary.
ENGLISH = """what is the image what color is it
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
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=WORLD_SPECIAL,
        show_progress=False,
        initial_alphabet=ALPHABET,
    )
    tokenizer.train_from_iterator(chain(corpus, ENGLISH.splitlines() * 8), trainer)
    return tokenizer


def world_tokenizer(vocab_size: int) -> Tokenizer:
    """The result of `train_tokenizer` on the world's corpus.

    Its merges are stored in world/merges.txt, as training them took a fifth of the start of a run.
    """
    merges = [tuple(line.split()) for line in MERGES.read_text(encoding="utf-8").splitlines()]
    merges = merges[: max(0, vocab_size - len(WORLD_SPECIAL) - len(ALPHABET))]
    tokens = [*WORLD_SPECIAL, *ALPHABET, *map("".join, merges)]
    tokenizer = _byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(WORLD_SPECIAL)
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(source: str | Path) -> Tokenizer:
    """tokenizer.json of a directory or Hub id, unchanged: AutoTokenizer rebuilds some wrongly."""
    path = Path(source) / "tokenizer.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(str(source), "tokenizer.json"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{source}: neither a directory nor a tokenizer on the Hub that can be reached "
                f"({type(error).__name__})."
            ) from None
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizer ({error}).") from None


def add_special_tokens(tokenizer: Tokenizer, cfg: VLMConfig) -> Tokenizer:
    """Add Idefics3's special tokens in SmolVLM's order, so that SmolLM2's tokenizer gets its ids.

    Reserved tokens fill the gap before the end-of-turn token. Raises `InputError` if an id differs
    from the config's.
    """
    missing = [
        t for t in (START, PAD, GLOBAL, *ROWS_COLS, FAKE, IMAGE) if tokenizer.token_to_id(t) is None
    ]
    if tokenizer.token_to_id(END_OF_TURN) is None:
        gap = cfg.vlm_eos_token_id - tokenizer.get_vocab_size() - len(missing)
        missing += [f"<|reserved_special_token_{i}|>" for i in range(gap)] + [END_OF_TURN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in missing])
    for name, token in (
        ("vlm_image_token_id", IMAGE),
        ("vlm_eos_token_id", END_OF_TURN),
        ("vlm_bos_token_id", START),
    ):
        found = tokenizer.token_to_id(token)
        if found != getattr(cfg, name):
            raise InputError(
                f"{name} = {getattr(cfg, name)}: the tokenizer has {token} at {found}; set that."
            )
    if tokenizer.get_vocab_size() > cfg.lm_vocab_size:
        raise InputError(
            f"lm_vocab_size = {cfg.lm_vocab_size}: the tokenizer has {tokenizer.get_vocab_size()} "
            "tokens; set at least that."
        )
    return tokenizer


def image_string(rows: int, cols: int, tokens_per_tile: int) -> str:
    """The text that replaces `<image>`: one tile (0, 0), or a grid of tiles and a global view."""
    tokens = IMAGE * tokens_per_tile
    if rows == 0:
        return f"{FAKE}{GLOBAL}{tokens}{FAKE}"
    lines = (
        "".join(f"{FAKE}<row_{r}_col_{c}>{tokens}" for c in range(1, cols + 1)) + "\n"
        for r in range(1, rows + 1)
    )
    return "".join(lines) + f"\n{FAKE}{GLOBAL}{tokens}{FAKE}"


def format_turns(
    turns: Iterable[Turn], image_strings: Iterable[str], opening: str = START
) -> Iterator[tuple[str, bool]]:
    """Format a conversation as (text, supervised) runs; an answer includes its end of turn.

    `opening` comes first; it is TURN_SEPARATOR if the turns continue after an answer.

    Each run is tokenised alone. Runs meet only between ":" and " x" or at a special token, where no
    tokenizer merges; a test compares with the template on the whole text. Texts are stripped, so
    that " x" never has two spaces.
    """
    fill = iter(image_strings)
    prompt = opening
    for role, text in turns:
        text = text.strip()
        space = "" if text.startswith(IMAGE) else " "
        text = re.sub(IMAGE, lambda _: next(fill), text)
        if role == "assistant":
            yield prompt + "Assistant:", False
            yield space + text + END_OF_TURN, True
            prompt = TURN_SEPARATOR
        else:
            prompt += f"{role.capitalize()}:{space}{text}{END_OF_TURN}\n"
    if prompt:
        yield prompt, False


def encode_runs(
    tokenizer: Tokenizer, runs: Iterable[tuple[str, bool]]
) -> tuple[np.ndarray, np.ndarray]:
    """Runs -> ids [T] int32 and supervised [T] bool."""
    found = [(_ids(tokenizer, text), wanted) for text, wanted in runs]
    supervised = np.repeat([wanted for _, wanted in found], [len(ids) for ids, _ in found])
    return np.concatenate([ids for ids, _ in found]), supervised


@lru_cache(maxsize=4096)  # questions and short answers repeat
def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def check_turns(turns: Iterable[Turn], n_images: int, tokenizer: Tokenizer, where: str) -> None:
    """Raise `InputError` for an unknown role, a special token in a text or a wrong image count."""
    n_places = 0
    for turn in turns:
        if turn.role not in ("system", "user", "assistant"):
            raise InputError(f"{where}: role {turn.role!r} must be system, user or assistant.")
        if turn.role == "assistant" and IMAGE in turn.text:
            raise InputError(f"{where}: an answer holds {IMAGE}; images belong in user turns.")
        if re.search("[\ud800-\udfff]", turn.text):  # valid in JSON, but not for a tokenizer
            raise InputError(f"{where}: the text is not UTF-8, or has half a surrogate pair.")
        n_places += turn.text.count(IMAGE)
        if "<" in turn.text.replace(IMAGE, ""):
            for token in (t.content for t in tokenizer.get_added_tokens_decoder().values()):
                if token in turn.text and token != IMAGE:
                    raise InputError(
                        f"{where}: the text holds the special token {token}; remove it."
                    )
    if n_places != n_images:
        raise InputError(f"{where}: {n_places} {IMAGE} placeholders for {n_images} images.")
