from __future__ import annotations

import socket
import threading
from email.utils import formatdate
from pathlib import Path
from time import monotonic, time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bvpo_stats.embedded.tokenizer import build_tokenizer
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.model.templates import find_template
from bvpo_stats.records import MODES, Message, Mode, Prompt
from bvpo_stats.sampling.engines import server as server_module
from bvpo_stats.sampling.engines.base import (
    Draw,
    Outcome,
    Request,
    SamplingOptions,
    SetAside,
    draw_seed,
    server_root,
)
from bvpo_stats.sampling.engines.openai_engine import OpenAIEngine, chat_rule
from bvpo_stats.sampling.engines.server import Server, ServerOptions
from bvpo_stats.sampling.sample import SamplingRun, sample_into
from bvpo_stats.store.jsonl import read_jsonl
from tests import tokenizers
from tests.sampling.fake_server import Call, FakeServer, Reply, Script, chat, completion, serve

TOKENIZER = build_tokenizer()
POLICY = ServedPolicy(find_template(TOKENIZER), (TOKENIZER.eos_token_id,))
EOS = TOKENIZER.eos_token_id
TEXT = "First 1+2=3.</think>It is 3."
IDS = tuple(TOKENIZER.encode(TEXT, add_special_tokens=False))


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FIRST_WAIT", 0.01)


def requests(count: int, mode: Mode = "thinking", policy: ServedPolicy = POLICY) -> list[Request]:
    prompts = [Prompt(f"q{number}", f"What is {number}+1?") for number in range(count)]
    template = policy.template
    return [
        Request(prompt, mode, 0, template.prompt_ids(prompt.prompt, mode), template.prompt_text(prompt.prompt, mode))
        for prompt in prompts
    ]


def options(at: FakeServer, **changes: Any) -> ServerOptions:
    return ServerOptions(**{"base_url": at.url, "retries": 2, "timeout": 5.0, "concurrency": 4, **changes})


def draw_all(at: FakeServer, asked: list[Request], policy: ServedPolicy = POLICY, **changes: Any) -> dict[str, Outcome]:
    modes = tuple({request.mode: None for request in asked})
    engine = OpenAIEngine(policy, options(at, **changes), modes)
    groups = engine.draw([asked], SamplingOptions(max_new_tokens=50))
    return {request.key: outcome for group in groups for request, outcome in group}


def ask_one(script: Script, **changes: Any) -> Outcome:
    with serve(script) as at:
        (outcome,) = draw_all(at, requests(1), **changes).values()
    return outcome


def ids_reply(call: Call, number: int) -> Reply:
    """As vLLM answers: ids and text, the end-of-sequence token among the ids only."""
    prompt = call.body["prompt"]
    return completion(TEXT, token_ids=[*IDS, EOS], prompt_token_ids=prompt, prompt_tokens=len(prompt))


def text_only(call: Call, number: int) -> Reply:
    """As ``transformers serve`` answers: strings only, no unknown fields, the end-of-sequence token counted."""
    if not isinstance(call.body["prompt"], str) or "top_k" in call.body:
        return Reply(422, {"detail": "Unexpected fields in the request"})
    read = len(TOKENIZER.encode(call.body["prompt"]))
    return completion(TEXT, prompt_tokens=read, completion_tokens=len(IDS) + 1)


# Exact token ids


def test_token_ids_of_the_server_are_taken_as_they_are() -> None:
    other = (*TOKENIZER.encode("First 1+2=3.</think>It is "), *TOKENIZER.encode("3."), EOS)
    with serve(lambda call, number: completion(TEXT, token_ids=list(other), finish_reason="stop")) as at:
        (outcome,) = draw_all(at, requests(1)).values()
        body = at.calls[0].body
    assert outcome == Draw(other, "stop")
    assert body["prompt"] == list(requests(1)[0].prompt_ids)
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.8, 1.0, 50)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)  # nothing truncates silently


def test_an_end_that_the_server_keeps_to_itself_is_put_back() -> None:
    assert ask_one(lambda call, number: completion(TEXT, token_ids=list(IDS))) == Draw((*IDS, EOS), "stop")


