"""Token-exact prompts of the four protocols, and the split of completions."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from bvpo_stats.embedded.tokenizer import build_tokenizer
from bvpo_stats.errors import UserError
from bvpo_stats.model.templates import CLOCK, PromptError, Template, find_template
from bvpo_stats.records import Message, Question, Role
from tests.tokenizers import (
    ASSISTANT,
    BOS,
    CLOSE,
    EMBEDDED,
    EOS,
    QWEN3,
    R1_0528,
    R1_DISTILL,
    THINK,
    USER,
    byte_tokenizer,
    plain,
    qwen3,
    r1,
)

QUESTION = "1+1?"


def spell(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> tuple[int, ...]:
    """Ids spelled token by token: special tokens whole, everything else a token per byte."""
    ids: list[int] = []
    for piece in pieces:
        whole = tokenizer.convert_tokens_to_ids(piece)
        if whole is not None:
            ids.append(whole)
        else:
            ids += [tokenizer.convert_tokens_to_ids({"\n": "Ċ", " ": "Ġ"}.get(c, c)) for c in piece]
    assert None not in ids
    return tuple(ids)


R1_HEADER = (BOS, USER, QUESTION, ASSISTANT)
QWEN_HEADER = ("<|im_start|>", "user\n", QUESTION, "<|im_end|>", "\n", "<|im_start|>", "assistant\n")
CASES = {
    "r1-distill": (r1(R1_DISTILL), (*R1_HEADER, THINK), (*R1_HEADER, THINK, CLOSE)),
    "r1-0528": (r1(R1_0528), (*R1_HEADER, THINK), (*R1_HEADER, THINK, CLOSE)),
    "embedded": (r1(EMBEDDED), (*R1_HEADER, THINK), (*R1_HEADER, THINK, CLOSE)),
    "qwen3": (qwen3(), QWEN_HEADER, (*QWEN_HEADER, THINK, "\n\n", CLOSE, "\n\n")),
}


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_exact(name: str) -> None:
    tokenizer, thinking, nothinking = CASES[name]
    template = find_template(tokenizer)
    assert template.name == name
    assert template.prompt_ids(QUESTION, "thinking") == spell(tokenizer, *thinking)
    assert template.prompt_ids(QUESTION, "nothinking") == spell(tokenizer, *nothinking)


@pytest.mark.parametrize("name", CASES)
def test_no_double_begin_of_sentence(name: str) -> None:
    tokenizer = CASES[name][0]
    ids = find_template(tokenizer).prompt_ids(QUESTION, "thinking")
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", CASES)
def test_the_empty_trace_continues_the_thinking_prompt(name: str) -> None:
    """The training form of D_e: the prompt of D_t, then the tokens that close the empty trace, then the answer."""
    tokenizer, thinking, nothinking = CASES[name]
    prompt, closing = find_template(tokenizer).empty_trace_ids(QUESTION)
    assert prompt == spell(tokenizer, *thinking)
    assert prompt + closing == spell(tokenizer, *nothinking)
    assert closing


def test_the_trap_of_rendering_a_finished_response() -> None:
    """Why no finished response goes through a chat template: with and without a trace it gives the same text."""
    tokenizer = r1(R1_DISTILL)
    turns = [
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]
        for text in ("<think>R</think>A", "<think></think>A")
    ]
    rendered = {tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns}
    assert len(rendered) == 1


@pytest.mark.parametrize("name", CASES)
def test_split_of_a_completion(name: str) -> None:
    tokenizer = CASES[name][0]
    template = find_template(tokenizer)
    opening = (THINK,) if name == "qwen3" else ()  # Qwen3 writes its own opening tag
    end = "<|im_end|>" if name == "qwen3" else EOS
    ids = spell(tokenizer, *opening, "1+1", CLOSE, "2", end)
    start, trace, answer = template.split(ids, "thinking")
    assert (start, trace, answer) == (len(opening) + 4, "1+1", "2")
    assert template.split(spell(tokenizer, "2", end), "nothinking") == (0, None, "2")
    assert template.split(spell(tokenizer, *opening, "1+1"), "thinking") == (None, "1+1", None)


def test_split_where_the_closing_tag_spans_several_tokens() -> None:
    tokenizer = plain()
    template = find_template(tokenizer, empty_trace="<think></think>")
    ids = tuple(tokenizer.encode("abc</think>42"))
    assert template.split((*ids, tokenizer.eos_token_id), "thinking") == (11, "abc", "42")


def test_overrides() -> None:
    tokenizer = r1(R1_DISTILL)
    spaced = find_template(tokenizer, empty_trace="<think>\n\n</think>")
    assert spaced.prompt_text(QUESTION, "nothinking").endswith("<think>\n\n</think>")
    assert spaced.name != find_template(tokenizer).name  # records of the two must not be mixed
    assert find_template(tokenizer, name="r1-0528").name == "r1-0528"


def test_custom_template_needs_the_empty_trace() -> None:
    with pytest.raises(UserError, match="`empty_trace"):
        find_template(plain())
    template = find_template(plain(), empty_trace="<think></think>")
    assert template.prompt_text(QUESTION, "thinking") == "[user] 1+1?\n[assistant] "
    assert template.prompt_text(QUESTION, "nothinking") == "[user] 1+1?\n[assistant] <think></think>"


def test_named_template_without_think_tokens_needs_the_empty_trace() -> None:
    with pytest.raises(UserError, match="`empty_trace"):
        find_template(plain(), name="r1-distill")


def test_unknown_and_missing_templates() -> None:
    with pytest.raises(UserError, match=r"`template='nonsense'`.*r1-distill"):
        find_template(r1(R1_DISTILL), name="nonsense")
    with pytest.raises(UserError, match="no chat template"):
        find_template(byte_tokenizer(None, ["</s>"], eos="</s>"))


def test_text_of_answers_drops_special_tokens() -> None:
    tokenizer = r1(R1_DISTILL)
    template: Template = find_template(tokenizer)
    assert template.answer_text(spell(tokenizer, " 2", EOS)) == "2"
    assert template.completion_text(spell(tokenizer, "t", CLOSE, "2", EOS)) == "t</think>2"


SYSTEM = Message("system", "Be kind.")
TURNS = (SYSTEM, Message("user", "1+1?"), Message("assistant", "<think>1+1=2</think>2"), Message("user", "And 2+2?"))


def test_a_conversation_is_rendered_turn_by_turn() -> None:
    """Past traces go, as the templates of reasoning models mean it; everything else stands."""
    template = find_template(build_tokenizer())
    expected = f"{BOS}Be kind.{USER}1+1?{ASSISTANT}2{EOS}{USER}And 2+2?{ASSISTANT}<think>"
    assert template.prompt_text(TURNS, "thinking") == expected
    assert template.prompt_text(TURNS, "nothinking") == expected + "</think>"
    prompt, closing = template.empty_trace_ids(TURNS)
    assert (prompt, closing) == (template.prompt_ids(TURNS, "thinking"), (template.tokenizer.vocab["</think>"],))


@pytest.mark.parametrize("text", [f"a {CLOSE}", f"{THINK}b", f"c{EOS}", f"{USER}d", f"e {ASSISTANT} f"])
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_text_never_becomes_control_tokens(text: str, role: Role) -> None:
    """Role markers and think tags are no special tokens of R1's tokenizers, and control tokens all the same."""
    template = find_template(r1(R1_DISTILL))
    turns = {"user": text, "system": (Message("system", text), Message("user", "1+1?"))}.get(
        role, (Message("user", "1+1?"), Message("assistant", f"<think></think>{text}"), Message("user", "And?"))
    )
    with pytest.raises(PromptError, match="control token") as caught:
        template.prompt_text(turns, "thinking")  # type: ignore[arg-type]
    assert caught.value.reason == "control-tokens"
    assert f"the {role}'s text holds " in str(caught.value)


