"""The router's count of a prompt follows what the engine is told of tokenizer and template."""

import shutil

import bundled
from deploy.tokens import ModelTokens

CHAT = {"messages": [{"role": "user", "content": "one two three"}]}
BARE = "{{ messages[0].content }}"


def test_a_template_of_the_engines_is_the_routers_too_by_name_or_by_text(tmp_path):
    file = tmp_path / "bare.jinja"
    file.write_text(BARE)
    own = ModelTokens({"model": str(bundled.MODEL)})
    assert own.chat(CHAT) > own.text("one two three")
    for template in (BARE, str(file)):
        other = ModelTokens({"model": str(bundled.MODEL), "chat_template": template})
        assert other.chat(CHAT) == own._count("one two three", add_special_tokens=False)


def test_values_of_the_engines_template_hold_unless_the_request_names_its_own():
    template = "{% if long %}one two three four five six seven{% else %}one{% endif %}"
    arguments = {"model": str(bundled.MODEL), "chat_template": template}
    short = ModelTokens(arguments)
    long = ModelTokens({**arguments, "default_chat_template_kwargs": {"long": True}})
    assert long.chat(CHAT) > short.chat(CHAT)
    assert long.chat({**CHAT, "chat_template_kwargs": {"long": False}}) == short.chat(CHAT)


def test_the_engines_tokenizer_counts_where_it_is_not_the_models(tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundled.MODEL / file, tmp_path / file)
    tokens = ModelTokens({"model": str(tmp_path / "nowhere"), "tokenizer": str(tmp_path)})
    assert tokens.chat(CHAT) == ModelTokens({"model": str(bundled.MODEL)}).chat(CHAT)