def test_a_cut_completion_has_no_end() -> None:
    script = lambda call, number: completion(TEXT, token_ids=list(IDS), finish_reason="length")  # noqa: E731
    assert ask_one(script) == Draw(IDS, "length")


def test_a_finish_reason_may_be_an_object() -> None:
    script = lambda call, number: completion(TEXT, token_ids=list(IDS), finish_reason={"type": "length"})  # noqa: E731
    assert ask_one(script) == Draw(IDS, "length")


def test_an_end_at_the_very_last_position_is_a_stop() -> None:
    script = lambda call, number: completion(TEXT, token_ids=[*IDS, EOS], finish_reason="length")  # noqa: E731
    assert ask_one(script) == Draw((*IDS, EOS), "stop")


def test_token_ids_that_do_not_spell_the_text_are_set_aside() -> None:
    outcome = ask_one(lambda call, number: completion("It is 4.", token_ids=[*IDS, EOS]))
    assert isinstance(outcome, SetAside)
    assert outcome.reason == "ids-differ"


def test_a_character_cut_in_the_middle_still_spells_the_text() -> None:
    ids = TOKENIZER.encode("é", add_special_tokens=False)
    assert len(ids) == 2
    for shown in ("", "\ufffd"):
        reply = completion(shown, token_ids=ids[:1], finish_reason="length")
        assert ask_one(lambda call, number, reply=reply: reply) == Draw((ids[0],), "length")


def test_text_is_tokenised_and_checked_by_its_length() -> None:
    assert ask_one(text_only) == Draw((*IDS, EOS), "stop")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (TEXT, len(IDS) + 3),  # the server wrote more tokens than the text has: it spelled it in another way
        (TEXT, len(IDS)),  # `transformers serve` counts the end; without it a token is missing
        ("e\u0301", 3),  # not in the normal form that the tokenizer keeps
    ],
)
def test_text_that_does_not_settle_its_token_ids_is_set_aside(text: str, count: int) -> None:
    def script(call: Call, number: int) -> Reply:
        reply = text_only(call, number)
        if reply.status == 200:
            reply.body["choices"][0]["text"] = text
            reply.body["usage"]["completion_tokens"] = count
        return reply

    outcome = ask_one(script)
    assert isinstance(outcome, SetAside)
    assert outcome.reason == "ids-differ"


def test_a_cut_text_is_checked_too() -> None:
    def script(call: Call, number: int) -> Reply:
        return completion(TEXT, completion_tokens=len(IDS) + number, finish_reason="length")

    with serve(script) as at:
        outcomes = list(draw_all(at, requests(2), concurrency=1).values())
    assert outcomes[0] == Draw(IDS, "length")
    assert isinstance(outcomes[1], SetAside)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion(TEXT, finish_reason="content_filter"), "finish-reason"),
        (completion(TEXT, finish_reason=None), "finish-reason"),
        (completion(TEXT, finish_reason={"type": "stop", "matched": "User:"}), "finish-reason"),
        (completion(TEXT, token_ids=[*IDS, 99_999, EOS], finish_reason="stop"), "ids-differ"),
        (completion(TEXT + "\ud83d"), "no-completion"),
        (completion("", finish_reason="length"), "empty"),
        (completion(TEXT, token_ids=[EOS, *IDS], finish_reason="length"), "ids-differ"),
        (Reply(400, {"error": {"message": "maximum context length exceeded"}}), "refused"),
        (Reply(body={"choices": []}), "no-completion"),
        (completion(TEXT, prompt_token_ids=[1, 2]), "prompt-differs"),
    ],
)
def test_flaws_of_single_responses_are_set_aside(reply: Reply, reason: str) -> None:
    with serve(lambda call, number: reply if number == 1 else ids_reply(call, number)) as at:
        outcomes = draw_all(at, requests(4), concurrency=1)
    kept = [outcome for outcome in outcomes.values() if isinstance(outcome, Draw)]
    (aside,) = [outcome for outcome in outcomes.values() if isinstance(outcome, SetAside)]
    assert len(kept) == 3
    assert aside.reason == reason


# How a server is asked