def test_what_only_looks_like_control_tokens_is_text() -> None:
    template = find_template(r1(R1_DISTILL))
    for text in ("think </ think> < think>", "|User|", "a < b > c", "&lt;think&gt;"):
        assert text in template.prompt_text(text, "thinking")


@pytest.mark.parametrize(
    ("source", "turns", "role"),
    [
        ("{{ messages[-1].content }}", TURNS, "system"),
        ("{{ messages[0].content }}{{ messages[-1].content }}", TURNS[:2] + TURNS, "user"),
        ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}", TURNS, "assistant"),
        ("{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}", TURNS, "user"),
        ("what is it", "is", "user"),  # the question stands there by chance
    ],
)
def test_a_template_that_drops_a_turn_is_refused(source: str, turns: Question, role: Role) -> None:
    template = find_template(r1(source), name="r1-distill")
    with pytest.raises(PromptError, match=f"leaves out the {role}'s text"):
        template.prompt_text(turns, "thinking")


def test_a_template_may_trim_white_space_and_may_fail() -> None:
    trims = find_template(r1("{{ messages[-1].content | trim }}"), name="r1-distill")
    assert trims.prompt_text("  1+1?\n", "thinking") == "1+1?<think>"
    picky = find_template(r1("{% if messages[0].role == 'system' %}{{ raise_exception('no system\nprompts') }}"
                             "{% endif %}{{ messages[-1].content }}"), name="r1-distill")  # fmt: skip
    with pytest.raises(PromptError, match=r"fails on these turns \(system, user\): no system prompts"):
        picky.prompt_text(TURNS[:2], "thinking")


def closing(header: str) -> str:
    """A template's end: the rendered turns, then a generation prompt."""
    turns = QWEN3[: QWEN3.index("{% if add_generation_prompt %}")]
    return turns + "{% if add_generation_prompt %}" + header + "{% endif %}"


ON, OFF = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def switched(condition: str, on: str = ON, off: str = OFF) -> str:
    return closing("{% if " + condition + " %}" + on + "{% else %}" + off + "{% endif %}")


