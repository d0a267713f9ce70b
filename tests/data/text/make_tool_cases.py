#!/usr/bin/env python3
"""Computes tool_cases.json: what transformers' apply_chat_template makes of chats with tools.

    pip install 'transformers>=5' 'jinja2>=3.1.6'
    python3 make_tool_cases.py

Each case is the body of a chat request as clients of OpenAI's API send it, and the prompt. Where a
template prints arguments itself, transformers gets them as objects, as its documentation asks.

{cases: [[template, body, text or null where it must fail]]}
"""
import copy
import json
import pathlib

from jinja2 import UndefinedError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

here = pathlib.Path(__file__).parent
TEMPLATES = {  # name: arguments as objects
    "deepseek_r1": False, "deepseek_r1_tools": False, "deepseek_v3_1": False,
    "llama3_1": True, "qwen2_5": True}
SHOWS_NO_TOOLS = {"deepseek_r1"}

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a <city> & its 'surroundings', été",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "zone": {"type": "string"}, "city": {"type": "string"},
        "days": {"type": "integer", "default": 3, "minimum": 0.5},
        "unit": {"enum": ["°C", "F", None, True]}}}, "strict": True}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Time", "parameters": {}}}
TOOLS = [WEATHER, CLOCK]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, number=1):
    return {"id": f"call_{number}", "type": "function",
            "function": {"name": name, "arguments": arguments}}


ASKED = [turn("system", "Be brief."), turn("user", "Paris?")]
CALLED = [*ASKED, turn("assistant", None,
                       tool_calls=[call("get_weather", '{"zone": "é<b>", "city": "Paris"}')]),
          turn("tool", "18 °C", tool_call_id="call_1", name="get_weather")]
BODIES = [
    {"messages": ASKED, "tools": TOOLS},
    {"messages": [turn("user", "Hi", name="me")], "tools": [CLOCK], "tool_choice": "auto"},
    {"messages": ASKED, "tools": TOOLS, "tool_choice": "none"},
    {"messages": CALLED, "tools": TOOLS},
    {"messages": CALLED},
    {"messages": [*CALLED, turn("assistant", "It is 18 °C.", tool_calls=[]),
                  turn("user", "Thanks")], "tools": TOOLS, "parallel_tool_calls": False},
    {"messages": [turn("user", "Both?"), turn("assistant", "Let me see.", tool_calls=[
        call("get_weather", '{"city":"Rome","days":2.50}'), call("clock", "{}", 2)]),
        turn("tool", "22", tool_call_id="call_1"), turn("tool", "12:00", tool_call_id="call_2")],
     "tools": TOOLS},
    {"messages": [turn("user", "One."), turn("assistant", "", tool_calls=[call("clock", "{}")]),
                  turn("tool", '{"z": 1, "a": [2]}', tool_call_id="call_1")], "tools": TOOLS},
    {"messages": ASKED, "tools": TOOLS, "chat_template_kwargs": {"thinking": True}},
    {"messages": ASKED, "chat_template_kwargs": {
        "tools_in_user_message": False, "date_string": "today",
        "custom_tools": [{"z": 1, "a": {"y": None, "b": [True, "x"]}}]}},
]


def expected(name, tokenizer, body):
    messages = copy.deepcopy(body["messages"])
    for message in messages:
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        for one in message.get("tool_calls", []):
            if TEMPLATES[name]:
                one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    tools = None if body.get("tool_choice") == "none" else body.get("tools")
    if tools and name in SHOWS_NO_TOOLS:
        return None
    variables = {"tools": tools, "add_generation_prompt": True,
                 **body.get("chat_template_kwargs", {})}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    except UndefinedError:  # DeepSeek's templates need content that is None, as version 4 had it
        return _compile_jinja_template(tokenizer.chat_template).render(
            messages=messages, bos_token=tokenizer.bos_token, **variables)
    except Exception:  # whatever Python raises: the case has to fail
        return None


def main():
    rows = []
    for name in TEMPLATES:
        source = (here / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()),
                                            bos_token="<bos>", chat_template=source)
        rows += [[name, body, expected(name, tokenizer, body)] for body in BODIES]
    lines = ",\n".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in rows)
    (here / "tool_cases.json").write_text('{"cases":[\n' + lines + "\n]}\n", encoding="utf-8")
    print(f"{len(rows)} cases, of which {sum(r[2] is None for r in rows)} must fail")


if __name__ == "__main__":
    main()