def test_a_bos_that_the_server_adds_is_not_sent_twice() -> None:
    bos = TOKENIZER.bos_token

    def script(call: Call, number: int) -> Reply:
        if "top_k" in call.body or not isinstance(call.body["prompt"], str):
            return Reply(400, {"error": "no"})
        return completion(TEXT, prompt_tokens=len(TOKENIZER.encode(bos + call.body["prompt"])))

    with serve(script) as at:
        outcomes = draw_all(at, requests(3), concurrency=1)
        assert all(outcome == Draw((*IDS, EOS), "stop") for outcome in outcomes.values())
        assert not at.calls[-1].body["prompt"].startswith(bos)


def test_a_server_with_another_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="reads the prompt as 3 tokens, not"):
        ask_one(lambda call, number: completion(TEXT, prompt_tokens=3))


def test_a_request_that_no_dialect_gets_through_names_the_reason() -> None:
    with pytest.raises(UserError, match="refuses request q0/thinking/0 \\(too long\\)"):
        ask_one(lambda call, number: Reply(400, {"error": {"message": "too long"}}))


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UserError, match="The model `x` does not exist"):
        ask_one(lambda call, number: Reply(404, {"error": {"message": "The model `x` does not exist."}}))


def test_the_seed_of_a_draw_is_its_own() -> None:
    with serve(ids_reply) as at:
        draw_all(at, requests(3))
        sent = {call.body["seed"] for call in at.calls}
    assert sent == {draw_seed(f"q{number}/thinking/0", 0) for number in range(3)}
    assert len(sent) == 3
    assert draw_seed("a", 0) != draw_seed("a", 1)


def test_requests_run_side_by_side() -> None:
    together = threading.Barrier(8)

    def script(call: Call, number: int) -> Reply:
        if number:  # after the first, which goes alone: nobody is answered before eight requests are there
            together.wait(timeout=60)
        return ids_reply(call, number)

    with serve(script) as at:
        outcomes = draw_all(at, requests(17), concurrency=8)
        assert at.most_at_once == 8
    assert len(outcomes) == 17


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (Reply(body={"data": [{"id": "a"}, {"id": "b"}]}), "offers a, b"),
        (Reply(body={"data": []}), "lists no models"),
        (Reply(500, b"Internal Server Error"), "500"),
        (Reply(body=[]), "does not list"),
    ],
)
def test_the_served_model_must_be_clear(models: Reply, words: str) -> None:
    with serve(ids_reply, models) as at:
        with pytest.raises(UserError, match=f"{words}.*`served_model`"):
            OpenAIEngine(POLICY, options(at), MODES)
        assert OpenAIEngine(POLICY, options(at, served_model="b"), MODES).model == "b@server"


# Chat endpoints


def test_chat_is_used_where_its_prompt_is_exact() -> None:
    size = len(requests(1)[0].prompt_ids)

    def script(call: Call, number: int) -> Reply:
        if call.path == "/v1/completions":
            return Reply(404, {"detail": "Not Found"})
        return chat(TEXT, prompt_tokens=size)

    with serve(script) as at:
        assert list(draw_all(at, requests(1)).values()) == [Draw((*IDS, EOS), "stop")]
        assert at.calls[-1].body["messages"] == [{"role": "user", "content": "What is 0+1?"}]


def test_chat_refuses_a_nothinking_prompt_that_it_cannot_make() -> None:
    with serve(lambda call, number: chat(TEXT)) as at, pytest.raises(UserError, match="exact nothinking prompt"):
        draw_all(at, requests(1, "nothinking"), endpoint="chat")


@pytest.mark.parametrize(
    ("tokenizer", "exact"),
    [
        (tokenizers.qwen3(), {"thinking": {}, "nothinking": {"enable_thinking": False}}),
        (tokenizers.r1(tokenizers.EMBEDDED), {"thinking": {}}),
        (tokenizers.r1(tokenizers.R1_DISTILL), {}),
        (tokenizers.r1(tokenizers.R1_0528), {}),
    ],
    ids=["qwen3", "embedded", "r1-distill", "r1-0528"],
)
def test_the_rule_for_chat_prompts(tokenizer: PreTrainedTokenizerFast, exact: dict[str, Any]) -> None:
    policy = ServedPolicy(find_template(tokenizer), (tokenizer.eos_token_id,))
    assert chat_rule(policy) == exact