V31 = R1_0528.replace(
    "<｜Assistant｜>{% endif %}", "<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
HEADER = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def chat(template: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(template, QWEN, eos="<|im_end|>")


SWITCHED = {
    "always thinks": (closing(ON), "qwen3-thinking", ()),
    "on by default": (switched("enable_thinking is not defined or enable_thinking"), "qwen3-thinking", ()),
    "off by default": (switched("enable_thinking"), "custom", (("enable_thinking", True),)),
    "of another name": (switched("reasoning is defined and reasoning"), "custom", (("reasoning", True),)),
    "inverted": (switched("not disable_thinking"), "qwen3-thinking", ()),
    "inverted, off by default": (
        switched("disable_thinking is defined and not disable_thinking"),
        "custom",
        (("disable_thinking", False),),
    ),
    "a word": (switched("thinking_mode == 'on'"), "custom", (("thinking_mode", "on"),)),
    "an effort": (switched("reasoning_effort == 'high'"), "custom", (("reasoning_effort", "high"),)),
}


@pytest.mark.parametrize("case", SWITCHED)
def test_a_switch_for_thinking_is_found_and_is_on_in_both_sets(case: str) -> None:
    """D_t ends in an open trace and D_e in the empty one, whatever the template does of itself."""
    source, name, switch = SWITCHED[case]
    template = find_template(chat(source))
    assert template.protocol.name == name
    assert template.switch == switch
    assert template.prompt_text(QUESTION, "thinking") == HEADER + "<think>"
    assert template.prompt_text(QUESTION, "nothinking") == HEADER + "<think>\n\n</think>\n\n"
    prompt, closing_ids = template.empty_trace_ids(QUESTION)
    assert closing_ids
    assert prompt + closing_ids == template.prompt_ids(QUESTION, "nothinking")


def test_deepseek_v31_thinks_on_request_only() -> None:
    template = find_template(r1(V31))
    assert (template.name, template.switch) == ("deepseek-v3.1", (("thinking", True),))
    assert template.prompt_text(QUESTION, "thinking") == f"{BOS}{USER}{QUESTION}{ASSISTANT}<think>"
    assert template.prompt_text(QUESTION, "nothinking") == f"{BOS}{USER}{QUESTION}{ASSISTANT}<think></think>"


def test_a_switch_may_write_a_system_message() -> None:
    """Granite's kind: thinking is asked for in the system message, and the prompt ends at the marker either way."""
    source = "{% if thinking %}<|im_start|>system\nThink first.<|im_end|>\n{% endif %}" + closing(
        "<|im_start|>assistant\n"
    )
    template = find_template(chat(source), empty_trace="<think></think>")
    for mode, ending in (("thinking", ""), ("nothinking", "<think></think>")):
        text = f"<|im_start|>system\nThink first.<|im_end|>\n{HEADER}{ending}"
        assert template.prompt_text(QUESTION, mode) == text  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`empty_trace`"):
        find_template(chat(source))


def test_templates_that_cannot_be_used_are_refused_by_name() -> None:
    cases = {
        closing("<|im_start|>assistant\n</think>"): "closes the trace before the model can think",
        closing("<|im_start|>assistant\n<|channel|>analysis"): "into channels",
        QWEN3 + "{{ range(10**5) | random }}": "differently from call to call",
        QWEN3 + "{{ raise_exception('only in French') }}": "only in French",
    }
    for source, words in cases.items():
        with pytest.raises(UserError, match=words.replace("|", r"\|")):
            find_template(chat(source))


def test_a_template_that_wants_a_system_message_is_known_by_its_rendering_with_one() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + QWEN3
    template = find_template(chat(source))
    assert template.name == "qwen3"
    with pytest.raises(UserError, match="no system"):
        template.prompt_text(QUESTION, "thinking")


def test_the_clock_stands_still() -> None:
    """A prompt must not change between sampling and pairing: what is told the date is told the same one, always."""
    format = "%d %B %Y, %A %H:%M:%S.%f and %-d %b %y 100%%"
    dated = "Today: {{ strftime_now('" + format + "') }}\n" + QWEN3
    template = find_template(chat(dated))
    assert template.name == "qwen3 on 2024-07-26"  # on record in every response
    expected = f"Today: {CLOCK.strftime(format)}\n{HEADER}"
    assert template.prompt_text(QUESTION, "thinking") == expected
    defaulted = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    template = find_template(chat("\n{{ date_string }}".join([defaulted, QWEN3])))
    assert template.prompt_text(QUESTION, "thinking").startswith("26 Jul 2024")


def test_an_empty_trace_may_spell_its_newlines_out_and_have_tags_of_its_own() -> None:
    tokenizer = r1(R1_DISTILL)
    spelled = find_template(tokenizer, empty_trace=r"<think>\n\n</think>")
    assert spelled == find_template(tokenizer, empty_trace="<think>\n\n</think>")
    seed = find_template(plain(), empty_trace="<seed:think></seed:think>")
    ids = tuple(seed.tokenizer.encode("<seed:think>abc</seed:think>42"))
    assert seed.split((*ids, 0), "thinking")[1] == "abc"
    for nonsense in ("", "<think>", "none", r"\n"):
        with pytest.raises(UserError, match=r"`empty_trace=.*must open a trace and close it"):
            find_template(tokenizer, empty_trace=nonsense)
