"""Uses a cluster through OpenAI's own client: openai_client.py BASE_URL"""
import json
import pathlib
import sys

import openai

base_url = sys.argv[1]
golden_path = pathlib.Path(__file__).parents[2] / "configs/models/troupe-mini/golden.json"
golden = json.loads(golden_path.read_text())
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60)

names = [model.id for model in client.models.list()]
assert names == ["troupe-mini"], names
assert client.models.retrieve("troupe-mini").id == "troupe-mini"

for talk in golden[:3]:
    messages = [{"role": "user", "content": talk["question"]}]
    content = reasoning = finish = ""
    usage = None
    num_chunks = 0
    for chunk in client.chat.completions.create(
        model="troupe-mini", messages=messages, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ):
        num_chunks += 1
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
    assert content.strip() == talk["answer"], content
    assert reasoning.strip() == talk["text"].split("</think>")[0].strip(), reasoning
    assert finish == "stop", finish
    assert usage.completion_tokens == len(talk["tokens"]), usage
    assert num_chunks > 3, num_chunks

    whole = client.chat.completions.create(model="troupe-mini", messages=messages, temperature=0)
    assert whole.choices[0].message.content == content
    text = client.completions.create(
        model="troupe-mini", prompt=talk["prompt"], temperature=0, max_tokens=256)
    assert text.choices[0].text == talk["text"], text.choices[0].text


def expect(error, culprit, call):
    try:
        call()
    except error as e:
        assert type(e) is error, type(e)
        assert culprit in str(e), str(e)
        return e
    raise AssertionError(f"no {error.__name__}")


hello = [{"role": "user", "content": "hello"}]
error = expect(openai.NotFoundError, "gpt-9", lambda: client.chat.completions.create(
    model="gpt-9", messages=hello))
assert error.code == "model_not_found", error.code
expect(openai.NotFoundError, "gpt-9", lambda: client.models.retrieve("gpt-9"))
error = expect(openai.BadRequestError, "max_tokens", lambda: client.chat.completions.create(
    model="troupe-mini", messages=hello, max_tokens=-5))
assert error.param == "max_tokens", error.param
expect(openai.BadRequestError, "messages", lambda: client.chat.completions.create(
    model="troupe-mini", messages=[]))
error = expect(openai.BadRequestError, "2048", lambda: client.completions.create(
    model="troupe-mini", prompt=[20] * 3000))
assert error.code == "context_length_exceeded", error.code

# A client that leaves in the middle leaves the service as it was.
with client.chat.completions.create(model="troupe-mini", messages=hello, stream=True) as stream:
    next(iter(stream))
assert client.models.list().data[0].id == "troupe-mini"
print(f"openai {openai.__version__}: all well")