def test_a_conversation_is_sent_turn_by_turn() -> None:
    turns = (Message("system", "Be kind."), Message("user", "1+1?"), Message("assistant", "2"), Message("user", "2+2?"))
    prompt, template = Prompt("q", "2+2?", messages=turns), POLICY.template
    asked = [Request(prompt, "thinking", 0, template.prompt_ids(turns, "thinking"), "")]
    with serve(lambda call, number: chat(TEXT, prompt_tokens=len(asked[0].prompt_ids))) as at:
        assert list(draw_all(at, asked, endpoint="chat").values()) == [Draw((*IDS, EOS), "stop")]
        assert at.calls[0].body["messages"] == [{"role": turn.role, "content": turn.content} for turn in turns]


def test_qwen3_switches_thinking_off_at_a_chat_endpoint() -> None:
    tokenizer = tokenizers.qwen3()
    policy = ServedPolicy(find_template(tokenizer), (tokenizer.eos_token_id,))
    asked = requests(1, "nothinking", policy)
    with serve(lambda call, number: chat("3", prompt_tokens=len(asked[0].prompt_ids))) as at:
        (outcome,) = draw_all(at, asked, policy, endpoint="chat").values()
        assert at.calls[0].body["chat_template_kwargs"] == {"enable_thinking": False}
    assert isinstance(outcome, Draw)


def test_a_reasoning_parser_is_refused() -> None:
    with pytest.raises(UserError, match="splits the trace off"):
        ask_one(lambda call, number: chat("It is 3.", reasoning_content="1+2=3"), endpoint="chat")


def test_a_chat_prompt_of_unknown_length_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be checked"):
        ask_one(lambda call, number: chat(TEXT), endpoint="chat")


# Faults


def test_busy_servers_are_asked_again_when_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    script = [
        Reply(429, {"error": "slow down"}, {"Retry-After": "0.02"}),
        Reply(503, b"", {"Retry-After": formatdate(time() - 10, usegmt=True)}),
    ]
    with serve(lambda call, number: script[number] if number < 2 else ids_reply(call, number)) as at:
        client = Server(options(at))
        monkeypatch.setattr(client._stopped, "wait", lambda seconds: waits.append(seconds) or False)
        assert client.post("/v1/completions", {"prompt": [1]})["choices"]
    assert waits == [0.02, 0.0]


def test_waits_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with serve(lambda call, number: Reply(500, b"")) as at:
        client = Server(options(at, retries=15))
        monkeypatch.setattr(client._stopped, "wait", lambda seconds: waits.append(seconds) or False)
        with pytest.raises(UserError, match=r"answers 500 .*tried 16 times"):
            client.post("/v1/completions", {})
        assert len(at.calls) == 16
    for attempt, wait in enumerate(waits):
        full = min(60.0, 0.01 * 2**attempt)
        assert 0.75 * full <= wait <= 1.25 * full


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Reply(500, {"error": "CUDA out of memory"}), "answers 500 \\(CUDA out of memory\\)"),
        (Reply(429, b""), "answers 429"),
        (Reply(200, {"choices": [1] * 50}, cut=40), "cut its answer short"),
        (Reply(200, b'{"choices": ['), "cut off or not JSON"),
        (Reply(200, b"<html>", wait=5.0), "did not answer within 0.2 s"),
    ],
)
@pytest.mark.parametrize("times", [1, 99])
def test_passing_faults_are_mended_and_lasting_ones_reported(fault: Reply, words: str, times: int) -> None:
    """The fault strikes from the second request on, once or for ever."""

    def script(call: Call, number: int) -> Reply:
        return fault if 1 <= number < 1 + times else ids_reply(call, number)

    with serve(script) as at:
        engine = OpenAIEngine(POLICY, options(at, concurrency=1, retries=1, timeout=0.2), ("thinking",))
        arrived: list[str] = []

        def run() -> None:
            for group in engine.draw([requests(3)], SamplingOptions()):
                arrived.extend(request.key for request, outcome in group if isinstance(outcome, Draw))

        if times == 1:
            run()
            assert len(arrived) == 3
        else:
            with pytest.raises(UserError, match=words):
                run()
            assert arrived == ["q0/thinking/0"]  # what came before the fault is not lost


