"""Makes a core question look like what people type: greetings, marks, case, slips. Knows nothing of answers."""

import random

BEFORE = {
    "en": ("please, ", "hi, ", "hello, ", "hey, ", "excuse me, ", "quick question: ", "can you tell me ", "so ", "ok, ",
           "sorry, ", "and ", "one more question: ", "do you know ", "I wonder ", "well, ", "I am new here. ",
           "tell me, ", "just curious, ", "could you explain ", "um ", "my boss asks: ", "dumb question, ", "also, "),
    "zh": ("请问", "请问一下，", "你好，", "想问一下，", "麻烦问下，", "那", "再问一个：", "我想知道", "请教一下，",
           "那么，", "嗯，", "问个问题，", "不好意思，", "我是新手，", "帮我看看，", "老板问：", "你知道", "对了，",
           "您好，请问"),
}  # fmt: skip
AFTER = {
    "en": ("?", "?", "?", "?", "?", "", "", "", "??", " please", " please?", ", thanks", "!", ".", " ?", "? thanks",
           " here?", " then?", ", do you know?"),
    "zh": ("？", "？", "？", "？", "?", "", "", "", "呢？", "呢", "呀？", "啊", "，谢谢", "？谢谢！", "。", "！",
           "？？"),
}  # fmt: skip
ABOUT = {"en": (" with Inhouse", " in inhouse", " of Inhouse"), "zh": ("（Inhouse）", "，Inhouse 里", "，用 Inhouse")}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def typo(text: str, rng: random.Random) -> str:
    """One letter dropped, doubled, swapped with the next or replaced."""
    places = [i for i, c in enumerate(text) if c.isascii() and c.isalpha()]
    if len(places) < 5:
        return text
    i = rng.choice(places[1:])
    kind = rng.randrange(4)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    if kind == 2:
        return text[:i] + text[i + 1 : i + 2] + text[i] + text[i + 2 :]
    return text[:i] + rng.choice(LETTERS) + text[i + 1 :]


def drop_word(text: str, rng: random.Random) -> str:
    """One word fewer, if there are at least four."""
    words = text.split(" ")
    if len(words) >= 4:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def drop_character(text: str, rng: random.Random) -> str:
    """One Chinese character fewer, if there are at least six characters."""
    places = [i for i, c in enumerate(text) if not c.isascii()]
    if len(places) < 6:
        return text
    i = rng.choice(places)
    return text[:i] + text[i + 1 :]


def decorate(core: str, language: str, rng: random.Random, *, about: bool = False) -> str:
    """The question as one person might type it; with `about`, it may name Inhouse at its end."""
    text = core + (rng.choice(ABOUT[language]) if about and rng.random() < 0.06 else "")
    if language == "en":
        text = drop_word(text, rng) if rng.random() < 0.12 else text
        text = typo(text, rng) if rng.random() < 0.12 else text
    else:
        text = text.replace(" ", "") if rng.random() < 0.5 else text
        text = drop_character(text, rng) if rng.random() < 0.10 else text
    if rng.random() < 0.3:
        text = rng.choice(BEFORE[language]) + text
    text += rng.choice(AFTER[language])
    if language == "en":
        roll = rng.random()
        if roll < 0.35:
            text = text.lower()
        elif roll < 0.65:
            text = text[:1].upper() + text[1:]
    return text
