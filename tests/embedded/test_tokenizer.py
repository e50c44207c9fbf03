import random

import pytest
from transformers import AutoTokenizer

from bvpo_stats.embedded.assets import embedded_model_path
from bvpo_stats.embedded.task import ANSWER_WORDINGS, Difficulty, draw_example
from bvpo_stats.embedded.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    THINK_CLOSE,
    THINK_OPEN,
    UNK,
    USER,
    WORDS,
    build_tokenizer,
    prompt_text,
)

PROTOCOL = (BOS, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, EOS, PAD)


@pytest.fixture(scope="module", params=["built", "shipped"])
def tokenizer(request):
    return build_tokenizer() if request.param == "built" else AutoTokenizer.from_pretrained(embedded_model_path())


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_protocol_is_spelled_as_in_r1_distill():
    assert BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    assert USER == "<\uff5cUser\uff5c>"
    assert ASSISTANT == "<\uff5cAssistant\uff5c>"
    assert EOS == "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.mark.parametrize("token", PROTOCOL)
def test_protocol_tokens_are_single(tokenizer, token):
    assert encode(tokenizer, token) == [tokenizer.convert_tokens_to_ids(token)]
    assert encode(tokenizer, f"2{token}3")[1:-1] == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id


@pytest.mark.parametrize("word", [*WORDS, *"0123456789+-*=?.,:\n"])
def test_words_digits_and_signs_are_single(tokenizer, word):
    assert len(encode(tokenizer, word)) == 1


def test_special_tokens_are_named(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    assert tokenizer.unk_token == UNK
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 4


def test_task_text_round_trips_exactly(tokenizer):
    rng = random.Random(1)
    texts = []
    for _ in range(300):
        example = draw_example(rng, Difficulty(), 0.0)
        texts.append(
            prompt_text(example.question, empty_trace=False) + f"{example.trace}{THINK_CLOSE}{example.answer}{EOS}"
        )
    texts += [wording.format(-120) for wording in ANSWER_WORDINGS]
    for text in texts:
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        # Joining ids of parts is joining text: what the sampler appends never changes the prompt's ids.
        assert tokenizer.decode(ids[:7]) + tokenizer.decode(ids[7:]) == text


def test_other_text_falls_back_to_bytes(tokenizer):
    text = "  Prove: café = 日本\t\n\n(x+y)^2 don't WHAT Itinerary 🙂"
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_decoding_without_special_tokens_keeps_the_think_tags(tokenizer):
    ids = encode(tokenizer, f"{BOS}{USER}1+1=?{ASSISTANT}{THINK_OPEN}1+1=2{THINK_CLOSE}2.{EOS}{PAD}")
    kept = tokenizer.decode(ids, skip_special_tokens=True)
    assert THINK_OPEN in kept
    assert THINK_CLOSE in kept
    assert BOS not in kept
    assert EOS not in kept
    assert PAD not in kept


def test_generation_prompt_ends_in_think_token_for_token(tokenizer):
    question = "4+3*5-2=?"
    expected = [BOS, USER, *question, ASSISTANT, THINK_OPEN]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    ids = rendered["input_ids"] if not isinstance(rendered, list) else rendered
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert encode(tokenizer, prompt_text(question, empty_trace=False)) == ids
    assert encode(tokenizer, prompt_text(question, empty_trace=True)) == [
        *ids,
        tokenizer.convert_tokens_to_ids(THINK_CLOSE),
    ]


def test_template_strips_the_trace_of_a_finished_turn(tokenizer):
    def rendered(answer):
        turns = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": answer}]
        return tokenizer.apply_chat_template(turns, tokenize=False)

    expected = f"{BOS}{USER}1+1=?{ASSISTANT}It is 2.{EOS}"
    assert rendered("<think>1+1=2</think>It is 2.") == rendered("<think></think>It is 2.") == expected
    assert rendered("It is 2.") == expected


def test_built_and_shipped_tokenizers_are_the_same():
    shipped = AutoTokenizer.from_pretrained(embedded_model_path())
    built = build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert shipped.padding_side == built.padding_side == "left"