def test_a_trickle_of_bytes_runs_out_of_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                try:
                    for _ in range(100):
                        connection.sendall(b" ")
                        threading.Event().wait(0.05)
                except OSError:
                    pass

        threading.Thread(target=trickle, daemon=True).start()
        where = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = monotonic()
        with pytest.raises(UserError, match=r"did not answer within 0\.3 s"):
            Server(ServerOptions(where, timeout=0.3, retries=0)).get("/v1/models")
        assert monotonic() - started < 2


def test_a_server_that_is_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match="refuses the connection; is it running\\? \\(tried 3 times\\)"):
        Server(ServerOptions(f"http://127.0.0.1:{port}", retries=2)).get("/v1/models")


def test_redirects_are_not_followed() -> None:
    with serve(lambda call, number: Reply(307, b"", {"Location": "http://elsewhere/"})) as at:
        client = Server(options(at))
        with pytest.raises(UserError, match="redirects to http://elsewhere/"):
            client.post("/v1/completions", {})


def run_into(folder: Path, at: FakeServer, **changes: Any) -> None:
    prompts = [Prompt(f"q{number}", f"What is {number}+1?") for number in range(12)]
    sampling = SamplingOptions(samples=2)
    engine = OpenAIEngine(POLICY, options(at, retries=0, **changes), MODES)
    sample_into(folder, prompts, SamplingRun(engine, POLICY.template, sampling, engine.model, 4, MODES), n_prompts=12)


def test_a_run_goes_on_where_the_server_left_it(tmp_path: Path) -> None:
    odd = Reply(400, {"error": "no"})

    def dying(call: Call, number: int) -> Reply:
        return ids_reply(call, number) if number < 20 and number != 3 else odd if number == 3 else Reply(500, b"")

    with serve(dying) as at, pytest.raises(UserError, match="answers 500"):
        run_into(tmp_path, at)
    kept = (tmp_path / "samples.jsonl").read_bytes()
    before = {
        f"{row['prompt_id']}/{row['mode']}/{row['sample_index']}" for _, row in read_jsonl(tmp_path / "samples.jsonl")
    }
    assert len(before) == 19
    with serve(ids_reply) as at:
        run_into(tmp_path, at)
        assert len(at.calls) == 48 - 19 - 1  # neither what is on record nor what was set aside is asked for again
    data = (tmp_path / "samples.jsonl").read_bytes()
    assert data.startswith(kept)
    keys = [
        f"{row['prompt_id']}/{row['mode']}/{row['sample_index']}" for _, row in read_jsonl(tmp_path / "samples.jsonl")
    ]
    assert len(keys) == len(set(keys)) == 47
    ((_, aside),) = read_jsonl(tmp_path / "set_aside.jsonl")
    assert aside["reason"] == "refused"
    assert f"{aside['prompt_id']}/{aside['mode']}/{aside['sample_index']}" not in keys


def test_the_record_says_what_was_sent(tmp_path: Path) -> None:
    with serve(ids_reply) as at:
        run_into(tmp_path, at)
        sent = {tuple(call.body["prompt"]) for call in at.calls}
    rows = [row for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    assert {tuple(row["prompt_ids"]) for row in rows} == sent
    row = next(row for row in rows if row["mode"] == "thinking")
    assert (row["trace"], row["answer"], row["engine"], row["model"]) == (
        "First 1+2=3.",
        "It is 3.",
        "openai",
        "toy@server",
    )


# The key


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOY_KEY", "s3cret")

    def echo(call: Call, number: int) -> Reply:
        if number < 3:
            return ids_reply(call, number)
        return Reply(400 if number < 6 else 500, {"error": f"key {call.headers['Authorization']} is over its limit"})

    with serve(echo) as at:
        with pytest.raises(UserError, match="is over its limit") as caught:
            run_into(tmp_path, at, api_key_env="TOY_KEY", concurrency=1)
        assert at.calls[0].headers["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"over its limit" in written
    assert b"s3cret" not in written


def test_no_key_is_sent_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    with serve(ids_reply) as at:
        draw_all(at, requests(1))
        assert "Authorization" not in at.calls[0].headers


def test_a_key_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOY_KEY", raising=False)
    with pytest.raises(UserError, match=r"TOY_KEY.*: this environment variable is not set"):
        Server(ServerOptions("http://localhost:1", api_key_env="TOY_KEY"))


@pytest.mark.parametrize(("key", "hint"), [(None, "`api_key_env`"), ("TOY_KEY", "Check the key")])
def test_a_refused_key_says_what_to_do(monkeypatch: pytest.MonkeyPatch, key: str | None, hint: str) -> None:
    monkeypatch.setenv("TOY_KEY", "s3cret")
    with pytest.raises(UserError, match=f"answers 401 .*{hint}"):
        ask_one(lambda call, number: Reply(401, {"error": "who are you?"}), api_key_env=key)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://x/v1"},
        {"base_url": "http://me:pw@x/v1"},
        {"endpoint": "responses"},
        {"concurrency": 0},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"retries": -1},
    ],
)
def test_wrong_server_options_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        ServerOptions(**{"base_url": "http://localhost:8000/v1", **changes})
    assert "pw" not in str(caught.value)


