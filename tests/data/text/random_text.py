"""Random texts that are hard on tokenizers, as a function of a random.Random."""

RANGES = [  # (first, last, weight)
    (0x20, 0x7E, 8), (0x00, 0x1F, 1), (0x7F, 0xA0, 1), (0xA1, 0xFF, 3), (0x100, 0x24F, 2),
    (0x250, 0x2FF, 1), (0x300, 0x36F, 3), (0x370, 0x3FF, 1), (0x400, 0x4FF, 2), (0x590, 0x5FF, 1),
    (0x600, 0x6FF, 1), (0x900, 0x9FF, 1), (0xE00, 0xE7F, 1), (0x1100, 0x11FF, 2), (0x1AB0, 0x1AFF, 1),
    (0x1DC0, 0x1DFF, 1), (0x1E00, 0x1FFF, 2), (0x2000, 0x206F, 2), (0x20D0, 0x20F0, 1),
    (0x2100, 0x214F, 1), (0x2150, 0x218F, 1), (0x2460, 0x24FF, 1), (0x2500, 0x27BF, 1),
    (0x3000, 0x303F, 2), (0x3040, 0x30FF, 3), (0x3400, 0x4DBF, 1), (0x4E00, 0x9FFF, 4),
    (0xA000, 0xABFF, 1), (0xAC00, 0xD7FF, 2), (0xE000, 0xF8FF, 1), (0xF900, 0xFAFF, 2),
    (0xFB00, 0xFDFF, 1), (0xFE00, 0xFE2F, 1), (0xFF00, 0xFFEF, 2), (0xFFF0, 0xFFFF, 1),
    (0x10000, 0x11FFF, 2), (0x12000, 0x1CFFF, 1), (0x1D000, 0x1D7FF, 1), (0x1E000, 0x1EFFF, 1),
    (0x1F000, 0x1FAFF, 3), (0x1FB00, 0x1FBFF, 1), (0x20000, 0x323AF, 1), (0xE0000, 0xE01EF, 1),
    (0xF0000, 0x10FFFF, 1), (0x800, 0xFFFF, 2), (0x10000, 0x10FFFF, 1)]
WEIGHTS = [w for _, _, w in RANGES]
WORDS = """the and wonderful Pfannkuchen mañana don't I'LL we'Ve it's 'S 'ſ 'Re x'd O'M return int main()
{"name": 123} <vector> ```json print(f"{x!r}") https://a.b/c?d=e&f=%20 1,234.56 3.14159 0x7fff 你好 世界 人工智能
東京タワー カタカナ ひらがな 안녕하세요 Привет мир Γειά مرحبا שלום नमस्ते สวัสดี Größe läßt ü ö ø À žółć İstanbul
K Å Ω ﬁ ſ ß ŉ ǰ ΐ 🙂 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ 1️⃣ word words sword sp né e\u0301 o\u0302 q\u0307\u0323
\u1112\u1161\u11ab \u1100\u1161 \uac00\u11a8 \u0958 \u0344 \u2126 \u212b \u1e9b\u0323 \ufb1d \u0f71\u0f72
\u0f73 \u09c7\u09be \u1025\u102e \U00011099\U000110ba \U0001d15e""".split()
SPACES = [" ", " ", " ", "  ", "    ", "\n", "\n\n", "\r\n", "\r", "\t", " \n", "\n ", "\u3000", "\xa0",
          "\u2003", "\x0b", "\x0c", "\x85", "\u2028", "\u180e", "\u200b", "\ufeff", "\x1c"]
MARKS = "\u0300\u0301\u0302\u0307\u0308\u0323\u0327\u0328\u0338\u0345\u035c\u05b0\u064b\u093c\u0e38\u3099\u309a"


def character(rng):
    first, last, _ = RANGES[rng.choices(range(len(RANGES)), WEIGHTS)[0]]
    code = rng.randint(first, last)
    return chr(code) if not 0xD800 <= code <= 0xDFFF else "\ufffd"


def piece(rng, added):
    kind = rng.randrange(14)
    if kind < 3:
        return rng.choice(WORDS)
    if kind == 3:
        return rng.choice(WORDS).upper() if rng.random() < 0.5 else rng.choice(WORDS).title()
    if kind == 4:
        return "".join(character(rng) for _ in range(rng.randint(1, 6)))
    if kind == 5:
        return "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 5)))
    if kind == 6:
        return rng.choice(SPACES) * rng.randint(1, 40 if rng.random() < 0.1 else 6)
    if kind == 7:
        return "".join(rng.choice("0123456789٣४½²Ⅳ①") for _ in range(rng.randint(1, 9)))
    if kind == 8:
        return rng.choice(added) if added else ""
    if kind == 9:  # a marker cut short or run into something
        text = rng.choice(added) if added else "<｜"
        return text[rng.randrange(len(text)):] + text[:rng.randrange(len(text) + 1)]
    if kind == 10:
        base = character(rng) if rng.random() < 0.5 else rng.choice("aeiounçΑα가ᄀか")
        return base + "".join(rng.choice(MARKS) for _ in range(rng.randint(1, 4)))
    if kind == 11:
        return rng.randbytes(rng.randint(1, 6)).decode("utf-8", errors="replace")
    if kind == 12:
        return character(rng) * rng.randint(1, 12)
    return "".join(rng.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~’“…—") for _ in range(rng.randint(1, 5)))


def text(rng, added):
    """Some pieces, with or without a space between them."""
    parts = []
    for _ in range(rng.randint(0, 7)):
        parts.append(piece(rng, added))
        if rng.random() < 0.3:
            parts.append(" ")
    return "".join(parts)


def neighbours(code):
    """A text with a code point beside letters, digits, punctuation, white space and marks."""
    c = chr(code)
    return f"\u0345{c}\u0334 a{c}1{c}. {c}{c}\n{c}'{c}\u0301x \U00011935{c} \uac00{c} \u1100{c} <{c}word"


def all_code_points():
    """Those of the planes with assigned characters that are not private."""
    for first, last in ((0, 0xD7FF), (0xE000, 0x1FFFF), (0x2A6D0, 0x2FA1F), (0x31340, 0x323FF),
                        (0xE0000, 0xE01FF), (0x10FFF0, 0x10FFFF)):
        yield from range(first, last + 1)
