#!/usr/bin/env python3
"""Computes the expected values of the text tests again, from what the files here hold.

    pip install tokenizers 'transformers>=5' 'jinja2>=3.1.6'
    python3 make_golden.py

tokenizer_cases.json     [[text, ids, ids with special tokens as plain text or null where equal]]
chat_template_cases.json {templates: {name: source}, contexts: {name: variables},
                          cases: [[template, context, text or null where it must fail]]}
"""
import json
import pathlib

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

here = pathlib.Path(__file__).parent
model = here.parents[2] / "configs/models/troupe-mini"


def write(name, value, rows):
    """One row a line, so that changes can be read."""
    lines = ",\n".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in rows)
    head = "".join(f"{json.dumps(k)}:{json.dumps(v, ensure_ascii=False, indent=1)},\n"
                   for k, v in value.items())
    text = "{\n" + head + '"cases":[\n' + lines + "\n]}\n" if value else "[\n" + lines + "\n]\n"
    (here / name).write_text(text, encoding="utf-8")


def tokenizer_cases():
    parsing = Tokenizer.from_file(str(model / "tokenizer.json"))
    plain = Tokenizer.from_file(str(model / "tokenizer.json"))
    plain.encode_special_tokens = True
    rows = []
    for text, *_ in json.loads((here / "tokenizer_cases.json").read_text(encoding="utf-8")):
        ids = parsing.encode(text, add_special_tokens=False).ids
        ids_plain = plain.encode(text, add_special_tokens=False).ids
        rows.append([text, ids, None if ids == ids_plain else ids_plain])
    write("tokenizer_cases.json", {}, rows)


def render(template, context):
    try:
        return _compile_jinja_template(template).render(**context)
    except Exception:  # whatever Python raises: the case has to fail
        return None


def template_cases():
    data = json.loads((here / "chat_template_cases.json").read_text(encoding="utf-8"))
    cases = data.pop("cases")
    rows = [[t, c, render(data["templates"][t], data["contexts"][c])] for t, c, _ in cases]
    write("chat_template_cases.json", data, rows)


tokenizer_cases()
template_cases()