def test_the_base_url_may_end_in_v1_or_not() -> None:
    assert {server_root(f"http://x:1{end}") for end in ("", "/", "/v1", "/v1/")} == {"http://x:1"}


# Several servers


def both(*servers: FakeServer, **changes: Any) -> ServerOptions:
    return options(servers[0], base_url=tuple(server.url for server in servers), **changes)


def draw_from(where: ServerOptions, asked: list[Request], **sampling: Any) -> dict[str, Outcome]:
    engine = OpenAIEngine(POLICY, where, ("thinking",))
    groups = engine.draw([asked], SamplingOptions(**{"max_new_tokens": 50, **sampling}))
    return {request.key: outcome for group in groups for request, outcome in group}


def test_a_request_goes_to_the_server_with_the_fewest_in_flight() -> None:
    """One server answers at once, the other not before the quick one has had nearly everything."""
    nearly_all = threading.Event()

    def quick(call: Call, number: int) -> Reply:
        if number == 20:
            nearly_all.set()
        return ids_reply(call, number)

    def slow(call: Call, number: int) -> Reply:
        if number:  # the first finds out how it likes to be asked
            assert nearly_all.wait(60)
        return ids_reply(call, number)

    with serve(slow) as first, serve(quick) as second:
        outcomes = draw_from(both(first, second, concurrency=1, timeout=60.0), requests(25))
    assert len(outcomes) == 25
    assert all(outcome == Draw((*IDS, EOS), "stop") for outcome in outcomes.values())
    assert len(second.calls) >= 20
    assert first.most_at_once == second.most_at_once == 1  # so many at each
    assert {call.body["max_tokens"] for call in second.calls[:1]} == {1}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Reply(500, {"error": "CUDA error"}), "answers 500 (CUDA error): left out; 1 of 2 servers go on."),
        (Reply(404, {"error": "no model toy"}), "answers 404 no model toy: left out; 1 of 2"),
        (Reply(401, {"error": "who?"}), "left out; 1 of 2 servers go on."),
    ],
)
def test_a_server_that_fails_for_good_is_left_out(fault: Reply, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(ids_reply) as good, serve(lambda c, n: fault if n > 3 else ids_reply(c, n)) as bad:
        outcomes = draw_from(both(good, bad, retries=1), requests(40))
    assert len(outcomes) == 40
    assert all(isinstance(outcome, Draw) for outcome in outcomes.values())
    said = capsys.readouterr().err
    assert f"The server at {bad.url} " in said
    assert words in said
    assert said.count("left out") == 1
    with serve(lambda c, n: fault if n > 3 else ids_reply(c, n)) as bad, pytest.raises(UserError, match=bad.url):
        draw_from(both(bad, retries=1), requests(40))


def test_a_server_that_is_not_there_is_left_out_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = FakeServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
    for served in (None, "toy"):
        with serve(ids_reply) as good:
            assert len(draw_from(both(gone, good, retries=0, served_model=served), requests(3))) == 3
        assert f"The server at {gone.url} refuses the connection" in capsys.readouterr().err
    with pytest.raises(UserError, match="refuses the connection"):
        draw_from(both(gone, FakeServer(gone.url.replace("127.0.0.1", "localhost")), retries=0), requests(1))


def test_servers_of_different_models_are_refused() -> None:
    other = Reply(body={"data": [{"id": "other"}]})
    with serve(ids_reply) as first, serve(ids_reply, other) as second:
        with pytest.raises(UserError, match=rf"different models: toy at {first.url}, other at {second.url}"):
            draw_from(both(first, second), requests(1))
        with pytest.raises(UserError, match=rf"{second.url} does not serve toy; it offers other"):
            draw_from(both(first, second, served_model="toy"), requests(1))
    ways = r"asked in different ways \(/v1/completions ids vllm at"
    with serve(ids_reply) as first, serve(text_only) as second, pytest.raises(UserError, match=ways):
        draw_from(both(first, second), requests(1))
    with pytest.raises(UserError, match="is there twice"):
        ServerOptions(("http://a:1", "http://a:1/v1"))


def test_a_restart_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The model server goes away in the middle, comes back on its port after some tries, and the run goes on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    back = threading.Event()

    def restart() -> None:
        with serve(lambda c, n: ids_reply(c, n), port=port):
            back.wait(60)

    with serve(ids_reply, port=port) as at:
        engine = OpenAIEngine(POLICY, options(at, retries=9, concurrency=2), ("thinking",))
        groups = engine.draw([requests(12)], SamplingOptions(max_new_tokens=50))
        found = [next(groups), next(groups)]
    again = threading.Timer(0.3, restart)
    again.start()
    try:
        found += list(groups)
    finally:
        back.set()
        again.join()
    keys = [request.key for group in found for request, outcome in group if isinstance(outcome, Draw)]
    assert sorted(keys) == sorted(request.key for request in requests(12))
    assert capsys.readouterr().err.count("trying again, 10 times in all") <= 1


# What the sampler says of its own draws


def with_logps(call: Call, values: object) -> Reply:
    reply = ids_reply(call, 0)
    reply.body["choices"][0]["logprobs"] = values
    return reply


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ({"token_logprobs": [-0.5] * (len(IDS) + 1), "tokens": ["?"] * (len(IDS) + 1)}, -0.5 * (len(IDS) + 1)),
        ({"content": [{"logprob": -0.25}] * (len(IDS) + 1)}, -0.25 * (len(IDS) + 1)),
        ({"token_logprobs": [None, *[-0.5] * len(IDS)]}, None),
        ({"token_logprobs": [-9999.0, *[-0.5] * len(IDS)]}, None),
        ({"token_logprobs": [0.5, *[-0.5] * len(IDS)]}, None),
        ({"token_logprobs": ["-1", *[-0.5] * len(IDS)]}, None),
        ({"token_logprobs": [-0.5] * len(IDS)}, None),  # one token less than the ids
        ({"content": None}, None),
        (None, None),
    ],
)
def test_log_probabilities_are_recorded_where_they_are_whole(values: object, total: float | None) -> None:
    with serve(lambda call, number: with_logps(call, values)) as at:
        (outcome,) = draw_from(options(at), requests(1), temperature=1.0).values()
        assert at.calls[0].body["logprobs"] == 1
    assert outcome == Draw((*IDS, EOS), "stop", total)


@pytest.mark.parametrize("sampling", [{"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}])
def test_log_probabilities_whose_meaning_differs_between_servers_are_not_asked_for(sampling: dict[str, float]) -> None:
    values = {"token_logprobs": [-0.5] * (len(IDS) + 1)}
    with serve(lambda call, number: with_logps(call, values)) as at:
        assert draw_from(options(at), requests(1), **sampling).popitem()[1] == Draw((*IDS, EOS), "stop")
        assert "logprobs" not in at.calls[0].body


def test_a_server_that_gives_no_log_probabilities_is_asked_without() -> None:
    def script(call: Call, number: int) -> Reply:
        return Reply(400, {"error": "logprobs: no"}) if "logprobs" in call.body else ids_reply(call, number)

    with serve(script) as at:
        outcomes = draw_from(options(at), requests(3), temperature=1.0)
        assert len(at.calls) == 4
    assert all(outcome == Draw((*IDS, EOS), "stop") for outcome in outcomes.values())
